"""Blobs: large immutable bytes, stored once per process in shared memory, named by digest.

    put(buffer) ──copy──► arena (memfd) ──segment──► worker or client: map_segment, private and writable
                             ▲   │
    transfers: writer(ref) ──┘   └──view──► chunks to another vertex

The rule: a blob's bytes are where its reference says as long as somebody holds a reference, and never change then.
Once the last reference is released the space is used again, so a mapping that outlives it must be made independent
first (`memory.Mappings.settle`), and a worker's file goes back to it only when its last mapping is gone.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from distexec.memory import COPY_BYTES, advise, map_memory, map_segment, new_memory, shared_file, whole_pages, write_at
from distexec.messages import BlobRef

if TYPE_CHECKING:
    import xxhash
    from typing_extensions import Buffer

__all__ = ["BlobStore", "BlobWriter", "Segment", "digest_of"]

ARENA_BYTES = 256 << 20
"""Address space of one arena. Smaller: more descriptors for many blobs. Larger: nothing but address space."""

SPARE_BYTES = 128 << 20
"""Freed memory kept for the next blob. Smaller: every large argument pays the kernel for new pages (a third of the
speed). Larger: memory that nobody uses."""

MAX_BLOB_BYTES = 1 << 40
"""Larger: address space that no machine has could be asked for by a peer. Smaller: somebody's array does not fit."""


def digest_of(buffer: Buffer) -> bytes:
    """Return the xxh3-128 digest of a C-contiguous buffer, by which its blob is named."""
    import xxhash

    return xxhash.xxh3_128_digest(cast("bytes", buffer))


# ---- the store


class Segment(NamedTuple):
    """Where a blob lies: `size_bytes` at `offset` of the arena with this number, whose descriptor is `fd`."""

    fd: int
    offset: int
    size_bytes: int
    arena: int


_forks = 0
"""How often this process has forked. A child goes on seeing the files that its parent had mapped."""


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork)


class _Loan:
    """A file that its owner wants to use again: who still sees it, and whether a forked child might for ever."""

    __slots__ = ("holders", "is_lost", "returned")

    def __init__(self, returned: Callable[[bool], object]) -> None:
        self.returned = returned
        self.holders = 1  # the arena; mappings add themselves
        self.is_lost = False


def _note_unmapped(unmapped: deque[tuple[_Loan, int]], wakers: list[Callable[[], object]], loan: _Loan,
                   forks: int) -> None:
    """Remember, in a finalizer, which may run anywhere, that a mapping is gone; no lock is taken."""
    unmapped.append((loan, forks))
    for wake in wakers:
        wake()


class _Arena:
    """One shared-memory file and its free space, kept as sorted, merged (offset, size) spans of whole pages."""

    def __init__(self, number: int, fd: int, file_bytes: int, *, sole: bool = False) -> None:
        self.number, self.fd, self.file_bytes, self.sole = number, fd, file_bytes, sole
        self.loan: _Loan | None = None
        self.warm_bytes = 0  # from the start, that have pages
        self.copying = 0  # threads that write to `fd` right now, so it must stay open
        self.live_bytes = 0
        capacity = whole_pages(file_bytes)
        self._free = [(0, capacity)]
        self._view: memoryview | None = None

    def view(self) -> memoryview:
        if self._view is None:
            self._view = map_memory(self.fd, 0, self.file_bytes, mmap.MAP_SHARED)
            if self.file_bytes and hasattr(mmap, "MADV_DONTFORK"):
                advise(self._view, mmap.MADV_DONTFORK)  # a forked child has no use for it, and forks faster
        return self._view

    def allocate(self, size: int) -> int | None:
        """First fit: low addresses are used again and again, so their pages are there already."""
        for i, (offset, span) in enumerate(self._free):
            if span >= size:
                self._free[i:i + 1] = [(offset + size, span - size)] if span > size else []
                self.live_bytes += size
                return offset
        return None

    def free(self, offset: int, size: int) -> None:
        self.live_bytes -= size
        insort(self._free, (offset, size))
        merged = [self._free[0]]
        for start, span in self._free[1:]:
            last, length = merged[-1]
            if last + length == start:
                merged[-1] = (last, length + span)
            else:
                merged.append((start, span))
        self._free = merged

    def spare_bytes(self) -> int:
        """Memory that the kernel keeps for it beyond what live blobs need."""
        return max(0, os.fstat(self.fd).st_blocks * 512 - self.live_bytes)

    def punch(self) -> None:
        """Give the memory of all free space back to the kernel."""
        self.warm_bytes = 0
        if hasattr(mmap, "MADV_REMOVE"):  # elsewhere it stays until the arena is closed
            for offset, span in self._free:
                advise(self.view(), mmap.MADV_REMOVE, offset, span)

    def close(self) -> None:
        self._view = None  # the mapping goes with the last view of a blob
        os.close(self.fd)


