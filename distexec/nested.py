"""The executor that a task has of its own cluster: calls made inside calls.

    task ── submit ──► Submit ──► outbox ──► pool … root          future.result() ── Blocked: this worker's slot is lent
         ◄── future ◄── receiver thread ◄── Answer ◄──────────────┘

An executor pickles to its session's label; unpickled in a worker of that session it is a `NestedExecutor`, which speaks over
the worker's own link. While a task has made calls a thread receives on that link: answers wake futures, what is for later
tasks is put by. Rule: whoever waits for a call of its own lends its slot, however it waits: in `result`, `exception`,
`concurrent.futures.wait`, `as_completed` or an iterator of `map`.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, InvalidStateError
from concurrent.futures import wait as wait_for_all
from typing import Any, TypeVar

from . import worker as worker_module
from .errors import DistexecError, TaskKilled, TaskTimeout, WorkerLost
from .mapping import Submissions
from .memory import Mappings
from .messages import (
    Answer,
    Blocked,
    Forget,
    Options,
    OutcomeKind,
    Refuse,
    Run,
    Segment,
    Submit,
    Took,
)
from .outbox import wait_thread_gone
from .payload import CallPacker
from .resultfiles import close_parts, put_apart
from .shared import Shared, share_in_task
from .taskoptions import TaskOptions, changed

__all__ = ["NestedExecutor", "NestedFuture", "homes", "rejoin"]

T = TypeVar("T")

homes: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The executors of this process, by the label of their session."""

NO_FILES = ("files= is for calls made by the client: a task gives files to its own calls as arguments, or sends them to the "
            "client first (current_task().send_file)")

_nest: Nest | None = None  # this worker's, once an executor was unpickled in it


def rejoin(label: str, options: tuple[Any, ...]) -> Any:
    """Unpickle an executor: in a task of its session one that makes nested calls, in its own process the executor itself.

    Raises DistexecError anywhere else.
    """
    global _nest
    here = worker_module.this_worker
    wanted = TaskOptions(*options)
    if here is not None and here.label == label:
        if _nest is None:
            _nest = Nest(here)
        return NestedExecutor(_nest, wanted)
    home = homes.get(label)
    if home is None:
        raise DistexecError("an executor can be used in the tasks that were submitted to it, and in the process that made "
                            "it; this is neither: make another executor here, or submit to this one from there")
    return home if wanted == TaskOptions() else home.view(wanted)


# ---- what the user sees


class NestedExecutor(Executor):
    """Inside a task: the executor it was submitted to. Calls go to the same nodes; who waits for them lends its slot.

    Calls that are not waited for go on after the task has returned a value, and are ended if it raises or is lost. A time
    limit of the task counts the time that it waits. What the task changed of the program's globals stays in its worker.
    """

    def __init__(self, nest: Nest, options: TaskOptions) -> None:
        self._nest, self._options = nest, options

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> NestedFuture[T]:
        """Run `fn(*args, **kwargs)` on some node and return its future. What cannot be pickled fails the future.

        Raises RuntimeError outside a task: in a process that it forked, or in a thread that outlived it.
        """
        return self._nest.submit(fn, args, kwargs, self._options)

    def map(self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
            buffersize: int | None = None, ordered: bool = True) -> Iterator[T]:
        """Run `fn` on the items of the iterables, zipped, and yield the results; as `ClusterExecutor.map`.

        Each item is a call of its own, whatever `chunksize` says.
        """
        if isinstance(chunksize, bool) or not isinstance(chunksize, int) or chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and (not isinstance(buffersize, int) or buffersize < 1):
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        items: Iterator[tuple[Any, ...]] = zip(*iterables)  # noqa: B905 - as the standard executors: the shortest decides

        def submit(calls: Sequence[tuple[Any, ...]]) -> list[NestedFuture[Any]]:
            return [self._nest.submit(fn, args, {}, self._options) for args in calls]

        return _Submissions(self._nest, submit, items, buffersize).results(deadline, ordered)

    def share(self, value: T) -> Shared[T]:
        """Put a value by for many calls; as `ClusterExecutor.share`, but workers keep it until they have too many."""
        return share_in_task(self._nest.packer, value)

    def options(self, **changes: Any) -> NestedExecutor:
        """Return a view whose calls have other options: `retries=, timeout=, priority=, node=`."""
        if changes.get("files"):
            raise ValueError(NO_FILES)
        if "key" in changes:
            raise ValueError("key= names a call in a journal, and nested calls are not recorded; leave it out")
        return NestedExecutor(self._nest, changed(self._options, **changes))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the calls this task has made, if `wait`. The cluster goes on, and this executor can be used again."""
        self._nest.finish(wait, cancel_futures)

    def __reduce__(self) -> tuple[Any, ...]:
        return rejoin, (self._nest.label, tuple(self._options))

    def __repr__(self) -> str:
        return f"<NestedExecutor of session {self._nest.label}>"


class NestedFuture(Future[T]):
    """The future of a nested call, PENDING until it ends, for no more is known here.

    `cancel()` gives the call up: one that has not begun is not run, one that has is left to end, and nobody hears of it.
    """

    def __init__(self, nest: Nest) -> None:
        super().__init__()
        self.nest = nest
        self.call = 0
        self._waiters = _Waiters(nest)

    def result(self, timeout: float | None = None) -> T:
        """Return the value, or raise what the call raised; the slot is lent meanwhile.

        Raises TimeoutError after `timeout` seconds, DistexecError if too many tasks wait already.
        """
        if not self.done():
            self.nest.wait_done(self, timeout)
        return super().result(0.0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, None if nothing; otherwise as `result`."""
        if not self.done():
            self.nest.wait_done(self, timeout)
        return super().exception(0.0)

    def cancel(self) -> bool:
        """Give the call up; False if it has ended."""
        if not super().cancel():
            return False
        self.set_running_or_notify_cancel()
        self.nest.give_up(self)
        return True


class _Waiters(list[Any]):
    """Who waits for a future by `wait` or `as_completed`: they wait on an event, which is made to lend the slot."""

    def __init__(self, nest: Nest) -> None:
        super().__init__()
        self._nest = nest

    def append(self, waiter: Any) -> None:
        """Called by concurrent.futures before anybody waits on the event."""
        if type(waiter.event) is threading.Event:
            waiter.event = _LendingEvent(self._nest)
        super().append(waiter)


class _LendingEvent(threading.Event):
    """Waiting for it lends the slot of the task."""

    def __init__(self, nest: Nest) -> None:
        super().__init__()
        self._nest = nest

    def wait(self, timeout: float | None = None) -> bool:
        """Wait; DistexecError if that is refused."""
        if self.is_set():
            return True
        with self._nest.lending(self.set):
            is_set = super().wait(timeout)
            self._nest.check_refusal()
        return is_set


class _Submissions(Submissions):
    """The calls of a map inside a task."""

    def __init__(self, nest: Nest, submit: Any, calls: Iterator[tuple[Any, ...]], buffersize: int | None) -> None:
        super().__init__(submit, calls, buffersize)
        self._nest = nest

    def _next(self, deadline: float | None) -> Future[Any]:
        ended = self._ended
        if ended is None or not ended.empty():
            return super()._next(deadline)
        nobody: Any = None
        with self._nest.lending(lambda: ended.put(nobody)):
            future = super()._next(deadline)
            if future is None:
                self._nest.check_refusal()
        return future


# ---- the worker's side


