"""What a test leaves behind: processes, threads, descriptors, files, network namespaces.

The pytest process makes itself a child subreaper, so that a process whose parent died is still found below it; and it
has a temporary directory of its own, so that other programs' files are not taken for ours.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import netns

PATIENCE_S = 10.0
"""How long what is ending may take. Longer: a failing test takes longer. Shorter: a busy machine fails a good one."""

DESCRIPTOR_ALLOWANCE = 2
"""Sockets or memfds more than before that are no leak: what the interpreter opens once and keeps."""

OWNED_FILES = ("pytest-of-", "pymp-")
"""Beginnings of names that pytest and multiprocessing make in the temporary directory and remove at their end."""

_PR_SET_CHILD_SUBREAPER = 36
_owned_pids: set[int] = set()


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent died."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def own(pid: int) -> None:
    """Say that a process belongs to a fixture that outlives the test; its descendants must still go."""
    _owned_pids.add(pid)


def disown(pid: int) -> None:
    """Say that the fixture's process must be gone by now."""
    _owned_pids.discard(pid)


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> bool:
    """Wait for a condition to become true; False if it did not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)  # nothing tells us when another process goes; this is how often we look
    return True


def _multiprocessing_pids() -> set[int | None]:
    """The two helpers that multiprocessing starts once per program and keeps."""
    tracker, server = multiprocessing.resource_tracker._resource_tracker, multiprocessing.forkserver._forkserver
    return {tracker._pid, server._forkserver_pid}


def _descendants() -> dict[int, str]:
    """Every living process below this one that nobody owns, with its command line; dead ones are reaped."""
    found = {}
    spared = _owned_pids | _multiprocessing_pids()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                _reap(process)
            elif process.pid not in spared:
                found[process.pid] = " ".join(process.cmdline())[:200] or process.name()
        except psutil.NoSuchProcess:
            continue
    return found


def _reap(process: psutil.Process) -> None:
    """Take note of an orphan's death; whoever started a process of its own already has, or asks and is told ECHILD."""
    if process.ppid() == os.getpid() and process.pid not in _owned_pids:
        try:
            os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            return


def _descriptors() -> Counter[str]:
    """How many sockets and memfds this process has open."""
    count: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
        if target.startswith("socket:"):
            count["sockets"] += 1
        elif target.startswith("/memfd:"):
            count["memfds"] += 1
    return count


def _files() -> set[str]:
    """What lies in our temporary directory, and what distexec has in the shared-memory directory."""
    temporary = {str(path) for path in Path(tempfile.gettempdir()).iterdir() if not path.name.startswith(OWNED_FILES)}
    return temporary | {str(path) for path in Path("/dev/shm").glob("*distexec*")}


@dataclass
class Footprint:
    """What there was before a test; `leaks` says what there is more afterwards."""

    processes: dict[int, str] = field(default_factory=_descendants)
    threads: set[threading.Thread] = field(default_factory=lambda: set(threading.enumerate()))
    descriptors: Counter[str] = field(default_factory=_descriptors)
    files: set[str] = field(default_factory=_files)
    namespaces: set[str] = field(default_factory=lambda: netns.namespaces(os.getpid()))

    def leaks(self) -> list[str]:
        """Give what is ending time to end, then name everything that is left."""
        gc.collect()
        wait_until(lambda: not self._found())
        return self._found()

    def _found(self) -> list[str]:
        processes = [f"process {pid}: {command}" for pid, command in _descendants().items()
                     if pid not in self.processes]
        threads = [f"thread {thread.name!r}" for thread in threading.enumerate() if thread not in self.threads]
        now = _descriptors()
        descriptors = [f"{now[kind]} {kind} open, {self.descriptors[kind]} before" for kind in now
                       if now[kind] > self.descriptors[kind] + DESCRIPTOR_ALLOWANCE]
        files = [f"file {path}" for path in sorted(_files() - self.files)]
        networks = [f"network namespace {name}" for name in sorted(netns.namespaces(os.getpid()) - self.namespaces)]
        return processes + threads + descriptors + files + networks