class _Blob:
    """A stored blob and how many references are held to it."""

    __slots__ = ("arena", "offset", "ref", "references", "sample")

    def __init__(self, ref: BlobRef, arena: _Arena, offset: int, sample: tuple[int, bytes] | None) -> None:
        self.ref, self.arena, self.offset, self.sample = ref, arena, offset, sample
        self.references = 1


class _Received:
    """A blob in memory of this process alone, and how many references are held to it."""

    __slots__ = ("ref", "references", "view")

    def __init__(self, ref: BlobRef, view: memoryview) -> None:
        self.ref, self.view, self.references = ref, view, 1


class BlobStore:
    """The blobs of one process: each digest once, counted, in shared memory that other processes can map.

    All methods may be called from any thread, though not from a finalizer. `arena_closed(number)` is called, without a
    lock held, when an arena is gone, so that whoever was given its descriptor can be told.

    With `keeps_received`, what comes in by `writer` is in memory of this process alone, to be had by `take`: for the end
    of the way. It is not found by its digest, and who gives up a reference to bytes that are here twice gives up one to
    those, so others see to it that shared ones stay. `wake` is called, in finalizers, when `reap` has something to do.
    """

    def __init__(self, arena_closed: Callable[[int], object] | None = None, *, keeps_received: bool = False,
                 wake: Callable[[], object] | None = None) -> None:
        self._arena_closed = arena_closed
        self._keeps_received = keeps_received
        self.make_room: Callable[[int], object] | None = None  # called before memory is taken, without a lock held
        self._unmapped: deque[tuple[_Loan, int]] = deque()  # appended to by finalizers
        self._wakers = [wake] if wake is not None else []
        self._lock = threading.Lock()  # guards all below; never held while bytes are copied or hashed
        self._received: dict[bytes, _Received] = {}
        self._blobs: dict[bytes, _Blob] = {}
        self._samples: dict[tuple[int, bytes], int] = {}
        self._arenas: list[_Arena] = []
        self._numbers = 0
        self._closed = False

    def __repr__(self) -> str:
        stored = sum(blob.ref.size_bytes for blob in list(self._blobs.values()))
        return f"<BlobStore: {len(self._blobs)} blobs, {stored:,} bytes, {len(self._arenas)} arenas>"

    def put(self, buffer: Buffer) -> BlobRef:
        """Store a C-contiguous buffer, copied once, unless its bytes are here already; the caller holds a reference.

        The digest is that of the copy, so a buffer that changes meanwhile makes a blob that is wrong only for itself.
        Raises OSError when there is no memory for it.
        """
        source = memoryview(buffer).cast("B")
        sample = (len(source), digest_of(source[:4096]))
        if sample in self._samples:  # seen something that begins like it: hashing first may save the copy
            ref = BlobRef(digest_of(source), len(source))
            if self.retain_if_here(ref):
                return ref
        arena, offset = self._allocate(len(source))
        try:
            digest = _copy_and_digest(source, arena, offset)
        except BaseException:
            self._end_copy(arena)
            self._free(arena, offset, len(source))
            raise
        self._end_copy(arena)
        return self._publish(BlobRef(digest, len(source)), arena, offset, sample)

    def adopt(self, fd: int, size_bytes: int, digest: bytes | None = None,
              returned: Callable[[bool], object] | None = None) -> BlobRef:
        """Take over a shared-memory file, descriptor and all, as a blob; the caller holds a reference.

        Nobody may write to the file any more; with `returned`, not until that is called, without a lock held: with True
        once nobody here sees the file any more, with False if a forked child may. `digest` saves hashing it. Raises
        ValueError if the file is too short; the file is then not returned.
        """
        try:
            if os.fstat(fd).st_size < size_bytes:
                raise ValueError(f"a shared-memory file said to hold {size_bytes:,} bytes is shorter")
            arena = self._add_arena(fd, size_bytes, sole=True, reserve=whole_pages(size_bytes))
            arena.loan = _Loan(returned) if returned is not None else None
        except BaseException:
            os.close(fd)
            raise
        if digest is None:
            digest = digest_of(arena.view())
        return self._publish(BlobRef(digest, size_bytes), arena, 0, None)

    def writer(self, ref: BlobRef) -> BlobWriter:
        """Return a writer for a blob that arrives in pieces. Raises OSError when there is no memory for it."""
        if not 0 <= ref.size_bytes <= MAX_BLOB_BYTES:
            raise ValueError(f"a blob cannot have {ref.size_bytes:,} bytes")
        if self._keeps_received:
            return BlobWriter(self, ref, new_memory(ref.size_bytes))
        return BlobWriter(self, ref, None, *self._allocate(ref.size_bytes))

    def retain(self, ref: BlobRef) -> None:
        """Hold one more reference. Raises KeyError if the blob is not here."""
        with self._lock:
            (self._received.get(ref.digest) or self._blobs[ref.digest]).references += 1

    def retain_if_here(self, ref: BlobRef) -> bool:
        """Hold one more reference if the blob is here; False if it is not."""
        with self._lock:
            blob = self._blobs.get(ref.digest)
            if blob is None or blob.ref != ref:
                return False
            blob.references += 1
            return True

    def release(self, ref: BlobRef) -> None:
        """Drop one reference; the last one frees the space. A store that was closed has nothing left to free."""
        with self._lock:
            received = self._received.get(ref.digest)
            if received is not None:
                received.references -= 1
                if not received.references:
                    del self._received[ref.digest]
                return
            blob = self._blobs.get(ref.digest)
            if blob is None:
                if self._closed:
                    return
                raise KeyError(ref.digest)
            blob.references -= 1
            if blob.references:
                return
            del self._blobs[ref.digest]
            self._forget_sample(blob.sample)
        self._free(blob.arena, blob.offset, blob.ref.size_bytes)

    def share(self, ref: BlobRef) -> None:
        """Let workers map a blob that was received for this process alone. Raises OSError if there is no memory for that."""
        with self._lock:
            received = self._received.get(ref.digest)
            references = received.references if received is not None else 0
        if received is None:
            return
        self.put(received.view)
        with self._lock:
            self._blobs[ref.digest].references += references - 1
            self._received.pop(ref.digest, None)

    def references(self, ref: BlobRef) -> int:
        """Count the references that are held to the blob."""
        blob = self._blobs.get(ref.digest)
        return blob.references if blob is not None else 0

    def has(self, ref: BlobRef) -> bool:
        """Is the blob here?"""
        blob = self._blobs.get(ref.digest)
        return blob is not None and blob.ref == ref

    def segment(self, ref: BlobRef) -> Segment:
        """Return where the blob lies; good while a reference is held. Raises KeyError if it is not here."""
        blob = self._blobs[ref.digest]
        return Segment(blob.arena.fd, blob.offset, ref.size_bytes, blob.arena.number)

    def view(self, ref: BlobRef) -> memoryview:
        """Return the blob's bytes, read-only; good while a reference is held. Raises KeyError if it is not here."""
        with self._lock:
            received = self._received.get(ref.digest)
            if received is not None:
                return received.view.toreadonly()
            blob = self._blobs[ref.digest]
            return blob.arena.view()[blob.offset:blob.offset + ref.size_bytes].toreadonly()

    def release_all(self, buffers: Sequence[bytes | BlobRef]) -> None:
        """Let go of those buffers that are blobs."""
        for buffer in buffers:
            if isinstance(buffer, BlobRef):
                self.release(buffer)

    def take_all(self, data: bytes, buffers: Sequence[bytes | BlobRef]) -> tuple[Any, list[Any]]:
        """Return a pickle and its buffers as they are to be loaded; empty `data` stands for the first buffer.

        As `take`, but if OSError or MemoryError is raised no reference is held any more.
        """
        taken: list[Any] = []
        try:
            for buffer in buffers:
                taken.append(self.take(buffer) if isinstance(buffer, BlobRef) else buffer)
        except (OSError, MemoryError):
            self.release_all(buffers[len(taken):])
            raise
        return (taken.pop(0) if not data and taken else data), taken

    def take(self, ref: BlobRef) -> memoryview:
        """Return the bytes, writable and the caller's for as long as it likes, for the caller's reference.

        Not copied if they were received, and nobody else wants them, or adopted. Raises KeyError if the blob is not here,
        OSError if there is no memory; the reference is then still held.
        """
        with self._lock:
            received = self._received.get(ref.digest)
            if received is not None and received.references == 1:
                return self._received.pop(ref.digest).view
            arena = None if received is not None else self._blobs[ref.digest].arena
        if arena is not None and arena.sole:
            view = self._map_adopted(arena, ref.size_bytes)
        else:
            view = new_memory(ref.size_bytes)
            view[:] = self.view(ref)
        self.release(ref)
        return view

    def _map_adopted(self, arena: _Arena, size_bytes: int) -> memoryview:
        loan = arena.loan
        if loan is None or not size_bytes:
            return map_segment(arena.fd, 0, size_bytes)
        with self._lock:
            loan.holders += 1
        unmapped = partial(_note_unmapped, self._unmapped, self._wakers, loan, _forks)
        try:
            return map_memory(arena.fd, 0, size_bytes, mmap.MAP_PRIVATE, unmapped)
        except OSError:
            unmapped()
            raise

    def reap(self) -> None:
        """Return the files whose last mapping is gone to those they are on loan from."""
        while self._unmapped:
            loan, forks = self._unmapped.popleft()
            loan.is_lost = loan.is_lost or forks != _forks
            self._let_go(loan)

    def _let_go(self, loan: _Loan) -> None:
        with self._lock:
            loan.holders -= 1
            is_last = not loan.holders
        if is_last:
            loan.returned(not loan.is_lost)

    def trim(self) -> None:
        """Give all freed memory back to the system, for a time when nothing goes on."""
        with self._lock:
            empty = [arena for arena in self._arenas if not arena.live_bytes]  # one being copied to counts as live
            for arena in empty:
                self._arenas.remove(arena)
            for arena in self._arenas:
                arena.punch()
        self._close_arenas(empty)

    def close(self) -> None:
        """Drop every blob and close every arena."""
        with self._lock:
            self._closed = True
            arenas = [arena for arena in self._arenas if not arena.copying]  # the rest: `_end_copy`
            self._arenas = [arena for arena in self._arenas if arena.copying]
            self._blobs.clear()
            self._received.clear()
            self._samples.clear()
        self._wakers.clear()  # what is still mapped must not keep whom they would wake
        self._close_arenas(arenas)

    def _publish(self, ref: BlobRef, arena: _Arena, offset: int, sample: tuple[int, bytes] | None) -> BlobRef:
        """Make the bytes a blob; if another thread stored the same ones first, its copy stays and ours goes."""
        with self._lock:
            if self._closed:
                raise ValueError("the blob store is closed")
            known = self._blobs.get(ref.digest)
            if known is None:
                self._blobs[ref.digest] = _Blob(ref, arena, offset, sample)
                if sample is not None:
                    self._samples[sample] = self._samples.get(sample, 0) + 1
                return ref
            known.references += 1
        self._free(arena, offset, ref.size_bytes)
        return ref

    def _keep(self, ref: BlobRef, view: memoryview) -> BlobRef:
        """Make received bytes a blob of this process alone."""
        with self._lock:
            if self._closed:
                raise ValueError("the blob store is closed")
            known = self._received.get(ref.digest)
            if known is None:
                self._received[ref.digest] = _Received(ref, view)
            else:
                known.references += 1
        return ref

    def _forget_sample(self, sample: tuple[int, bytes] | None) -> None:
        if sample is None:
            return
        self._samples[sample] -= 1
        if not self._samples[sample]:
            del self._samples[sample]

    def _allocate(self, size_bytes: int) -> tuple[_Arena, int]:
        """Find space to copy to; `_end_copy` must follow, then `_publish` or `_free`."""
        size = whole_pages(size_bytes)
        if self.make_room is not None:
            self.make_room(size)
        with self._lock:
            if self._closed:
                raise ValueError("the blob store is closed")
            for arena in self._arenas:
                if not arena.sole and (offset := arena.allocate(size)) is not None:
                    arena.copying += 1
                    return arena, offset
        file_bytes = max(size, ARENA_BYTES)
        fd = shared_file()
        try:
            os.ftruncate(fd, file_bytes)
            arena = self._add_arena(fd, file_bytes, reserve=size, copying=1)
        except BaseException:
            os.close(fd)
            raise
        return arena, 0

    def _end_copy(self, arena: _Arena) -> None:
        with self._lock:
            arena.copying -= 1
            if not self._closed or arena.copying:
                return
            self._arenas.remove(arena)
        self._close_arenas([arena])

    def _add_arena(self, fd: int, file_bytes: int, *, reserve: int, sole: bool = False, copying: int = 0) -> _Arena:
        with self._lock:
            if self._closed:
                raise ValueError("the blob store is closed")
            self._numbers += 1
            arena = _Arena(self._numbers, fd, file_bytes, sole=sole)
            arena.allocate(reserve)
            arena.copying = copying
            self._arenas.append(arena)
            return arena

    def _free(self, arena: _Arena, offset: int, size_bytes: int) -> None:
        with self._lock:
            if arena not in self._arenas:  # the store was closed meanwhile
                return
            arena.free(offset, whole_pages(size_bytes))
            if not self._is_superfluous(arena):
                if self._spare_bytes() > SPARE_BYTES:
                    arena.punch()
                return
            self._arenas.remove(arena)
        self._close_arenas([arena])

    def _is_superfluous(self, arena: _Arena) -> bool:
        """Is it empty, and not the one empty arena that is kept for the next blob?"""
        if arena.live_bytes:
            return False
        if arena.sole or arena.file_bytes > ARENA_BYTES:
            return True
        return any(not other.live_bytes for other in self._arenas if other is not arena)

    def _spare_bytes(self) -> int:
        return sum(arena.spare_bytes() for arena in self._arenas if not arena.sole)

    def _close_arenas(self, arenas: Iterable[_Arena]) -> None:
        for arena in arenas:
            arena.close()
            if self._arena_closed is not None:
                self._arena_closed(arena.number)
            if arena.loan is not None:
                self._let_go(arena.loan)


