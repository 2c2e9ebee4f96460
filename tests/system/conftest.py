"""Executors for the tests with real processes: on this machine's own workers, and on those of one agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distexec import ClusterExecutor
from tests.agents import AgentProcess

Make = Callable[..., ClusterExecutor]


@pytest.fixture(scope="session")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent with two slots that is there for all tests; what a test does to it must pass without a trace."""
    spool = tmp_path_factory.mktemp("spool")
    with AgentProcess(slots=2, name="shared", arguments=("--spool", str(spool))) as agent:
        yield agent
    assert not list(spool.iterdir()), "an agent that was stopped leaves no files"


@pytest.fixture(params=["local", "agent"])
def make(request: pytest.FixtureRequest) -> Make:
    """A constructor of executors with two slots (`max_workers` for fewer), local or through the agent."""
    if request.param == "local":
        return make_local
    agent: AgentProcess = request.getfixturevalue("shared_agent")
    return lambda *args, **kwargs: ClusterExecutor(*args, nodes=[agent.address], secret=agent.secret, **kwargs)


def make_local(max_workers: int = 2, *args: Any, **kwargs: Any) -> ClusterExecutor:
    """An executor on workers of this machine."""
    return ClusterExecutor(max_workers, *args, nodes="local", **kwargs)
