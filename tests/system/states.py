"""What the tests of prepared state have setup, cleanup and tasks do. Imports little: workers import it."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.system import deeds

state: Any = None  # what setup makes
holder: Any = None  # what goes with the process that has it


def build(directory: str, value: Any = "built") -> None:
    """Setup: note where it ran, and make a value global."""
    global state
    deeds.note(directory, f"setup {value}")
    state = value


def take_down(directory: str) -> None:
    """Cleanup: note what there was."""
    deeds.note(directory, f"cleanup {state}")


def build_arrays(megabytes: int) -> None:
    """Setup: make a large array global."""
    import numpy

    global state
    state = numpy.ones(megabytes << 20, dtype="u1")


def keep(array: Any) -> None:
    """Setup: make an argument global."""
    global state
    state = array


def look(_: object = None) -> Any:
    """Return what setup made, and which process forked this one."""
    return state, os.getppid()


def total() -> int:
    """Read all of it."""
    return int(state.sum())


def memory_when_met(directory: str, count: int) -> tuple[int, float]:
    """Read all of what setup made, wait until `count` tasks have, then return the sum and what it costs us, MiB.

    Pages that several processes share count for each by its part (PSS).
    """
    result = total()
    deeds.note(directory, "read")
    while len(deeds.notes(directory)) < count:
        deeds.nap(0.005)
    cost = pss_mib("self")
    deeds.note(directory, "measured")
    while len(deeds.notes(directory)) < 2 * count:
        deeds.nap(0.005)
    return result, cost


def pss_mib(process: object) -> float:
    """The memory of a process, of which shared pages count by its part."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Pss in smaps_rollup")


def hold_state(directory: str) -> Any:
    """Wait for word, then return what setup made."""
    deeds.hold(directory)
    return state


def hang(directory: str) -> None:
    """Setup or cleanup that waits for word."""
    deeds.hold(directory, "hangs")


def start_things(directory: str) -> None:
    """Setup: a thread, a child process, a directory and an exit function of its own."""
    global state, holder
    holder = tempfile.TemporaryDirectory(prefix="state-", dir=directory)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    child = subprocess.Popen(["sleep", "1000"])
    deeds.note(directory, child.pid)
    atexit.register(deeds.note, directory, "exit")
    state = holder.name


def is_there() -> bool:
    """Whether the directory that setup made is there, and how many threads we have is one."""
    return os.path.isdir(state) and threading.active_count() == 1


def greet(word: str) -> None:
    """Setup or cleanup: print."""
    print(word, flush=True)
    print(word.upper(), file=sys.stderr, flush=True)


def fork_and_return(directory: str) -> None:
    """Setup that comes back in two processes, of which one is noted."""
    if os.fork() == 0:
        deeds.note(directory, "child")


def hang_for_ever(directory: str) -> None:
    """Cleanup that does not end."""
    deeds.note(directory, "hangs")
    threading.Event().wait()


def build_or_hang(directory: str, value: Any) -> None:
    """Setup: make a value global, or do not end if there is none."""
    if value is None:
        hang_for_ever(directory)
    build(directory, value)


def start_and_hold(directory: str) -> None:
    """Start a process, note it, and wait for word."""
    child = subprocess.Popen(["sleep", "1000"])
    deeds.hold(directory, child.pid)


def from_init(name: str) -> Any:
    """Return what the node's init file defined."""
    import distexec_init  # type: ignore[import-not-found]

    return getattr(distexec_init, name)


def threads() -> dict[str, str]:
    """The variables that limit threads."""
    return {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS") or "MAXIMUM_THREADS" in name}


def limits() -> tuple[int, int]:
    """How many files we may open, and how large they may be."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_FSIZE)[0]


def write(path: str, size: int) -> int:
    """Write a file that large, and return its size."""
    Path(path).write_bytes(bytes(size))
    return os.stat(path).st_size


def zeros(size: int) -> bytes:
    """Return so many bytes."""
    return bytes(size)


def set_from_init() -> None:
    """Setup: keep what the init file defined."""
    keep(from_init("TABLE"))


def greet_nobody() -> None:
    """Setup: nothing."""


def who() -> tuple[int, str, int, int]:
    """Our user and its home, the mode of the session's directory, and whose that is."""
    from distexec import worker

    assert worker.this_worker is None or worker.this_worker.home
    home = worker.this_worker.home if worker.this_worker is not None else os.getcwd()
    found = os.stat(home)
    return os.getuid(), os.environ["HOME"], found.st_mode & 0o777, found.st_uid


def keep_user() -> None:
    """Setup: keep who we are."""
    keep((os.getuid(), os.environ["HOME"]))


def read(path: str) -> bytes:
    """Read a file."""
    return Path(path).read_bytes()


def read_parents_environ() -> bytes:
    """Read the environment of the process that forked us."""
    return read(f"/proc/{os.getppid()}/environ")
