"""Nested calls as transcripts: what a task says of its own calls goes in, who runs and who is answered comes out."""

from __future__ import annotations

from typing import Any

from distexec.kin import Called, Ended, Spent, ancestors_of
from distexec.ledger import KillWorker, Revoke, StartWorker, StopWorker, Task
from distexec.messages import (
    Ack,
    Answer,
    BlobRef,
    Blocked,
    Evidence,
    Held,
    Kill,
    Lend,
    Offer,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Refuse,
    Resume,
    Run,
    SessionSpec,
    Submit,
    Took,
)
from distexec.placement import SPARE_S

from .test_scheduler import FN, GONE, LINK, Script, with_workers

BLOB = BlobRef(b"b" * 16, 2 << 20)


def call(seq: int, number: int, attempt: int = 1, buffers: tuple[Any, ...] = ()) -> Submit:
    """What a task says when it makes a call."""
    return Submit(1, seq, attempt, number, b"key", b"fn", (), b"", buffers)


def waits(seq: int, attempt: int = 1, is_blocked: bool = True) -> Blocked:
    """What a task says when it begins to wait for its calls, or goes on."""
    return Blocked(1, seq, attempt, is_blocked)


def make(script: Script, retries: int = 3, **options: Any) -> list[int]:
    """Do as the root does: make tasks of the calls that were made; give their numbers."""
    made = []
    for each in script.scheduler.take_kin():
        if isinstance(each, Called):
            script.seq += 1
            run = Run(script.session.no, script.seq, 1, FN, b"", (), Options(ancestors=ancestors_of(each.parent), **options))
            task = Task(run, script.session, retries=retries)
            if script.scheduler.submit_nested(each.parent, each.submit, task, script.now):
                made.append(script.seq)
    return made


def answers(said: list[Any]) -> list[tuple[str, int, int, str]]:
    """Pick the answers: to whom, which task, which call, what."""
    return [(peer, each.seq, each.call, each.kind.name)
            for peer, each in (pair for pair in said if isinstance(pair[-1], Answer))]


def place_of(script: Script, seq: int) -> Any:
    """Say where a task is leased."""
    lane = script.session.tasks[seq].lane
    assert lane is not None
    return lane.peer


def parent_waits_for_child(script: Script) -> None:
    """Have task 1 make a call and wait for it: that is task 2."""
    script.submit()
    script.says(place_of(script, 1), call(1, 1), waits(1))
    assert make(script) == [2]


# ---- lent slots


def test_child_runs_in_the_slot_of_its_parent() -> None:
    """One slot: the parent waits → another worker is started → the child runs there → answer; the parent ends by itself."""
    script = with_workers("w1")
    parent_waits_for_child(script)
    assert script.heard()[1:] == [StartWorker(script.session)]
    script.scheduler.worker_ready("w2", script.session, 0.0)
    assert script.leased() == [("w2", 2, 1)]
    script.says("w2", script.outcome(2))
    assert answers(script.heard()) == [("w1", 1, 1, "VALUE")]
    assert [type(each) for each in script.scheduler.take_kin()] == [Ended]
    assert script.ended() == [], "a nested call ends no future"
    script.says("w1", Took(1, 1, 1, [1]), waits(1, is_blocked=False), script.outcome(1))
    assert script.ended() == [(1, "VALUE")]
    assert not script.session.tasks
    assert (script.session.paused, script.session.lent, script.session.blocked) == (0, 0, {})


def test_strangers_do_not_run_in_lent_slots() -> None:
    """One slot, two workers, two tasks queued: while the first waits the second does not begin, its child does."""
    script = with_workers("w1", "w2", slots=1)
    script.submit(), script.submit()
    script.heard()
    script.says(place_of(script, 1), call(1, 1), waits(1))
    assert script.leased() == []
    assert make(script) == [3]
    assert [seq for _, seq, _ in script.leased()] == [3]


def test_who_goes_on_stops_nobody_and_lets_nobody_begin() -> None:
    """The parent goes on while its second child runs: three run on two slots, and nothing begins until it is two again."""
    script = with_workers("w1", "w2", "w3", "w4", slots=2)
    script.submit(), script.submit()
    script.heard()
    parent, other = place_of(script, 1), place_of(script, 2)
    script.says(parent, call(1, 1), call(1, 2), waits(1))
    assert make(script) == [3, 4]
    ((child, seq, _),) = script.leased()
    assert seq == 3
    script.says(parent, waits(1, is_blocked=False))
    assert script.session.active == 3
    script.says(child, script.outcome(3))
    assert script.leased() == [], "both slots are used by those who own them"
    script.says(other, script.outcome(2))
    assert [seq for _, seq, _ in script.leased()] == [4]


