"""What a dying worker leaves to be read: the end of its stderr, and the Python stacks of a crash.

    sys.stderr ─► Echo ─► descriptor 2, as before, and the ring ┐ memory shared with the pool, which
    faulthandler ─► a descriptor ─► the room for stacks         ┘ reads it when the worker is dead

For workers whose output nobody captures: they print where their client does, and the pool sees nothing of it. The rule:
what is printed arrives as if nobody listened. What C code writes to descriptor 2 by itself is not kept. Part of every
worker, so it imports little.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

TAIL_BYTES = 4096
"""Of stderr, kept as evidence of a death."""

STACKS_BYTES = 12 << 10
"""Of stacks. Smaller: a crash in a deep recursion, of which 100 frames are told, would be cut off."""

_COUNT_BYTES = 8
WORDS_BYTES = _COUNT_BYTES + TAIL_BYTES + STACKS_BYTES
"""The memory in all."""

_FATAL = "Fatal Python error"


class LastWords:
    """The shared memory, seen from either side; `memory` has WORDS_BYTES and begins as zeros."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._count = memory[:_COUNT_BYTES].cast("q")  # bytes ever printed
        self._ring = memory[_COUNT_BYTES:_COUNT_BYTES + TAIL_BYTES]
        self._stacks = memory[_COUNT_BYTES + TAIL_BYTES:]

    def keep(self, printed: bytes) -> None:
        """Worker: note what was printed. ValueError once it was closed."""
        at = self._count[0] % TAIL_BYTES
        last = printed[-TAIL_BYTES:]
        at = (at + len(printed) - len(last)) % TAIL_BYTES
        first = min(len(last), TAIL_BYTES - at)
        self._ring[at:at + first] = last[:first]
        self._ring[:len(last) - first] = last[first:]
        self._count[0] += len(printed)

    def listen(self, fd: int, offset: int) -> None:
        """Worker: have what it prints, and the stacks of a crash, kept; `fd` is the memory's file, which has it at `offset`.

        The descriptor becomes ours, for as long as the process lives.
        """
        import faulthandler

        os.set_inheritable(fd, False)
        os.lseek(fd, offset + _COUNT_BYTES + TAIL_BYTES, os.SEEK_SET)
        faulthandler.enable(file=fd)
        old: Any = sys.stderr
        if old is not None and hasattr(old, "encoding"):
            sys.stderr = io.TextIOWrapper(
                io.BufferedWriter(Echo(self)), old.encoding, old.errors, line_buffering=True)

    @property
    def printed(self) -> str:
        """Pool: the end of what was printed."""
        count, ring = self._count[0], bytes(self._ring)
        at = count % TAIL_BYTES
        return (ring[:count] if count <= TAIL_BYTES else ring[at:] + ring[:at]).decode(errors="replace")

    @property
    def stacks(self) -> str:
        """Pool: what the process said of the crash it died of."""
        return bytes(self._stacks).partition(b"\0")[0].decode(errors="replace")

    def close(self) -> None:
        """Let go of the memory; using it afterwards raises ValueError."""
        for part in (self._count, self._ring, self._stacks, self._memory):
            part.release()


class Echo(io.RawIOBase):
    """Descriptor 2, and a note of what was written to it."""

    def __init__(self, words: LastWords) -> None:
        self._words = words
        self.name = "<stderr>"
        self.mode = "wb"

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The standard error's, for those who write to it directly."""
        return 2

    def isatty(self) -> bool:
        """Whether the standard error is a terminal."""
        return os.isatty(2)

    def write(self, data: Any) -> int:
        """Write, and keep."""
        done = os.write(2, data)
        try:
            self._words.keep(bytes(data[:done]))
        except ValueError:
            pass  # a process that the task forked: the memory is its parent's
        return done


def shorten(text: str) -> str:
    """Keep of a stderr what tells most: the beginning of the last crash's stacks, and the end of what was printed."""
    before, fatal, stacks = text.rpartition(_FATAL)
    if not fatal or len(fatal + stacks) <= TAIL_BYTES:
        return text[-TAIL_BYTES:]
    return before[-TAIL_BYTES // 4:] + (fatal + stacks)[:TAIL_BYTES]
