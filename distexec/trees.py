"""Trees of files: what a directory holds, put into messages; and messages put into a directory, never outside it.

    pack(root, names) ─► Tree, sources      small files inline, the bytes of large ones stay where they are
    place(tree, directory, locate)          each file under a temporary name, or none, until it is whole

The rule: a path that comes from elsewhere is checked, and then opened component by component without following links, so
nothing is read or written outside the directory that was meant. Nobody finds a file that is only partly there.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, cast

from distexec.messages import BlobRef, File, Tree

__all__ = ["INLINE_BYTES", "MESSAGE_BYTES", "STORED_NS", "FileWriter", "Folder", "Placing", "Signature", "Source",
           "check_path", "copy_file", "digest_file", "open_regular", "pack", "place", "split"]

INLINE_BYTES = 64 << 10
"""Files up to this are in the message that names them. Smaller: a round trip for each. Larger: the same bytes more often."""

MESSAGE_BYTES = 4 << 20
"""Of file contents and names in one message; a frame has twice that. What is more becomes references."""

PATH_BYTES = 4 << 10

PIECE_BYTES = 1 << 20
"""Read and hashed at once."""

ATTEMPTS = 2
"""How often a file that changes while it is read is read."""

STORED_NS = 946_684_800 * 10**9
"""The time stamp of files that may be linked to: who writes to one changes it, and it is not believed any more."""

RACY_NS = 100_000_000
"""A file changed less than this before it was read may change again and look the same. Larger: read again for longer."""

Skip = Callable[[str, bool], bool]
"""Says of a path below the root, and whether it is a directory, if it is to be left out."""

_DRIVE = re.compile(r"[A-Za-z]:")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_TMPFILE = getattr(os, "O_TMPFILE", 0)
_OPEN_FILES = "/proc/self/fd"
_TEMPORARY = ".distexec-"


def check_path(path: str) -> list[str]:
    """Return the components of a path as it travels: relative, separated by "/". ValueError, with the reason, for others.

    One that ends in "/" is a directory's.
    """
    def refuse(why: str) -> ValueError:
        return ValueError(f"{path[:200]!r} cannot be a file's name here: {why}; give a relative path below the directory")

    if not path.rstrip("/"):
        raise refuse("it is empty" if not path else "it is absolute")
    if "\0" in path:
        raise refuse("it has a NUL byte in it")
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise refuse("it is not UTF-8") from None
    if size > PATH_BYTES:
        raise refuse(f"it is longer than {PATH_BYTES} bytes")
    if path.startswith("/"):
        raise refuse("it is absolute")
    if _DRIVE.match(path) or (os.sep != "/" and ("\\" in path or ":" in path)):
        raise refuse("it names a drive, or is written in another system's way")
    parts = path.removesuffix("/").split("/")
    if ".." in parts:
        raise refuse("it leads upwards")
    if "." in parts or "" in parts:
        raise refuse('it has an empty component or "." in it')
    return parts


# ---- reading


class Signature(NamedTuple):
    """By what a file is known to be unchanged without reading it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """Take it from what stat says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Source(NamedTuple):
    """A file on disk that is a blob, as long as it does not change."""

    ref: BlobRef
    path: str
    signature: Signature

    def open(self) -> int:
        """Open it for reading. Raises OSError if it is gone or has changed since it was packed."""
        fd, status = open_regular(self.path)
        if Signature.of(status)[:4] != self.signature[:4]:  # the number of links, and so ctime, may change
            os.close(fd)
            raise OSError(f"{self.path!r} was changed after it had been taken in; submit, or start the session, anew")
        return fd


Known = dict[str, tuple["Signature", "bytes | BlobRef"]]
"""What is in files, by path, as long as they do not change."""


def digest_file(fd: int) -> BlobRef:
    """Name the content of an open file. Raises OSError if it changes meanwhile."""
    import xxhash

    before = Signature.of(os.fstat(fd))
    hasher = xxhash.xxh3_128()
    at = 0
    while piece := os.pread(fd, PIECE_BYTES, at):
        hasher.update(piece)
        at += len(piece)
    if at != before.size_bytes or Signature.of(os.fstat(fd))[:4] != before[:4]:
        raise OSError("the file changed while it was read")
    return BlobRef(hasher.digest(), at)


def pack(root: str, names: Iterable[str] = ("",), *, skip: Skip | None = None, inline_bytes: int = INLINE_BYTES,
         total_bytes: int | None = MESSAGE_BYTES, known: Known | None = None) -> tuple[Tree, list[Source]]:
    """Describe files and directories below `root`, for a message; and where the bytes that do not go with it are.

    Args:
        names: relative to `root`, "/"-separated; "" is all that `root` holds. Directories are taken with all in them.
        skip: called with each path below `root`, and whether it is a directory.
        inline_bytes: larger files become references.
        total_bytes: so do others once the contents and names before them come to this; None: they do not, see `split`.
        known: saves reading what has not changed since it was added to this.

    Links are followed if they lead to something inside the directory named. Raises OSError for what cannot be read, is
    no file, or keeps changing; ValueError for names that cannot travel.
    """
    packer = _Packer(root, skip, inline_bytes, total_bytes, known if known is not None else {})
    for name in names:
        packer.add(name)
    return tuple(packer.files[path] for path in sorted(packer.files)), packer.sources


class _Packer:
    def __init__(self, root: str, skip: Skip | None, inline_bytes: int, total_bytes: int | None, known: Known) -> None:
        self.files: dict[str, File] = {}
        self.sources: list[Source] = []
        self._root, self._skip = root, skip
        self._inline_bytes, self._left, self._known = inline_bytes, total_bytes, known

    def add(self, name: str) -> None:
        if name:
            check_path(name)
        path = os.path.join(self._root, name) if name else self._root
        if os.path.isdir(path):
            real = os.path.realpath(path)
            self._add_directory(name.removesuffix("/"), path, real, (real,))
        else:
            self._add_file(name, path)

    def _add_directory(self, name: str, path: str, top: str, within: tuple[str, ...]) -> None:
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        count = len(self.files)
        for entry in entries:
            inner = f"{name}/{entry.name}" if name else entry.name
            real = ""
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if not os.path.exists(real) or os.path.commonpath([real, top]) != top:
                    if self._skip is not None and self._skip(inner, os.path.isdir(real)):
                        continue
                    raise OSError(f"{entry.path!r} is a link that leads out of {top!r}, or nowhere, and so cannot be sent "
                                  "with it; put what it leads to there, or leave it out")
            is_directory = entry.is_dir()
            if self._skip is not None and self._skip(inner, is_directory):
                continue
            if not is_directory:
                self._add_file(inner, entry.path)
                continue
            real = real or os.path.join(within[-1], entry.name)
            if real in within:
                raise OSError(f"{entry.path!r} is a link to a directory that it is in; leave it out")
            self._add_directory(inner, entry.path, top, (*within, real))
        if len(self.files) == count and name:
            check_path(name)
            self.files[name + "/"] = File(name + "/", _mode_of(os.stat(path)), b"")

    def _add_file(self, name: str, path: str) -> None:
        check_path(name)
        for attempt in range(ATTEMPTS):
            try:
                self._read_file(name, path)
                return
            except _Changing as error:
                if attempt + 1 == ATTEMPTS:
                    raise OSError(f"{path!r} changes while it is read; wait until it is written") from error

    def _read_file(self, name: str, path: str) -> None:
        fd, status = open_regular(path)
        try:
            size = len(name) + 32
            is_inline = status.st_size <= self._inline_bytes and (self._left is None or status.st_size + size <= self._left)
            content = self._content(fd, os.path.abspath(path), status, is_inline=is_inline)
        finally:
            os.close(fd)
        if isinstance(content, BlobRef):
            self.sources.append(Source(content, os.path.abspath(path), Signature.of(status)))
        else:
            size += len(content)
        if self._left is not None:
            self._left = max(0, self._left - size)
        self.files[name] = File(name, _mode_of(status), content)

    def _content(self, fd: int, path: str, status: os.stat_result, *, is_inline: bool) -> bytes | BlobRef:
        signature, content = self._known.get(path, (None, b""))
        if signature == Signature.of(status) and isinstance(content, bytes) is is_inline:
            return content
        content = _read_whole(fd, status) if is_inline else _digest(fd)
        if time.time_ns() - status.st_mtime_ns > RACY_NS:
            self._known[path] = (Signature.of(status), content)
        return content


class _Changing(Exception):
    """A file changed while it was read."""


def _digest(fd: int) -> BlobRef:
    try:
        return digest_file(fd)
    except OSError as error:
        raise _Changing if error.errno is None else error from error


def _read_whole(fd: int, status: os.stat_result) -> bytes:
    content = b""
    while piece := os.read(fd, INLINE_BYTES):
        content += piece
        if len(content) > status.st_size:
            break
    if len(content) != status.st_size or Signature.of(os.fstat(fd))[:4] != Signature.of(status)[:4]:
        raise _Changing
    return content


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a file that is a file: reading anything else might never end, or do something. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | _CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise OSError(f"{path!r} is {kind}, not a file")
    return fd, status


def _mode_of(status: os.stat_result) -> int:
    return status.st_mode & 0o777


def split(tree: Tree) -> Iterator[Tree]:
    """Divide a tree into such as fit into a message each."""
    part: list[File] = []
    size = 0
    for file in tree:
        grows = 2 * len(file.path) + 64 + (len(file.content) if isinstance(file.content, bytes) else 0)
        if part and size + grows > MESSAGE_BYTES:
            yield tuple(part)
            part, size = [], 0
        part.append(file)
        size += grows
    if part:
        yield tuple(part)


# ---- writing


class Folder:
    """A directory that is open, below which files are made without ever leaving it. Raises OSError if that cannot be done.

    Args:
        make: it is made if it does not exist.
        may_be_link: whether what the path names may be a link to a directory.
        owner: the user and group that all that is made belongs to; None: ours.
    """

    def __init__(self, path: str, *, make: bool = False, may_be_link: bool = True,
                 owner: tuple[int, int] | None = None) -> None:
        self.path, self.owner = path, owner
        if make:
            os.makedirs(path, exist_ok=True)
        self.fd = os.open(path, os.O_RDONLY | _DIRECTORY | _CLOEXEC | (0 if may_be_link else _NOFOLLOW))

    def __repr__(self) -> str:
        return f"<Folder {self.path!r}>"

    def close(self) -> None:
        """Close it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def parent_of(self, path: str) -> Iterator[tuple[int, str]]:
        """Give the open directory that a path's last component belongs into, made if need be, and that component.

        Raises ValueError for a path that cannot be meant; OSError if a component is a link, or not a directory.
        """
        *above, name = check_path(path)
        fd = os.dup(self.fd)
        try:
            for part in above:
                fd = self._descend(fd, part)
            yield fd, name
        finally:
            os.close(fd)

    def make_directory(self, path: str, mode: int) -> None:
        """Make a directory, and those it is in."""
        with self.parent_of(path) as (fd, name):
            inner = self._descend(os.dup(fd), name)
            try:
                os.fchmod(inner, mode | 0o700)
            finally:
                os.close(inner)

    def _descend(self, fd: int, part: str) -> int:
        """Open a directory in an open one, made if need be; the outer one is closed, unless OSError is raised."""
        is_new = False
        with suppress(FileExistsError):
            os.mkdir(part, dir_fd=fd)
            is_new = True
        try:
            inner = os.open(part, os.O_RDONLY | _DIRECTORY | _NOFOLLOW | _CLOEXEC, dir_fd=fd)
        except OSError as error:
            raise OSError(error.errno, f"{part!r} in {self.path!r} is a link or no directory, and cannot be written into") \
                from error
        os.close(fd)
        if is_new and self.owner is not None:
            os.fchown(inner, *self.owner)
        return inner