def test_the_deepest_goes_first() -> None:
    """Of those that may use a lent slot the deepest call runs first, and a stranger never."""
    script = with_workers("w1", "w2", "w3", slots=1)
    parent_waits_for_child(script)
    child = place_of(script, 2)
    script.submit()
    script.says(place_of(script, 1), call(1, 2))
    assert make(script) == [4]
    script.says(child, call(2, 1))
    assert make(script) == [5]
    script.heard()
    script.says(child, waits(2))
    assert [seq for _, seq, _ in script.leased()] == [5], "the grandchild, not its uncle, nor the stranger"


def test_beyond_the_bound_waiting_is_refused() -> None:
    """On one slot the 33rd task that would wait is told that it must not; its slot is not lent."""
    script = with_workers(*(f"w{number}" for number in range(40)), slots=1)
    script.submit()
    for seq in range(1, 34):
        worker = place_of(script, seq)
        script.heard()
        script.says(worker, call(seq, 1), waits(seq))
        make(script)
    refused = [each for each in script.heard() if isinstance(each[-1], Refuse)]
    assert refused == [(worker, Refuse(1, 33, 1, 32, 0))]
    assert script.session.paused == 32


def test_what_lies_behind_who_waits_is_taken_back() -> None:
    """Two quick tasks on one worker: the first waits → the second is revoked, and is nobody's again."""
    script = with_workers("w1")
    script.learn("w1")
    first, second = script.submit(), script.submit()
    assert script.leased() == [("w1", first.run.seq, 1), ("w1", second.run.seq, 1)]
    script.says("w1", call(first.run.seq, 1), waits(first.run.seq))
    assert any(isinstance(each, Revoke) for each in script.heard())
    script.scheduler.revoked("w1", script.session, first.order, 0.1)
    assert second.lane is None
    assert second.queued


def test_workers_beyond_the_slots_go_after_a_while() -> None:
    """A worker started for a lent slot is kept while it may be needed again, and then stopped."""
    script = with_workers("w1", "w2", slots=1)
    script.scheduler.tick(SPARE_S - 1)
    assert script.heard() == []
    script.scheduler.tick(SPARE_S + 1)
    assert [type(each) for each in script.heard()] == [StopWorker]
    assert script.session.workers == 1


# ---- parents that end


def test_returned_parent_leaves_its_calls_running() -> None:
    """A value ends the parent, not its calls; nobody is answered."""
    script = with_workers("w1", "w2")
    script.submit()
    worker = place_of(script, 1)
    script.says(worker, call(1, 1))
    assert make(script) == [2]
    child = place_of(script, 2)
    script.heard()
    script.says(worker, script.outcome(1))
    assert not [each for each in script.heard() if isinstance(each, (KillWorker, Revoke))]
    script.says(child, script.outcome(2))
    assert answers(script.heard()) == []
    assert not script.session.tasks


def test_call_made_just_before_the_end_is_made() -> None:
    """[a call, the parent's outcome] in one batch: the call becomes a task all the same, without ancestors."""
    script = with_workers("w1")
    script.submit()
    script.says("w1", call(1, 1), script.outcome(1))
    assert make(script) == [2]
    assert script.session.tasks[2].run.options == Options()


def test_raising_parent_takes_its_calls_along() -> None:
    """An error ends the parent and its queued call."""
    script = with_workers("w1")
    script.submit()
    script.says("w1", call(1, 1))
    assert make(script) == [2]
    script.says("w1", script.outcome(1, kind=OutcomeKind.ERROR))
    assert script.ended() == [(1, "ERROR")]
    assert not script.session.tasks


def test_lost_parent_runs_again_after_its_child_has_ended() -> None:
    """The parent's worker dies → its child is ended → only when that is certain the parent runs again, with a new number."""
    script = with_workers("w1", "w2")
    script.submit()
    worker = place_of(script, 1)
    script.says(worker, call(1, 1), waits(1))
    assert make(script) == [2]
    child = place_of(script, 2)
    script.heard()
    script.scheduler.worker_gone(worker, script.session, 1, GONE, 0.0)
    assert [type(each) for each in script.heard() if not isinstance(each, StartWorker)] == [Revoke]
    script.scheduler.revoked(child, script.session, 1, 0.1)
    assert [type(each) for each in script.heard() if not isinstance(each, StartWorker)] == [KillWorker]
    assert script.session.tasks[1].lane is None
    assert not script.session.tasks[1].queued
    script.scheduler.worker_gone(child, script.session, 1, GONE, 0.2)
    script.scheduler.worker_ready("w3", script.session, 0.3)
    ((where, seq, attempt),) = script.leased()
    assert (where, seq) == ("w3", 1)
    assert attempt > 1
    assert list(script.session.tasks) == [1]


