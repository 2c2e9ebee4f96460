"""Forks a session's workers, in the template or in the process that its setup prepared, and reports how they end.

    pool ── Fork + descriptors, End ──► Workers ── fork ──► worker
         ◄── Forked, Exited ──             ◄── SIGCHLD, and the caller reaps

The rule: a forked worker finds nothing of its parent's but what it is to share: no link, no wake-up descriptor, no
handler that the parent would have called at its own end.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from multiprocessing import process as multiprocessing_process
from typing import Any, NoReturn

from msgspec import Struct

from distexec import payload, worker
from distexec.descent import die_with_parent, end_tree, new_group
from distexec.limits import Limits
from distexec.messages import Buffers, SessionSpec
from distexec.outbox import BlockingLink, flush_streams


class Init(Struct, frozen=True, array_like=True):
    """What an operator has run in every session here: a Python file and the text that was in it."""

    path: str
    source: str


class Prepare(Struct, frozen=True, array_like=True, tag=1):
    """Pool to template: what the session's workers are to find. Only the blobs of initializer and setup come before it."""

    spec: SessionSpec
    limits: Limits = Limits()
    init: Init | None = None


class Fork(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Pool to template: fork worker `number`; with it come its link, page and, if `captured`, stdout and stderr."""

    number: int
    captured: bool


class End(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Pool to template: kill worker `number` and all that descends from it."""

    number: int


class Forked(Struct, frozen=True, array_like=True, tag=10, gc=False):
    """Template to pool: worker `number` is process `pid`."""

    number: int
    pid: int


class Exited(Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Template to pool: worker `number` is gone, by exit code or signal, or could not be forked (`reason`)."""

    number: int
    exitcode: int | None
    signal: int
    reason: str = ""
    peak_bytes: int = 0  # the most memory it had resident; 0: unknown


class Workers:
    """The workers that this process forked and that live.

    Args:
        link: to the pool.
        leave: called in each forked child: close what is its parent's.
    """

    def __init__(self, link: BlockingLink, spec: SessionSpec, unpacker: payload.CallUnpacker,
                 initializer: worker.Initializer | None, leave: Callable[[], object]) -> None:
        self.pids: dict[int, int] = {}  # pid → number
        self._link, self._spec, self._unpacker, self._initializer = link, spec, unpacker, initializer
        self._leave = leave

    def fork(self, order: Fork) -> None:
        """Fork a worker; the descriptors that came with the order go to it."""
        number = order.number
        fds = [self._link.received_fds.popleft() for _ in range(4 if order.captured else 2)]
        try:
            pid = fork_into_group(lambda: self._become_worker(number, fds))
        except OSError as error:
            self._link.send([Exited(number, None, 0, f"no process could be forked: {error}")])
        else:
            self.pids[pid] = number
            self._link.send([Forked(number, pid)])
        finally:
            for fd in fds:
                os.close(fd)

    def end(self, number: int) -> None:
        """Kill a worker and what descends from it."""
        for pid in [pid for pid, known in self.pids.items() if known == number]:
            end_tree(pid)

    def report(self, reaped: Iterable[tuple[int, int, int]]) -> None:
        """Tell the pool of those workers that are among the reaped."""
        reports = []
        for pid, code, peak_bytes in reaped:
            number = self.pids.pop(pid, None)
            if number is not None:  # else an orphan of a task, which nobody asks about
                reports.append(Exited(number, code if code >= 0 else None, max(0, -code), "", peak_bytes))
        if reports:
            self._link.send(reports)

    def _become_worker(self, number: int, fds: list[int]) -> NoReturn:
        status = 1
        try:
            forget_parent()
            self._leave()
            die_with_parent(os.getppid())
            gc.enable()
            multiprocessing_process.current_process().name = f"distexec-worker-{number}"
            status = worker.serve(*fds[:2], unpacker=self._unpacker, initializer=self._initializer,
                                  outputs=(fds[2], fds[3]) if len(fds) == 4 else None, label=self._spec.label,
                                  home=self._spec.home, node=self._spec.node, log_levels=self._spec.log_levels)
            worker.leave()
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)


def unfolded(data: bytes, buffers: Buffers, blobs: dict[bytes, memoryview]) -> tuple[Any, list[bytes | memoryview]]:
    """Return a pickle and its buffers as bytes; without `data` the first buffer is the pickle, if there is one at all."""
    whole = [each if isinstance(each, bytes) else blobs[each.digest] for each in buffers]
    return (data, whole) if data or not whole else (whole[0], whole[1:])


def make_initializer(spec: SessionSpec, blobs: dict[bytes, memoryview]) -> worker.Initializer | None:
    """Return what a worker calls before it is ready, or None; it is unpickled only there."""
    data, buffers = unfolded(spec.initializer, spec.initializer_buffers, blobs)
    if not data:
        return None

    def initialize(unpacker: payload.CallUnpacker) -> None:
        (function, args), _ = unpacker.load_call(data, buffers)
        function(*args)

    return initialize


def fork_into_group(become: Callable[[], NoReturn]) -> int:
    """Fork a child that calls `become()` in a process group of its own; give its pid. Raises OSError."""
    flush_streams()  # or what waits to be printed is printed by both
    with new_group() as group, warnings.catch_warnings():
        # Threads that a setup started stay in its process. That is what it was told, not news for each worker.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, group)
            become()
        os.setpgid(pid, group)  # again, because either may come first
    return pid


def forget_parent() -> None:
    """In a forked child: undo what only its parent is to be woken for, or to call at its end."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _forget_exit_functions()


def _forget_exit_functions() -> None:
    """Leave to the parent what it registered to be called at its end: directories and servers that are its own.

    What modules of the standard library do there for each process they do for this one too.
    """
    atexit._clear()
    finalizers: Any = weakref.finalize
    for finalizer in list(finalizers._registry):
        finalizer.atexit = False
    finalizers._registered_with_atexit = False
    for module, name in (("logging", "shutdown"), ("multiprocessing.util", "_exit_function")):
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            atexit.register(function)
