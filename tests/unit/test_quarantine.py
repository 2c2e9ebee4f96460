"""Where a task runs again that died on a node, and when a node is left alone: transcripts, without clock and network."""

from __future__ import annotations

from distexec.messages import BlobRef, Evidence, Lost, Offer, Open, OutcomeKind, Recall, Run, SessionSpec
from distexec.quarantine import PATIENCE_S, PAUSE_S, SHARE, STRIKES, WINDOW_S
from distexec.scheduler import Scheduler
from tests.unit.test_scheduler import Script, with_workers

CRASH = Evidence("bad", 7, signal=11, reason="it was killed by SIGSEGV")


def two_nodes(slots: int = 1, good_slots: int = 1) -> Script:
    """An executor on a node where tasks die and another where they do not, of which no function is known to be quick."""
    script = Script()
    script.join("good", good_slots)
    script.join("bad", slots)
    return script


def dies(script: Script, seq: int, attempt: int = 1, peer: str = "bad") -> None:
    """A worker of the node dies of the task."""
    script.says(peer, Lost(1, seq, attempt, CRASH))


def ends(script: Script, seq: int, attempt: int = 1, peer: str = "good", kind: OutcomeKind = OutcomeKind.VALUE) -> None:
    """The node has the task's outcome; each takes long."""
    script.says(peer, script.outcome(seq, attempt, 1.0, kind))


def runs_on(script: Script) -> dict[int, str]:
    """Which task is leased to which node."""
    return {task.run.seq: str(lane.peer) for lane in script.session.lanes.values() for task in lane.leases.values()}


def strike(script: Script, kind: OutcomeKind = OutcomeKind.VALUE) -> None:
    """Let one task die on the bad node and end on the good one, which has a free slot."""
    occupied = script.submit() if "bad" not in next_lane(script) else None
    task = script.submit()
    seq = task.run.seq
    assert runs_on(script)[seq] == "bad"
    if occupied is not None:
        ends(script, occupied.run.seq)
    dies(script, seq)
    assert runs_on(script)[seq] == "good"
    ends(script, seq, task.run.attempt, kind=kind)
    script.heard()


def next_lane(script: Script) -> str:
    """Who would get the next task."""
    return str(next(reversed(script.session.free)).peer)


def state(script: Script) -> str:
    """How the bad node stands."""
    return script.session.lanes["bad"].state.value


# ---- the second attempt


def test_another_node_has_the_second_attempt() -> None:
    """A task that died on a node runs next on the other one, though the first is free at once."""
    script = two_nodes()
    first, second = script.submit(), script.submit()
    where = runs_on(script)
    bad, good = (first, second) if where[1] == "bad" else (second, first)
    script.submit(), script.submit(), script.submit()
    dies(script, bad.run.seq)
    assert bad.run.seq not in runs_on(script)
    assert len(script.session.lanes["bad"].leases) == 2, "others go there"
    ends(script, good.run.seq)
    assert runs_on(script)[bad.run.seq] == "good"
    assert bad.run.attempt == 2


def test_nobody_else_is_there() -> None:
    """With one node only, a task runs there again at once; local workers are somebody else."""
    script = Script()
    script.join("bad", 1)
    script.submit()
    dies(script, 1)
    assert runs_on(script) == {1: "bad"}
    mixed = with_workers("w1")
    mixed.join("bad", 1)
    first, second = mixed.submit(), mixed.submit()
    bad, other = (first, second) if runs_on(mixed)[1] == "bad" else (second, first)
    dies(mixed, bad.run.seq)
    assert bad.run.seq not in runs_on(mixed)
    mixed.says("w1", mixed.outcome(other.run.seq, run_s=1.0))
    assert runs_on(mixed) == {bad.run.seq: "w1"}


def test_the_other_node_goes() -> None:
    """A task that waits for another node than its first runs there all the same once that one is gone."""
    script = two_nodes()
    tasks = [script.submit(), script.submit()]
    bad = next(task for task in tasks if runs_on(script)[task.run.seq] == "bad")
    dies(script, bad.run.seq)
    assert bad.run.seq not in runs_on(script)
    script.scheduler.node_suspended("good", 0.0)
    assert runs_on(script)[bad.run.seq] == "bad"


