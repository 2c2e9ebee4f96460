"""The agent that the contract is tested through, and multiprocessing's helpers tidied up after each module."""

from __future__ import annotations

import multiprocessing.util
import os
from collections.abc import Iterator

import pytest

from tests.agents import AgentProcess
from tests.contract.substitute import ADDRESS_VARIABLE, IS_PEER, SECRET_VARIABLE


@pytest.fixture(scope="session")
def agent() -> Iterator[None]:
    """An agent with five slots, as many as CPython's tests have workers; found through two variables."""
    if IS_PEER:
        yield
        return
    with AgentProcess(slots=5) as agent:
        os.environ[ADDRESS_VARIABLE], os.environ[SECRET_VARIABLE] = agent.address, agent.secret
        yield
        del os.environ[ADDRESS_VARIABLE], os.environ[SECRET_VARIABLE]


@pytest.fixture(autouse=True, scope="module")
def stops_multiprocessing() -> Iterator[None]:
    """The fork server and the resource tracker that contexts started go with the module."""
    yield
    multiprocessing.util._cleanup_tests()
