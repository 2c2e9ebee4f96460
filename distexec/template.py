"""The template: a clean, single-threaded process that forks a session's workers and guards everything below it.

    pool ── Prepare, Fork + descriptors, End ──► template ── fork ──► worker ──► what tasks start
         ◄── Forked, Exited ──                       ◄── SIGCHLD ──
    pool ── Prepare, Branch + descriptors ─────► template ── fork ──► prepared process ── fork ──► worker

It runs in a session of its own, so no terminal signal reaches it or its workers, and it is the reaper of its orphans.
The rule: when its pool's process dies or closes the control link, it kills every descendant until none is left, then
exits. For workers that a multiprocessing context started, or that a setup is shared by, it is the guardian only. It never
runs user code itself and never starts a thread; a forked worker finds nothing half-done.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import selectors
import signal
import socket
import sys
from multiprocessing import process as multiprocessing_process
from typing import NoReturn

from msgspec import Struct

from distexec import payload
from distexec.descent import become_reaper, end_descendants, end_tree, is_ending, reap_all
from distexec.forking import End, Exited, Fork, Forked, Prepare, Workers, forget_parent, make_initializer
from distexec.memory import map_segment
from distexec.messages import Segment, SessionSpec
from distexec.outbox import BlockingLink


class Watch(Struct, frozen=True, array_like=True, tag=4, gc=False):
    """Pool to template: guard process `pid`, which somebody else started; with it comes our end of its lifeline.

    When the pool goes the process is killed with all that descends from it; when we go, the lifeline breaks.
    """

    pid: int


class Branch(Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Pool to template: fork the process that setup runs in and that then forks the workers.

    With it come its link and, if `captured`, stdout and stderr. It is reported as worker 0.
    """

    captured: bool


ToTemplate = Segment | Prepare | Fork | End | Watch | Branch
FromTemplate = Forked | Exited


def main(control_fd: int, parent: int) -> NoReturn:
    """Serve the pool at the other end of `control_fd`, in process `parent`, until it goes; then end all descendants."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the thread that started us may have blocked some
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    status = 1
    template = _Template(socket.socket(fileno=control_fd), parent)
    try:
        template.run()
        status = 0
    except (EOFError, ConnectionError):
        status = 0  # the pool went: what it wanted of us ends with it
    finally:
        template.end_watched()
        end_descendants()
        template.remove_home()
        os._exit(status)


class _Template:
    def __init__(self, control: socket.socket, parent: int) -> None:
        self._link = BlockingLink(control, ToTemplate)
        self._parent = parent
        self._watched: dict[int, int] = {}  # lifeline → pid
        self._prepared = Prepare(SessionSpec())
        self._unpacker = payload.CallUnpacker()
        self._workers = Workers(self._link, SessionSpec(), self._unpacker, None, self._leave)
        self._branch_pid = 0  # of the process that setup runs in
        self._blobs: dict[bytes, memoryview] = {}  # mapped here once, inherited by every worker
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._parent_fd = _open_pidfd(parent)
        self._selector = selectors.DefaultSelector()
        for source in (control, self._woken, self._parent_fd):
            if source is not None:
                self._selector.register(source, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only so that the wake-up descriptor is written to
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Act on what the pool says and report who died, until the pool is gone (EOFError) or its process is."""
        become_reaper()
        gc.disable()  # a collection would touch, and so copy, every page that the workers share
        while os.getppid() == self._parent:
            for key, _ in self._selector.select(None if self._parent_fd is not None else 1.0):
                if key.fd == self._link.fileno():
                    for message in self._link.receive():
                        self._act(message)
                elif key.fileobj is self._woken:
                    self._reap()
                elif key.fd in self._watched:  # it ended
                    self._selector.unregister(key.fd)
                    del self._watched[key.fd]
                    os.close(key.fd)

    def end_watched(self) -> None:
        """Kill the processes watched, and what descends from them, as far as they are still what they were."""
        with contextlib.suppress(EOFError, ConnectionError):  # the pool may have gone before we heard all it had to say
            while select.select([self._link], [], [], 0)[0]:
                for message in self._link.receive():
                    if isinstance(message, Watch):
                        self._act(message)
        for lifeline, pid in self._watched.items():
            if not select.select([lifeline], [], [], 0)[0]:
                end_tree(pid)

    def remove_home(self) -> None:
        """Remove the session's directory, if whoever would is dead or dying."""
        home = self._prepared.spec.home
        if home and os.path.isdir(home) and (os.getppid() != self._parent or is_ending(self._parent)):
            from distexec.spool import remove_tree

            remove_tree(home)

    def _act(self, message: ToTemplate) -> None:
        match message:
            case Segment(blob, _, offset):
                fd = self._link.received_fds.popleft()
                self._blobs[blob.digest] = map_segment(fd, offset, blob.size_bytes)
                os.close(fd)
            case Prepare(spec, limits):
                self._prepared = message
                prepare(spec)
                limits.apply()
                self._unpacker.install_main(script_of(spec))
                if spec.code:
                    from distexec.imports import explain

                    self._unpacker.explain = explain
                initializer = make_initializer(spec, self._blobs)
                self._workers = Workers(self._link, spec, self._unpacker, initializer, self._leave)
                gc.freeze()
            case Fork():
                self._workers.fork(message)
            case End(number):
                self._workers.end(number)
            case Branch(captured):
                self._branch([self._link.received_fds.popleft() for _ in range(3 if captured else 1)])
            case Watch(pid):
                lifeline = self._link.received_fds.popleft()
                self._watched[lifeline] = pid
                self._selector.register(lifeline, selectors.EVENT_READ)

    def _branch(self, fds: list[int]) -> None:
        """Fork the process that the session's setup runs in."""
        from distexec import prepared

        guardian = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                forget_parent()
                self._leave()
                prepared.main(fds, guardian, self._prepared, self._blobs, self._unpacker)
        except OSError as error:
            self._link.send([Exited(0, None, 0, f"no process could be forked: {error}")])
        else:
            self._branch_pid = pid
            self._workers.pids[pid] = 0
            self._link.send([Forked(0, pid)])
        finally:
            for fd in fds:
                os.close(fd)

    def _leave(self) -> None:
        """Close, in a child, what is ours."""
        self._selector.close()
        self._link.close()
        self._woken.close()
        self._wake.close()
        if self._parent_fd is not None:
            os.close(self._parent_fd)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        self._workers.report(reap_all(self._workers.pids, self._branch_pid))