class BlobWriter:
    """Receives a blob piece by piece, in order, and makes it a blob of the store once complete and verified."""

    def __init__(self, store: BlobStore, ref: BlobRef, memory: memoryview | None, arena: _Arena | None = None,
                 offset: int = 0) -> None:
        import xxhash

        self.ref = ref
        self.written_bytes = 0
        self._store, self._memory, self._arena, self._offset = store, memory, arena, offset
        self._spaces: deque[memoryview] = deque()  # given out, and not come back to `write`
        self._spaced_bytes = 0  # where the last of them ends
        self._ended = False
        self._hash: xxhash.xxh3_128 = xxhash.xxh3_128()

    def __repr__(self) -> str:
        return f"<BlobWriter {self.ref.digest.hex()}: {self.written_bytes:,} of {self.ref.size_bytes:,} bytes>"

    @property
    def is_complete(self) -> bool:
        """Is every byte here?"""
        return self.written_bytes == self.ref.size_bytes

    def space(self, offset: int, size_bytes: int) -> memoryview | None:
        """Return where the piece after those so far may be put, to be given to `write` in its turn; None: nowhere."""
        end = offset + size_bytes
        if offset != max(self.written_bytes, self._spaced_bytes) or end > self.ref.size_bytes or self._ended:
            return None
        space = self._arena_space(offset, size_bytes) if self._memory is None else self._memory[offset:end]
        if space is not None:
            self._spaces.append(space)
            self._spaced_bytes = end
        return space

    def _arena_space(self, offset: int, size_bytes: int) -> memoryview | None:
        assert self._arena is not None
        start = self._offset + offset
        try:
            os.posix_fallocate(self._arena.fd, start, size_bytes)  # or a lack of memory would kill the process
        except (OSError, AttributeError):  # no memory: `write` will say so; a system that cannot: `write` can
            return None
        return self._arena.view()[start:start + size_bytes]

    def write(self, offset: int, piece: bytes | memoryview) -> None:
        """Add the next piece. Raises ValueError if it is not the next or too long, OSError if there is no memory."""
        if offset != self.written_bytes or offset + len(piece) > self.ref.size_bytes:
            raise ValueError(f"a piece of {len(piece):,} bytes at {offset:,} does not follow {self!r}")
        if self._spaces and piece is self._spaces[0]:
            self._spaces.popleft()
        elif self._memory is not None:
            self._memory[offset:offset + len(piece)] = piece
        else:
            assert self._arena is not None
            write_at(self._arena.fd, memoryview(piece), self._offset + offset)
        self._hash.update(cast("bytes", piece))
        self.written_bytes += len(piece)

    def finish(self) -> BlobRef:
        """Publish the blob; the caller holds a reference. Raises ValueError if it is not what its digest says."""
        if not self.is_complete or self._hash.digest() != self.ref.digest:
            self.abandon()
            raise ValueError(f"the bytes received are not those that digest {self.ref.digest.hex()} names")
        self._ended = True
        if self._memory is not None:
            return self._store._keep(self.ref, self._memory)
        assert self._arena is not None
        self._store._end_copy(self._arena)
        return self._store._publish(self.ref, self._arena, self._offset, None)

    def abandon(self) -> None:
        """Drop what was received; nothing may be put into `space` any more."""
        if self._ended:
            return
        self._ended = True
        if self._arena is not None:
            self._store._end_copy(self._arena)
            self._store._free(self._arena, self._offset, self.ref.size_bytes)


def _copy_and_digest(source: memoryview, arena: _Arena, offset: int) -> bytes:
    import xxhash

    hasher = xxhash.xxh3_128()
    stored = arena.view()[offset:offset + len(source)]
    is_warm = offset + len(source) <= arena.warm_bytes
    for at in range(0, len(source), COPY_BYTES):
        piece, copy = source[at:at + COPY_BYTES], stored[at:at + COPY_BYTES]
        if is_warm:
            copy[:] = piece  # twice as fast as a system call, which however makes new pages faster than faults do
        else:
            write_at(arena.fd, piece, offset + at)
        hasher.update(cast("bytes", copy))
    arena.warm_bytes = max(arena.warm_bytes, offset + len(source))
    return hasher.digest()