def test_patience_ends() -> None:
    """While all others are busy a task waits for them a while, not for ever."""
    script = two_nodes()
    tasks = [script.submit(), script.submit()]
    bad = next(task for task in tasks if runs_on(script)[task.run.seq] == "bad")
    dies(script, bad.run.seq)
    script.scheduler.tick(PATIENCE_S - 0.1)
    assert bad.run.seq not in runs_on(script)
    script.scheduler.tick(PATIENCE_S + 0.1)
    assert runs_on(script)[bad.run.seq] == "bad"


def test_a_pinned_task_stays_pinned() -> None:
    """A task for one node only runs there again, whatever happened to it."""
    script = two_nodes()
    task = script.submit(node="bad")
    dies(script, 1)
    assert runs_on(script) == {1: "bad"}
    assert task.run.attempt == 2


def test_a_task_that_dies_everywhere_is_lost_as_before() -> None:
    """Each node has a try, then any; the retries are counted as ever."""
    script = two_nodes()
    task = script.submit(retries=3)
    tried = []
    for attempt in range(1, 5):
        tried.append(runs_on(script)[1])
        dies(script, 1, attempt, peer=tried[-1])
    assert set(tried[:2]) == {"good", "bad"}
    assert script.ended() == [(1, "LOST")]
    assert task.deaths == 4
    assert script.scheduler.take_notices() == []


def test_killed_while_it_waits() -> None:
    """A task that waits for another node can be killed and discarded like others."""
    script = two_nodes()
    tasks = [script.submit(), script.submit()]
    bad = next(task for task in tasks if runs_on(script)[task.run.seq] == "bad")
    dies(script, bad.run.seq)
    script.scheduler.kill(bad)
    assert script.ended() == [(bad.run.seq, "KILLED")]
    assert script.session.queued() == 0


# ---- quarantine


def test_a_node_that_fails_what_others_do_well_is_left_alone() -> None:
    """After so many strikes it gets nothing more, its waiting leases are taken back, and the user is told once, why."""
    script = two_nodes()
    for _ in range(STRIKES - 1):
        strike(script)
    assert state(script) == "active"
    script.submit(), script.submit()
    held = script.session.lanes["bad"].leases
    assert held
    last = next(iter(held.values()))
    script.submit(), script.submit(), script.submit()
    for task in list(script.session.lanes["good"].leases.values()):
        ends(script, task.run.seq, task.run.attempt)
    dies(script, last.run.seq)
    for _ in range(6):
        for task in list(script.session.lanes["good"].leases.values()):
            ends(script, task.run.seq, task.run.attempt)
    assert state(script) == "quarantined"
    assert any(isinstance(said[-1], Recall) and said[0] == "bad" for said in script.heard())
    [notice] = script.scheduler.take_notices()
    assert "'bad'" in notice
    assert "SIGSEGV" in notice
    assert "SIGSEGV" in script.scheduler.quarantine_of("bad", 0.0)
    assert script.scheduler.quarantine_of("good", 0.0) == ""


def quarantined() -> Script:
    script = two_nodes(good_slots=2)
    for _ in range(STRIKES):
        strike(script)
    assert state(script) == "quarantined"
    assert script.scheduler.take_notices()
    return script


def test_it_gets_nothing() -> None:
    """While it lasts, tasks wait rather than go there; when the pause is over the node gets them."""
    script = quarantined()
    for _ in range(8):
        script.submit()
    assert "bad" not in runs_on(script).values()
    script.now = PAUSE_S + 0.1
    script.scheduler.tick(script.now)
    assert "bad" in runs_on(script).values()
    assert script.scheduler.quarantine_of("bad", script.now) == ""


def test_failing_again_doubles_the_pause() -> None:
    """A node let in again that fails at once is out for twice as long, told anew."""
    script = quarantined()
    script.now = PAUSE_S + 0.1
    script.scheduler.tick(script.now)
    strike(script)
    assert state(script) == "quarantined"
    assert f"{2 * PAUSE_S:g} s" in script.scheduler.take_notices()[0]
    script.now += PAUSE_S + 0.1
    script.scheduler.tick(script.now)
    assert state(script) == "quarantined"
    script.now += PAUSE_S
    script.scheduler.tick(script.now)
    assert state(script) == "active"


def test_the_link_is_cut_meanwhile() -> None:
    """A quarantine outlasts a cut of the link, and a new process of the node."""
    script = quarantined()
    script.scheduler.node_suspended("bad", 1.0)
    script.join("bad", 1)
    assert state(script) == "quarantined"
    script.scheduler.node_lost("bad", CRASH, 2.0)
    script.join("bad", 1)
    assert state(script) == "quarantined"
    script.submit(), script.submit(), script.submit()
    assert "bad" not in runs_on(script).values()


