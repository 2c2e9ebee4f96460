"""Values put by once for all tasks: `executor.share(value)`.

    client: Shares ── pickled once, into the store ──► Shared, the handle; in its place pickles hold a reference
    worker: load ── first time: unpickled over the mapped blobs ──► Keeper: the value, for later tasks    Keep ──► pool

The rule: a handle is nothing but a pickle whose large parts are in the store already; so calls that hold one are like any
other, and keep what they need when the handle goes. A worker keeps the value until the client says `Unshare`, which it does
once there is neither a handle nor a call, or until it has too many.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from . import mainmodule
from . import worker as worker_module
from .mainmodule import IN_BAND_BYTES
from .memory import Mappings, map_segment
from .messages import BlobRef, Keep
from .payload import CallPacker, CallUnpacker
from .resultfiles import keep_part, kept_parts

if TYPE_CHECKING:
    from .blobcache import BlobCache
    from .shipping import BlobStore

__all__ = ["Keeper", "Shared", "Shares", "load", "share_in_task"]

T = TypeVar("T")

KEPT_SHARE = 4
"""Of the machine's memory one part in so many, in shared values, is kept by a worker. Smaller: some are loaded again and
again. Larger: who frees no handle fills the memory."""

KEPT_COUNT = 1024
"""The same in values."""

FADE_S = 0.1
"""Between two looks whether a value whose handle is gone is still used by some call; and the time that its bytes stay for
calls that are just being made of it. Longer: memory is free later."""

Part = bytes | memoryview
Reference = tuple[bytes, int]  # digest and size of a part; (b"", 0): it is in the pickle


class Shared(Generic[T]):
    """A value that tasks share; made by `executor.share`.

    It may stand anywhere in a call: in arguments, inside other objects, in closures and globals of `__main__`. Tasks get the
    value in its place. `free`, leaving a `with` block, or dropping the last reference to the handle ends it; calls that
    were submitted before then still have it.
    """

    def __init__(self, name: bytes, parts: Sequence[Part], references: Sequence[Reference], kind: str,
                 let_go: Callable[[], object]) -> None:
        self._name, self._parts, self._references, self._kind = name, tuple(parts), tuple(references), kind
        for part, (digest, _) in zip(parts, references, strict=True):
            if digest:
                mainmodule.digests[id(part)] = digest
        ids = [id(part) for part in parts]
        self._finalizer = weakref.finalize(self, _let_go, ids, let_go)
        self._finalizer.atexit = False

    @property
    def size_bytes(self) -> int:
        """How large its pickle is."""
        return sum(len(part) for part in self._parts)

    @property
    def is_freed(self) -> bool:
        """Whether it was freed, so that no more calls can be made with it."""
        return not self._finalizer.alive

    def free(self) -> None:
        """Let go of it: no more calls can be made with it, and once those that were are over, no machine keeps it."""
        self._finalizer()
        self._parts = ()

    def __enter__(self) -> Shared[T]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.free()

    def __copy__(self) -> Shared[T]:
        return self

    def __deepcopy__(self, _memo: object) -> Shared[T]:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = self._parts
        if not self._finalizer.alive:
            raise ValueError(f"{self!r} cannot be used in calls any more; share the value again")
        travelling = [mainmodule.apart(part) if protocol >= 5 and isinstance(part, memoryview) else bytes(part)
                      for part in parts]
        return load, (self._name, self._references, *travelling)

    def __repr__(self) -> str:
        state = "freed" if self.is_freed else f"{self.size_bytes:,} bytes"
        return f"<Shared {self._kind}: {state}>"


def _let_go(ids: list[int], let_go: Callable[[], object]) -> None:
    """In a finalizer, which may run anywhere: take no lock."""
    for each in ids:
        mainmodule.digests.pop(each, None)
    let_go()


def pack(packer: CallPacker, value: Any, put: Callable[[Any], tuple[memoryview, Reference]]) -> tuple[
        bytes, list[Part], list[Reference]]:
    """Pickle a value and put its large parts by; give its name, its parts and their references.

    Raises what pickling raises, and what `put` raises.
    """
    data, views = packer.pack_call((value,), {})
    parts: list[Part] = []
    references: list[Reference] = []
    for part in (data, *views):
        if len(part) < IN_BAND_BYTES:
            parts.append(bytes(part))
            references.append((b"", 0))
        else:
            stored, reference = put(part)
            parts.append(stored)
            references.append(reference)
    name = mainmodule.digest(b"".join(digest for digest, _ in references),
                             [part for part in parts if isinstance(part, bytes)])
    return name, parts, references


# ---- the client's side


class Home(Protocol):
    """Whose tasks use them: the root."""

    packer: CallPacker
    store: BlobStore
    cache: BlobCache

    def later(self, seconds: float, function: Callable[[], object]) -> object:
        """Call a function on the I/O thread."""

    def wake(self) -> object:
        """Have `reap` called soon. Called in finalizers."""

    def forget_code(self, refs: Sequence[BlobRef]) -> None:
        """Forget functions that were made of these, unless some task is to run them."""

    def count_kept(self, ref: BlobRef) -> int:
        """Count the references to a blob that are held for workers here, which keep what they have loaded."""

    def unshare(self, name: bytes, refs: Sequence[BlobRef]) -> None:
        """Tell all workers that nobody uses this value any more."""


class _Entry(NamedTuple):
    """What is put by of a value; by name, and as often as it was shared."""

    refs: tuple[BlobRef, ...]
    handles: int


class Shares:
    """What one root's user has shared."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()  # guards _entries
        self._entries: dict[bytes, _Entry] = {}
        self._gone: deque[tuple[bytes, tuple[BlobRef, ...]]] = deque()  # whose handles went; appended to by finalizers
        self._fading: dict[bytes, tuple[BlobRef, ...]] = {}  # without a handle, perhaps in use; I/O thread
        self._is_looking = False

    def share(self, value: Any) -> Shared[Any]:
        """Put a value by. Raises what pickling raises, OSError if there is no memory."""
        store = self._home.store
        held: list[BlobRef] = []

        def put(part: Any) -> tuple[memoryview, Reference]:
            ref = store.put(part)
            held.append(ref)
            return store.view(ref), (ref.digest, ref.size_bytes)

        try:
            name, parts, references = pack(self._home.packer, value, put)
        except BaseException:
            for ref in held:
                store.release(ref)
            raise
        refs = tuple(held)
        self._home.cache.allow(refs)
        with self._lock:
            self._entries[name] = _Entry(refs, self._entries[name].handles + 1 if name in self._entries else 1)
        return Shared(name, parts, references, type(value).__name__, _Farewell(self._gone, (name, refs), self._home.wake))

    def is_shared(self, name: bytes) -> bool:
        """Whether there is a handle of this value."""
        return name in self._entries

    def reap(self) -> None:
        """Look whether handles went. I/O thread."""
        while self._gone:
            name, refs = self._gone.popleft()
            self._home.later(FADE_S, partial(self._fade, name, refs))

    def _fade(self, name: bytes, refs: tuple[BlobRef, ...]) -> None:
        home = self._home
        with self._lock:
            entry = self._entries.pop(name, None)
            is_last = entry is None or entry.handles == 1
            if entry is not None and not is_last:
                self._entries[name] = entry._replace(handles=entry.handles - 1)
        if is_last:
            home.cache.drop(home, refs, ban=True)
        for ref in refs:
            home.store.release(ref)
        if is_last:
            self._fading[name] = refs
            self._look_soon()

    def _look_soon(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self._home.later(FADE_S, self._look)

    def _look(self) -> None:
        """Tell workers of what is used by nobody any more."""
        self._is_looking = False
        home = self._home
        for name, refs in list(self._fading.items()):
            with self._lock:
                is_back = name in self._entries  # shared again
            home.forget_code(refs)
            if is_back:
                del self._fading[name]
            elif not any(home.store.references(ref) > home.count_kept(ref) for ref in refs):
                del self._fading[name]
                home.cache.allow(refs)
                home.unshare(name, refs)
        if self._fading:
            self._look_soon()


class _Farewell:
    """What a handle leaves to be done when it goes; called in finalizers, so it only leaves a note."""

    def __init__(self, gone: deque[Any], note: Any, wake: Callable[[], object]) -> None:
        self._gone, self._note, self._wake = gone, note, wake

    def __call__(self) -> None:
        self._gone.append(self._note)
        self._wake()


# ---- the worker's side


def share_in_task(packer: CallPacker, value: Any) -> Shared[Any]:
    """Put a value by for the calls that a task makes. Raises what pickling raises, OSError if there is no memory.

    The workers that load it keep it until they have too many: nobody tells them that the handle went.
    """
    fds: list[int] = []
    ids: list[int] = []

    def put(part: Any) -> tuple[memoryview, Reference]:
        segment, fd = keep_part(part)
        fds.append(fd)
        view = map_segment(fd, 0, segment.blob.size_bytes)
        kept_parts[id(view)] = segment, fd
        ids.append(id(view))
        return view, (segment.blob.digest, segment.blob.size_bytes)

    def let_go() -> None:
        for each in ids:
            kept_parts.pop(each, None)
        while fds:
            os.close(fds.pop())

    try:
        name, parts, references = pack(packer, value, put)
    except BaseException:
        let_go()
        raise
    return Shared(name, parts, references, type(value).__name__, let_go)


def load(name: bytes, references: tuple[Reference, ...], *parts: Any) -> Any:
    """Give the value; what a handle pickles to. In a worker, the one that it has already."""
    here = worker_module.this_worker
    if here is None:
        return _unpickle(CallUnpacker(), parts)
    if here.keeper is None:
        here.keeper = Keeper(here)
    return here.keeper.get(name, references, parts)


def _unpickle(unpacker: CallUnpacker, parts: Sequence[Any]) -> Any:
    data, *buffers = (_writable(part) for part in parts)
    return unpacker.load_call(data, buffers)[0][0]


def _writable(part: Any) -> Any:
    """Give a part as the value may be built over it: what was pickled from read-only memory comes read-only."""
    if type(part) is memoryview and part.readonly:
        return memoryview(part.obj).cast("B")
    return part


class _Kept(NamedTuple):
    value: Any
    mappings: Mappings
    refs: tuple[BlobRef, ...]
    size_bytes: int


class Keeper:
    """The shared values that a worker has loaded, least recently used first."""

    def __init__(self, worker: worker_module.Worker) -> None:
        self._worker = worker
        self._lock = threading.RLock()  # guards what follows: the thread that receives nested calls' answers loads too
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._size_bytes = 0
        try:
            self._limit_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // KEPT_SHARE
        except (AttributeError, ValueError, OSError):  # a system that does not tell
            self._limit_bytes = 1 << 30

    def get(self, name: bytes, references: Sequence[Reference], parts: Sequence[Any]) -> Any:
        """Give the value of this name: the one that is here, or made of these parts and kept."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None:
                self._kept.move_to_end(name)
                return kept.value
        value = _unpickle(self._worker.unpacker, parts)
        self._keep(name, value, references, parts)
        return value

    def _keep(self, name: bytes, value: Any, references: Sequence[Reference], parts: Sequence[Any]) -> None:
        """Keep a value, and what it was built over; that is the task's no more."""
        size_bytes = sum(len(part) for part in parts)
        with self._lock:
            if name in self._kept:
                return  # another thread was faster
            mappings = Mappings()
            refs = []
            for (digest, length), part in zip(references[1:], parts[1:], strict=True):  # the first is read, and no more
                if digest and type(part) is memoryview and self._worker.mappings.hand_over(part, mappings):
                    refs.append(BlobRef(digest, length))
            self._kept[name] = _Kept(value, mappings, tuple(refs), size_bytes)
            self._size_bytes += size_bytes
            if refs:
                self._worker.outbox.append(Keep(tuple(refs)))
            while len(self._kept) > 1 and (self._size_bytes > self._limit_bytes or len(self._kept) > KEPT_COUNT):
                self._drop(next(iter(self._kept)))

    def forget(self, names: Sequence[bytes]) -> None:
        """Nobody uses these any more."""
        with self._lock:
            for name in names:
                self._drop(name)

    def _drop(self, name: bytes) -> None:
        kept = self._kept.pop(name, None)
        if kept is None:
            return
        _, mappings, refs, size_bytes = kept
        del kept
        self._size_bytes -= size_bytes
        mappings.settle()  # what a task made of it and kept must be its own before the memory is used again
        if refs:
            self._worker.outbox.append(Keep((), refs))