class FileWriter:
    """Receives a file piece by piece, in order; it takes its place, instead of one that was there, once it is whole.

    Until then it has no name where the system can do that, so nothing of it is left by a process that is killed.

    Args:
        folder: stays the caller's, and open while this is in use.
        path: below the folder.
        mode: permission bits.
        mtime_ns: its time stamp; None: that of its writing.
    """

    def __init__(self, folder: Folder, path: str, mode: int, ref: BlobRef, *, mtime_ns: int | None = None) -> None:
        import xxhash

        self.ref, self.written_bytes = ref, 0
        self._path, self._mode, self._mtime_ns, self._owner = path, mode & 0o777, mtime_ns, folder.owner
        self._hash = xxhash.xxh3_128()
        with folder.parent_of(path) as (parent, name):
            _check_target(parent, name, path)
            self._parent, self._name = os.dup(parent), name
        try:
            self._fd, self._temporary = _new_file(self._parent)
        except BaseException:
            os.close(self._parent)
            raise

    def __repr__(self) -> str:
        return f"<FileWriter {self._path!r}: {self.written_bytes:,} of {self.ref.size_bytes:,} bytes>"

    @property
    def is_complete(self) -> bool:
        """Is every byte here?"""
        return self.written_bytes == self.ref.size_bytes

    def write(self, offset: int, piece: bytes | memoryview) -> None:
        """Add the next piece. Raises ValueError if it is not the next or too long, OSError if it cannot be written."""
        if offset != self.written_bytes or offset + len(piece) > self.ref.size_bytes:
            raise ValueError(f"a piece of {len(piece):,} bytes at {offset:,} does not follow {self!r}")
        rest = memoryview(piece)
        while len(rest):
            rest = rest[os.write(self._fd, rest):]
        self._hash.update(cast("bytes", piece))
        self.written_bytes += len(piece)

    def finish(self) -> None:
        """Put the file into its place. Raises ValueError if its digest is wrong, OSError if it cannot be put there."""
        try:
            if not self.is_complete or self._hash.digest() != self.ref.digest:
                raise ValueError(f"the bytes of {self._path!r} are not those that its digest names: the file was changed "
                                 "while it was sent")
            if self._owner is not None:
                os.fchown(self._fd, *self._owner)
            os.fchmod(self._fd, self._mode)
            if self._mtime_ns is not None:
                os.utime(self._fd, ns=(self._mtime_ns, self._mtime_ns))
            _check_target(self._parent, self._name, self._path)
            if not self._temporary:
                self._temporary = _name_file(self._fd, self._parent)
            os.replace(self._temporary, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
            self._temporary = ""
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop what was received, if it was not finished."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self._temporary:
            with suppress(OSError):  # whoever removed it did what we wanted
                os.unlink(self._temporary, dir_fd=self._parent)
        os.close(self._parent)


def _check_target(parent: int, name: str, path: str) -> None:
    """Refuse to take the place of anything but a file. Raises OSError."""
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise FileExistsError(f"{path!r} is {kind} there already, and is not replaced by a file; remove it, or give another "
                              "name")


def _new_file(parent: int) -> tuple[int, str]:
    """Make a file in an open directory: without a name, if that can be, else with a temporary one."""
    if _TMPFILE and os.path.isdir(_OPEN_FILES):
        with suppress(OSError):  # a file system that cannot, or no room: then the other way says so
            return os.open(".", os.O_RDWR | _TMPFILE | _CLOEXEC, 0o600, dir_fd=parent), ""
    name = _TEMPORARY + secrets.token_hex(8)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=parent), name