def test_when_nobody_else_is_left() -> None:
    """A node in quarantine is used when there is no other: work goes on."""
    script = quarantined()
    script.scheduler.node_lost("good", CRASH, 1.0)
    script.submit()
    script.scheduler.tick(1.0)
    assert runs_on(script) == {script.seq: "bad"}


def test_the_only_node_is_never_out() -> None:
    """A node whose fellow offers nothing any more stays in use, whatever it did."""
    script = two_nodes()
    for _ in range(STRIKES - 1):
        strike(script)
    tasks = [script.submit(), script.submit()]
    bad = next(task for task in tasks if runs_on(script)[task.run.seq] == "bad")
    good = next(task for task in tasks if task is not bad)
    dies(script, bad.run.seq)
    ends(script, good.run.seq)
    script.says("good", Offer(1, 0))
    ends(script, bad.run.seq, bad.run.attempt)
    assert state(script) == "active"


def test_draining_goes_before() -> None:
    """A node in quarantine that is removed is drained, and does not come back when the pause is over."""
    script = quarantined()
    script.scheduler.drain_node("bad")
    script.scheduler.tick(PAUSE_S + 0.1)
    assert state(script) == "draining"


def test_what_is_no_strike() -> None:
    """A payload that cannot be loaded elsewhere says nothing of the node where the task died; an exception does."""
    script = two_nodes()
    for _ in range(2 * STRIKES):
        strike(script, OutcomeKind.PAYLOAD)
    assert state(script) == "active"
    for _ in range(STRIKES):
        strike(script, OutcomeKind.ERROR)
    assert state(script) == "quarantined"


def test_now_and_then_is_not_enough() -> None:
    """A node that does well most of what it gets stays in use."""
    script = two_nodes()
    for _ in range(3 * STRIKES):
        for _ in range(2 * SHARE):
            script.submit(), script.submit()
            for seq, peer in runs_on(script).items():
                ends(script, seq, peer=peer)
        strike(script)
    assert state(script) == "active"


def test_nodes_that_are_alike() -> None:
    """Where every third task dies on each node, none is taken for the worse."""
    script = two_nodes()
    for _ in range(4 * STRIKES):
        for victim in ("good", "bad"):
            tasks = [script.submit(), script.submit()]
            where = runs_on(script)
            dead = next(task for task in tasks if where[task.run.seq] == victim)
            other = next(task for task in tasks if task is not dead)
            dies(script, dead.run.seq, peer=victim)
            ends(script, other.run.seq, peer=where[other.run.seq])
            ends(script, dead.run.seq, dead.run.attempt, peer=runs_on(script)[dead.run.seq])
    assert {lane.state.value for lane in script.session.lanes.values()} == {"active"}


def test_strikes_grow_old() -> None:
    """Strikes long ago do not add up with those of today."""
    script = two_nodes()
    for round_ in range(3 * STRIKES):
        strike(script)
        for tick in (1, 2):
            script.now = (2 * round_ + tick) * (WINDOW_S + 1)
            script.scheduler.tick(script.now)
    assert state(script) == "active"


def test_nothing_is_kept_for_ever() -> None:
    """When deaths are long past, outcomes are not counted any more."""
    script = two_nodes()
    strike(script)
    assert script.scheduler._quarantine.is_watching
    for number in range(1, 4):
        script.scheduler.tick(number * (WINDOW_S + 1))
    assert not script.scheduler._quarantine.is_watching


# ---- what never arrives


def test_arguments_that_never_arrive() -> None:
    """Tasks that wait on an agent for blobs that cannot be had go back as lost, those of other functions wait on."""
    agent = Scheduler(1, "here", absent=lambda run: True)
    opened = Open(1, b"i" * 16, b"t" * 16, 1.0, 0, SessionSpec())
    session = agent.open_session(opened, "root", 0.0)
    blob = (BlobRef(b"b" * 16, 2 << 20),)
    agent.receive("root", [Run(1, seq, 1, fn, b"", blob) for seq, fn in ((1, 7), (2, 7), (3, 8))], 0.0)
    agent.take()
    agent.cannot_arrive(session, 1, CRASH, 1.0)
    assert agent.take() == [("root", Lost(1, 1, 1, CRASH))]
    agent.cannot_arrive(session, -7, CRASH, 1.0)
    assert agent.take() == [("root", Lost(1, 2, 1, CRASH))]
    assert list(session.waiting) == [3]
    assert list(session.tasks) == [3]
