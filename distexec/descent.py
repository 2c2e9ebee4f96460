"""The tree of processes below one: made its children, found, killed and reaped.

    worker ── dies ──► its parent: what is left of its group is killed, then it is reaped and reported
      └── child ── orphaned ──► the nearest reaper above: the template, or an agent

The rule: what is to be killed is stopped when it is found, so that none forks behind our back, and no number is used that
could be another process's by now.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

GRACE_S = 2.0
"""For multiprocessing's resource trackers to unlink what the dead left. Shorter: shared memory may stay behind."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PF_EXITING = 0x4
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


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
    orphans = [process.pid for process in _read_proc(zombies=True)
               if process.parent == os.getpid() and process.pid not in spared]
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
        for _ in reap_all():
            pass
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait([signal.SIGCHLD], timeout_s)
    return True


def reap_all(end_groups_of: Container[int] = (), end_session_of: int = 0) -> Iterator[tuple[int, int, int]]:
    """Reap what has died; yield each pid, its exit code or negative signal, and the most memory it used, bytes.

    If one of `end_groups_of` did not end well, what is left of its group is killed: the task will run again elsewhere,
    and must not meet what its first attempt started. Of `end_session_of`, once it is dead, the whole session is.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            # Looked at before it is reaped: until then its group's number cannot become another's.
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) if hasattr(os, "waitid") else None
            if dead and dead.si_pid == end_session_of:
                _end_all(lambda process: process.session == end_session_of)
            elif dead and dead.si_pid in end_groups_of and (dead.si_code != os.CLD_EXITED or dead.si_status != 0):
                _end_group(dead.si_pid)
            pid, status, usage = os.wait4(dead.si_pid if dead else -1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * _MAXRSS_BYTES


def reap(pids: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Do as `reap_all` for these children alone, whose groups end with them: others are somebody else's to wait for.

    The code is 0 where somebody else has waited nevertheless.
    """
    for pid in list(pids):
        try:
            dead = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) if hasattr(os, "waitid") else None
            if dead and (dead.si_code != os.CLD_EXITED or dead.si_status != 0):
                _end_group(pid)
            done, status, usage = os.wait4(pid, os.WNOHANG)
        except ChildProcessError:
            yield pid, 0, 0
            continue
        if done:
            yield pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * _MAXRSS_BYTES


def _end_group(member: int) -> None:
    """Kill the others of a dead worker's group."""
    group = os.getpgid(member)
    if group != os.getpgrp():
        _end_all(lambda process: process.group == group)


def _end_all(is_meant: Callable[[_Process], bool]) -> None:
    """Kill processes, resource trackers excepted, until none is left that could fork."""
    found = {0}
    while found:
        found = {process.pid for process in _processes() if is_meant(process) and not _is_tracker(process.pid)}
        for pid in found:
            _signal(pid, signal.SIGKILL)


@contextlib.contextmanager
def new_group() -> Iterator[int]:
    """Make a process group that a child may join. Nobody is its leader: a leader could not become a session's.

    It is made by a process that is not reaped, and so stays in it, until the child has joined.
    """
    pid = _start_group()
    try:
        yield pid
    finally:
        _signal(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _start_group() -> int:
    """Start a process that leads a group, and does nothing."""
    try:  # which takes no time for each page of ours, as a fork does
        return os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}, setpgroup=0)
    except OSError:
        pid = os.fork()  # the interpreter's file is gone, or no process can be had
        if pid == 0:
            os.setpgid(0, 0)
            os._exit(0)
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid


def _descendants(root: int, *, trackers: bool = False) -> list[int]:
    """List who descends from `root`, without multiprocessing's resource trackers unless asked for.

    Those end by themselves after the last of the processes they serve, and unlink what these left behind.
    """
    children: dict[int, list[int]] = {}
    for process in _processes():
        children.setdefault(process.parent, []).append(process.pid)
    below = list(children.get(root, ()))
    for pid in below:  # grows while we walk
        below.extend(children.get(pid, ()))
    return below if trackers else [pid for pid in below if not _is_tracker(pid)]


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    session: int


def _processes() -> Iterable[_Process]:
    """Yield every process that is not a zombie."""
    if sys.platform != "linux":
        import psutil

        return [_Process(each.pid, each.ppid(), os.getpgid(each.pid), os.getsid(each.pid)) for each in psutil.process_iter()]
    return _read_proc()


def _read_proc(*, zombies: bool = False) -> Iterator[_Process]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                    state, parent, group, session = file.read(512).rpartition(b")")[2].split()[:4]
            except (OSError, ValueError):
                continue  # it ended while we looked
            if zombies or state not in (b"Z", b"X"):
                yield _Process(int(name), int(parent), int(group), int(session))


def is_ending(pid: int) -> bool:
    """Whether a process is on its way out: the kernel notes that before it closes the first of its descriptors (Linux)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(512).rpartition(b")")[2].split()
        return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)
    except (OSError, ValueError, IndexError):
        return os.path.isdir("/proc/self")  # it is gone; elsewhere nobody can tell


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            return b"multiprocessing.resource_tracker" in file.read(4096)
    except OSError:
        return False  # it ended, or there is no /proc: then it is killed like the rest


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, number)