def prepare(spec: SessionSpec) -> None:
    """Give this process the client's sys.path, working directory, arguments and authentication key.

    Environment and warning filters came with the command line. Directories of this machine that the client's path lacks
    stay at its end, or on another machine nothing that distexec needs could be imported.
    """
    if spec.path:
        sys.path[:] = [*spec.path, *(entry for entry in sys.path if entry not in spec.path)]
    if spec.code:
        from distexec import imports

        sys.path.insert(0, spec.code)
        imports.install(spec.imports, spec.code, spec.node)
    if spec.argv:
        sys.argv[:] = spec.argv
    if spec.authkey:
        multiprocessing_process.current_process().authkey = spec.authkey
    if spec.directory:
        with contextlib.suppress(OSError):  # it does not exist on this machine; a task that needs it will say so
            os.chdir(spec.directory)


def script_of(spec: SessionSpec) -> str | None:
    """Return what `__main__.__file__` should be: the client's script, where this machine has it.

    multiprocessing runs it again in the spawned children of a task, as it would in those of the client. A module of a
    package cannot be run so.
    """
    if not spec.argv or not spec.argv[0].endswith(".py"):
        return None
    path = os.path.abspath(os.path.join(spec.directory, spec.argv[0]))
    in_package = os.path.exists(os.path.join(os.path.dirname(path), "__init__.py"))
    return path if os.path.isfile(path) and not in_package else None


def command(control_fd: int, spec: SessionSpec) -> list[str]:
    """Return the command line that starts a template: this interpreter, its flags, the session's warning filters."""
    from multiprocessing.util import _args_from_interpreter_flags  # type: ignore[attr-defined]

    flags = [flag for flag in _args_from_interpreter_flags() if not flag.startswith("-W")]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # The empty first entry would let any file in the working directory stand in for a module of ours.
    # msgspec takes from typing_extensions, if it is there, what this Python's typing has as well: a fifth of our start.
    code = (f"import sys; sys.path[:1] = [{root!r}] + [p for p in sys.path[:1] if p]; "
            f"sys.modules['typing_extensions'] = None; from distexec.template import main; "
            f"del sys.modules['typing_extensions']; main({control_fd}, {os.getpid()})")
    return [sys.executable, *flags, *(f"-W{option}" for option in spec.warnings), "-c", code]


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None  # an older kernel or another system: the caller asks for the parent every second instead
