"""A root that comes back from its journal, as transcripts: what nodes hold is adopted, the rest handed out, none twice."""

from __future__ import annotations

from typing import Any

from distexec.ledger import StopWorker, Task
from distexec.messages import Ack, Define, Evidence, Held, Kill, Offer, Open, Resume, Returned, Run, SessionSpec
from distexec.recovery import ATTEMPTS_PER_LIFE, UNHEARD
from tests.unit.test_scheduler import FN, LINK, Script


def recovered(count: int, *nodes: str, parked: bool = False, life: int = 1, claim: Any = None) -> tuple[Script, list[Task]]:
    """A root in its next life, with so many unfinished tasks, that awaits these nodes."""
    root = Script(claim=claim)
    root.session.is_durable = True
    tasks = [Task(Run(root.session.no, seq, UNHEARD, FN, b""), root.session, retries=3) for seq in range(1, count + 1)]
    numbers = {task.run.seq for task in tasks} if parked else set()
    root.scheduler.recovery.recover(root.session, tasks, numbers, nodes, life, 0.0)
    return root, tasks


def comes_up(root: Script, node: str) -> None:
    """The link to a node is up."""
    root.scheduler.node_joined(node, node, 0.02)
    root.heard()


def test_nothing_is_handed_out_before_every_node_was_heard() -> None:
    """n1 free, n2 awaited → nothing; n2 holds task 1 → that is adopted with its number, task 2 handed out with a new one."""
    root, (first, second) = recovered(2, "n1", "n2")
    comes_up(root, "n1")
    root.says("n1", Offer(1, 2))
    assert root.leased() == []
    comes_up(root, "n2")
    root.says("n2", Held(1, [(1, 3)], []))
    said = root.heard()
    assert ("n2", Resume(1, [], [])) in said
    assert [(peer, each.seq, each.attempt) for peer, each in said if isinstance(each, Run)] == [("n1", 2, ATTEMPTS_PER_LIFE)]
    assert (first.run.attempt, first.node, first.lane is not None) == (3, "n2", True)
    assert second.run.attempt == ATTEMPTS_PER_LIFE


def test_a_kept_outcome_is_taken() -> None:
    """The node ended the task while nobody listened: Held names it, its outcome follows Resume and counts."""
    root, _ = recovered(1, "n1")
    comes_up(root, "n1")
    root.says("n1", Held(1, [], [(1, 2)]))
    assert root.heard() == [("n1", Resume(1, [], []))]
    root.says("n1", root.outcome(1, 2))
    assert root.ended() == [(1, "VALUE")]


def test_a_dead_node_is_waited_for_no_longer() -> None:
    """Awaited n2 is proven dead, or late: what it may have had is handed to n1."""
    root, _ = recovered(1, "n1", "n2")
    comes_up(root, "n1")
    root.says("n1", Offer(1, 1))
    root.scheduler.node_lost("n2", Evidence("n2"), 1.0)
    assert root.leased() == [("n1", 1, ATTEMPTS_PER_LIFE)]

    root, _ = recovered(1, "n1", "n2")
    comes_up(root, "n1")
    root.says("n1", Offer(1, 1))
    root.scheduler.tick(14.0)
    assert root.leased() == []
    root.scheduler.tick(16.0)
    assert root.leased() == [("n1", 1, ATTEMPTS_PER_LIFE)]


def test_a_late_node_is_adopted_until_its_task_is_handed_out() -> None:
    """Released but still queued → the node's attempt counts; handed out → it is dropped."""
    root, (first, second) = recovered(2, "n1")
    root.scheduler.tick(16.0)
    root.join("n2", 1)
    assert root.leased() == [("n2", 1, ATTEMPTS_PER_LIFE), ("n2", 2, ATTEMPTS_PER_LIFE)]

    root, (first, second) = recovered(2, "n1")
    root.scheduler.tick(16.0)
    assert first.queued
    comes_up(root, "n1")
    root.says("n1", Held(1, [(1, 1)], []))
    assert root.heard() == [("n1", Resume(1, [], []))]
    assert (first.run.attempt, first.queued, second.queued) == (1, False, True)


def test_the_later_of_two_attempts_counts() -> None:
    """n1 holds attempt 1, n2 attempt 2, which replaced it: n1's is ended, whichever speaks first."""
    root, (task,) = recovered(1, "n1", "n2")
    for node, attempt in (("n1", 1), ("n2", 2)):
        comes_up(root, node)
        root.says(node, Held(1, [(1, attempt)], []))
    assert ("n1", Kill(1, 1, 1)) in root.heard()
    assert task.lane is not None
    assert (task.lane.peer, task.run.attempt) == ("n2", 2)

    root, (task,) = recovered(1, "n1", "n2")
    for node, attempt in (("n2", 2), ("n1", 1)):
        comes_up(root, node)
        root.says(node, Held(1, [(1, attempt)], []))
    assert ("n1", Resume(1, [(1, 1)], [])) in root.heard()
    assert task.run.attempt == 2


