"""A node on which tasks die that run well elsewhere: what it costs, and that it is used again. All times are virtual."""

from __future__ import annotations

from distexec.ledger import LaneState
from distexec.messages import Outcome, OutcomeKind
from distexec.quarantine import PATIENCE_S, PAUSE_S

from .test_laws import LONG, Cluster


def states(cluster: Cluster) -> dict[str, LaneState]:
    """How each node stands with the root."""
    return {lane.name: lane.state for lane in cluster.root.session.lanes.values() if not lane.is_worker}


def test_a_bad_node_costs_few_attempts() -> None:
    """Of 1,000 tasks, of which each that begins on one of three nodes dies, all end well, and few were ever begun there."""
    cluster = Cluster(agents=(2, 2, 2))
    cluster.agents[1].fails = 1.0
    cluster.start()
    calls = [cluster.root.submit(LONG, 0.05) for _ in range(1000)]
    cluster.finish(calls, 60.0)
    assert all(isinstance(call.end, Outcome) and call.end.kind is OutcomeKind.VALUE for call in calls)
    assert max(call.begun for call in calls) == 2, "the second attempt is elsewhere"
    assert sum(call.begun for call in calls) - len(calls) < 30


def test_it_is_used_again_once_it_is_well() -> None:
    """After the pause it is tried; if it does well it stays."""
    cluster = Cluster(agents=(2, 2))
    cluster.agents[1].fails = 1.0
    cluster.start()
    cluster.finish([cluster.root.submit(LONG, 0.05) for _ in range(100)], 60.0)
    assert states(cluster)["agent1"] is LaneState.QUARANTINED
    cluster.agents[1].fails = 0.0
    calls = [cluster.root.submit(LONG, 0.05) for _ in range(1000)]
    assert cluster.run(PAUSE_S + 2.0, lambda: states(cluster)["agent1"] is LaneState.ACTIVE)
    before = cluster.agents[1].pool._births
    cluster.finish(calls, 60.0)
    assert states(cluster)["agent1"] is LaneState.ACTIVE
    assert cluster.agents[1].pool._births > before or any(call.task.node == "agent1" for call in calls)


def test_tasks_that_die_everywhere_harm_no_node() -> None:
    """Where every node fails alike no node is left alone, and each task is tried as often as its retries say."""
    cluster = Cluster(agents=(1, 1, 1))
    for agent in cluster.agents:
        agent.fails = 0.4
    cluster.start()
    calls = [cluster.root.submit(LONG, 0.02, retries=3) for _ in range(300)]
    seen = set()

    def is_over() -> bool:
        seen.update(states(cluster).values())
        return all(call.is_over for call in calls)

    assert cluster.run(120.0, is_over)
    assert seen == {LaneState.ACTIVE}


def test_a_task_waits_for_another_node_only_so_long() -> None:
    """When all other slots are taken for good, a task that died runs on the same node after a while."""
    cluster = Cluster(agents=(1, 1))
    cluster.start()
    blocker = cluster.root.submit(LONG, 1000.0)
    assert cluster.run(1.0, lambda: bool(blocker.begun))
    bad = next(agent for agent in cluster.agents if agent.name != blocker.task.node)
    bad.fails = 1.0
    victim = cluster.root.submit(LONG, 0.05)
    assert cluster.run(1.0, lambda: victim.task.deaths == 1)
    bad.fails = 0.0
    assert not cluster.run(PATIENCE_S - 1.0, lambda: victim.is_over)
    assert cluster.run(3.0, lambda: victim.is_over)