def test_grandchildren_are_waited_for() -> None:
    """The parent is lost while its grandchild is on a node out of reach: it waits until that has ended, or is lost."""
    script = with_workers("w1", "w2")
    script.submit()
    worker = place_of(script, 1)
    script.says(worker, call(1, 1), waits(1))
    make(script)
    child = place_of(script, 2)
    script.join("far", 1)
    script.says(child, call(2, 1))
    assert make(script, node="far") == [3]
    assert place_of(script, 3) == "far"
    script.scheduler.node_suspended("far", 1.0)
    script.scheduler.worker_gone(worker, script.session, 1, GONE, 1.0)
    script.scheduler.worker_gone(child, script.session, 1, GONE, 1.0)
    assert sorted(script.session.tasks) == [1, 3]
    assert not script.session.tasks[1].queued
    script.scheduler.node_lost("far", GONE, 20.0)
    assert list(script.session.tasks) == [1]
    assert script.session.tasks[1].queued


def test_lost_child_is_answered_when_its_retries_are_spent() -> None:
    """A child that dies costs its parent nothing: its loss is the answer."""
    script = with_workers("w1", "w2")
    script.submit()
    worker = place_of(script, 1)
    script.says(worker, call(1, 1), waits(1))
    make(script, retries=0)
    child = place_of(script, 2)
    script.heard()
    script.scheduler.worker_gone(child, script.session, 1, GONE, 0.0)
    ((peer, answer),) = [each for each in script.heard() if isinstance(each[-1], Answer)]
    assert (peer, answer.evidence, answer.deaths) == (worker, GONE, 1)
    assert script.session.tasks[1].deaths == 0


def test_given_up_call_does_not_begin() -> None:
    """A queued call that its caller wants no more leaves."""
    script = with_workers("w1")
    script.submit()
    script.says("w1", call(1, 1))
    assert make(script) == [2]
    script.says("w1", Took(1, 1, 1, [1]))
    assert list(script.session.tasks) == [1]


def test_call_said_again_is_taken_once() -> None:
    """The same call twice makes one task."""
    script = with_workers("w1")
    script.submit()
    script.says("w1", call(1, 1), call(1, 1), call(1, 2), call(1, 1))
    assert len(make(script)) == 2


def test_refused_call_is_answered() -> None:
    """A call that cannot be made a task is answered with the reason."""
    script = with_workers("w1")
    parent = script.submit()
    script.heard()
    script.says("w1", call(1, 1))
    script.scheduler.refuse_nested(parent, call(1, 1), Evidence("", reason="no memory"), 0.0)
    ((_, answer),) = script.heard()
    assert (answer.call, answer.evidence.reason) == (1, "no memory")


# ---- an agent


def agent_with_parent() -> Script:
    """An agent with one slot whose task 1 has made a call and waits."""
    script = with_workers("w1", "w2", slots=1, upstream=LINK)
    script.runs((1, 1))
    script.heard()
    script.says(place_of(script, 1), call(1, 1, buffers=(BLOB,)), waits(1))
    return script


def test_agent_passes_calls_up_and_answers_down() -> None:
    """A call goes up, its answer comes down to the worker, and the blobs of both are let go when they are not needed."""
    script = agent_with_parent()
    worker = place_of(script, 1)
    assert script.heard() == [(LINK, call(1, 1, buffers=(BLOB,))), (LINK, waits(1))], "and its offer is what it was"
    answer = Answer(1, 1, 1, 1, OutcomeKind.VALUE, b"", (BLOB,))
    script.says(LINK, answer)
    assert script.heard() == [(worker, answer)]
    assert script.scheduler.take_kin() == [Spent((BLOB,))]
    script.says(worker, Took(1, 1, 1, [1]))
    assert script.heard() == [(LINK, Took(1, 1, 1, [1]))]
    assert script.scheduler.take_kin() == [Spent((BLOB,))]


def test_agent_says_calls_again_after_a_cut() -> None:
    """The link is cut and returns: after `Resume` the agent says what was not answered, and who waits."""
    script = agent_with_parent()
    script.heard()
    script.scheduler.upstream_lost(LINK, 1.0)
    script.scheduler.open_session(Open(4, script.opened.id, script.opened.token, 1.0, 0, SessionSpec()), "new", 2.0)
    assert [type(each[-1]) for each in script.heard()] == [Held]
    script.says("new", Resume(4, [], []))
    said = [each for peer, each in script.heard() if peer == "new"]
    assert [(type(each), each.session) for each in said] == [(Submit, 4), (Blocked, 4), (Offer, 4)]


