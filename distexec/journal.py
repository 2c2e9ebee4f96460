"""The journal of a durable session: a SQLite file of what was submitted and what came of it.

    meta       whose session it is: id, token, format, how its workers are prepared
    nodes      where it works, and whether something of it may still be there
    functions  code, by number
    tasks      calls: function, arguments, options, key
    outcomes   how they ended
    blobs      large buffers, in pieces, by digest

Rule: what `write` has returned for survives the death of this process at any moment. After a power failure the file is
consistent, though what was written last may be missing (synchronous=NORMAL). Rows go in many to a statement: each statement
gives the interpreter away and has to get it back.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from .errors import JournalError
from .messages import BlobRef, Buffers, Options

__all__ = ["CANCELLED", "LOST", "Function", "Journal", "NodeRow", "Result", "Submission"]

T = TypeVar("T")

FORMAT = 1
"""Of the tables below. Another one is refused, not guessed at."""

APPLICATION_ID = 0x64786A6C  # "dxjl"; what SQLite keeps in a file's header to tell whose it is

LOST, CANCELLED = 100, 101
"""Kinds of outcomes beside `OutcomeKind`: WorkerLost, its `data` an `Evidence`; and withdrawn before it was handed out."""

PIECE_BYTES = 64 << 20
"""Large buffers are stored in pieces. Larger: SQLite refuses a gigabyte. Smaller: more rows."""

ROWS = 1024
"""Most rows in one statement: eight columns of so many stay below SQLite's 32,766 variables."""

_SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value BLOB);
CREATE TABLE nodes(address TEXT PRIMARY KEY, slots INTEGER, may_hold INTEGER);
CREATE TABLE functions(fn INTEGER PRIMARY KEY, data BLOB, buffers BLOB);
CREATE TABLE tasks(seq INTEGER PRIMARY KEY, fn INTEGER, data BLOB, buffers BLOB, options BLOB, retries INTEGER, key BLOB);
CREATE TABLE outcomes(seq INTEGER PRIMARY KEY, kind INTEGER, data BLOB, buffers BLOB, run_ns INTEGER, node TEXT,
                      attempts INTEGER);
CREATE TABLE blobs(digest BLOB, position INTEGER, data BLOB, PRIMARY KEY(digest, position));
"""

_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""How files are opened: never by a link, and without waiting for a pipe's other end."""

_encode = msgspec.msgpack.Encoder().encode
_decode_buffers = msgspec.msgpack.Decoder(Buffers).decode
_decode_options = msgspec.msgpack.Decoder(Options).decode


class Function(NamedTuple):
    """A function by its number, pickled."""

    fn: int
    data: bytes
    buffers: Buffers


class Submission(NamedTuple):
    """A call: `data` is the pickled (args, kwargs), `key` what it is found by, empty if nothing."""

    seq: int
    fn: int
    data: bytes
    buffers: Buffers
    options: Options | None
    retries: int
    key: bytes


class Result(NamedTuple):
    """How a call ended: `kind` is an `OutcomeKind`, LOST or CANCELLED."""

    seq: int
    kind: int
    data: bytes
    buffers: Buffers
    run_ns: int
    node: str
    attempts: int


class NodeRow(NamedTuple):
    """A node that the session uses; `may_hold`: something of it may be there."""

    address: str
    slots: int | None
    may_hold: bool


