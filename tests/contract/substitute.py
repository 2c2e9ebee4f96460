"""The executor types that take the place of ProcessPoolExecutor in CPython's tests, here and in the scripts they run.

`CONTRACT_PEER=ProcessPoolExecutor` puts that executor itself there: what fails then is the fault of the harness.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ADDRESS_VARIABLE = "CONTRACT_AGENT_ADDRESS"
SECRET_VARIABLE = "CONTRACT_AGENT_SECRET"
PEER_VARIABLE = "CONTRACT_PEER"
IS_PEER = os.environ.get(PEER_VARIABLE) == "ProcessPoolExecutor"

if IS_PEER:
    class LocalExecutor(ProcessPoolExecutor):
        """The peer as it is."""

    class TemplateExecutor(ProcessPoolExecutor):
        """The peer as it is."""

    class AgentExecutor(ProcessPoolExecutor):
        """The peer as it is."""
else:
    from distexec import ClusterExecutor

    class LocalExecutor(ClusterExecutor):  # type: ignore[no-redef]
        """Workers of this machine, as processes of the multiprocessing context that the test chose."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, nodes="local")

    class TemplateExecutor(ClusterExecutor):  # type: ignore[no-redef]
        """Workers of this machine that fork from the template: what a user gets who chooses nothing."""

        def __init__(self, max_workers: int | None = None, mp_context: object = None, *args: Any,
                     **kwargs: Any) -> None:
            super().__init__(max_workers, None, *args, **kwargs, nodes="local")

    class AgentExecutor(ClusterExecutor):  # type: ignore[no-redef]
        """Workers of the agent that the fixture started. They are never processes of a context here."""

        def __init__(self, max_workers: int | None = None, mp_context: object = None, *args: Any,
                     **kwargs: Any) -> None:
            super().__init__(max_workers, None, *args, **kwargs, nodes=[os.environ[ADDRESS_VARIABLE]],
                             secret=os.environ[SECRET_VARIABLE])


def import_line(executor_type: type[Executor]) -> str:
    """What a script says to have `executor_type` under its own name."""
    return (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            f"from tests.contract.substitute import {executor_type.__name__}")
