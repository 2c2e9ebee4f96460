"""Partial results at the client: heard once each, in order, and kept for whoever reads them.

    Partial, from a worker or node ──► hear ──► PartialLog of the task's future ──► callbacks, at once
                                                       └── the newest are kept ──► any number of readers, each at its pace

The rule: the sender is told that a partial result was heard once it is in the log; so the log is bounded, and a reader
that is too slow misses the oldest, and is told how many.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .messages import OutcomeKind, Partial, partial_bytes

if TYPE_CHECKING:
    from .ledger import Session
    from .payload import CallPacker
    from .shipping import BlobStore

__all__ = ["PartialLog", "Partials", "hear"]

KEPT = 10_000
"""Partial results of one task that are kept for readers. Smaller: slow readers miss some. Larger: memory."""

KEPT_BYTES = 64 << 20
"""The same in bytes of their pickles; the newest is kept whatever its size."""

_log = logging.getLogger("distexec")


class _Kept(NamedTuple):
    value: Any
    attempt: int
    size_bytes: int


class PartialLog:
    """What one task has published."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()  # guards all below
        self._kept: deque[_Kept] = deque()
        self._first = 0  # how many came before the oldest that is kept
        self._size_bytes = 0
        self._heard = (0, 0)  # attempt and number of the last
        self._has_ended = False
        self._callbacks: list[_Callback] = []
        self.is_watched = False  # `end` will be called

    # ---- whoever hears the task

    def expects(self, attempt: int, number: int) -> bool:
        """Whether this one is new: after a cut link some are said again. One thread at a time."""
        return (attempt, number) > self._heard

    def add(self, attempt: int, number: int, value: Any, size_bytes: int) -> None:
        """Take in the next one, and tell who waits for it."""
        with self._changed:
            self.skip(attempt, number)
            self._kept.append(_Kept(value, attempt, size_bytes))
            self._size_bytes += size_bytes
            while len(self._kept) > 1 and (len(self._kept) > KEPT or self._size_bytes > KEPT_BYTES):
                self._size_bytes -= self._kept.popleft().size_bytes
                self._first += 1
            callbacks = list(self._callbacks)
            self._changed.notify_all()
        for callback in callbacks:
            callback.run(self)

    def skip(self, attempt: int, number: int) -> None:
        """Note that this one was heard, though it cannot be had."""
        self._heard = attempt, number

    def end(self) -> None:
        """The task is over, and nothing comes any more."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    # ---- readers

    @property
    def first(self) -> int:
        """The position of the oldest that is kept."""
        return self._first

    def call(self, fn: Callable[[Any], object]) -> None:
        """Call a function with each, beginning with what is kept."""
        with self._changed:
            callback = _Callback(fn, self._first)
            self._callbacks.append(callback)
        callback.run(self)

    def next(self, position: int, timeout: float | None) -> tuple[int, _Kept] | None:
        """Wait for the one at `position`, or the first after it that is kept; None once there is none for good.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: position < self._first + len(self._kept) or self._has_ended, timeout):
                raise TimeoutError(f"no partial result of {self._name} in time")
            return self._at(position)

    def take(self, callback: _Callback) -> _Kept | None:
        """Give a callback its next; None: it has all, and runs no more."""
        with self._changed:
            found = self._at(callback.position)
            if found is None:
                callback.is_running = False
                return None
            callback.position = found[0] + 1
            return found[1]

    def _at(self, position: int) -> tuple[int, _Kept] | None:
        if position >= self._first + len(self._kept):
            return None
        if position < self._first:
            _log.warning("%d partial results of %s were dropped before they were read: %d are kept, or %d MiB", self._first -
                         position, self._name, KEPT, KEPT_BYTES >> 20)
            position = self._first
        return position, self._kept[position - self._first]

    def yield_up(self, callback: _Callback) -> None:
        """Let another thread run a callback."""
        with self._changed:
            callback.is_running = False

    def claim(self, callback: _Callback) -> bool:
        """Let a thread run a callback; False if another does, which will see all there is."""
        with self._changed:
            if callback.is_running:
                return False
            callback.is_running = True
            return True


class _Callback:
    """A user's function, called with one value after the other, never by two threads at once."""

    def __init__(self, fn: Callable[[Any], object], position: int) -> None:
        self._fn = fn
        self.position = position  # the log's
        self.is_running = False  # the log's

    def run(self, log: PartialLog) -> None:
        if not log.claim(self):
            return
        while (found := log.take(self)) is not None:
            try:
                self._fn(found.value)
            except BaseException as error:  # SystemExit too: the values that come after this one count
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    log.yield_up(self)
                    raise
                _log.exception("distexec: a callback for partial results failed")


class Partials(Iterator[Any]):
    """Yields a task's partial results as they come, and ends with the task; made by `ClusterFuture.partials`.

    `attempt`: the attempt that published the value yielded last.
    """

    def __init__(self, log: PartialLog, timeout: float | None) -> None:
        self._log, self._position = log, log.first
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self.attempt = 0

    def __next__(self) -> Any:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        found = self._log.next(self._position, left)
        if found is None:
            raise StopIteration
        self._position, self.attempt = found[0] + 1, found[1].attempt
        return found[1].value


# ---- from workers and nodes to the log


class Home(Protocol):
    """Whose tasks they are: the root."""

    packer: CallPacker
    store: BlobStore

    @property
    def session(self) -> Session:
        """Of which they are."""


def hear(home: Home, peer: Any, partial: Partial) -> None:
    """Put a partial result where its task's future finds it, unless nobody wants it. I/O thread.

    Its blobs are in the store, a reference to each being ours.
    """
    task = home.session.tasks.get(partial.seq)
    log: PartialLog | None = None
    if task is not None and task.run.attempt == partial.attempt and task.lane is not None and task.lane.peer is peer:
        find = getattr(task.owner, "partial_log", None)  # nested calls have no future here
        log = find() if find is not None else None
    if log is None or not log.expects(partial.attempt, partial.number):
        home.store.release_all(partial.buffers)
        return
    value, error = _unpack(home, partial)
    if error is None:
        log.add(partial.attempt, partial.number, value, partial_bytes(partial.data, partial.buffers))
    else:
        log.skip(partial.attempt, partial.number)
        _log.error("distexec: partial result %d of task %d cannot be had here: %s", partial.number, partial.seq, error)


def _unpack(home: Home, partial: Partial) -> tuple[Any, BaseException | None]:
    try:
        data, buffers = home.store.take_all(partial.data, partial.buffers)
    except (OSError, MemoryError) as error:
        return None, error
    return home.packer.unpack_outcome(OutcomeKind.VALUE, data, buffers)
