"""Functions that tests have workers run. Imports little, because workers import it."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_kept: list[Any] = []


def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


def fail(error: BaseException) -> None:
    """Raise it."""
    raise error


def lock() -> Any:
    """Return what cannot be pickled."""
    return threading.Lock()


def wait_for(path: str | None) -> str | None:
    """Say through one named pipe that we are here and wait for word from another; return at once without a path."""
    if path is not None:
        Path(path + ".here").write_text("here")
        Path(path + ".go").read_text()
    return path


def threads_after_fork(path: str | None) -> int:
    """Fork, and return how many threads there were then; 0 without forking, if there is no path."""
    if path is None:
        return 0
    child = os.fork()
    if child == 0:
        os._exit(0)
    threads = len(os.listdir("/proc/self/task"))
    os.waitpid(child, 0)
    return threads


def fork_and_return() -> bool:
    """Return in two processes."""
    return os.fork() == 0


def keep(array: Any) -> int:
    """Hold on to an argument beyond the task."""
    _kept.append(array)
    return int(array.sum())


def kept_sum() -> int:
    """What the first argument held on to sums up to now."""
    return int(_kept[0].sum())


def negative(array: Any) -> Any:
    """Write to the argument, and return it."""
    array *= -1
    return array


def say(text: str, error: str = "") -> None:
    """Print, without ending the line."""
    sys.stdout.write(text)
    sys.stderr.write(error)


def say_and_wait(text: str, path: str) -> None:
    """Print a line, then wait."""
    print(text)
    wait_for(path)


def leave_mark_at_exit(path: str) -> None:
    """Write a file when the interpreter ends."""
    atexit.register(lambda: Path(path).write_text("ended"))


def die(exitcode: int) -> None:
    """End the process without a word."""
    os._exit(exitcode)


def start_sleeper(path: str) -> None:
    """Start a process that sleeps, write down its pid, and wait for it."""
    sleeper = subprocess.Popen(["sleep", "1000"])
    Path(path + ".new").write_text(str(sleeper.pid))
    os.rename(path + ".new", path)
    sleeper.wait()


def hold_link_and_die() -> None:
    """Leave behind a process that holds all our descriptors, made in a way that no hook of Python's sees."""
    import ctypes

    if ctypes.CDLL(None).fork() == 0:
        ctypes.CDLL(None).pause()
    os._exit(7)


def close_link_and_stay() -> None:
    """Close every descriptor but the standard ones, and go on."""
    os.closerange(3, 256)
    threading.Event().wait()


def share_and_wait(path: str) -> None:
    """Make named shared memory, write down its name, and wait for ever."""
    from multiprocessing import shared_memory

    memory = shared_memory.SharedMemory(create=True, size=4096)
    Path(path + ".new").write_text(memory.name)
    os.rename(path + ".new", path)
    threading.Event().wait()


def surroundings() -> dict[str, Any]:
    """Describe the process as a task sees it."""
    import multiprocessing

    process = multiprocessing.current_process()
    main = sys.modules["__main__"]
    return {
        "path": sys.path, "argv": sys.argv, "directory": os.getcwd(), "environ": dict(os.environ),
        "authkey": bytes(process.authkey), "name": process.name, "daemon": process.daemon,
        "main": sorted(name for name in vars(main) if not name.startswith("__")), "warnings": sys.warnoptions,
        "threads": threading.active_count(), "stdin": sys.stdin.read(),
    }


def count_sockets() -> int:
    """How many sockets this process has open."""
    return sum(_is_socket(fd) for fd in os.listdir("/proc/self/fd"))


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except FileNotFoundError:
        return False  # the listing's own


def double_in_child(number: int) -> int:
    """Have a multiprocessing child do it."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(2 * number))
    child.start()
    result: int = queue.get()
    child.join()
    return result


def append_to(proxy: Any, number: int) -> None:
    """Append to a manager's list."""
    proxy.append(number)


def set_sign(sign: Any) -> None:
    """Keep something for `get_sign`; an initializer."""
    _kept.insert(0, sign)


def get_sign() -> Any:
    """Return what the initializer was given, or what comes out of it if it is a queue."""
    return _kept[0].get() if hasattr(_kept[0], "get") else _kept[0]
