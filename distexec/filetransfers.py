"""Blobs that are files, on their way: read from a file of the sender, written to a file of the receiver, never held whole.

    Source ── pieces, read ahead ──► FileSending ──► Chunk … ──► FileReceiving ── pieces ──► FileWriter ──► its place

`transfers` treats them as it does blobs in memory; here is what differs: pieces are read, hashed and written on a thread of
their own. The rule: at most a window of bytes of a file is in memory at either end.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from distexec.diskthread import DiskThread, Loop
from distexec.messages import BlobRef, Chunk
from distexec.trees import FileWriter

__all__ = ["FileReceiving", "FileSending", "FileTraffic", "Opener"]

READ_BYTES = 1 << 20
"""Read at once. Smaller: more changes of thread. Larger: more memory for each file under way."""

AHEAD_BYTES = 2 << 20
"""Read and not yet sent. Smaller: the link waits for the disk. Larger: as above."""

Opener = Callable[[], int]
"""Gives a descriptor to read the file from, which is the caller's to close; raises OSError."""


class FileTraffic:
    """The files that a process has to send, by digest, and the thread that reads and writes files for it."""

    def __init__(self, loop: Loop) -> None:
        self.disk = DiskThread(loop)
        self._lock = threading.Lock()  # guards _sources
        self._sources: dict[bytes, list[tuple[BlobRef, Opener]]] = {}

    def __repr__(self) -> str:
        return f"<FileTraffic: {len(self._sources)} sources>"

    def register(self, ref: BlobRef, opener: Opener) -> None:
        """Let the other ends of links have this file."""
        with self._lock:
            self._sources.setdefault(ref.digest, []).append((ref, opener))

    def forget(self, ref: BlobRef, opener: Opener) -> None:
        """Undo `register`; what is under way goes on."""
        with self._lock:
            sources = self._sources.get(ref.digest, [])
            if (ref, opener) in sources:
                sources.remove((ref, opener))
            if not sources:
                self._sources.pop(ref.digest, None)

    def has(self, ref: BlobRef) -> bool:
        """Whether there is such a file."""
        return any(known == ref for known, _ in self._sources.get(ref.digest, ()))

    def open(self, ref: BlobRef) -> int:
        """Open the file with this content. Raises OSError if none can be, saying why. Disk thread."""
        problem: OSError | None = None
        for known, opener in list(self._sources.get(ref.digest, ())):
            try:
                if known == ref:
                    return opener()
            except OSError as error:
                problem = error
        raise problem or OSError("no such file is there (any more)")

    def close(self) -> None:
        """End the thread."""
        self.disk.close()


class FileSending:
    """A file on its way out: `sent` bytes queued, of which the receiver may have up to `allowed`.

    Args:
        on_ready: called on the I/O thread when there is more to send.
        on_failed: called there, once, with the reason, when there never will be.
    """

    def __init__(self, ref: BlobRef, files: FileTraffic, allowed: int, chunk_bytes: int,
                 on_ready: Callable[[FileSending], object], on_failed: Callable[[FileSending, str], object]) -> None:
        self.ref, self.sent, self.allowed = ref, 0, allowed
        self._disk, self._chunk_bytes, self._on_ready, self._on_failed = files.disk, chunk_bytes, on_ready, on_failed
        self._fd = -1
        self._read = 0  # bytes that were read, or are being read
        self._ready: deque[memoryview] = deque()
        self._ready_bytes = 0
        self._is_reading = True
        self._has_ended = False
        self._disk.run(partial(files.open, ref), self._on_opened)

    def next_chunk(self) -> Chunk | None:
        """Give what is to be sent next; None if it has not been read yet: then `on_ready` follows."""
        if not self.ref.size_bytes and self._fd >= 0:
            return Chunk(self.ref.digest, 0, b"")
        if not self._ready:
            self._read_ahead()
            return None
        piece = self._ready[0]
        size = min(self._chunk_bytes, len(piece), self.allowed - self.sent)
        data = piece[:size]
        if size == len(piece):
            self._ready.popleft()
        else:
            self._ready[0] = piece[size:]
        chunk = Chunk(self.ref.digest, self.sent, cast("bytes", data))
        self.sent += size
        self._ready_bytes -= size
        self._read_ahead()
        return chunk

    def end(self) -> None:
        """Stop reading, and close the file."""
        self._has_ended = True
        self._ready.clear()
        if self._fd >= 0:
            self._disk.run(partial(os.close, self._fd))
            self._fd = -1

    def _on_opened(self, found: Any) -> None:
        self._is_reading = False
        if isinstance(found, Exception):
            self._fail(str(found))
            return
        self._fd = found
        if self._has_ended:
            self.end()
        elif not self.ref.size_bytes:
            self._on_ready(self)
        else:
            self._read_ahead()

    def _read_ahead(self) -> None:
        if self._is_reading or self._has_ended or self._fd < 0 or self._ready_bytes >= AHEAD_BYTES:
            return
        size = min(READ_BYTES, self.ref.size_bytes - self._read)
        if size:
            self._is_reading = True
            self._disk.run(partial(_read_at, self._fd, size, self._read), self._on_read)
            self._read += size

    def _on_read(self, piece: Any) -> None:
        self._is_reading = False
        if self._has_ended:
            return
        if isinstance(piece, Exception):
            self._fail(str(piece))
            return
        self._ready.append(memoryview(piece))
        self._ready_bytes += len(piece)
        self._read_ahead()
        self._on_ready(self)

    def _fail(self, reason: str) -> None:
        if not self._has_ended:
            self._on_failed(self, reason)


