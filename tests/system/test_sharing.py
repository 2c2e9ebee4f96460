"""Several clients on one agent: each gets its fair share, and what one leaves the others take."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path

from distexec import ClusterExecutor
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds

WAIT_S = 30.0


def client(agent: AgentProcess, **kwargs: object) -> ClusterExecutor:
    """An executor on the agent."""
    return ClusterExecutor(nodes=[agent.address], secret=agent.secret, **kwargs)  # type: ignore[arg-type]


def test_two_clients_share_fairly(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """While two clients have work each has one of two slots, though the first had both before the second came."""
    with client(shared_agent) as first, client(shared_agent) as second:
        ours = [first.submit(deeds.nap, 0.02) for _ in range(400)]
        assert wait_until(lambda: ours[5].done(), WAIT_S)
        theirs = [second.submit(deeds.nap, 0.02) for _ in range(60)]
        wait(theirs[:10], WAIT_S)
        began = sum(future.done() for future in ours)
        wait(theirs, WAIT_S)
        meanwhile = sum(future.done() for future in ours) - began
        assert 25 <= meanwhile <= 100, "50 of theirs ended in that time"
        assert wait_until(lambda: second.status().slots <= 1)
        for future in ours:
            future.kill()


def test_a_long_task_keeps_its_slot(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """A second client waits for the first task to end, not for all of them; none is interrupted for it."""
    for each in ("long", "short"):
        (tmp_path / each).mkdir()
    with client(shared_agent) as first, client(shared_agent) as second:
        held = [first.submit(deeds.hold, str(tmp_path / "long"), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path / "long")) == 2, WAIT_S)
        queued = [first.submit(deeds.nap, 0.01, number) for number in range(100)]
        other = second.submit(deeds.hold, str(tmp_path / "short"), "other")
        deeds.let_go(tmp_path / "long")
        assert wait_until(lambda: deeds.notes(tmp_path / "short"), WAIT_S)
        deeds.let_go(tmp_path / "short")
        assert other.result(WAIT_S) == "other"
        assert [future.result(WAIT_S) for future in [*held, *queued]] == [0, 1, *range(100)]
        assert all(future.attempts == 1 for future in held)


def test_who_is_left_gets_all(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """When one client leaves, or only falls silent, the other gets all slots."""
    with client(shared_agent) as first:
        with client(shared_agent) as second:
            wait([executor.submit(deeds.nap, 0.01) for executor in (first, second) for _ in range(20)], WAIT_S)
        futures = [first.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]


def test_idle_share_is_lent(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """A client that is connected and has nothing to do keeps no slot from the other."""
    with client(shared_agent) as first, client(shared_agent) as second:
        assert second.submit(deeds.double, 1).result(WAIT_S) == 2
        futures = [first.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]


def test_ten_clients_come_and_go(shared_agent: AgentProcess) -> None:
    """Ten clients at once, each with work, come and go: everybody gets all results, of its own functions."""
    errors: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for _ in range(2):
                with client(shared_agent) as executor:
                    got = list(executor.map(lambda item: (number, item), range(30)))
                    assert got == [(number, item) for item in range(30)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    with client(shared_agent) as executor:
        assert executor.wait_for_slots(2, WAIT_S)


def test_one_client_cannot_harm_another(shared_agent: AgentProcess) -> None:
    """A client whose workers die all the time does not disturb another's work."""
    with client(shared_agent, retries=0) as bad, client(shared_agent, retries=0) as good:
        deaths = [bad.submit(deeds.die, "SIGKILL") for _ in range(10)]
        assert list(good.map(deeds.double, range(100))) == [2 * number for number in range(100)]
        wait(deaths, WAIT_S)
        assert all(future.exception(0) is not None for future in deaths)
