"""Run Python functions on many machines, as with `concurrent.futures.ProcessPoolExecutor`.

    from distexec import ClusterExecutor
    with ClusterExecutor() as executor:
        results = list(executor.map(work, inputs))

Names are imported when first used: a worker process imports this package too, and should not pay for the rest of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .arguments import NodeSpec
    from .errors import (
        AuthenticationFailed,
        DistexecError,
        IncompatibleNode,
        InitializerFailed,
        JournalError,
        NoNodes,
        PayloadError,
        ProtocolError,
        RemoteError,
        TaskKilled,
        TaskTimeout,
        WorkerLost,
    )
    from .executor import ClusterExecutor
    from .future import ClusterFuture, Timing
    from .program import Program
    from .report import ClusterStatus, NodeStatus
    from .shared import Shared
    from .task import TaskContext, current_task

__all__ = [
    "AuthenticationFailed", "ClusterExecutor", "ClusterFuture", "ClusterStatus", "DistexecError", "IncompatibleNode",
    "InitializerFailed", "JournalError", "NoNodes", "NodeSpec", "NodeStatus", "PayloadError", "Program", "ProtocolError",
    "RemoteError", "Shared", "TaskContext", "TaskKilled", "TaskTimeout", "Timing", "WorkerLost", "__version__",
    "current_task",
]

_HOMES = {
    "arguments": ("NodeSpec",),
    "executor": ("ClusterExecutor",),
    "future": ("ClusterFuture", "Timing"),
    "program": ("Program",),
    "shared": ("Shared",),
    "task": ("TaskContext", "current_task"),
    "report": ("ClusterStatus", "NodeStatus"),
    "errors": ("AuthenticationFailed", "DistexecError", "IncompatibleNode", "InitializerFailed", "JournalError", "NoNodes",
               "PayloadError", "ProtocolError", "RemoteError", "TaskKilled", "TaskTimeout", "WorkerLost"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
