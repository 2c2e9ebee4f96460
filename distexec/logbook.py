"""What tasks logged, given to the client's own loggers.

    I/O thread ── Record ──► Logbook ── thread "distexec-log", there only meanwhile ──► logger of that name ──► its handlers

Handlers are the user's code and may take their time. Rule: nobody waits for them, except that the I/O thread gives them a
moment before it tells of a result, once each time they fall behind; and what waits for them is bounded.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from .logrecords import unpack
from .messages import Record

__all__ = ["Logbook"]

PATIENCE_S = 0.05
"""How long the I/O thread waits for the handlers. Smaller: more results are there before what was logged on the way to them.
Larger: one slow handler delays everybody's results."""

MAX_WAITING = 10_000
"""Records that may wait for the handlers; beyond that they are dropped, which is logged. Larger: more memory."""

IDLE_S = 1.0
"""How long the thread stays when there is nothing to do."""

_log = logging.getLogger("distexec")


class Logbook:
    """The log records of one executor's tasks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all below
        self._waiting: deque[tuple[str, Record]] = deque()
        self._lost = 0
        self._thread: threading.Thread | None = None
        self._is_behind = self._is_over = False
        self.is_busy = False  # whether some wait or are being handled; read without the lock

    def __repr__(self) -> str:
        return f"<Logbook: {len(self._waiting)} records wait>"

    def take(self, node: str, record: Record) -> None:
        """Have a record from a node handled. Any thread."""
        with self._changed:
            if self._is_over:
                return
            self._lost += record.lost
            if len(self._waiting) >= MAX_WAITING:
                self._lost += 1
                return
            self._waiting.append((node, record))
            self.is_busy = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="distexec-log")
                self._thread.start()
            self._changed.notify_all()

    def catch_up(self) -> None:
        """Wait a moment until all are handled, unless that was in vain since it last was so."""
        with self._changed:
            if self._is_behind or threading.current_thread() is self._thread:
                return
            self._is_behind = not self._changed.wait_for(lambda: not self.is_busy, PATIENCE_S)

    def close(self) -> None:
        """Wait until all are handled, or `give_up` was called. Nothing is taken any more."""
        with self._changed:
            self._is_over = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def give_up(self) -> None:
        """Drop what waits. Any thread."""
        with self._changed:
            self._waiting.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._lost:
                    self.is_busy = self._is_behind = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._waiting or self._is_over, IDLE_S)
                if not self._waiting and not self._lost:
                    self._thread = None
                    return
                self.is_busy = True
                node, record = self._waiting.popleft() if self._waiting else ("", None)
                lost, self._lost = (0, self._lost) if self._waiting else (self._lost, 0)
            if record is not None:
                _handle(node, record)
            if lost:
                _log.warning("%d log records of tasks were dropped: there were more than could be sent or handled", lost)


def _handle(node: str, record: Record) -> None:
    logger = logging.getLogger(record.name)
    if not logger.isEnabledFor(record.level):
        return
    try:
        logger.handle(logging.makeLogRecord(unpack(record, node)))
    except Exception as error:  # a filter of the user's, say; handlers tell of their own errors
        _log.warning("a log record of task %d on node %r could not be handled: %r", record.seq, node, error)