class Journal:
    """An open journal; one thread at a time may use it. `path` is absolute.

    `created` says that there was none before. Raises JournalError, from every method, with the path and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], *, must_exist: bool = False) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.created = False
        self._rows = ROWS
        self._made: list[str] = []  # files of SQLite's beside it that we made, empty
        self._fd = self._open(must_exist)
        self._unlock = weakref.finalize(self, os.close, self._fd)
        try:
            _check_owner(os.fstat(self._fd), self.path)
            self._lock()
            self._claim()
            self._db = self._connect()
        except BaseException:
            self._remove_made()
            self._unlock()
            raise
        try:
            with self._explained("open"):
                self._begin()
            self._remove_made("-journal")
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Journal {self.path!r}>"

    def close(self) -> None:
        """Let go of the file; what was written stays."""
        if not self._unlock.alive:
            return
        try:
            self._db.close()
        except sqlite3.Error:
            pass  # a full disk keeps it from being tidied up: all is in the -wal file, for the next to open it
        self._remove_made()
        self._unlock()

    def abandon(self) -> None:
        """Be closed in a forked child, without tidying up: the file is the parent's."""
        import ctypes
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._db))  # so that no finalizer closes it
        self._unlock()

    # ---- opening

    def _open(self, must_exist: bool) -> int:
        """Open the file, or make it; never by a link."""
        try:
            return os.open(self.path, _FLAGS) if must_exist else self._create_or_open(_FLAGS)
        except OSError as error:
            raise JournalError(f"journal {self.path} cannot be opened: {self._why(error)}") from error

    def _claim(self) -> None:
        """Own the files that SQLite keeps beside the journal: it believes what it finds there, whoever wrote it.

        In a directory like /tmp others could make them, but not replace ours. Empty ones mean nothing to SQLite.
        """
        for path in (self.path + "-journal", self.path + "-wal"):
            try:
                try:
                    fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
                    self._made.append(path)
                except FileExistsError:
                    fd = os.open(path, _FLAGS)
            except OSError as error:
                raise JournalError(f"file {path} beside the journal cannot be opened: {error.strerror}; remove it if it is "
                                   "not yours, or name another journal") from error
            try:
                _check_owner(os.fstat(fd), path)
            finally:
                os.close(fd)

    def _remove_made(self, suffix: str = "") -> None:
        """Remove what `_claim` made and SQLite does not use; the -wal file only while it is closed."""
        for path in [path for path in self._made if path.endswith(suffix)]:
            self._made.remove(path)
            try:
                if not os.path.getsize(path):
                    os.unlink(path)
            except OSError:
                pass  # SQLite has removed it; or it stays, empty

    def _lock(self) -> None:
        """Lock the file. SQLite's own lock would go as soon as anything in this process opened and closed the file."""
        try:
            import fcntl
        except ImportError:
            return  # Windows: SQLite's lock holds there
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(self._in_use()) from None
        except OSError:
            pass  # a file system without such locks: SQLite's must do

    def _in_use(self) -> str:
        holder = _lock_holder(os.fstat(self._fd))
        by = ("another executor of this process" if holder == os.getpid() else f"process {holder}" if holder
              else "another process")
        return f"journal {self.path} is in use by {by}; wait until it ends, or name another file"

    def _create_or_open(self, flags: int) -> int:
        try:
            fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            self.created = True
            return fd
        except FileExistsError:
            return os.open(self.path, flags)

    def _why(self, error: OSError) -> str:
        if Path(self.path).is_symlink():
            return "it is a symbolic link; name the file itself"
        if isinstance(error, FileNotFoundError):
            parent = os.path.dirname(self.path)
            return "there is no such file" if os.path.isdir(parent) else f"there is no directory {parent}; make it first"
        return f"{error.strerror}"

    def _connect(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self.path, timeout=0.0, isolation_level=None, check_same_thread=False)
            status = os.stat(self.path, follow_symlinks=False)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"journal {self.path} cannot be opened: {error}") from error
        if not os.path.samestat(status, os.fstat(self._fd)):
            db.close()
            raise JournalError(f"journal {self.path} was exchanged for another file while it was being opened")
        return db

    def _begin(self) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not application:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._set("format", FORMAT)
            self._set("python", _python())
            db.execute("COMMIT")
            self.created = True
        elif application != APPLICATION_ID:
            db.execute("ROLLBACK")
            raise JournalError(f"{self.path} is a SQLite file, but no journal of distexec; name another file")
        else:
            db.execute("COMMIT")
        db.execute("PRAGMA journal_mode=WAL")
        if os.path.lexists(self.path + "-wal"):  # SQLite made it anew for a new journal
            _check_owner(os.stat(self.path + "-wal", follow_symlinks=False), self.path + "-wal")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA wal_autocheckpoint=8192")  # 32 MiB: a checkpoint waits for the disk
        while 8 * self._rows > db.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER):  # before SQLite 3.32
            self._rows //= 2
        self._check_versions()

    def _check_versions(self) -> None:
        found = self.get("format")
        if found != FORMAT:
            raise JournalError(f"journal {self.path} has format {found}, this distexec writes format {FORMAT}; finish it "
                               "with the version that began it, or name another file")
        python = self.get("python")
        if python != _python():
            raise JournalError(f"journal {self.path} was begun by Python {python}, and this is Python {_python()}, which "
                               f"may not understand its pickles; run it with Python {python}, or name another file")

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Turn SQLite's errors into one that names the file and the remedy."""
        try:
            yield
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise JournalError(self._explain(error, verb)) from error

    def _explain(self, error: Exception, verb: str) -> str:
        code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
        where = f"journal {self.path}"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return self._in_use()
        if code == sqlite3.SQLITE_FULL:
            return (f"{where} cannot grow: the disk is full; what was recorded is safe: make room on the file system of "
                    f"{os.path.dirname(self.path)}, then run the program again or `distexec recover {self.path}`")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or isinstance(error, msgspec.MsgspecError):
            return (f"{where} is damaged or no journal ({error}); it was left as it is: name another file, or restore it "
                    "from a copy (sqlite3's .recover may save part of it)")
        return (f"cannot {verb} {where}: {error}; what was recorded before is safe: see to the file and its disk, then run "
                f"the program again or `distexec recover {self.path}`")

    # ---- meta

    def get(self, name: str, default: Any = None) -> Any:
        """Read a value kept by name."""
        with self._explained("read"):
            row = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
            return default if row is None else msgspec.msgpack.decode(row[0])

    def get_as(self, name: str, kind: type[T]) -> T | None:
        """Read a value of that type."""
        with self._explained("read"):
            row = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
            return None if row is None else msgspec.msgpack.decode(row[0], type=kind)

    def set(self, **values: Any) -> None:
        """Keep values by name."""
        with self._transaction():
            for name, value in values.items():
                self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (name, _encode(value)))

    # ---- writing

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained("write to"):
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def write(self, functions: Sequence[Function], tasks: Sequence[Submission], results: Sequence[Result],
              blob: Callable[[BlobRef], memoryview]) -> None:
        """Record all of this, or nothing; `blob` gives the bytes of a large buffer."""
        with self._transaction():
            for buffers in chain((each.buffers for each in functions), (each.buffers for each in tasks),
                                 (each.buffers for each in results)):
                if buffers:
                    self._write_blobs(buffers, blob)
            if functions:
                self._insert("functions", 3, [value for each in functions for value in (
                    each.fn, each.data, _pack_buffers(each.buffers))])
            if tasks:
                self._insert("tasks", 7, [value for seq, fn, data, buffers, options, retries, key in tasks for value in (
                    seq, fn, data, _encode(buffers) if buffers else None, None if options is None else _encode(options),
                    retries, key)])
            if results:
                self._insert("outcomes", 7, [value for seq, kind, data, buffers, run_ns, node, attempts in results
                                             for value in (seq, int(kind), data, _encode(buffers) if buffers else None,
                                                           run_ns, node, attempts)])

    def _insert(self, table: str, columns: int, values: list[Any]) -> None:
        """Insert rows, given one after the other, a power of two at a time, so that few statements are ever prepared."""
        row = f"({','.join('?' * columns)})"
        at, left, size = 0, len(values) // columns, self._rows
        while left:
            while size > left:
                size >>= 1
            self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES{','.join([row] * size)}",
                             values[at:at + size * columns])
            at += size * columns
            left -= size

    def _write_blobs(self, buffers: Buffers, blob: Callable[[BlobRef], memoryview]) -> None:
        for ref in buffers:
            if not isinstance(ref, BlobRef):
                continue
            if self._db.execute("SELECT 1 FROM blobs WHERE digest=?", (ref.digest,)).fetchone() is None:
                view = blob(ref)
                for position in range(0, ref.size_bytes, PIECE_BYTES):
                    self._db.execute("INSERT INTO blobs VALUES(?,?,?)",
                                     (ref.digest, position, view[position:position + PIECE_BYTES]))

    def set_nodes(self, nodes: Iterable[NodeRow]) -> None:
        """Record nodes before anything is given to them."""
        with self._transaction():
            self._db.executemany("INSERT INTO nodes VALUES(?,?,?) ON CONFLICT(address) DO UPDATE SET slots=excluded.slots, "
                                 "may_hold=excluded.may_hold", nodes)

    def free_nodes(self, away: Sequence[str] = ()) -> None:
        """Record that no node but those `away` holds anything of the session."""
        with self._transaction():
            self._db.executemany("UPDATE nodes SET may_hold=0 WHERE address=?",
                                 [(row.address,) for row in self.nodes() if row.address not in away])

    # ---- reading

    def nodes(self) -> list[NodeRow]:
        """Name the nodes in the order they were first used."""
        with self._explained("read"):
            return [NodeRow(address, slots, bool(may_hold)) for address, slots, may_hold
                    in self._db.execute("SELECT address, slots, may_hold FROM nodes ORDER BY rowid")]

    def index(self) -> list[tuple[int, bytes, int | None]]:
        """List every call: its number, key, and the kind of its outcome, None while it has none; as submitted."""
        with self._explained("read"):
            return self._db.execute("SELECT t.seq, t.key, o.kind FROM tasks t LEFT JOIN outcomes o USING(seq) "
                                    "ORDER BY t.seq").fetchall()

    def calls(self) -> list[tuple[int, bytes, int | None]]:
        """Do as `index`, without calls that were made anew: of those with one key, the last counts."""
        rows = self.index()
        last = {key: seq for seq, key, _ in rows if key}
        return [row for row in rows if not row[1] or last[row[1]] == row[0]]

    def last(self) -> tuple[int, int]:
        """Give the highest numbers of a call and of a function, 0 if there is none."""
        with self._explained("read"):
            (seq,) = self._db.execute("SELECT max(seq) FROM tasks").fetchone()
            (fn,) = self._db.execute("SELECT max(fn) FROM functions").fetchone()
            return seq or 0, fn or 0

    def unfinished(self) -> list[Submission]:
        """Give the calls that have no outcome, as submitted."""
        with self._explained("read"):
            return [Submission(seq, fn, data, _unpack_buffers(buffers), options and _decode_options(options), retries, key)
                    for seq, fn, data, buffers, options, retries, key in self._db.execute(
                        "SELECT * FROM tasks WHERE seq NOT IN (SELECT seq FROM outcomes) ORDER BY seq")]

    def function(self, fn: int) -> Function:
        """Give a function."""
        with self._explained("read"):
            row = self._db.execute("SELECT * FROM functions WHERE fn=?", (fn,)).fetchone()
            if row is None:
                raise JournalError(f"journal {self.path} is damaged: function {fn} is missing; restore it from a copy")
            return Function(row[0], row[1], _unpack_buffers(row[2]))

    def result(self, seq: int) -> Result | None:
        """Give the outcome of a call, None if there is none."""
        with self._explained("read"):
            row = self._db.execute("SELECT * FROM outcomes WHERE seq=?", (seq,)).fetchone()
            return None if row is None else Result(row[0], row[1], row[2], _unpack_buffers(row[3]), *row[4:])

    def results(self, seqs: Sequence[int]) -> dict[int, Result]:
        """Give the outcomes of these calls, as far as there are any, by number."""
        found = {}
        with self._explained("read"):
            for at in range(0, len(seqs), self._rows):
                some = seqs[at:at + self._rows]
                for row in self._db.execute(f"SELECT * FROM outcomes WHERE seq IN ({','.join('?' * len(some))})", some):
                    found[row[0]] = Result(row[0], row[1], row[2], _unpack_buffers(row[3]), *row[4:])
        return found

    def blob(self, ref: BlobRef) -> bytearray:
        """Give the bytes of a large buffer."""
        with self._explained("read"):
            whole = bytearray()
            for (piece,) in self._db.execute("SELECT data FROM blobs WHERE digest=? ORDER BY position", (ref.digest,)):
                whole += piece
        if len(whole) != ref.size_bytes:
            raise JournalError(f"journal {self.path} is damaged: a buffer of {ref.size_bytes} bytes is missing; restore it "
                               "from a copy")
        return whole


def _pack_buffers(buffers: Buffers) -> bytes | None:
    return _encode(buffers) if buffers else None


def _unpack_buffers(packed: bytes | None) -> Buffers:
    return _decode_buffers(packed) if packed else ()


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _check_owner(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise JournalError(f"journal {path} is not a regular file; name another")
    if not hasattr(os, "getuid"):
        return  # Windows: the rights of the directory say who may read it
    if status.st_uid != os.getuid():
        raise JournalError(f"journal {path} belongs to user {status.st_uid}, not to user {os.getuid()} that runs this "
                           "process: whoever writes it can have code run; name a file of your own")
    if status.st_mode & 0o077:
        raise JournalError(f"journal {path} is open to other users (mode {stat.S_IMODE(status.st_mode):03o}): "
                           f"chmod 600 {path}")


def _lock_holder(status: os.stat_result) -> int:
    """Ask the kernel which process has locked the file; 0: unknown."""
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if name in fields and "FLOCK" in fields:
                return int(fields[4])
    except (OSError, ValueError):
        pass  # not Linux, or a line of a kind we do not know: "another process" will do
    return 0
