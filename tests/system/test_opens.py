"""Sessions that cannot be, and too many of them: the connection that names them is closed, and nobody else is hurt.

A client of the bare protocol, holding the secret, beside an honest executor on the same agent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distexec import ClusterExecutor, nodeagent
from distexec.address import parse_address
from distexec.auth import Secret
from distexec.messages import Bye, Offer, Open, SessionSpec
from distexec.nodeagent import Agent
from distexec.transport import Link, Loop
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.wires import SECRET, Witness, credentials, dial, running_loop

WAIT_S = 30.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    """The I/O thread of the bare client."""
    with running_loop("bare") as running:
        yield running


def connect(loop: Loop, address: str, secret: Secret, witness: Witness) -> Link:
    """Dial an agent as a client would."""
    return dial(loop, parse_address(address), witness, who=credentials("bare", secret))


def opening(session: int, weight: float = 1.0, ceiling: int = 0, linger_s: float = 0.0) -> Open:
    """A session with an id of its own."""
    return Open(session, os.urandom(16), os.urandom(16), weight, ceiling, SessionSpec(name="bare"), linger_s)


@pytest.mark.parametrize("opened", [
    opening(0), opening(-1), opening(1, weight=0.0), opening(1, weight=-1.0), opening(1, weight=float("nan")),
    opening(1, weight=float("inf")), opening(1, ceiling=-1), opening(1, linger_s=-1.0), opening(1, linger_s=float("nan")),
], ids=lambda opened: f"{opened.session} {opened.weight:g} {opened.ceiling} {opened.linger_s:g}")
def test_sessions_that_cannot_be(shared_agent: AgentProcess, loop: Loop, tmp_path: Path, opened: Open) -> None:
    """A number below 1, a weight or ceiling that is none → that link is closed; others' tasks run on, new ones begin."""
    log_before = len(shared_agent.log())
    with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret) as executor:
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path))
        witness = Witness()
        link = connect(loop, shared_agent.address, Secret.parse(shared_agent.secret), witness)
        link.send([opened])
        assert witness.is_closed
        assert witness.messages == []
        assert list(executor.map(deeds.double, range(20))) == [2 * number for number in range(20)]
        deeds.let_go(tmp_path)
        assert held.result(WAIT_S) == "held"
        assert held.attempts == 1
        assert executor.wait_for_slots(2, WAIT_S)
        good = Witness()
        link = connect(loop, shared_agent.address, Secret.parse(shared_agent.secret), good)
        link.send([opening(1)])
        assert wait_until(lambda: any(isinstance(message, Offer) for message in good.messages))
        link.send([Bye("enough")])  # else the session would wait for its client, and for slots with it
        assert executor.wait_for_slots(2, WAIT_S)
    assert "Traceback" not in shared_agent.log()[log_before:]


def test_too_many_sessions(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection may open so many sessions; with one more it is closed, and others open theirs as before."""
    monkeypatch.setattr(nodeagent, "MAX_SESSIONS", 3)
    agent = Agent(SECRET, 1, "inner", str(tmp_path))
    agent.start([("127.0.0.1", 0)])
    try:
        host, port = agent.listeners[0].address[:2]
        address = f"{host}:{port}"
        greedy, other = Witness(), Witness()
        link = connect(loop, address, SECRET, greedy)
        link.send([opening(number) for number in range(1, 4)])
        assert wait_until(lambda: {each.session for each in greedy.messages if isinstance(each, Offer)} == {1, 2, 3})
        assert len(agent.tenancies) == 3
        assert greedy.reasons == []
        link.send([opening(4)])
        assert greedy.is_closed
        assert len(agent.tenancies) == 3
        connect(loop, address, SECRET, other).send([opening(1)])
        assert wait_until(lambda: len(agent.tenancies) == 4)
        assert other.reasons == []
    finally:
        agent.close()
    assert list(tmp_path.iterdir()) == []