def test_calls_left_behind_are_kept_until_the_outcome_is_acknowledged() -> None:
    """A task returns with a call that the root may not have: it is kept, and said again before the outcome."""
    script = agent_with_parent()
    worker = place_of(script, 1)
    script.scheduler.upstream_lost(LINK, 1.0)
    script.says(worker, waits(1, is_blocked=False), script.outcome(1))
    script.heard()
    script.scheduler.open_session(Open(1, script.opened.id, script.opened.token, 1.0, 0, SessionSpec()), "new", 2.0)
    script.says("new", Resume(1, [], []))
    said = [type(each[-1]) for each in script.heard() if each[0] == "new"]
    assert said == [Held, Submit, Outcome, Offer]
    assert script.scheduler.take_kin() == []
    script.says("new", Ack(1, [1]))
    assert script.scheduler.take_kin() == [Spent((BLOB,))]


def test_lend_lets_a_task_from_elsewhere_use_the_slot() -> None:
    """A task whose caller waits elsewhere may use a slot lent here once the vertex above has said so."""
    script = agent_with_parent()
    script.heard()
    script.says(LINK, Run(1, 9, 1, FN, b"", (), Options(ancestors=(7,))))
    assert script.leased() == []
    script.says(LINK, Lend(1, 9, 1))
    assert [seq for _, seq, _ in script.leased()] == [9]


# ---- nodes


def test_root_lends_at_nodes() -> None:
    """Two nodes: a parent waits on one → children go to its slot and to the other node, with word that they may borrow."""
    script = Script()
    script.join("n1", 1)
    script.submit()
    script.join("n2", 1)
    script.heard()
    script.says("n1", call(1, 1))
    assert make(script, node="n2") == [2]
    assert script.heard() == [("n2", script.session.tasks[2].run)]
    script.says("n1", waits(1), call(1, 2))
    assert ("n2", Lend(1, 2, 1)) in script.heard(), "it was there before its caller waited"
    assert make(script, node="n1") == [3]
    assert script.heard() == [("n1", script.session.tasks[3].run), ("n1", Lend(1, 3, 1))]


def test_root_answers_again_after_a_cut() -> None:
    """The link to the parent's node is cut when the answer comes: it is said after `Resume`."""
    script = Script()
    script.join("n1", 1)
    script.join("n2", 1)
    script.submit(node="n1")
    script.says("n1", call(1, 1), waits(1))
    make(script, node="n2")
    script.scheduler.node_suspended("n1", 1.0)
    script.heard()
    script.says("n2", script.outcome(2))
    assert answers(script.heard()) == []
    script.scheduler.node_joined("n1", "n1", 0.02)
    script.says("n1", Held(1, [(1, 1)], []))
    assert answers(script.heard()) == [("n1", 1, 1, "VALUE")]


def test_ahead_of_who_waits_is_no_obstacle() -> None:
    """One slot at a node, a stranger leased ahead there: the child of who waits is sent all the same."""
    script = Script()
    script.join("n1", 1)
    script.submit(), script.submit()
    assert [each[:2] for each in script.leased()] == [("n1", 1), ("n1", 2)]
    script.says("n1", call(1, 1), waits(1))
    make(script)
    assert script.leased() == [("n1", 3, 1)]


def test_draining_node_runs_what_its_tasks_wait_for() -> None:
    """A node that is to get nothing more is given the child of a task that waits there."""
    script = Script()
    script.join("n1", 1)
    script.submit()
    script.scheduler.drain_node("n1")
    script.heard()
    script.says("n1", call(1, 1), waits(1))
    make(script)
    script.says("n1")
    assert script.leased() == [("n1", 2, 1)]


def test_killed_parent_on_a_node_kills_its_children() -> None:
    """`kill` of a parent: its node says it ended → its child's node is told to end that."""
    script = Script()
    script.join("n1", 1)
    parent = script.submit()
    script.says("n1", call(1, 1), waits(1))
    make(script)
    script.heard()
    script.scheduler.kill(parent)
    assert script.heard() == [("n1", Kill(1, 1, 1))]
    script.says("n1", Outcome(1, 1, 1, OutcomeKind.KILLED, b"", 0))
    assert ("n1", Kill(1, 2, 1)) in script.heard()
