"""A thread that does what may wait for a disk, so that the I/O thread does not: pieces of work, in order, one at a time.

    I/O thread ── run(work, done) ──► queue ──► work() on this thread ──► done(result or exception) on the I/O thread

The rule: what was given is done, in the order given, also after `close` was called; so a descriptor that is closed by a
piece of work is closed after all that used it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["DiskThread"]

Work = Callable[[], Any]
Done = Callable[[Any], object]


class Loop(Protocol):
    """What it needs of the I/O thread."""

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Have a function called by the I/O thread."""


class DiskThread:
    """One thread of its own, started by the first piece of work."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Work, Done | None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _thread and _is_closed, and that nothing is queued behind the end
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def run(self, work: Work, done: Done | None = None) -> None:
        """Have `work()` done; then `done` is called on the I/O thread with what it returned, or the exception it raised."""
        with self._lock:
            if not self._is_closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="distexec-files")
                    self._thread.start()
                self._queue.put((work, done))
                return
        self._do(work, done)  # the thread has ended, so nothing is being done elsewhere

    def close(self) -> None:
        """Return once everything that was given is done. Not on this thread."""
        with self._lock:
            thread, is_first = self._thread, not self._is_closed
            if is_first and thread is not None:
                self._queue.put(None)
        if thread is not None:
            thread.join()
        with self._lock:
            self._is_closed = True

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._do(*job)
        with self._lock:
            self._is_closed = True
        while not self._queue.empty():  # came between
            late = self._queue.get()
            if late is not None:
                self._do(*late)

    def _do(self, work: Work, done: Done | None) -> None:
        try:
            result = work()
        except Exception as error:  # whatever it is, whoever waits must hear of it
            result = error
        if done is not None:
            self._loop.call_soon(done, result)
