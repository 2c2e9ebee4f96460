"""What tasks printed elsewhere, written to one of the program's own streams, without making the writer wait for a reader.

    I/O thread ── write ──► stream, as long as it takes the bytes
                     └────► what it does not take ──► thread "distexec-echo", there only meanwhile ──► stream

Rule: the I/O thread waits at most `PATIENCE_S` for who reads the stream, once each time it falls behind. Until then what a
task printed is out before its result is told.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
import time
from collections import deque
from typing import Any

__all__ = ["Echo"]

PATIENCE_S = 0.05
"""How long the I/O thread waits for the reader. Smaller: a busy reader sees output after the result it came with. Larger:
one that stands still delays everybody's results."""

PIECE_CHARS = 1024
"""Written at once; as UTF-8 no more than PIPE_BUF, so that a pipe that is ready takes it whole."""

BACKLOG_CHARS = 32 << 20
"""What may wait for the reader; beyond that output is dropped, and the stream told how much. Larger: more of our memory."""

RATE_BYTES_S = 4 << 20
"""What a stream may be flooded with for long. Larger: terminals and log files are filled with what nobody reads."""

BURST_BYTES = 64 << 20
"""What it may be given at once after it was quiet. Smaller: a large result that is printed is not whole."""

LOOK_S = 0.2
"""How often the thread looks whether it is to stop while the reader stands still."""


class Rate:
    """Says how much may be written: what is left of `BURST_BYTES`, which fills up again at `RATE_BYTES_S`.

    Who was refused is again until there is enough for a second, so that what is left out is in few places.
    """

    def __init__(self, now: float) -> None:
        self._now = now
        self._left = float(BURST_BYTES)
        self._is_flooded = False

    def allows(self, size_bytes: int, now: float) -> bool:
        """Take so much away, if it is there, at a time in seconds."""
        self._left = min(BURST_BYTES, self._left + (now - self._now) * RATE_BYTES_S)
        self._now = now
        self._is_flooded = size_bytes > self._left or (self._is_flooded and self._left < RATE_BYTES_S)
        if not self._is_flooded:
            self._left -= size_bytes
        return not self._is_flooded


class Echo:
    """Writes to `sys.stdout` or `sys.stderr`, whichever it is named after and whatever the program made of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()  # guards all below
        self._waiting: deque[str] = deque()
        self._waiting_chars = self._dropped_chars = 0
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._rate = Rate(time.monotonic())  # this and what follows: the writer's
        self._left_out_bytes = 0
        self._is_in_line = False

    def __repr__(self) -> str:
        return f"<Echo to {self._name}: {self._waiting_chars} characters wait>"

    def write(self, data: bytes) -> None:
        """Write, or put in line behind what waits already. One thread only."""
        if not self._rate.allows(len(data), time.monotonic()):
            self._left_out_bytes += len(data)
            return
        if self._left_out_bytes:
            self._tell_left_out()
        self._write(data.decode("utf-8", "replace"))
        self._is_in_line = not data.endswith((b"\n", b"\r"))

    def _tell_left_out(self) -> None:
        size, self._left_out_bytes = self._left_out_bytes, 0
        line_end = "\n" if self._is_in_line else ""
        self._write(f"{line_end}[distexec: {size:,} bytes are left out here: tasks print more than "
                    f"{RATE_BYTES_S >> 20} MiB a second, and have done for long]\n")
        self._is_in_line = False

    def _write(self, text: str) -> None:
        with self._changed:
            if self._thread is not None:
                self._put(text)
                return
        rest = _write(self._name, text, PATIENCE_S)
        if rest:
            with self._changed:
                self._put(rest)
                self._thread = threading.Thread(target=self._run, name="distexec-echo")
                self._thread.start()

    def close(self) -> None:
        """Wait until the reader has everything, or `give_up` was called."""
        if self._left_out_bytes:
            self._tell_left_out()
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join()

    def give_up(self) -> None:
        """Drop what the reader did not take yet. Any thread."""
        with self._changed:
            self._is_over = True

    def _put(self, text: str) -> None:
        if self._waiting_chars > BACKLOG_CHARS:
            self._dropped_chars += len(text)
            return
        self._waiting.append(text)
        self._waiting_chars += len(text)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_over or not self._waiting:
                    self._waiting.clear()
                    self._waiting_chars, self._thread = 0, None
                    return
                text = self._waiting.popleft()
                self._waiting_chars -= len(text)
                if not self._waiting and self._dropped_chars:
                    text += (f"\n[distexec: {self._dropped_chars:,} more characters were printed and dropped: too many "
                             "waited to be read]\n")
                    self._dropped_chars = 0
            while text and not self._is_over:
                text = _write(self._name, text, LOOK_S)


def _write(name: str, text: str, patience_s: float) -> str:
    """Write what the stream takes in that time; give the rest."""
    target = getattr(sys, name)
    deadline = time.monotonic() + patience_s
    try:
        poll = _slow_reader(target)
        if poll is None:
            target.write(text)
            target.flush()
            return ""
        for start in range(0, len(text), PIECE_CHARS):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return text[start:]
            target.write(text[start:start + PIECE_CHARS])
            target.flush()
    except (AttributeError, OSError, ValueError):
        pass  # the program closed or replaced its own stream: it does not want to see output
    return ""


def _slow_reader(target: Any) -> Any:
    """Give what to ask before each piece if somebody may be slow to read the stream; None for files, and what is no file."""
    try:
        fd = target.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    mode = os.fstat(fd).st_mode
    if not hasattr(select, "poll") or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
        return None
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll
