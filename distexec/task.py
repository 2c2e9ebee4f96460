"""What a task can know of itself and say to its client while it runs: `current_task()`.

    task ── publish(value) ──► Partial ──► outbox ──► pool … root ──► future.partials()
                ▲ waits while too much of it is under way ── WorkerPage.heard_bytes ── pool

The rule: a `TaskContext` speaks for one attempt and only while that runs in this process; afterwards it says so. Imported
by the tasks that want it, so that the others do not pay for it.
"""

from __future__ import annotations

import _thread
import os
import threading
from typing import TYPE_CHECKING, Any

from distexec import worker as worker_module
from distexec.messages import Partial, partial_bytes
from distexec.resultfiles import close_parts, put_apart

if TYPE_CHECKING:
    import logging

    from distexec.messages import Run

__all__ = ["TaskContext", "current_task"]

WINDOW_BYTES = 16 << 20
"""Published and not yet with the client, above which `publish` waits. Larger: more memory at a slow client's nodes. Smaller:
a long way is not filled."""

LOOK_S = 0.002
"""Between two looks whether there is room again. Larger: `publish` goes on later. Smaller: looking takes its toll."""


class TaskContext:
    """One attempt of a task, as seen from inside.

    Any thread of the task may use it. A thread that outlives its task should keep the object that it got: asking again gives
    the task that then runs in the same process.
    """

    __slots__ = ("_run", "_worker")

    def __init__(self, worker: worker_module.Worker, run: Run) -> None:
        self._worker, self._run = worker, run

    @property
    def task_id(self) -> int:
        """The number of the task in its executor; its future's `task_id`."""
        return self._run.seq

    @property
    def attempt(self) -> int:
        """Which run of the task this is: 1 for the first, and greater each time that it is handed out again."""
        return self._run.attempt

    @property
    def node(self) -> str:
        """The name of the machine that it runs on; "local": a worker of the client's own."""
        return self._worker.node

    @property
    def cancelled(self) -> bool:
        """Whether the task is to end: killed, or past its time limit. The process is ended some ten milliseconds later."""
        return self._is_current and self._worker.page.is_doomed

    @property
    def directory(self) -> str:
        """A directory of this attempt's own, made when first asked for, and removed with all in it when the attempt ends.

        Raises RuntimeError after that, OSError if it cannot be made.
        """
        from distexec.taskfiles import task_directory

        self._check("directory")
        return task_directory(self._worker)

    @property
    def logger(self) -> logging.Logger:
        """A logger whose records reach the client's handlers, as those of every other logger do."""
        import logging

        return logging.getLogger("distexec.task")

    def publish(self, value: Any) -> None:
        """Send a provisional result: the client finds it in `future.partials()`, in order, before the task has ended.

        The value is pickled now; what pickling raises is raised here. Waits while more than 16 MiB are on their way to a
        client that does not keep up, or is out of reach. Raises RuntimeError once the attempt has ended, and in a process
        that the task forked; OSError if there is no memory for a large value. What nested calls publish is heard by nobody.
        """
        self._check("publish()")
        _publisher(self._worker).publish(self._run, value)

    def send_file(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Deliver a file to the client's directory for downloads, and return its path there once it is there.

        Args:
            path: of a regular file on this machine.
            name: what it is called there, relative and "/"-separated; None: its own name.

        Raises RuntimeError after the attempt's end, ValueError for a name that leads elsewhere, OSError if it cannot be read
        here or written there.
        """
        from distexec.taskfiles import send_file

        self._check("send_file()")
        return send_file(self._worker, path, name)

    @property
    def _is_current(self) -> bool:
        return self._worker.current is self._run

    def _check(self, what: str) -> None:
        if not self._is_current:
            raise _ended(self._run, what)

    def __repr__(self) -> str:
        state = "running" if self._is_current else "ended"
        return f"<task {self.task_id}, attempt {self.attempt}, on {self.node!r}: {state}>"


def current_task() -> TaskContext | None:
    """Give the task that runs in this process, in any of its threads; None outside one, and in processes that it started."""
    worker = worker_module.this_worker
    run = worker.current if worker is not None else None
    return None if worker is None or run is None else TaskContext(worker, run)


def _ended(run: Run, what: str) -> RuntimeError:
    return RuntimeError(f"{what} is for the task that runs in this process: task {run.seq} has ended, or this process was "
                        "forked by it")


# ---- partial results


class _Publisher:
    """What a worker's tasks publish, one after the other."""

    def __init__(self, worker: worker_module.Worker) -> None:
        self._worker = worker
        self._lock = threading.RLock()  # guards what follows, and the order of what is said; reentrant, for signal handlers
        self._run: Run | None = None  # the task that has published, until its end
        self._ended = (0, 0)  # seq and attempt of the last that has
        self._number = 0  # of its last
        self._published_bytes = 0  # by all tasks
        self._pause = _thread.allocate_lock()  # waited for in vain
        self._pause.acquire()

    def publish(self, run: Run, value: Any) -> None:
        worker = self._worker
        data, views = worker.unpacker.pack_value(value)
        with self._lock:
            self._begin(run)
            data, buffers, segments = put_apart(data, views)
            size = partial_bytes(data, buffers)
            try:
                self._wait_for_room(run, size)
            except BaseException:  # it ended meanwhile, or a signal handler raised
                close_parts(segments)
                raise
            self._number += 1
            self._published_bytes += size
            worker.outbox.append_large(Partial(run.session, run.seq, run.attempt, self._number, data, buffers), segments)
        worker.outbox.flush()  # and not later: the task may be about to crash

    def _begin(self, run: Run) -> None:
        if self._worker.current is not run or self._ended == (run.seq, run.attempt):
            raise _ended(run, "publish()")
        if self._run is not run:
            self._run, self._number = run, 0
            self._worker.at_end.append(self._end)

    def _end(self) -> None:
        """The task is over: what another thread publishes from here on must not follow its outcome."""
        run, self._run = self._run, None  # without the lock: who waits for room has it
        if run is not None:
            self._ended = run.seq, run.attempt
        with self._lock:
            pass  # what was on its way to the outbox is there

    def _wait_for_room(self, run: Run, size: int) -> None:
        page = self._worker.page
        limit = max(WINDOW_BYTES - size, 0)
        while self._published_bytes - page.heard_bytes > limit:
            self._worker.outbox.flush()
            self._pause.acquire(True, LOOK_S)
            if self._run is not run:
                raise _ended(run, "publish()")


def _publisher(worker: worker_module.Worker) -> _Publisher:
    """Give the one of this process."""
    global _the_publisher
    if _the_publisher is None:
        with _birth:
            if _the_publisher is None:
                _the_publisher = _Publisher(worker)
    return _the_publisher


_the_publisher: _Publisher | None = None
_birth = threading.Lock()
