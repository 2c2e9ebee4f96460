"""The prepared process: the operator's init file and the session's setup run here, and workers are forked from it.

    template ── fork ──► init file, setup ── Prepared ──► pool      what they build in globals, every worker shares
    pool ── Fork + descriptors, End ──► fork ──► worker             by copy-on-write
    pool ── CleanUp ──► cleanup ── Cleaned ──► pool

User code runs here, so nothing depends on this process: the template above ends what is below it when it dies, the pool
when it hangs. The rule: setup runs once and before any worker is forked, cleanup once and after the last has ended, and
only if setup succeeded.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import process as multiprocessing_process
from types import ModuleType
from typing import NoReturn

from msgspec import Struct

from distexec import payload, worker
from distexec.descent import die_with_parent, reap
from distexec.forking import End, Exited, Fork, Forked, Init, Prepare, Workers, make_initializer, unfolded
from distexec.messages import Cleaned, CleanUp, Evidence, SessionFailed
from distexec.outbox import BlockingLink, flush_streams

INIT_MODULE = "distexec_init"
"""What tasks import to reach what the operator's init file defines."""


class Prepared(Struct, frozen=True, array_like=True, tag=12, gc=False):
    """Prepared process to pool: setup has run, workers can be had."""


ToPrepared = Fork | End | CleanUp
FromPrepared = Prepared | Forked | Exited | SessionFailed | Cleaned

Cleanup = Callable[[], object]


def main(fds: list[int], guardian: int, prepare: Prepare, blobs: dict[bytes, memoryview],
         unpacker: payload.CallUnpacker) -> NoReturn:
    """Be the prepared process of a template; `fds`: the link to the pool, and files that stdout and stderr become."""
    status = 1
    try:
        os.setsid()  # what descends from us can be told by that
        die_with_parent(guardian)
        if len(fds) > 1:
            worker.redirect((fds[1], fds[2]))
        _enable_faulthandler()
        gc.enable()
        multiprocessing_process.current_process().name = "distexec-setup"
        link = BlockingLink(socket.socket(fileno=fds[0]), ToPrepared)
        status = _Prepared(link, prepare, blobs, unpacker).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the pool's process is gone, and the template ends all of us
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        flush_streams()
        os._exit(status)


class _Prepared:
    def __init__(self, link: BlockingLink, prepare: Prepare, blobs: dict[bytes, memoryview],
                 unpacker: payload.CallUnpacker) -> None:
        self._link, self._prepare, self._blobs, self._unpacker = link, prepare, blobs, unpacker
        self._cleanup: Cleanup | None = None

    def run(self) -> int:
        """Prepare, then fork workers until the pool wants no more; return the exit code to end with."""
        pid = os.getpid()
        try:
            self._run_init(self._prepare.init)
            self._run_setup()
        except BaseException as error:  # SystemExit too: whatever it is, there will be no worker, and the client hears why
            if os.getpid() == pid:
                self._fail(error)
            return 1
        if os.getpid() != pid:  # a child that setup forked came back out of it
            return 0
        flush_streams()
        gc.collect()
        gc.disable()  # a collection would touch, and so copy, every page that the workers share
        gc.freeze()
        with contextlib.closing(_Serving(self._link, self._prepare, self._blobs, self._unpacker)) as serving:
            self._link.send([Prepared()])
            serving.run()
        gc.enable()
        self._clean_up()
        worker.leave()
        return 0

    # ---- the user's code

    def _run_init(self, init: Init | None) -> None:
        if init is None:
            return
        module = ModuleType(INIT_MODULE)
        module.__file__ = init.path
        sys.modules[INIT_MODULE] = module
        self._doing = f"the node's init file {init.path}"
        exec(compile(init.source, init.path, "exec"), vars(module))

    def _run_setup(self) -> None:
        spec = self._prepare.spec
        data, buffers = unfolded(spec.setup, spec.setup_buffers, self._blobs)
        if not data:
            return
        self._doing = "setup"
        (function, args, self._cleanup), _ = self._unpacker.load_call(data, buffers)
        if function is not None:
            function(*args)

    def _fail(self, error: BaseException) -> None:
        reason = f"{self._doing} raised {type(error).__name__}: {error}"
        traceback = error.__traceback__ and error.__traceback__.tb_next
        evidence = Evidence("", os.getpid(), reason=reason)
        flush_streams()
        self._link.send([SessionFailed(0, evidence, self._unpacker.pack_error(error, traceback))])

    def _clean_up(self) -> None:
        """Run the cleanup, and say how that went."""
        evidence, data, pid = None, b"", os.getpid()
        try:
            if self._cleanup is not None:
                self._cleanup()
        except BaseException as error:  # SystemExit too: the client hears what it was
            traceback = error.__traceback__ and error.__traceback__.tb_next
            evidence = Evidence("", pid, reason=f"cleanup raised {type(error).__name__}: {error}")
            data = self._unpacker.pack_error(error, traceback)
        if os.getpid() != pid:
            os._exit(0)
        flush_streams()
        self._link.send([Cleaned(0, self._prepare.spec.generation, evidence, data)])


class _Serving:
    """Forks workers when the pool asks for them, until it says CleanUp."""

    def __init__(self, link: BlockingLink, prepare: Prepare, blobs: dict[bytes, memoryview],
                 unpacker: payload.CallUnpacker) -> None:
        self._link = link
        initializer = make_initializer(prepare.spec, blobs)
        self._workers = Workers(link, prepare.spec, unpacker, initializer, self._leave)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for source in (link, self._woken):
            self._selector.register(source, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only so that the wake-up descriptor is written to
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve; EOFError or OSError when the pool has gone."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._reap()
                    continue
                for message in self._link.receive():
                    match message:
                        case Fork():
                            self._workers.fork(message)
                        case End(number):
                            self._workers.end(number)
                        case CleanUp():
                            return

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        self._workers.report(reap(self._workers.pids))

    def _leave(self) -> None:
        """Close, in a child, what is ours."""
        self._link.close()
        self._close()

    def _close(self) -> None:
        self._selector.close()
        self._woken.close()
        self._wake.close()

    def close(self) -> None:
        """Serve no more."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._close()


def _enable_faulthandler() -> None:
    import faulthandler

    with contextlib.suppress(ValueError, OSError):  # without a stderr there is nobody to tell
        faulthandler.enable(file=2)