class Nest:
    """The nested calls of the task that a worker runs. Any thread of the task may use it."""

    def __init__(self, worker: worker_module.Worker) -> None:
        self.label = worker.label
        self._worker = worker
        self.packer = CallPacker(is_nested=True)
        self._lock = threading.RLock()  # guards what follows, and the order of what is said
        self._run: Run | None = None  # the task that has made calls
        self._last_call = 0
        self._futures: dict[int, NestedFuture[Any]] = {}  # not ended
        self._waiting = self._waits = 0  # threads that wait; how often the slot was lent
        self._refusal = 0  # so many tasks wait already that this one must not
        self._wakers: list[Callable[[], object]] = []
        self._receiver: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._is_forked = False
        worker.nest = self
        os.register_at_fork(before=self._prepare_fork, after_in_parent=self._after_fork, after_in_child=self._forsake)

    # ---- calls

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
               options: TaskOptions) -> NestedFuture[Any]:
        """Make a call of the running task."""
        future: NestedFuture[Any] = NestedFuture(self)
        segments: list[tuple[Segment, int]] = []
        try:
            code, views, key = self.packer.pack_function(fn)
            function, function_buffers, segments = put_apart(code, views)
            data, views = self.packer.pack_call(args, kwargs, key)
            data, buffers, more = put_apart(data, views)
            segments += more
        except (Exception, SystemExit) as error:  # what a user's __reduce__ raises is the call's failure
            close_parts(segments)
            future.set_exception(error)
            return future
        travels = Options(options.timeout_s or 0.0, options.priority, options.node, options.retries == 0)
        with self._lock:
            try:
                run = self._begin()
            except BaseException:
                close_parts(segments)
                raise
            self._last_call = future.call = self._last_call + 1
            self._futures[future.call] = future
            submit = Submit(run.session, run.seq, run.attempt, future.call, key, function, function_buffers, data, buffers,
                            travels, -1 if options.retries is None else options.retries)
            self._worker.outbox.append_large(submit, segments)
            self._worker.outbox.flush_soon()
        return future

    def _begin(self) -> Run:
        """Give the task that runs; from its first call on a thread receives."""
        run = self._worker.current
        if self._is_forked or run is None:
            raise RuntimeError("this executor makes calls for the task that runs in this process, and none does: it has "
                               "ended, or this process was forked by it")
        if self._run is not run:
            self._run, self._last_call = run, 0
        if self._receiver is None:
            self._start()
        return run

    def give_up(self, future: NestedFuture[Any]) -> None:
        """Nobody wants this call's answer any more."""
        with self._lock:
            if self._futures.pop(future.call, None) is not None:
                self._took(future.call)

    def _took(self, call: int) -> None:
        run = self._run
        if run is not None:
            self._worker.outbox.append(Took(run.session, run.seq, run.attempt, [call]))
            self._worker.outbox.flush_soon()

    def finish(self, wait: bool, cancel: bool) -> None:
        """Wait for the calls of this task, or give up those not begun."""
        with self._lock:
            futures = list(self._futures.values())
        if cancel:
            for future in futures:
                future.cancel()
        if wait:
            wait_for_all([future for future in futures if not future.cancelled()])

    # ---- waiting

    @contextlib.contextmanager
    def lending(self, waker: Callable[[], object]) -> Iterator[None]:
        """Lend the slot of this task while in here; `waker` ends the wait if that is refused."""
        if threading.current_thread() is self._receiver:
            raise RuntimeError("a callback of a nested call cannot wait for another: the answers are received by the thread "
                               "that it runs in")
        with self._lock:
            self._wakers.append(waker)
            self._waiting += 1
            if self._waiting == 1:
                self._refusal = 0
                self._waits += 1
                self._say_blocked(True)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(waker)
                self._waiting -= 1
                if self._waiting == 0:
                    self._say_blocked(False)

    def _say_blocked(self, is_blocked: bool) -> None:
        run = self._run
        if run is not None and run is self._worker.current:
            self._worker.outbox.append(Blocked(run.session, run.seq, run.attempt, is_blocked, self._waits))
            self._worker.outbox.flush()

    def wait_done(self, future: NestedFuture[Any], timeout: float | None) -> None:
        """Wait for a call. Raises TimeoutError, or DistexecError if that is refused."""
        condition = future._condition

        def wake() -> None:
            with condition:
                condition.notify_all()

        with self.lending(wake):
            with condition:
                if not condition.wait_for(lambda: future.done() or self._refusal, timeout):
                    raise TimeoutError
            if not future.done():
                self.check_refusal()

    def check_refusal(self) -> None:
        """Raise DistexecError if this task must not wait."""
        if self._refusal:
            raise DistexecError(
                f"{self._refusal} tasks of this session wait for nested calls on this machine, and no more may: nest less "
                "deeply (below some size, compute in the task itself), or wait for fewer at once; more slots allow more")

    # ---- receiving

    def _start(self) -> None:
        if self._wake is None:
            self._wake = os.pipe()
        self._receiver = threading.Thread(target=self._receive, name="distexec-answers", daemon=True)
        self._receiver.start()

    def _stop(self) -> None:
        """End the thread and wait until the system has no trace of it."""
        receiver, self._receiver = self._receiver, None
        if receiver is None or self._wake is None:
            return
        os.write(self._wake[1], b"x")
        receiver.join()
        os.read(self._wake[0], 1)
        if receiver.native_id is not None:
            wait_thread_gone(receiver.native_id)

    def _receive(self) -> None:
        assert self._wake is not None, "made before the thread"
        link, wake = self._worker.link, self._wake[0]
        poll = select.poll()
        poll.register(link.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        try:
            while not any(fd == wake for fd, _ in poll.poll()):
                for message in link.receive():
                    self._hear(message)
        except (EOFError, OSError):
            os._exit(0)  # the pool's process is gone, and with it everybody who would want what we do

    def _hear(self, message: Any) -> None:
        if isinstance(message, Answer):
            self._on_answer(message)
        elif isinstance(message, Refuse):
            self._on_refuse(message)
        elif isinstance(message, (Segment, Forget)):
            self._worker.act(message)
        else:
            self._worker.backlog.append(message)

    def _is_ours(self, message: Answer | Refuse) -> bool:
        run = self._run
        return run is not None and (run.seq, run.attempt) == (message.seq, message.attempt)

    def _on_refuse(self, message: Refuse) -> None:
        with self._lock:
            if not self._is_ours(message) or message.wait != self._waits or not self._waiting:
                return
            self._refusal = message.limit
            wakers = list(self._wakers)
        for waker in wakers:
            waker()

    def _on_answer(self, message: Answer) -> None:
        with self._lock:
            if not self._is_ours(message):
                return
            future = self._futures.pop(message.call, None)
        if future is None:
            with self._lock:
                self._took(message.call)
            return
        mappings = Mappings()
        value, error = self._unpack(message, mappings)
        mappings.settle()  # its memory is used again once we have said that we have the answer
        with self._lock:
            self._took(message.call)
        try:
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        except InvalidStateError:
            pass  # it was cancelled at this moment
        except BaseException:  # SystemExit of a callback: the calls that come after this one are answered all the same
            sys.excepthook(*sys.exc_info())

    def _unpack(self, message: Answer, mappings: Mappings) -> tuple[Any, BaseException | None]:
        if message.evidence is not None:
            found = message.evidence
            return None, WorkerLost(found.reason, node=found.node, pid=found.pid, exitcode=found.exitcode,
                                    signal=found.signal, attempts=message.deaths, stderr_tail=found.stderr_tail)
        if message.kind == OutcomeKind.TIMEOUT:
            return None, TaskTimeout(f"a nested call ran longer than its timeout on node {message.node!r} and was ended")
        if message.kind == OutcomeKind.KILLED:
            return None, TaskKilled("a nested call was ended, with what made it or by itself")
        try:
            data, buffers = self._worker.unfold(message.data, message.buffers, mappings.map)
        except (OSError, KeyError) as error:
            return None, error
        return self.packer.unpack_outcome(OutcomeKind(message.kind), data, buffers)

    # ---- ends

    def end_task(self) -> None:
        """The task is over: nobody receives for it any more, and what it did not wait for, it will not hear of."""
        if self._run is None:
            return
        self._stop()
        with self._lock:
            self._run = None
            futures, self._futures = self._futures, {}
        for future in futures.values():
            with contextlib.suppress(InvalidStateError):  # it was cancelled at this moment
                future.set_exception(DistexecError("the task that made this call has ended"))

    def _prepare_fork(self) -> None:
        if threading.current_thread() is not self._receiver:  # a callback that forks is the receiver
            self._stop()

    def _after_fork(self) -> None:
        with self._lock:
            if self._run is not None and self._run is self._worker.current and self._receiver is None:
                self._start()

    def _forsake(self) -> None:
        self._is_forked = True
        self._lock = threading.RLock()
