"""The client's files: what its calls and nodes are given, and what comes back (`downloads`).

    options(files=) ─► read at each submit ─► Tree in the task's options, large files copied to the depot: each task's own
    depends=, send_file() ─► Place, to every node that is up or comes up ─► Placed

Rule: what a call was given is as it was at submit, whatever happens to the file afterwards; what nodes are given is sent
from where it lies, and must stay as it is while nodes may still come.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from msgspec import structs

from .depot import Depot, refs_of
from .dispatcher import Dispatcher
from .downloads import Downloads
from .filetransfers import FileTraffic
from .messages import BlobRef, Delivery, File, Message, Place, Placed, Tree
from .taskfiles import remove_left, tasks_directory
from .transfers import Transfers
from .trees import ATTEMPTS, Known, Source, check_path, copy_file, pack, split

if TYPE_CHECKING:
    from .ledger import Session
    from .transport import Link, Loop

__all__ = ["ClientFiles", "Depends", "split_path"]

Dependency = str | os.PathLike[str] | ModuleType
Depends = Dependency | Iterable[Dependency]

PREFIX = "distexec-client-"

TASK_INLINE_BYTES = 4 << 10
"""Files up to this go with every task that they are given to; larger ones once to each node."""

TASK_TOTAL_BYTES = 256 << 10
"""Of those with one task."""

KNOWN = 10_000
"""Files whose content is remembered until they change. Smaller: they are read again. Larger: memory."""


class Station(Protocol):
    """A node, as this sees it."""

    address: str
    link: Link | None

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def is_up(self) -> bool:
        """Whether it can be told something."""


class Stations(Protocol):
    """All nodes; `changed` is notified when one comes or goes."""

    nodes: list[Any]
    changed: threading.Condition
    has_pool: bool


class _Placing:
    """Files for one node, or for all, and what became of them on each."""

    def __init__(self, parts: Sequence[Tree], sources: Sequence[Source], node: str | None, *, is_vital: bool) -> None:
        self.parts, self.sources, self.node, self.is_vital = parts, sources, node, is_vital
        self.numbers: list[int] = []
        self.missing: dict[Any, set[int]] = {}  # by node that it was said to
        self.errors: dict[Any, str] = {}

    def is_for(self, station: Station) -> bool:
        return self.node is None or self.node in (station.name, station.address)


class _Packed(NamedTuple):
    tree: Tree
    sources: list[Source]


class ClientFiles:
    """All that is said above, for one root. Any thread may call what is not said to be for the I/O thread.

    Args:
        downloads: the directory for what tasks send; None: the working directory.
    """

    def __init__(self, loop: Loop, dispatcher: Dispatcher, downloads: str | None) -> None:
        self.traffic = FileTraffic(loop)
        self.home = ""
        self.downloads = Downloads(os.path.abspath(downloads or "."), self.traffic, self._is_wanted)
        self.modules: list[tuple[str, str | None]] = []  # that nodes, or one, shall have before the first task
        self._loop, self._dispatcher = loop, dispatcher
        self._lock = threading.Lock()  # guards all below
        self._home_fd = -1
        self._has_cleared = False  # what clients left that were killed
        self._depot: Depot | None = None
        self._known: Known = {}
        self._openers: dict[BlobRef, Callable[[], int]] = {}  # of the depot's files that calls were given
        self._uses: dict[BlobRef, int] = {}
        self._placings: list[_Placing] = []
        self._numbers = 0
        self._stations: Stations | None = None
        self._session = 0  # by which number nodes know it
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<ClientFiles {self.home!r}: {len(self._uses)} in use, {len(self._placings)} placed>"

    # ---- life

    def open(self) -> str:
        """Make this machine's directory for the session, and give its path; "" if none can be made."""
        with self._lock:
            if not self.home and not self._is_closed:
                with suppress(ImportError, OSError):  # who needs it hears of it
                    from .spool import make_directory
                    self.home, self._home_fd = make_directory(None, PREFIX)
                    self._depot = Depot(self.home)
            return self.home

    def close(self) -> None:
        """Remove what is here. Not on the I/O thread, nor before the pool is closed."""
        self.traffic.close()
        with self._lock:
            self._is_closed = True
            if self._home_fd >= 0:
                from .spool import remove_tree
                remove_tree(self.home)
                os.close(self._home_fd)
                self._home_fd = -1

    def abandon(self) -> None:
        """Be closed in a forked child: what is here is its parent's."""
        self._lock = threading.Lock()
        self._is_closed = True
        if self._home_fd >= 0:
            os.close(self._home_fd)
            self._home_fd = -1

    # ---- files of calls

    def tree(self, paths: Iterable[str]) -> Tree:
        """Read what a call is given, for its options. In use until `keep` lets go of it, or `let_go` is called.

        Raises OSError for what cannot be read, ValueError for names that cannot travel.
        """
        if not self.open():
            raise OSError("no directory for files could be made; see to the temporary directory of this machine ($TMPDIR)")
        if not self._has_cleared:
            self._has_cleared = True
            from .spool import clear
            self.traffic.disk.run(partial(clear, os.path.dirname(self.home), PREFIX))
        for attempt in range(ATTEMPTS):
            packed = self._pack(paths)
            try:
                self._store(packed)
                return packed.tree
            except ValueError:  # it changed between reading and copying
                if attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _pack(self, paths: Iterable[str]) -> _Packed:
        known = self._known = self._known if len(self._known) < KNOWN else {}
        files: list[File] = []
        sources: list[Source] = []
        left = TASK_TOTAL_BYTES
        for path in paths:
            root, name = split_path(path)
            tree, more = pack(root, [name], inline_bytes=TASK_INLINE_BYTES, total_bytes=left, known=known)
            left = max(0, left - sum(len(file.content) for file in tree if isinstance(file.content, bytes)))
            files += tree
            sources += more
        named = {file.path: file for file in files}
        return _Packed(tuple(named[path] for path in sorted(named)), sources)

    def _store(self, packed: _Packed) -> None:
        depot = self._depot
        assert depot is not None, "made by `open`"
        refs = refs_of(packed.tree)
        with self._lock:
            for ref in refs:
                self._uses[ref] = self._uses.get(ref, 0) + 1
                if self._uses[ref] == 1:
                    depot.pin(ref)
                    self._openers[ref] = partial(os.open, depot.path(ref), os.O_RDONLY | os.O_CLOEXEC)
                    self.traffic.register(ref, self._openers[ref])
        try:
            for source in packed.sources:
                if not depot.has(source.ref):
                    with self._lock:
                        depot.make_room_for(source.ref.size_bytes)
                    fd = source.open()
                    try:
                        copy_file(fd, depot.make_writer(source.ref))
                    finally:
                        os.close(fd)
        except BaseException:
            self.let_go(packed.tree)
            raise

    def keep(self, tree: Tree, future: Future[Any]) -> None:
        """Keep what a call was given until it has ended."""
        future.add_done_callback(lambda _: self.let_go(tree))

    def use_again(self, tree: Tree) -> None:
        """Have it in use once more."""
        with self._lock:
            for ref in refs_of(tree):
                self._uses[ref] += 1

    def let_go(self, tree: Tree) -> None:
        """Let go of what a call was given."""
        with self._lock:
            for ref in refs_of(tree):
                self._uses[ref] -= 1
                if not self._uses[ref] and self._depot is not None:
                    del self._uses[ref]
                    self.traffic.forget(ref, self._openers.pop(ref))
                    self._depot.unpin(ref)

    def worker_gone(self, worker: Any) -> None:
        """Drop what a local worker that is gone was sending, and its task's directory. I/O thread."""
        self.downloads.worker_gone(worker)
        if self.home and os.path.isdir(tasks_directory(self.home)):
            self.traffic.disk.run(partial(remove_left, self.home, worker.pid))

    # ---- files of nodes

    def serve(self, stations: Stations, session: Session) -> None:
        """Learn where nodes are to be found, and whose files these are."""
        self._stations, self._session = stations, session.no

    def depend(self, depends: Depends, node: str | None = None) -> None:
        """Have files put into the working directory of every node's session, or one's, before its first task.

        Raises OSError for what is not there,
        ValueError for names that cannot travel, TypeError for what is neither path nor module.
        """
        paths, modules = sort_depends(depends)
        self.modules += [(module, node) for module in modules]
        tree: list[File] = []
        sources: list[Source] = []
        for path in paths:
            root, name = split_path(path)
            files, more = pack(root, [name], total_bytes=None)
            tree += files
            sources += more
        if tree:
            named = {file.path: file for file in tree}
            self._add(tuple(named[path] for path in sorted(named)), sources, node, is_vital=True)

    def _add(self, tree: Tree, sources: list[Source], node: str | None, *, is_vital: bool) -> _Placing:
        placing = _Placing(list(split(tree)), sources, node, is_vital=is_vital)
        for source in sources:
            self.traffic.register(source.ref, source.open)
        with self._lock:
            names = {file.path for file in tree}
            for older in self._placings:  # what is replaced need not be sent to who comes later, nor be as it was
                if older.node == node:
                    older.parts = [tuple(file for file in part if file.path not in names) for part in older.parts]
            for _ in placing.parts:
                self._numbers += 1
                placing.numbers.append(self._numbers)
            self._placings.append(placing)
        return placing

    def node_opened(self, station: Station) -> None:
        """Tell a node whose link is new what belongs there, before it starts a worker. I/O thread."""
        with self._lock:
            placings = [placing for placing in self._placings if placing.is_for(station)]
        for placing in placings:
            self._say(placing, station, is_vital=True)

    def _say(self, placing: _Placing, station: Station, *, is_vital: bool) -> None:
        link = station.link
        if link is None:
            return
        with self._lock:
            placing.missing[station] = set(placing.numbers)
            placing.errors.pop(station, None)
        for number, part in zip(placing.numbers, placing.parts, strict=True):
            link.send([Place(self._session, number, part, is_vital)])

    def node_said(self, station: Station, message: Message, transfers: Transfers) -> bool:
        """Hear what a node says of files; False if it is about something else. I/O thread."""
        if isinstance(message, Delivery):
            self.downloads.take(station, message, transfers)
        elif isinstance(message, Placed):
            self._placed(station, message)
        else:
            return False
        return True

    def _placed(self, station: Station, message: Placed) -> None:
        with self._lock:
            for placing in self._placings:
                if message.number in placing.missing.get(station, ()):
                    placing.missing[station].discard(message.number)
                    if message.error:
                        placing.errors[station] = message.error
        if self._stations is not None:
            with self._stations.changed:
                self._stations.changed.notify_all()

    def send(self, path: str, name: str | None, node: str | None, timeout_s: float | None) -> None:
        """Do `ClusterExecutor.send_file`."""
        stations = self._stations
        assert stations is not None, "the root has some, if only of its own"
        root, own = split_path(path)
        if stations.has_pool and node in (None, "local"):
            _check_local(path, name or own)
        if node == "local" or (node is None and not stations.nodes):
            return
        tree, sources = pack(root, [own], total_bytes=None)
        if name is not None:
            tree = tuple(structs.replace(file, path=name + file.path[len(own):] if own else f"{name}/{file.path}")
                         for file in tree)
            for file in tree:
                check_path(file.path)
        placing = self._add(tree, sources, node, is_vital=False)
        self._loop.call_soon(self._say_all, placing)
        self._wait(placing, stations, path, timeout_s)

    def _say_all(self, placing: _Placing) -> None:
        assert self._stations is not None, "`send` looked"
        for station in list(self._stations.nodes):
            if placing.is_for(station) and station not in placing.missing:
                self._say(placing, station, is_vital=False)

    def _wait(self, placing: _Placing, stations: Stations, path: str, timeout_s: float | None) -> None:
        """Wait until the nodes that are up have it, or one of them never will; if none is up, for the first that comes."""
        def is_decided() -> bool:
            if self._is_closed or placing.errors:
                return True
            up = [station for station in stations.nodes if placing.is_for(station) and station.is_up]
            done = [station for station in up if placing.missing.get(station) == set()]
            return bool(done) and (len(done) == len(up))

        with stations.changed:
            is_there = stations.changed.wait_for(is_decided, timeout_s)
        if placing.errors:
            station, error = next(iter(placing.errors.items()))
            raise OSError(f"{path!r} could not be put on node {station.name!r}: {error}")
        if self._is_closed:
            raise RuntimeError("the executor was shut down while a file was being sent")
        if not is_there:
            where = f"node {placing.node!r}" if placing.node is not None else "every node"
            raise TimeoutError(f"{path!r} was not on {where} within {timeout_s:g} s; it is still being sent")

    def _is_wanted(self, station: Any, delivery: Delivery) -> bool:
        with self._dispatcher.lock:
            return self._dispatcher.scheduler.expects(station, delivery)


