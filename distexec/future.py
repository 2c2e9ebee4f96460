"""`ClusterFuture`: the standard library's `Future` with what is known of its task, and far cheaper while nobody waits.

The standard Future makes a Condition when it is born; most futures of a long run are never waited on one by one. Here the
Condition is born when somebody first needs it, and until then a lock shared by all futures guards the state. Rule: whoever
finds no Condition acts under that lock and looks again; whoever makes one makes it under that lock.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from .messages import Stream

if TYPE_CHECKING:
    from .ledger import Task
    from .partials import PartialLog, Partials
    from .printed import Printed

__all__ = ["ClusterFuture", "Timing"]

T = TypeVar("T")

_PENDING, _RUNNING, _CANCELLED, _NOTIFIED, _FINISHED = (
    "PENDING", "RUNNING", "CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED")

_DONE = frozenset((_CANCELLED, _NOTIFIED, _FINISHED))
_WITHDRAWN = frozenset((_CANCELLED, _NOTIFIED))

_birth = threading.RLock()  # guards every future that has no Condition; reentrant, for finalizers that touch a future


class Timing(NamedTuple):
    """When things happened to a task: seconds on this machine's monotonic clock, None where they have not happened."""

    submitted_at: float
    finished_at: float | None
    run_s: float | None
    """How long the function itself ran, on its node."""

    @property
    def waited_s(self) -> float | None:
        """Seconds from submit to the end that were not spent running: queueing, travelling, being found."""
        if self.finished_at is None or self.run_s is None:
            return None
        return max(0.0, self.finished_at - self.submitted_at - self.run_s)


class Control(Protocol):
    """What a future needs of the executor behind it."""

    def withdraw(self, task: Task) -> object:
        """Forget a task that was never handed out."""

    def kill(self, task: Task) -> object:
        """End a task wherever it is."""

    def captures(self, node: str) -> bool:
        """Whether what tasks print on a node is kept for their futures."""