def _name_file(fd: int, parent: int) -> str:
    name = _TEMPORARY + secrets.token_hex(8)
    os.link(f"{_OPEN_FILES}/{fd}", name, dst_dir_fd=parent)
    return name


class Placing(NamedTuple):
    """Where the files are that a tree refers to, and from which size on they may be linked to, and so shared."""

    locate: Callable[[BlobRef], str]
    link_bytes: int | None = None  # None: all are copied


def place(tree: Tree, folder: Folder, files: Placing | None = None) -> None:
    """Put files into a folder, each at once, instead of those that were there.

    Raises ValueError for paths that cannot be meant, OSError for what cannot be written; some are placed by then.
    """
    for file in tree:
        if file.path.endswith("/"):
            folder.make_directory(file.path, file.mode)
        elif isinstance(file.content, bytes):
            _place_bytes(folder, file, file.content)
        else:
            assert files is not None, "a tree with references needs their files"
            _place_file(folder, file, file.content, files)


def _place_bytes(folder: Folder, file: File, content: bytes) -> None:
    import xxhash

    writer = FileWriter(folder, file.path, file.mode, BlobRef(xxhash.xxh3_128_digest(content), len(content)))
    try:
        writer.write(0, content)
        writer.finish()
    finally:
        writer.abandon()


