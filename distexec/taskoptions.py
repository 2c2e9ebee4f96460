"""What `options()` sets for single calls, on an executor and inside a task: checked once, said once.

Workers import this for nested calls, so it imports little.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import NamedTuple

from .messages import Options

__all__ = ["TaskOptions", "changed", "check_kind"]


class TaskOptions(NamedTuple):
    """What `options()` sets for the calls made through its view."""

    retries: int | None = None
    timeout_s: float | None = None
    priority: int = 0
    node: str = ""
    key: str | None = None

    def for_task(self, retries: int) -> Options | None:
        """Give the part that travels with the task; None if there is nothing to say."""
        if self.timeout_s is None and not self.priority and not self.node and retries:
            return None
        return Options(self.timeout_s or 0.0, self.priority, self.node, retries == 0)


def check_kind(name: str, value: object, kind: type, *, may_be_none: bool = False) -> None:
    """Raise TypeError if an argument is not of a kind."""
    if not isinstance(value, kind) and not (may_be_none and value is None):
        wanted = "a whole number" if kind is Integral else "a number" if kind is Real else "a string"
        raise TypeError(f"{name} must be {wanted}{' or None' if may_be_none else ''}, not {value!r}")


def changed(options: TaskOptions, *, retries: int | None = None, timeout: float | None = None, priority: int | None = None,
            node: str | None = None, key: str | None = None) -> TaskOptions:
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
                       options.key if key is None else key)