def split_path(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Give the directory that a path's place elsewhere is counted from, and that place: "" is the directory itself.

    A relative path below the working directory is kept; of any other the last component is.
    """
    path = os.path.normpath(os.fspath(path))
    if path == os.curdir:
        return os.getcwd(), ""
    if not os.path.isabs(path) and path.split(os.sep)[0] != os.pardir:
        return os.getcwd(), path.replace(os.sep, "/")
    directory, name = os.path.split(os.path.abspath(path))
    return directory, name


def sort_depends(depends: Depends) -> tuple[list[str], list[str]]:
    """Tell paths from modules: gives paths, and names of top-level modules. Raises FileNotFoundError for what is neither."""
    one = isinstance(depends, (str, os.PathLike, ModuleType))
    paths, modules = [], []
    for each in [depends] if one else cast("Iterable[Dependency]", depends):
        if isinstance(each, ModuleType):
            modules.append(each.__name__.partition(".")[0])
        elif not isinstance(each, (str, os.PathLike)):
            raise TypeError(f"depends must name files, directories or modules, not {each!r}")
        elif os.path.exists(each):
            paths.append(os.fspath(each))
        elif isinstance(each, str) and each.replace(".", "_").isidentifier() and _is_module(each.partition(".")[0]):
            modules.append(each.partition(".")[0])
        else:
            raise FileNotFoundError(errno.ENOENT, "there is no such file, nor a module of that name", os.fspath(each))
    return paths, modules


def _is_module(name: str) -> bool:
    from importlib.util import find_spec
    try:
        return name in sys.modules or find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _check_local(path: str, name: str) -> None:
    """See that local workers, which work where this process does, find a file by the name that it is to have."""
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not os.path.exists(name or ".") or not os.path.samefile(path, name or "."):
        raise ValueError(f"local workers work in this program's own directory, and {path!r} is not {name!r} there: have "
                         "tasks open it by its path, or name a node with node=")
