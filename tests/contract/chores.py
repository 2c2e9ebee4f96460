"""What the replacement tests have workers do. Light to import, as every worker does."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from pickle import PicklingError
from typing import Any

PATIENCE_S = 30.0


def stay(directory: str) -> int:
    """Note that this process is here, and stay until told to go."""
    (Path(directory) / str(os.getpid())).touch()
    deadline = time.monotonic() + PATIENCE_S
    while not Path(directory, "go").exists():
        assert time.monotonic() < deadline, "was never told to go"
        time.sleep(0.01)
    return os.getpid()


def double(x: int) -> int:
    """Twice x."""
    return 2 * x


def has_module(name: str) -> bool:
    """Whether this process has the module."""
    return name in sys.modules


def fail_to_initialize(log_queue: Any = None) -> None:
    """An initializer that raises, whatever it is given."""
    raise ValueError("error in initializer")


class ErrorAtPickle:
    """Cannot be pickled."""

    def __reduce__(self) -> str:
        raise PicklingError("Error in pickle")
