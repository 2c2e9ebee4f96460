"""The template: a clean, single-threaded process that forks a session's workers and guards everything below it.

    pool ── Prepare, Fork + descriptors, End ──► template ── fork ──► worker ──► what tasks start
         ◄── Forked, Exited ──                       ◄── SIGCHLD ──

It runs in a session of its own, so no terminal signal reaches it or its workers, and it is the reaper of its orphans.
The rule: when its pool's process dies or closes the control link, it kills every descendant until none is left, then
exits. For workers that a multiprocessing context started it is the guardian only. It never runs user code itself and
never starts a thread; a forked worker finds nothing half-done.
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
import time
from collections.abc import Container, Iterable, Iterator
from multiprocessing import process as multiprocessing_process
from typing import Any, NoReturn

from msgspec import Struct

from distexec import payload, worker
from distexec.memory import map_segment
from distexec.messages import Segment, SessionSpec
from distexec.outbox import BlockingLink

GRACE_S = 2.0
"""For multiprocessing's resource trackers to unlink what the dead left. Shorter: shared memory may stay behind."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


class Prepare(Struct, frozen=True, array_like=True, tag=1):
    """Pool to template: what the session's workers are to find. Only the blobs of its initializer come before it."""

    spec: SessionSpec


class Fork(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Pool to template: fork worker `number`; with it come its link, page and, if `captured`, stdout and stderr."""

    number: int
    captured: bool


class End(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Pool to template: kill worker `number` and all that descends from it."""

    number: int


class Watch(Struct, frozen=True, array_like=True, tag=4, gc=False):
    """Pool to template: guard process `pid`, which somebody else started; with it comes our end of its lifeline.

    When the pool goes the process is killed with all that descends from it; when we go, the lifeline breaks.
    """

    pid: int


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


ToTemplate = Segment | Prepare | Fork | End | Watch
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
        os._exit(status)


class _Template:
    def __init__(self, control: socket.socket, parent: int) -> None:
        self._link = BlockingLink(control, ToTemplate)
        self._parent = parent
        self._pids: dict[int, int] = {}  # worker pid → number
        self._watched: dict[int, int] = {}  # lifeline → pid
        self._spec = SessionSpec()
        self._unpacker = payload.CallUnpacker()
        self._initializer: worker.Initializer | None = None
        self._blobs: dict[bytes, memoryview] = {}  # of the initializer: mapped here once, inherited by every worker
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

    def _act(self, message: ToTemplate) -> None:
        match message:
            case Segment(blob, _, offset):
                fd = self._link.received_fds.popleft()
                self._blobs[blob.digest] = map_segment(fd, offset, blob.size_bytes)
                os.close(fd)
            case Prepare(spec):
                self._spec = spec
                prepare(spec)
                self._unpacker.install_main(script_of(spec))
                self._initializer = make_initializer(spec, self._blobs)
                gc.freeze()
            case Fork(number, captured):
                self._fork(number, [self._link.received_fds.popleft() for _ in range(4 if captured else 2)])
            case End(number):
                for pid in [pid for pid, known in self._pids.items() if known == number]:
                    end_tree(pid)
            case Watch(pid):
                lifeline = self._link.received_fds.popleft()
                self._watched[lifeline] = pid
                self._selector.register(lifeline, selectors.EVENT_READ)

    def _fork(self, number: int, fds: list[int]) -> None:
        try:
            with _new_group() as group:
                pid = os.fork()
                if pid == 0:
                    os.setpgid(0, group)
                    self._become_worker(number, fds)
                os.setpgid(pid, group)  # again, because either may come first
        except OSError as error:
            self._link.send([Exited(number, None, 0, f"no process could be forked: {error}")])
        else:
            self._pids[pid] = number
            self._link.send([Forked(number, pid)])
        finally:
            for fd in fds:
                os.close(fd)

    def _become_worker(self, number: int, fds: list[int]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            self._link.close()
            self._woken.close()
            self._wake.close()
            if self._parent_fd is not None:
                os.close(self._parent_fd)
            die_with_parent(os.getppid())
            gc.enable()
            multiprocessing_process.current_process().name = f"distexec-worker-{number}"
            status = worker.serve(*fds[:2], unpacker=self._unpacker, initializer=self._initializer,
                                  outputs=(fds[2], fds[3]) if len(fds) == 4 else None, label=self._spec.label)
            worker.leave()
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        reports = []
        for pid, code, peak_bytes in _reap_all(end_groups_of=self._pids):
            number = self._pids.pop(pid, None)
            if number is not None:  # else an orphan of a task, which nobody asks about
                reports.append(Exited(number, code if code >= 0 else None, max(0, -code), "", peak_bytes))
        if reports:
            self._link.send(reports)


def prepare(spec: SessionSpec) -> None:
    """Give this process the client's sys.path, working directory, arguments and authentication key.

    Environment and warning filters came with the command line. Directories of this machine that the client's path lacks
    stay at its end, or on another machine nothing that distexec needs could be imported.
    """
    if spec.path:
        sys.path[:] = [*spec.path, *(entry for entry in sys.path if entry not in spec.path)]
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


def make_initializer(spec: SessionSpec, blobs: dict[bytes, memoryview]) -> worker.Initializer | None:
    """Return what a worker calls before it is ready, or None; it is unpickled only there."""
    if not spec.initializer and not spec.initializer_buffers:
        return None
    buffers: list[bytes | memoryview] = [
        each if isinstance(each, bytes) else blobs[each.digest] for each in spec.initializer_buffers]
    data: Any = spec.initializer or buffers.pop(0)  # a large pickle is the first buffer

    def initialize(unpacker: payload.CallUnpacker) -> None:
        (function, args), _ = unpacker.load_call(data, buffers)
        function(*args)

    return initialize


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


# ---- the tree of processes below one


def become_reaper() -> None:
    """Make orphaned descendants children of this process, where the system can (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have this process killed when the thread of `parent` that started it ends, where the system can (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


def end_tree(pid: int) -> None:
    """Kill process `pid` and all its descendants; each is stopped when found, so that none forks behind our back."""
    found: dict[int, None] = {}
    fresh = [pid]
    while fresh:
        for each in fresh:
            found[each] = None
            _signal(each, signal.SIGSTOP)
        fresh = [each for each in _descendants(pid) if each not in found]
    for each in found:
        _signal(each, signal.SIGKILL)


def end_orphans(spared: Container[int]) -> bool:
    """Kill what fell to this process, a reaper, when a guardian was killed: every child not spared, with all below it.

    Gives False once nothing is left; until then it is to be called again, for the dying may leave orphans of their own.
    """
    orphans = [pid for pid, parent, _ in _read_proc(zombies=True) if parent == os.getpid() and pid not in spared]
    for pid in orphans:
        if not _is_tracker(pid):
            end_tree(pid)
        with contextlib.suppress(ChildProcessError):  # reaped elsewhere
            os.waitpid(pid, os.WNOHANG)
    return bool(orphans)


def end_offspring() -> None:
    """Kill the descendants of this process that are there now."""
    for pid in _descendants(os.getpid()):
        end_tree(pid)


def end_descendants() -> None:
    """Kill every descendant of this process, the reaper of its orphans, until none is left."""
    deadline = time.monotonic() + GRACE_S
    while True:
        trackers = time.monotonic() < deadline
        found = [pid for pid in _descendants(os.getpid(), trackers=False) if pid]
        for pid in found:
            end_tree(pid)
        if not found and not trackers:
            found = list(_descendants(os.getpid(), trackers=True))
            for pid in found:
                _signal(pid, signal.SIGKILL)
        if not _wait_child(0.05):
            return


def _wait_child(timeout_s: float) -> bool:
    """Reap what has died, waiting a moment if nothing has; False if there is no child at all."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        for _ in _reap_all():
            pass
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait([signal.SIGCHLD], timeout_s)
    return True


def _reap_all(end_groups_of: Container[int] = ()) -> Iterator[tuple[int, int, int]]:
    """Reap what has died; yield each pid, its exit code or negative signal, and the most memory it used, bytes.

    If one of `end_groups_of` did not end well, what is left of its group is killed: the task will run again elsewhere,
    and must not meet what its first attempt started.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            # Looked at before it is reaped: until then its group's number cannot become another's.
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) if hasattr(os, "waitid") else None
            if dead and dead.si_pid in end_groups_of and (dead.si_code != os.CLD_EXITED or dead.si_status != 0):
                _end_group(dead.si_pid)
            pid, status, usage = os.wait4(dead.si_pid if dead else -1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * _MAXRSS_BYTES


def _end_group(member: int) -> None:
    """Kill the others of a dead worker's group, resource trackers excepted, until none is left that could fork."""
    group = os.getpgid(member)
    found: set[int] = {0}
    while found and group != os.getpgrp():
        found = {pid for pid, _, its_group in _processes() if its_group == group and not _is_tracker(pid)}
        for pid in found:
            _signal(pid, signal.SIGKILL)


@contextlib.contextmanager
def _new_group() -> Iterator[int]:
    """Make a process group that a child may join. Nobody is its leader: a leader could not become a session's.

    It is made by a process that is not reaped, and so stays in it, until the child has joined.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os._exit(0)
    try:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        yield pid
    finally:
        os.waitpid(pid, 0)


def _descendants(root: int, *, trackers: bool = False) -> list[int]:
    """List who descends from `root`, without multiprocessing's resource trackers unless asked for.

    Those end by themselves after the last of the processes they serve, and unlink what these left behind.
    """
    children: dict[int, list[int]] = {}
    for pid, parent, _ in _processes():
        children.setdefault(parent, []).append(pid)
    below = list(children.get(root, ()))
    for pid in below:  # grows while we walk
        below.extend(children.get(pid, ()))
    return below if trackers else [pid for pid in below if not _is_tracker(pid)]


def _processes() -> Iterable[tuple[int, int, int]]:
    """Yield (pid, parent, group) of every process that is not a zombie."""
    if sys.platform != "linux":
        import psutil

        return [(process.pid, process.ppid(), os.getpgid(process.pid)) for process in psutil.process_iter()]
    return _read_proc()


def _read_proc(*, zombies: bool = False) -> Iterator[tuple[int, int, int]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                    state, parent, group = file.read(512).rpartition(b")")[2].split()[:3]
            except (OSError, ValueError):
                continue  # it ended while we looked
            if zombies or state not in (b"Z", b"X"):
                yield int(name), int(parent), int(group)


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            return b"multiprocessing.resource_tracker" in file.read(4096)
    except OSError:
        return False  # it ended, or there is no /proc: then it is killed like the rest


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, number)


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None  # an older kernel or another system: the caller asks for the parent every second instead