class ClusterFuture(Future[T]):
    """The future of one task; everything `concurrent.futures.Future` promises, and:

    `task_id` (int, counted from 1 per executor), `node` (name of the node that ran or runs it, "" before), `attempts` (how
    often it was started as far as known; more than 1 after a worker was lost), `timing` (a `Timing`), `stdout` and `stderr`
    (what it printed), `kill()`.
    """

    __slots__ = ("_attempts", "_callbacks", "_cond", "_control", "_finished_at", "_node", "_run_ns", "_submitted_at",
                 "_task", "_task_id", "_waiting", "_waker")

    printed: Printed | None = None  # as below: of those whose tasks have printed
    _log: PartialLog | None = None  # of the class, and of those futures whose tasks have published or are read

    def __init__(self) -> None:
        # Not the parent's __init__: it would make the Condition. These are all of its other attributes (3.11 to 3.14).
        self._state = _PENDING
        self._result = None
        self._exception = None
        self._cond: threading.Condition | None = None
        self._waiting: list[Any] | None = None
        self._waker: _thread.LockType | None = None
        self._callbacks: list[Callable[[Future[T]], object]] | None = None
        self._task: Task | None = None
        self._task_id = 0
        self._control: Control | None = None
        self._submitted_at = time.monotonic()
        self._finished_at = 0.0
        self._run_ns = -1
        self._node = ""
        self._attempts = 0

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        """The parent's attribute, born on first use."""
        condition = self._cond
        if condition is None:
            with _birth:
                condition = self._cond
                if condition is None:
                    condition = self._cond = threading.Condition()
        return condition

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        """The parent's attribute, used with the Condition held; born on first use."""
        if self._waiting is None:
            self._waiting = []
        return self._waiting

    @property
    def _done_callbacks(self) -> list[Callable[[Future[T]], object]]:
        """The parent's attribute, appended to with the Condition held; born on first use."""
        if self._callbacks is None:
            self._callbacks = []
        return self._callbacks

    # ---- for the user

    def done(self) -> bool:
        """Whether it is cancelled or finished."""
        return self._state in _DONE

    def running(self) -> bool:
        """Whether it was handed out and has not ended."""
        return self._state == _RUNNING

    def cancelled(self) -> bool:
        """Whether it was withdrawn."""
        return self._state in _WITHDRAWN

    def result(self, timeout: float | None = None) -> T:
        """Return the value, or raise what the call raised; wait for it at most `timeout` seconds (TimeoutError)."""
        if self._state == _RUNNING and self._waker is None and self._wait(timeout):
            timeout = 0.0
        if self._state == _FINISHED and self._exception is None:
            return self._result  # type: ignore[return-value]
        try:
            return super().result(timeout)
        finally:
            del self  # break the cycle with the exception's traceback

    def _wait(self, timeout: float | None) -> bool:
        """Wait on a lock of our own, which costs half of what a Condition does. False: another thread does that already."""
        waker = _thread.allocate_lock()
        waker.acquire()
        with _birth:
            if self._waker is not None:
                return False
            self._waker = waker
        if self._state == _RUNNING:  # as in `conclude`: who ends it sees our lock, or we see the state
            waker.acquire(timeout=-1 if timeout is None else max(0.0, min(timeout, threading.TIMEOUT_MAX)))
        return True

    @property
    def task_id(self) -> int:
        """The number of the task in its executor, from 1."""
        return self._task_id

    @property
    def node(self) -> str:
        """The node that ran the task last, "" while it was on none."""
        return self._task.node if self._task is not None else self._node

    @property
    def attempts(self) -> int:
        """How often the task was begun, as far as this end knows: 0 while queued, 1 normally, more after losses."""
        task = self._task
        if task is None:
            return self._attempts
        return task.deaths + (task.lane is not None)

    @property
    def timing(self) -> Timing:
        """When the task was submitted and ended, and how long it ran."""
        return Timing(self._submitted_at, self._finished_at or None, self._run_ns / 1e9 if self._run_ns >= 0 else None)

    @property
    def stdout(self) -> str | None:
        """What the last attempt wrote to its standard output, so far or, once it is done, in all: of more than 128 KiB the
        first and the last 64, and a line that says how much is missing between. None: nobody captured it (see `capture=`).
        """
        return self._text(Stream.STDOUT)

    @property
    def stderr(self) -> str | None:
        """The same of its standard error."""
        return self._text(Stream.STDERR)

    def _text(self, stream: Stream) -> str | None:
        printed = self.printed
        if printed is not None:
            return printed.text(stream)
        control, node = self._control, self.node
        return "" if node and control is not None and control.captures(node) else None

    def cancel(self) -> bool:
        """Withdraw the task if it was never handed out; True if it is (or was) withdrawn. See `kill` for the others."""
        if self._state in (_RUNNING, _FINISHED):
            return False
        is_first = self._cancel_unwatched()
        if not is_first:
            if not super().cancel():
                return False
            is_first = self._notify_cancel()
        task, control = self._task, self._control
        if is_first:
            self._finished_at = time.monotonic()
            self._task = None  # it has the arguments
            if task is not None and control is not None:
                control.withdraw(task)
        return True

    def partials(self, timeout: float | None = None) -> Partials:
        """Iterate over what the task publishes (`current_task().publish`), as it comes, until the task has ended.

        Each iterator yields all, in order, at its own pace; the last 10,000 are kept, or 64 MiB, and who reads too slowly
        misses older ones. If the task is run again after a loss, what the lost attempt published stays, and what the next
        one publishes follows: the iterator's `attempt` says whose the value yielded last is. `result` tells how it ends.

        Args:
            timeout: seconds from this call after which the iterator raises TimeoutError.
        """
        from .partials import Partials
        return Partials(self._watched_log(), timeout)

    def add_partial_callback(self, fn: Callable[[Any], object]) -> None:
        """Call `fn(value)` with each value that the task publishes, in order, those that came before first.

        It is called by the thread that receives it, or this one; what it raises is logged. It may kill this or other tasks.
        """
        self._watched_log().call(fn)

    def kill(self) -> bool:
        """End the task wherever it is: withdrawn if queued, recalled if unstarted, its whole process tree ended if running.

        The future then raises `TaskKilled` (or `CancelledError`, if it was still queued), unless the task was faster.
        Returns False if the task has ended already. Does not wait.
        """
        if self.cancel():
            return True
        task, control = self._task, self._control
        if task is None or control is None or self.done():
            return False
        control.kill(task)
        return True

    # ---- for the executor

    def bind(self, task: Task, control: Control) -> None:
        """Join the future to its task."""
        self._task, self._control, self._task_id = task, control, task.run.seq

    def partial_log(self) -> PartialLog:
        """Give what the task has published."""
        if self._log is None:
            from .partials import PartialLog
            with _birth:
                if self._log is None:
                    self._log = PartialLog(f"task {self._task_id}")
        return self._log

    def _watched_log(self) -> PartialLog:
        log = self.partial_log()
        if not log.is_watched:
            log.is_watched = True
            self.add_done_callback(lambda _: log.end())
        return log

    def restore(self, task_id: int, node: str, attempts: int) -> None:
        """Describe a task of an earlier life of the session, which is recorded."""
        self._task_id, self._node, self._attempts = task_id, node, attempts

    def claim(self) -> bool:
        """Turn RUNNING, for good; False if the user has cancelled."""
        if self._cond is None:
            with _birth:
                if self._cond is None:
                    if self._state == _PENDING:
                        self._state = _RUNNING
                    return self._state == _RUNNING
        with self._condition:
            if self._state == _PENDING:
                self._state = _RUNNING
            return self._state == _RUNNING

    def _cancel_unwatched(self) -> bool:
        """Withdraw it if nobody can be waiting or have left a callback: both take the Condition."""
        with _birth:
            if self._cond is not None or self._state != _PENDING:
                return False
            self._state = _NOTIFIED
            return True

    def _notify_cancel(self) -> bool:
        with self._condition:
            return self._state == _CANCELLED and not self.set_running_or_notify_cancel()

    def conclude(self, result: Any, exception: BaseException | None, run_ns: int = -1) -> None:
        """End the future, once; only the executor does. What the task's record knew is kept, the record is let go."""
        task, self._task = self._task, None
        if task is not None:
            self._node = task.node
            self._attempts = task.deaths + (1 if run_ns >= 0 else 0)
        self._run_ns = run_ns
        self._finished_at = time.monotonic()
        if self._state == _RUNNING:
            # Nobody else changes a running future. First the state, then a look for a Condition; who waits makes the
            # Condition first, then looks at the state: one of the two sees the other.
            self._result, self._exception = result, exception
            self._state = _FINISHED
            if self._waker is not None:
                self._waker.release()
            if self._cond is not None:
                self._tell(exception)
        elif not self._end_pending(result, exception):
            return
        if self._callbacks:
            self._invoke_callbacks()  # type: ignore[attr-defined]

    def _end_pending(self, result: Any, exception: BaseException | None) -> bool:
        """End a future that was never handed out; False if it was cancelled or ended before."""
        with self._condition:
            if self._state != _PENDING:
                return False
            self._result, self._exception = result, exception
            self._state = _FINISHED
        self._tell(exception)
        return True

    def _tell(self, exception: BaseException | None) -> None:
        """Wake those who wait."""
        with self._condition:
            for waiter in self._waiting or ():
                if exception is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            self._condition.notify_all()

    def __repr__(self) -> str:
        where = f" on {self.node!r}" if self.node else ""
        text = super().__repr__()[1:-1]
        return f"<{text.replace(' at ', f' {self.task_id} at ', 1)}{where}>"

