"""What `options()` sets for single calls, on an executor and inside a task: checked once, said once.

Workers import this for nested calls, so it imports little.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import NamedTuple

from .messages import Options, Tree

__all__ = ["Paths", "TaskOptions", "as_paths", "changed", "check_kind"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class TaskOptions(NamedTuple):
    """What `options()` sets for the calls made through its view."""

    retries: int | None = None
    timeout_s: float | None = None
    priority: int = 0
    node: str = ""
    key: str | None = None
    files: tuple[str, ...] = ()

    def for_task(self, retries: int, tree: Tree = ()) -> Options | None:
        """Give the part that travels with the task, `tree` being what is in its files; None if there is nothing to say."""
        if tree:
            return Options(self.timeout_s or 0.0, self.priority, self.node, retries == 0, files=tree)
        if self.timeout_s is None and not self.priority and not self.node and retries:
            return None
        return Options(self.timeout_s or 0.0, self.priority, self.node, retries == 0)


def check_kind(name: str, value: object, kind: type, *, may_be_none: bool = False) -> None:
    """Raise TypeError if an argument is not of a kind."""
    if not isinstance(value, kind) and not (may_be_none and value is None):
        wanted = "a whole number" if kind is Integral else "a number" if kind is Real else "a string"
        raise TypeError(f"{name} must be {wanted}{' or None' if may_be_none else ''}, not {value!r}")


def changed(options: TaskOptions, *, retries: int | None = None, timeout: float | None = None, priority: int | None = None,
            node: str | None = None, key: str | None = None, files: Paths | None = None) -> TaskOptions:
    """Give options with some of them changed. Raises TypeError or ValueError for what cannot be meant."""
    check_kind("retries", retries, Integral, may_be_none=True)
    check_kind("timeout", timeout, Real, may_be_none=True)
    check_kind("priority", priority, Integral, may_be_none=True)
    check_kind("node", node, str, may_be_none=True)
    check_kind("key", key, str, may_be_none=True)
    if retries is not None and retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
    return TaskOptions(options.retries if retries is None else retries,
                       options.timeout_s if timeout is None else float(timeout),
                       options.priority if priority is None else int(priority),
                       options.node if node is None else node,
                       options.key if key is None else key,
                       options.files if files is None else as_paths("files", files))


def as_paths(name: str, paths: Paths) -> tuple[str, ...]:
    """Give paths as strings. Raises TypeError for what is none."""
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    for path in listed:
        if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
            raise TypeError(f"{name} must be a path or a sequence of paths, not {path!r}")
    return tuple(os.fspath(path) for path in listed)
