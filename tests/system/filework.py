"""What tasks do with files in tests. Imports little, because workers import it."""

from __future__ import annotations

import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

from distexec.task import TaskContext, current_task


def task() -> TaskContext:
    """The task that runs."""
    found = current_task()
    assert found is not None
    return found


def tree(directory: str = ".") -> dict[str, tuple[int, bytes]]:
    """Every file below a directory: mode and the first bytes."""
    return {str(path.relative_to(directory)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes()[:64])
            for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def read(path: str, gate: str | None = None) -> bytes:
    """Wait at a gate, if one is given; then read a file."""
    if gate is not None:
        Path(gate + ".here").write_text("here")
        Path(gate + ".go").read_text()
    return Path(path).read_bytes()


def cwd() -> str:
    """Where this worker works."""
    return os.getcwd()


def own_directory() -> tuple[str, int, bool]:
    """The task's directory, its mode, and whether it is this process's working directory; something is left in it."""
    directory = task().directory
    assert task().directory == directory
    Path(directory, "left").write_text("left")
    Path(directory, "locked").mkdir()
    Path(directory, "locked", "left").write_text("left")
    Path(directory, "locked").chmod(0)
    return directory, stat.S_IMODE(os.stat(directory).st_mode), os.path.samefile(directory, ".")


def die_with_directory(note: str) -> None:
    """Note where the task's directory is, and be killed."""
    with open(note, "a") as file:
        file.write(task().directory + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def overwrite(path: str) -> None:
    """Write to a file that one was given to read."""
    Path(path).chmod(0o644)
    Path(path).write_bytes(b"overwritten")


def send(content: bytes, times: int = 1, name: str | None = None, mode: int = 0o644) -> tuple[str, str]:
    """Make a file and send it; gives its path at the client, and here."""
    path = Path(task().directory, "file.out")
    with path.open("wb") as file:
        for _ in range(times):
            file.write(content)
    path.chmod(mode)
    return task().send_file(path, name), str(path)


def send_path(path: str, name: str | None = None) -> str:
    """Send a file that is there."""
    return task().send_file(path, name)


def send_in_threads(count: int) -> list[str]:
    """Send several at the same time."""
    sent: list[str] = []

    def one(number: int) -> None:
        path = Path(context.directory, str(number))
        path.write_bytes(bytes([number]) * 300_000)
        sent.append(context.send_file(path, f"many/{number}"))

    context = task()
    context.directory  # noqa: B018 - made before the threads ask
    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(sent)


def send_from_child() -> str:
    """Try to send from a process that the task forked."""
    reader, writer = os.pipe()
    context = task()
    path = Path(context.directory, "x")
    path.write_text("x")
    child = os.fork()
    if child == 0:
        try:
            context.send_file(path)
            os.write(writer, b"sent")
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(reader, 1000).decode()


def growing(path: str) -> Any:
    """Send a file that another thread goes on writing to."""
    stop = threading.Event()

    def grow() -> None:
        with open(path, "ab", buffering=0) as file:
            while not stop.is_set():
                file.write(bytes(1 << 16))
                if file.tell() > 1 << 28:
                    file.truncate(1 << 20)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        return task().send_file(path)
    finally:
        stop.set()
        thread.join()


def fail_with_directory() -> None:
    """Raise, and say where the task's directory is."""
    raise ValueError(own_directory()[0])


_kept: list[TaskContext] = []


def keep_context() -> str:
    """Keep what belongs to one task for the next."""
    _kept.append(task())
    return task().directory


def use_kept_context() -> str:
    """Use what belonged to another task."""
    try:
        return _kept[0].directory
    except RuntimeError as error:
        return str(error)


def nest_with_files(executor: Any) -> str:
    """Try to give files to a call that a task makes."""
    try:
        executor.options(files="x")
    except ValueError as error:
        return str(error)
    return "allowed"


def take(_: object) -> None:
    """Take an argument."""


def exchange(path: str, target: str) -> None:
    """Put a link in the place of a directory."""
    if os.path.isdir(path):
        os.rename(path, path + ".old")
    os.symlink(target, path)
