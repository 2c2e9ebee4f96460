"""What the tasks of a storm do. Each first notes that it began, so that nobody can run it twice in secret.

All but `trifle` take longer than the millisecond for which outcomes of quick tasks may wait in their worker: a quick task
that has ended, but whose worker dies before it could say so, is run again and not charged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

NOT_QUICK_S = 0.003


def begin(log: str, key: int) -> int:
    """Note that task `key` begins, and take a moment; give how often it has begun, this time included."""
    note(log, key)
    time.sleep(NOT_QUICK_S)
    return begun(log).count(key)


def note(log: str, key: int) -> None:
    """Note that task `key` begins."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, f"{key}\n".encode())
    finally:
        os.close(fd)


def begun(log: str) -> list[int]:
    """Give the keys of the tasks that began, in order."""
    if not os.path.exists(log):
        return []
    with open(log, encoding="ascii") as lines:
        return [int(line) for line in lines]


def trifle(log: str, key: int) -> int:
    """Give the square at once."""
    note(log, key)
    return key * key


def square(log: str, key: int, seconds: float = 0.0) -> int:
    """Take so long, and give the square."""
    begin(log, key)
    time.sleep(seconds)
    return key * key


def die_at_first(log: str, key: int) -> int:
    """Die the first time."""
    if begin(log, key) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return key * key


def measure(log: str, key: int, block: bytes) -> tuple[int, int]:
    """Give the size of a large argument, and its last byte."""
    begin(log, key)
    return len(block), block[-1]


def make(log: str, key: int, size: int) -> bytes:
    """Give a large result."""
    begin(log, key)
    return bytes([key % 251]) * size


def talk(log: str, key: int, count: int) -> int:
    """Print so many lines."""
    begin(log, key)
    for number in range(count):
        print(f"task {key} says {number}")
    sys.stdout.flush()
    return key * key


def abandon_a_child(log: str, key: int) -> int:
    """Leave a process behind, in a session of its own."""
    begin(log, key)
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return key * key


def refuse(log: str, key: int) -> None:
    """Raise."""
    begin(log, key)
    raise ValueError(key)