def test_an_adopted_task_that_comes_back_gets_a_number_of_this_life() -> None:
    """Adopted with attempt 2, returned unstarted → handed out with a number that no earlier life can have used."""
    root, _ = recovered(1, "n1", life=2)
    comes_up(root, "n1")
    root.says("n1", Held(1, [(1, 2)], []))
    root.join("n2", 1)
    root.heard()
    root.says("n1", Returned(1, [(1, 2)]))
    assert root.leased() == [("n2", 1, 2 * ATTEMPTS_PER_LIFE)]


def test_parked_tasks_wait_to_be_asked_for() -> None:
    """Parked and not held → nothing runs until it is asked for; held → it goes on by itself."""
    root, (first, second, third) = recovered(3, "n1", parked=True)
    comes_up(root, "n1")
    root.scheduler.recovery.ask(root.session, second, 0.0)  # before the node has spoken: waits with the others
    assert root.leased() == []
    root.says("n1", Held(1, [(1, 1)], []))
    root.says("n1", Offer(1, 5))
    assert root.leased() == [("n1", 2, ATTEMPTS_PER_LIFE)]
    assert first.lane is not None
    assert third.run.seq not in root.session.tasks
    root.scheduler.recovery.ask(root.session, third, 0.0)
    assert root.leased() == [("n1", 3, ATTEMPTS_PER_LIFE)]
    root.scheduler.recovery.ask(root.session, third, 0.0)
    root.scheduler.recovery.ask(root.session, first, 0.0)
    assert root.heard() == []


def test_a_withdrawn_task_is_not_adopted() -> None:
    """The user cancelled the recovered future before its node spoke: the node is told to drop it."""
    root, (task,) = recovered(1, "n1", claim=lambda task: False)
    comes_up(root, "n1")
    root.says("n1", Held(1, [(1, 1)], []))
    assert ("n1", Resume(1, [(1, 1)], [])) in root.heard()
    assert root.session.tasks == {}

    root, (task,) = recovered(1, "n1")
    assert root.scheduler.discard(task)
    assert not root.session.waiting


def test_outcomes_are_acknowledged_when_they_are_recorded() -> None:
    """Outcome → no Ack; acknowledge → Ack. Cut in between → the node says it again, it neither counts nor is forgotten."""
    root, _ = recovered(0)
    root.join("n1", 1)
    root.submit()
    root.heard()
    root.says("n1", root.outcome(1))
    assert root.ended() == [(1, "VALUE")]
    assert root.heard() == []
    root.scheduler.node_suspended("n1", 1.0)
    comes_up(root, "n1")
    root.says("n1", Held(1, [], [(1, 1)]))
    assert root.heard() == [("n1", Resume(1, [], []))]
    root.says("n1", root.outcome(1))
    assert root.ended() == []
    assert root.heard() == []
    root.scheduler.node_lost("n1", Evidence("n1"), 2.0)
    comes_up(root, "n1")
    root.says("n1", Held(1, [], [(1, 1)]))
    root.says("n1", root.outcome(1))
    assert root.heard() == [("n1", Resume(1, [], []))]
    root.scheduler.acknowledge(root.session, [1])
    assert root.heard() == [("n1", Ack(1, [1]))]
    root.says("n1", root.outcome(1))
    assert root.heard() == [("n1", Ack(1, [1], [1]))]


def test_a_session_lingers_as_long_as_its_client_asked() -> None:
    """linger_s=100, client away: kept beyond the vertex's own patience, its idle workers sent home; then closed."""
    agent = Script(1, upstream=LINK)
    opened = Open(1, b"j" * 16, b"t" * 16, 1.0, 0, SessionSpec(), 100.0)
    session = agent.scheduler.open_session(opened, LINK, 0.0)
    agent.scheduler.define(session, Define(session.no, FN, b"fn"))
    agent.scheduler.worker_ready("w1", session, 0.0)
    agent.heard()
    agent.scheduler.upstream_lost(LINK, 0.0)
    agent.scheduler.tick(50.0)
    assert agent.scheduler.sessions == [session]
    assert agent.heard()[-1] == StopWorker("w1")
    agent.scheduler.tick(101.0)
    assert agent.scheduler.sessions == []
