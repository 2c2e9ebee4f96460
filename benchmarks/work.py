"""The tasks that are measured. Every contender's workers import this module."""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

_result: Any = None


def nothing(x: object = None) -> None:
    """Do nothing."""


def sleep(seconds: float) -> None:
    """Sleep."""
    time.sleep(seconds)


def hold(path: str) -> int:
    """Occupy a worker until the file is gone."""
    while Path(path).exists():
        time.sleep(0.01)
    return os.getpid()


def note_begin(directory: str) -> None:
    """Note this process and the time, and occupy a worker until there is a file `go`."""
    with open(Path(directory, "begins"), "a", encoding="ascii") as log:
        log.write(f"{os.getpid()} {time.monotonic()}\n")
    while Path(directory).exists() and not Path(directory, "go").exists():
        time.sleep(0.005)


def import_all(names: list[str]) -> None:
    """Import modules."""
    for name in names:
        import_module(name)


def first_byte(array: Any) -> int:
    """Take a large argument."""
    return int(array[0])


def large_result(size_bytes: int, first: int) -> Any:
    """Return a large array that is made once and then changed in one place, so that only its transport costs."""
    global _result
    if _result is None or len(_result) != size_bytes:
        import numpy
        _result = numpy.ones(size_bytes, dtype="u1")
    _result[0] = first
    return _result


def send_file(path: str) -> str:
    """Send a file to the client."""
    from distexec import current_task
    task = current_task()
    assert task is not None
    return task.send_file(path)


def size_of(path: str) -> int:
    """Look at a file."""
    return Path(path).stat().st_size
