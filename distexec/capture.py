"""What one worker prints, read from the files in memory that its descriptors 1 and 2 are.

    worker ── writes ──► two files that only grow ── pread ──► Capture ── pieces: task, stream, bytes ──► pool's owner

Rule: every byte is handed over once, as the task's that certainly printed it: an outcome says where its task's output ended.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator

from distexec.lastwords import STACKS_BYTES, TAIL_BYTES, shorten
from distexec.memory import shared_file
from distexec.messages import Outcome, Returned, Stream
from distexec.worker import WorkerPage

WROTE_BYTES = 256 << 10
"""The most bytes of output handed over at once, so that they fit a message."""

SPENT_BYTES = 1 << 20
"""Of output already read, after which its memory is given back."""

Piece = tuple[int, Stream, bytes]  # of output: the task, where to, what


class Capture:
    """What one worker prints, and which of its tasks printed it.

    Both streams are files in memory that only grow. An outcome says where they ended after its task: what lies before
    belongs to that task. Beyond lies what the oldest unanswered task printed, and perhaps those after it.
    """

    def __init__(self) -> None:
        out = _append_only()
        try:
            self.fds = (out, _append_only())
        except OSError:
            os.close(out)
            raise
        self._read = [0, 0]
        self._spent = [0, 0]
        self._seqs: deque[int] = deque()  # of the Runs queued and not answered, in order
        self._answered = 0
        self._last_seq: int | None = None

    @property
    def is_expecting(self) -> bool:
        """Whether a task may print."""
        return bool(self._seqs)

    def expect(self, seq: int) -> None:
        """A Run was queued."""
        self._seqs.append(seq)

    def answered(self, message: Outcome | Returned) -> Iterable[Piece]:
        """Give what the task printed that this answers, beyond what `live` gave already; to be used up at once."""
        if type(message) is Returned:
            for _ in message.tasks:
                self._seqs.popleft()
            self._answered += len(message.tasks)
            return ()
        self._last_seq = seq = self._seqs.popleft()
        self._answered += 1
        ends = message.ends  # type: ignore[union-attr]
        return () if ends is None else self._until(ends, seq)

    def live(self, page: WorkerPage) -> Iterable[Piece]:
        """Give what the running task has printed so far, if it is certain which task that is; as `answered`."""
        order = page.started
        if order != self._answered + 1 or not self._seqs:
            return ()
        ends = [os.fstat(fd).st_size for fd in self.fds]
        if page.started != order:
            return ()  # the next one has begun, and may have printed some of it
        return self._until(ends, self._seqs[0])

    def rest(self) -> Iterable[Piece]:
        """Give what a dead worker's last task printed; as `answered`."""
        seq = self._seqs[0] if self._seqs else self._last_seq
        return () if seq is None else self._until([os.fstat(fd).st_size for fd in self.fds], seq)

    def tail(self) -> str:
        """Return the last it wrote to stderr."""
        fd = self.fds[1]
        most = TAIL_BYTES + STACKS_BYTES
        return shorten(os.pread(fd, most, max(0, os.fstat(fd).st_size - most)).decode(errors="replace"))

    def close(self) -> None:
        """Let go of both files."""
        for fd in self.fds:
            os.close(fd)
        self.fds = ()  # type: ignore[assignment]

    def _until(self, ends: Iterable[int], seq: int) -> Iterator[Piece]:
        """Yield what lies before the ends, read piece by piece: it may be more than there is memory for."""
        for stream, end in enumerate(ends):
            yield from self._pieces(seq, stream, end)

    def _pieces(self, seq: int, stream: int, end: int) -> Iterator[Piece]:
        while self._read[stream] < end:
            data = os.pread(self.fds[stream], min(WROTE_BYTES, end - self._read[stream]), self._read[stream])
            if not data:
                return  # the task cut the file short
            self._read[stream] += len(data)
            yield seq, Stream(stream + 1), data
        self._give_back(stream)

    def _give_back(self, stream: int) -> None:
        """Free the memory of what was read, short of what `tail` may still want."""
        end = (self._read[stream] - TAIL_BYTES - STACKS_BYTES) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        start = self._spent[stream]
        if end - start >= SPENT_BYTES and hasattr(mmap, "MADV_REMOVE"):
            with mmap.mmap(self.fds[stream], end - start, offset=start) as spent:
                spent.madvise(mmap.MADV_REMOVE)
            self._spent[stream] = end


def _append_only() -> int:
    fd = shared_file()
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)  # a task's children write too
    return fd