def _read_at(fd: int, size: int, offset: int) -> bytes:
    piece = os.pread(fd, size, offset)
    while len(piece) < size:
        more = os.pread(fd, size - len(piece), offset + len(piece))
        if not more:
            raise OSError("the file became shorter while it was sent")
        piece += more
    return piece


class Watcher(Protocol):
    """Who is told, on the I/O thread, how a file comes in."""

    def file_opened(self, receiving: FileReceiving) -> object:
        """There is a place for it, so it may be sent."""

    def file_written(self, receiving: FileReceiving) -> object:
        """More of it was written."""

    def file_ended(self, receiving: FileReceiving, reason: str) -> object:
        """It is whole and in its place; or, for a reason, it never will be."""


class FileReceiving:
    """A file on its way in. All methods are called on the I/O thread.

    Args:
        make_writer: called on the disk thread; raises OSError or ValueError if there is no place for it.
    """

    def __init__(self, ref: BlobRef, files: FileTraffic, make_writer: Callable[[], FileWriter], watcher: Watcher,
                 on_done: Callable[[BlobRef], object], on_failed: Callable[[BlobRef, str], object]) -> None:
        self.ref, self.written_bytes, self.credited = ref, 0, 0
        self.on_done, self.on_failed = on_done, on_failed
        self._disk, self._watcher = files.disk, watcher
        self._make_writer = make_writer
        self._writer: FileWriter | None = None  # disk thread
        self._expected_bytes = 0  # received, or about to be
        self._has_ended = False
        self._disk.run(self._open, self._on_opened)

    @property
    def unwritten_bytes(self) -> int:
        """How much of what was received waits for the disk."""
        return self._expected_bytes - self.written_bytes

    def space(self, offset: int, size_bytes: int) -> memoryview | None:
        """Return where the piece after those so far may be put; None: nowhere."""
        if offset != self._expected_bytes or offset + size_bytes > self.ref.size_bytes or self._has_ended:
            return None
        self._expected_bytes = offset + size_bytes
        return memoryview(bytearray(size_bytes))

    def take(self, offset: int, piece: bytes | memoryview) -> None:
        """Have the next piece written."""
        if self._has_ended or (offset and not self._expected_bytes):  # the latter is of a transfer that was given up
            return
        self._expected_bytes = max(self._expected_bytes, offset + len(piece))
        self._disk.run(partial(self._write, offset, piece), self._on_written)

    def end(self) -> None:
        """Drop what was received, if it is not whole."""
        if not self._has_ended:
            self._has_ended = True
            self._disk.run(self._abandon)

    def _open(self) -> None:
        self._writer = self._make_writer()

    def _on_opened(self, problem: Any) -> None:
        if self._has_ended:
            return
        if isinstance(problem, Exception):
            self._watcher.file_ended(self, _say(problem))
        else:
            self._watcher.file_opened(self)

    def _write(self, offset: int, piece: bytes | memoryview) -> bool:
        writer = self._writer
        if writer is None:
            return False
        writer.write(offset, piece)
        if writer.is_complete:
            self._writer = None
            writer.finish()
            return True
        return False

    def _on_written(self, is_whole: Any) -> None:
        if self._has_ended:
            return
        if isinstance(is_whole, Exception):
            self._watcher.file_ended(self, _say(is_whole))
        elif is_whole:
            self._has_ended = True
            self._watcher.file_ended(self, "")
        elif self._writer is not None:
            self.written_bytes = self._writer.written_bytes
            self._watcher.file_written(self)

    def _abandon(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.abandon()


def _say(error: Exception) -> str:
    return str(error) or type(error).__name__
