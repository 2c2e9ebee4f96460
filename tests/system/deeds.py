"""What the tests of whole executors have tasks do: leave notes, wait for word, die. Imports little: workers import it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 20.0
"""How long a task waits for word before it gives up. Longer than any test waits."""


def note(directory: str, word: object = "") -> None:
    """Append a line to the directory's log; lines of different processes do not mix."""
    fd = os.open(os.path.join(directory, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, f"{os.getpid()} {word}\n".encode())
    finally:
        os.close(fd)


def notes(directory: str | Path) -> list[str]:
    """Return the words that were noted, in order."""
    return [line.partition(" ")[2] for line in _lines(directory)]


def pids(directory: str | Path) -> list[int]:
    """Return the processes that noted something, in order."""
    return [int(line.partition(" ")[0]) for line in _lines(directory)]


def _lines(directory: str | Path) -> list[str]:
    log = Path(directory, "log")
    return log.read_text().splitlines() if log.exists() else []


def note_and_return(directory: str, word: Any) -> Any:
    """Leave a note, of large words only the size, and return the word."""
    note(directory, len(word) if isinstance(word, bytes) else word)
    return word


def hold(directory: str, word: Any = "") -> Any:
    """Leave a note, wait until the directory holds a file `go`, and return the word."""
    note(directory, word)
    wait_for_file(os.path.join(directory, "go"))
    return word


def wait_for_file(path: str) -> None:
    """Wait until there is such a file."""
    deadline = time.monotonic() + PATIENCE_S
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody made {path}")
        time.sleep(0.005)


def let_go(directory: str | Path) -> None:
    """Give the word that `hold` waits for."""
    Path(directory, "go").touch()


def die(way: str, directory: str = "") -> None:
    """End this process, after a note if there is a directory."""
    if directory:
        note(directory, way)
    print("last words", file=sys.stderr, flush=True)
    if way.startswith("exit"):
        os._exit(int(way[4:]))
    elif way == "segfault":
        import ctypes
        ctypes.string_at(0)
    elif way == "group":
        os.killpg(0, signal.SIGKILL)
    elif way == "close":
        os.closerange(3, 1024)
    else:
        os.kill(os.getpid(), getattr(signal, way))


def die_first(times: int, directory: str, way: str = "SIGKILL") -> int:
    """Die so many times, then return how often this was tried."""
    note(directory, way)
    tried = len(notes(directory))
    if tried <= times:
        die(way)
    return tried


def die_if(word: int, victims: tuple[int, ...], directory: str) -> int:
    """Leave a note; die if the word is among the victims and this is its first time, else return it."""
    note(directory, word)
    if word in victims and notes(directory).count(str(word)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return word


def double(number: Any) -> Any:
    """Return twice the number."""
    return 2 * number


def pid(_: object) -> int:
    """Return which process this is."""
    return os.getpid()


def ends(array: Any) -> tuple[int, int]:
    """Return the first and the last of an array."""
    return int(array[0]), int(array[-1])


def nap(seconds: float, word: Any = None) -> Any:
    """Take that long, and return the word."""
    time.sleep(seconds)
    return word


def fail(error: BaseException) -> None:
    """Raise it."""
    raise error


def fail_at(number: int, bad: int) -> int:
    """Return the number, or raise ValueError if it is the bad one."""
    if number == bad:
        raise ValueError(f"bad {number}")
    return number


def recurse(depth: int = 0) -> int:
    """Never return."""
    return recurse(depth + 1) + 1


def fill_memory() -> bytearray:
    """Ask for more memory than any machine has."""
    return bytearray(1 << 60)


def fork_and_go_on() -> int:
    """Fork a child that ends at once, and return its exit code."""
    child = os.fork()
    if child == 0:
        os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_children(directory: str) -> None:
    """Start a process, and one in a session of its own; note both pids, and wait for ever."""
    children = [subprocess.Popen(["sleep", "1000"]), subprocess.Popen(["sleep", "1000"], start_new_session=True)]
    note(directory, " ".join(str(child.pid) for child in children))
    for child in children:
        child.wait()


def abandon_a_child() -> int:
    """Start a process in a session of its own, and give its pid without waiting for it."""
    return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid


def say(text: str, error: str = "") -> None:
    """Print in every way there is: through Python, to the descriptor, from a child process."""
    print(f"print {text}")
    sys.stdout.flush()
    os.write(1, f"write {text}\n".encode())
    subprocess.run(["echo", "echo", text], check=True)
    if error:
        print(error, file=sys.stderr)


class PicklesOnce:
    """Its pickle cannot be loaded anywhere."""

    def __reduce__(self) -> tuple[Any, ...]:
        return fail, (LookupError("no way back"),)


class Unpicklable:
    """Refuses to be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("cannot pickle this on purpose")


class LoadsAt:
    """Can be loaded only in processes other than the one with this pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_at, (self.pid,)


def _load_at(pid: int) -> LoadsAt:
    if os.getpid() == pid:
        raise LookupError("not in this process")
    return LoadsAt(pid)


class PickyError(Exception):
    """Its constructor cannot be called again with its args."""

    def __init__(self, first: int, *, second: int) -> None:
        super().__init__(f"{first} and {second}")


class SecretiveError(Exception):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.keeps = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("cannot pickle this error")


def raise_picky() -> None:
    """Raise what cannot be made again."""
    raise PickyError(1, second=2)


def raise_secretive() -> None:
    """Raise what cannot be pickled."""
    raise SecretiveError("the text stays")


def make_unpicklable() -> Unpicklable:
    """Return what cannot be pickled."""
    return Unpicklable()


def make_pickles_once() -> PicklesOnce:
    """Return what cannot be loaded at the client."""
    return PicklesOnce()


def return_for(pid: int) -> LoadsAt:
    """Return what that process cannot load."""
    return LoadsAt(pid)


def exit_politely(code: object) -> None:
    """Call sys.exit."""
    sys.exit(code)  # type: ignore[arg-type]


def negate(array: Any) -> tuple[Any, bool]:
    """Write into the argument; return it, and whether it could be written to."""
    writable = bool(array.flags.writeable)
    array *= -1
    return array, writable


def talk(queue_in: Any, queue_out: Any, word: Any) -> Any:
    """Say a word to another task and hear its word."""
    queue_out.put(word)
    return queue_in.get(timeout=PATIENCE_S)


def print_and_die(directory: str, times: int) -> str:
    """Print which try this is; die so many times."""
    note(directory, "try")
    tried = len(notes(directory))
    print(f"try {tried}", flush=True)
    print("error", tried, file=sys.stderr, flush=True)
    if tried <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"try {tried}"


def print_and_hold(directory: str, text: str) -> str:
    """Print, without the end of a line, and wait for word."""
    print(text, end="", flush=True)
    result: str = hold(directory, text)
    return result


def print_c(text: str) -> None:
    """Print as a C library does, which has a buffer of its own."""
    import ctypes
    ctypes.CDLL(None).printf(b"%s", text.encode())


def log(name: str, level: int, text: str, *args: Any, **extra: Any) -> int:
    """Log a record, and return how many handlers the root logger has here."""
    import logging
    logging.getLogger(name).log(level, text, *args, extra=extra)
    return len(logging.root.handlers)


def dribble(number: int) -> None:
    """Print lines piece by piece."""
    for _ in range(5):
        for _ in range(50):
            os.write(1, f"{number} ".encode())
        os.write(1, b"\n")


def has_imported(name: str) -> bool:
    """Whether something in this process has imported it."""
    return name in sys.modules


def log_loader(level: int) -> None:
    """Log what loaded `logging`."""
    import logging
    logging.getLogger("loader").log(level, "%s", type(logging.__spec__.loader).__name__)