def _place_file(folder: Folder, file: File, ref: BlobRef, files: Placing) -> None:
    path = files.locate(ref)
    is_large = files.link_bytes is not None and ref.size_bytes >= files.link_bytes
    if is_large and not file.mode & 0o111 and _link(folder, file.path, path, ref):
        return
    fd, _ = open_regular(path)
    try:
        copy_file(fd, FileWriter(folder, file.path, file.mode, ref))
    finally:
        os.close(fd)


def copy_file(fd: int, writer: FileWriter) -> None:
    """Write what an open file holds. Raises OSError or ValueError; then nothing is left of it."""
    try:
        while piece := os.pread(fd, PIECE_BYTES, writer.written_bytes):
            writer.write(writer.written_bytes, piece)
        writer.finish()
    finally:
        writer.abandon()


def _link(folder: Folder, path: str, target: str, ref: BlobRef) -> bool:
    """Link to a file; False if that cannot be done. Raises OSError if the file was written to since it was stored."""
    status = os.stat(target, follow_symlinks=False)
    if status.st_mtime_ns != STORED_NS or status.st_size != ref.size_bytes:
        raise OSError(f"the file for {path!r} was changed on this machine: a task wrote to what it was given to read")
    with folder.parent_of(path) as (parent, name):
        _check_target(parent, name, path)
        temporary = _TEMPORARY + secrets.token_hex(8)
        try:
            os.link(target, temporary, dst_dir_fd=parent, follow_symlinks=False)
        except OSError:  # another file system, too many links, another user's: then it is copied
            return False
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    return True
