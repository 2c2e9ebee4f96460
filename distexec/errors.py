"""The exceptions a user of distexec can meet, all under `DistexecError`.

Where the standard library has an exception for the same event, ours derives from it too, so that a program written for
`ProcessPoolExecutor` catches what it expects. Every message says what happened, where, and what to do next.
"""

from __future__ import annotations

import copy as _copy
import signal as _signal
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

__all__ = [
    "AuthenticationFailed", "DistexecError", "IncompatibleNode", "InitializerFailed", "JournalError", "NoNodes",
    "PayloadError", "ProtocolError", "RemoteError", "TaskKilled", "TaskTimeout", "WorkerLost",
]


class DistexecError(Exception):
    """Base of every error that distexec itself raises."""


class WorkerLost(DistexecError, BrokenProcessPool):
    """The worker or node that ran the task died on every attempt it was allowed.

    Attributes: `node` (name), `pid`, `exitcode` (int, or None when unknown or ended by a signal), `signal` (number, 0 for
    none), `reason` (a sentence), `attempts` (how many died), `stderr_tail` (the last of what it wrote, where captured).
    The executor stays usable, unless `attempts` is 0: no worker could be had, or all were ended.
    """

    def __init__(self, reason: str, *, node: str = "", pid: int = 0, exitcode: int | None = None, signal: int = 0,
                 attempts: int = 1, stderr_tail: str = "") -> None:
        self.reason, self.node, self.pid, self.exitcode = reason, node, pid, exitcode
        self.signal, self.attempts, self.stderr_tail = signal, attempts, stderr_tail
        super().__init__(reason)

    def __str__(self) -> str:
        where = f" on node {self.node!r}" if self.node else ""
        who = f"worker process {self.pid}" if self.pid else "the worker process"
        how = describe_exit(self.exitcode, self.signal)
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        if not self.attempts:
            text = f"{self.reason}{where}; the executor cannot be used any more"
        else:
            text = f"{who}{where} {how} while running the task (lost {times}; {self.reason or 'no reason known'}). " \
                   "The executor is still usable; raise retries= if such deaths are expected"
        return f"{text}\n--- last stderr of the worker ---\n{self.stderr_tail}" if self.stderr_tail else text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_worker_lost, (self.reason, self.node, self.pid, self.exitcode, self.signal, self.attempts,
                                      self.stderr_tail)


def _rebuild_worker_lost(reason: str, node: str, pid: int, exitcode: int | None, signal: int, attempts: int,
                         stderr_tail: str) -> WorkerLost:
    return WorkerLost(reason, node=node, pid=pid, exitcode=exitcode, signal=signal, attempts=attempts,
                      stderr_tail=stderr_tail)


def describe_exit(exitcode: int | None, signal: int) -> str:
    """Say in words how a process ended: 'was killed by SIGSEGV', 'exited with code 1', 'disappeared'."""
    if signal:
        try:
            name = _signal.Signals(signal).name
        except ValueError:  # a real-time signal has no name
            name = f"signal {signal}"
        return f"was killed by {name}"
    return "disappeared" if exitcode is None else f"exited with code {exitcode}"


class PayloadError(DistexecError, BrokenProcessPool):
    """A call, value or exception could not be unpickled, at the worker or at the client; the cause says why."""


class TaskTimeout(DistexecError, TimeoutError):
    """The task ran longer than `options(timeout=)` allowed and was ended, its child processes included."""


class TaskKilled(DistexecError):
    """The task was ended by `future.kill()`."""


class NoNodes(DistexecError, BrokenExecutor):
    """No node offered a slot within `nodes_timeout` while work was queued."""


class InitializerFailed(DistexecError, BrokenProcessPool):
    """The initializer raised on every node there was; the executor is broken. The cause is what it raised."""


class AuthenticationFailed(DistexecError):
    """The other end does not hold the same secret, or somebody sits between the two."""


class IncompatibleNode(DistexecError):
    """The node speaks another protocol version or runs another Python minor version than the client."""


class ProtocolError(DistexecError):
    """The other end said something that is not in the protocol, or too large; the link was closed."""


class JournalError(DistexecError, BrokenExecutor):
    """The journal of a durable session cannot be opened or written; what was recorded before is not touched."""


class RemoteError(DistexecError):
    """Stands in for a remote exception that could not be pickled; its text and remote traceback are kept."""


def say_where(error: BaseException, node: str) -> None:
    """Add to a remote exception the name of the node, which is not in its traceback."""
    try:
        error.add_note(f"(raised on node {node!r})")
    except Exception:
        pass  # an exception that takes no notes; its future knows the node


def raisable(error: BaseException) -> BaseException:
    """Make a fresh exception of the same kind, so that tracebacks do not pile up on one object."""
    try:
        fresh = _copy.copy(error)
    except TypeError:
        return error
    fresh.__cause__ = error.__cause__
    return fresh
