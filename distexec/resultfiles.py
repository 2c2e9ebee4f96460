"""Where a worker puts results too large for a message: shared-memory files, used again once the pool gives them back.

    put(bytes) ── Segment + descriptor ──► pool ── mapped by the client, or sent on ──► Free(arena) ──► used again

New pages cost three times what copying costs, hence the reuse. The rule: a file is written to only while nobody but us
can see it, so only after the pool said that it is reusable; a file it says nothing of is not touched again. Part of
every worker, so it imports little.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Any, cast

from distexec.memory import COPY_BYTES, advise, map_memory, shared_file, write_at
from distexec.messages import MAX_INLINE_BYTES, BlobRef, Buffers, Free, Segment

__all__ = ["KEPT_BYTES", "ResultFiles", "close_parts", "keep_part", "kept_parts", "put_apart"]

KEPT_BYTES = 128 << 20
"""Of files that are to be used again. Smaller: large results take new pages every time. Larger: idle memory."""

KEPT_COUNT = 8
"""Descriptors held for them. Smaller: many small results in a row take new files."""

SPACIOUS = 4
"""How many times its size a result may be given. Larger: a small result keeps the memory of a large one."""


class _File:
    """A file of ours: its arena number, descriptor and size in bytes; whether nobody else sees it; a view once reused."""

    __slots__ = ("fd", "is_free", "number", "size_bytes", "view")

    def __init__(self, number: int, fd: int, size_bytes: int) -> None:
        self.number, self.fd, self.size_bytes = number, fd, size_bytes
        self.is_free = False
        self.view: memoryview | None = None

    def write(self, source: memoryview) -> bytes:
        """Copy bytes to the start; return their digest."""
        import xxhash

        hasher = xxhash.xxh3_128()
        for at in range(0, len(source), COPY_BYTES):
            piece = source[at:at + COPY_BYTES]
            if self.view is not None:
                self.view[at:at + len(piece)] = piece
            else:
                write_at(self.fd, piece, at)
            hasher.update(cast("bytes", piece))
        return hasher.digest()

    def reuse(self) -> None:
        """Have a view from now on: with the pages there, copying to it is twice as fast as a system call."""
        if self.view is None:
            self.view = map_memory(self.fd, 0, self.size_bytes, mmap.MAP_SHARED)
            if hasattr(mmap, "MADV_DONTFORK"):
                advise(self.view, mmap.MADV_DONTFORK)  # what a task forks has no use for it


def _written(file: _File, source: memoryview) -> bytes:
    """Do as `file.write`, also where the files of tasks have to be smaller: this is none of theirs."""
    try:
        return file.write(source)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
    from distexec.limits import unlimited_files

    with unlimited_files():
        return file.write(source)


class ResultFiles:
    """The files that a worker keeps for its results. Used by the thread that runs tasks only."""

    def __init__(self) -> None:
        self._kept: dict[int, _File] = {}  # by number, oldest use first
        self._numbers = 0

    def __repr__(self) -> str:
        free = sum(file.is_free for file in self._kept.values())
        return f"<ResultFiles: {len(self._kept)} kept, {free} free>"

    def put(self, part: bytes | memoryview) -> tuple[Segment, int]:
        """Copy bytes into a file; return how to announce it, and a descriptor of it that becomes the caller's.

        Raises OSError if there is no memory, or no descriptor.
        """
        size = len(part)
        file = self._find(size) or self._make(size)
        try:
            blob = BlobRef(_written(file, memoryview(part)), size)
            fd = os.dup(file.fd) if size <= KEPT_BYTES else file.fd
        except BaseException:
            os.close(file.fd)
            raise
        if fd == file.fd:
            return Segment(blob, 0, 0), fd
        self._kept[file.number] = file
        self._make_room()
        return Segment(blob, file.number, 0), fd

    def take_back(self, free: Free) -> None:
        """Use a file again, or never if a fork of the client may see it. Arena 0: give up all that is free."""
        if not free.arena:
            for file in [file for file in self._kept.values() if file.is_free]:
                self._drop(file)
        elif free.arena in self._kept:
            if free.is_reusable:
                self._kept[free.arena].is_free = True
            else:
                self._drop(self._kept[free.arena])

    def close(self) -> None:
        """Close all descriptors."""
        for file in list(self._kept.values()):
            self._drop(file)

    def _find(self, size: int) -> _File | None:
        fitting = [file for file in self._kept.values() if file.is_free and size <= file.size_bytes <= SPACIOUS * size]
        if not fitting:
            return None
        file = self._kept.pop(min(fitting, key=lambda each: each.size_bytes).number)
        file.reuse()
        self._numbers += 1
        file.number, file.is_free = self._numbers, False  # anew: what is said of its last use must not concern this one
        return file

    def _make(self, size: int) -> _File:
        self._numbers += 1
        return _File(self._numbers, shared_file(), size)

    def _make_room(self) -> None:
        """Keep to the limits: free files go first, then those lent longest, whose memory is their holders' then."""
        by_use = sorted(self._kept.values(), key=lambda file: not file.is_free)
        kept_bytes = sum(file.size_bytes for file in by_use)
        for file in by_use:
            if kept_bytes <= KEPT_BYTES and len(self._kept) <= KEPT_COUNT:
                return
            kept_bytes -= file.size_bytes
            self._drop(file)

    def _drop(self, file: _File) -> None:
        del self._kept[file.number]
        os.close(file.fd)


# ---- for what goes before the result, from any thread


def put_apart(data: bytes, views: Sequence[memoryview]) -> tuple[bytes, Buffers, list[tuple[Segment, int]]]:
    """Put what is too large for a message into shared memory; give data and buffers as they travel, and how to announce it.

    The descriptors are the caller's. Raises OSError if there is no memory, or no descriptor.
    """
    parts: list[Any] = list(views)
    if len(data) > MAX_INLINE_BYTES:
        data, parts = b"", [data, *parts]
    inline = MAX_INLINE_BYTES - len(data)
    wire: list[bytes | BlobRef] = []
    segments: list[tuple[Segment, int]] = []
    try:
        for part in parts:
            if len(part) <= inline and not (kept_parts and type(part) is memoryview and id(part.obj) in kept_parts):
                inline -= len(part)
                wire.append(bytes(part))
            else:
                segments.append(_segment(part if type(part) is memoryview else memoryview(part)))
                wire.append(segments[-1][0].blob)
    except BaseException:
        close_parts(segments)
        raise
    return data, tuple(wire), segments


kept_parts: dict[int, tuple[Segment, int]] = {}
"""By id of a view, where its bytes lie already."""


def _segment(part: memoryview) -> tuple[Segment, int]:
    known = kept_parts.get(id(part.obj)) if kept_parts else None
    return keep_part(part) if known is None else (known[0], os.dup(known[1]))


def keep_part(part: bytes | memoryview) -> tuple[Segment, int]:
    """Copy bytes into a file of their own; give how to announce it, and its descriptor, which is the caller's."""
    import xxhash

    fd = shared_file()
    try:
        write_at(fd, memoryview(part), 0)
    except BaseException:
        os.close(fd)
        raise
    return Segment(BlobRef(xxhash.xxh3_128(part).digest(), len(part)), 0, 0), fd


def close_parts(segments: list[tuple[Segment, int]]) -> None:
    """Close the descriptors of what is not sent after all."""
    for _, fd in segments:
        os.close(fd)
