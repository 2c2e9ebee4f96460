"""The scheduler alone, as transcripts: an event goes in, what is said to whom comes out. No clock, no network."""

from __future__ import annotations

from typing import Any

import pytest

from distexec import shares
from distexec.ledger import (
    UNKNOWN,
    EndSession,
    Estimate,
    KillWorker,
    Revoke,
    Session,
    StartWorker,
    StopWorker,
    Task,
)
from distexec.messages import (
    Ack,
    Close,
    Define,
    Evidence,
    Held,
    Kill,
    Lost,
    Offer,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Recall,
    Renew,
    Resume,
    Returned,
    Run,
    SessionFailed,
    SessionSpec,
    Want,
)
from distexec.queues import Queue
from distexec.scheduler import Scheduler

FN = 7
GONE = Evidence("n1", reason="it was unplugged")
LINK = "link above"


class Script:
    """A scheduler, its one session, and what it says, in the order in which it is said."""

    def __init__(self, slots: int = 0, *, upstream: str | None = None, ceiling: int = 0, spec: SessionSpec | None = None,
                 claim: Any = None) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(slots, "here", node_timeout_s=15.0, orphan_s=30.0, claim=claim)
        opened = Open(0 if upstream is None else 1, b"i" * 16, b"t" * 16, 1.0, ceiling, spec or SessionSpec())
        self.opened = opened
        self.session = self.scheduler.open_session(opened, upstream, 0.0)
        self.scheduler.define(self.session, Define(self.session.no, FN, b"fn"))
        self.seq = 0
        self.heard()

    # ---- what happens

    def submit(self, *, retries: int = 3, **options: Any) -> Task:
        self.seq += 1
        run = Run(self.session.no, self.seq, 1, FN, b"", (), Options(**options) if options else None)
        task = Task(run, self.session, retries=retries)
        self.scheduler.submit(self.session, task)
        return task

    def join(self, node: str, slots: int) -> None:
        self.scheduler.node_joined(node, node, 0.02)
        self.says(node, Offer(self.session.no, slots))

    def says(self, peer: str, *messages: Any) -> None:
        self.scheduler.receive(peer, list(messages), self.now)

    def runs(self, *orders: tuple[int, int]) -> None:
        """The vertex above leases (seq, attempt)s here."""
        self.says(LINK, *(Run(1, seq, attempt, FN, b"") for seq, attempt in orders))

    def outcome(self, seq: int, attempt: int = 1, run_s: float = 0.0001, kind: OutcomeKind = OutcomeKind.VALUE) -> Outcome:
        return Outcome(self.session.no, seq, attempt, kind, b"", round(run_s * 1e9))

    def learn(self, peer: str, number: int = 1, run_s: float = 0.0001) -> None:
        """Let the session know how long the function takes."""
        for _ in range(number):
            task = self.submit()
            self.says(peer, self.outcome(task.run.seq, run_s=run_s))
        self.heard(), self.ended()

    # ---- what comes out

    def heard(self) -> list[Any]:
        """Give what was said since: (peer, message) and pool actions, without definitions and openings."""
        said = [(peer, message) for peer, message in self.scheduler.take() if not isinstance(message, (Define, Open, Want))]
        return [*said, *self.scheduler.take_pool()]

    def leased(self) -> list[tuple[str, int, int]]:
        """Give the leases made since as (peer, seq, attempt)."""
        return [(each[0], each[-1].seq, each[-1].attempt) for each in self.heard() if isinstance(each[-1], Run)]

    def ended(self) -> list[tuple[int, str]]:
        """Give the tasks that ended since."""
        ended = self.scheduler.take_ended()
        return [(task.run.seq, "LOST" if isinstance(end, Lost) else end.kind.name) for task, end in ended]


def with_workers(*names: str, slots: int | None = None, **options: Any) -> Script:
    """A vertex with so many workers up; an agent if `upstream` is given."""
    script = Script(slots or len(names), **options)
    for name in names:
        script.scheduler.worker_ready(name, script.session, 0.0)
    script.heard()
    return script


# ---- the life of a task


def test_submit_runs_on_a_free_slot_at_once() -> None:
    """submit → leased to the free worker in the same step; its outcome ends it."""
    script = with_workers("w1")
    script.submit()
    assert script.leased() == [("w1", 1, 1)]
    script.says("w1", script.outcome(1))
    assert script.ended() == [(1, "VALUE")]
    assert not script.session.tasks


def test_a_lost_node_means_a_second_attempt_elsewhere() -> None:
    """submit → runs on n1; n1 lost → runs on n2, second attempt; its outcome counts, the first attempt's does not."""
    script = Script()
    script.join("n1", 1)
    script.submit()
    assert script.leased() == [("n1", 1, 1)]
    script.join("n2", 1)
    script.scheduler.node_lost("n1", GONE, 1.0)
    assert script.leased() == [("n2", 1, 2)]
    script.join("n1", 1)
    script.says("n1", script.outcome(1, attempt=1))
    assert script.ended() == []
    assert ("n1", Ack(1, [1], [1])) in script.heard()
    script.says("n2", script.outcome(1, attempt=2))
    assert script.ended() == [(1, "VALUE")]
    assert script.heard() == [("n2", Ack(1, [1]))]


def test_a_task_is_lost_when_its_retries_are_used_up() -> None:
    """retries=1: the first death runs it again, the second is its end."""
    script = with_workers("w1", "w2")
    script.submit(retries=1)
    assert script.leased() == [("w2", 1, 1)]
    script.scheduler.worker_gone("w2", script.session, 1, GONE, 0.0)
    assert script.leased() == [("w1", 1, 2)]
    script.scheduler.worker_gone("w1", script.session, 1, GONE, 0.0)
    assert script.ended() == [(1, "LOST")]


def test_a_dead_worker_is_charged_only_for_what_it_had_begun() -> None:
    """Two tasks on a worker that dies in the first: the second moves uncharged, before its equals, the first is charged."""
    script = with_workers("w1")
    script.learn("w1")
    first, second, third = script.submit(retries=0), script.submit(retries=0), script.submit()
    assert [task.lane.peer for task in (first, second, third) if task.lane] == ["w1"] * 3
    started = second.order
    script.scheduler.worker_gone("w1", script.session, started, GONE, 0.0)
    assert script.ended() == [(second.run.seq, "LOST")]
    script.heard()
    script.scheduler.worker_ready("w2", script.session, 0.0)
    assert next(seq for _, seq, _ in script.leased()) == first.run.seq
    assert (first.deaths, third.deaths) == (0, 0)


def test_priority_goes_before_order() -> None:
    """Of what waits, the highest priority runs first, equals in their order."""
    script = with_workers("w1")
    script.submit()
    for priority in (0, 1, 5, 1):
        script.submit(priority=priority)
    script.heard()
    order = []
    for seq in (1, 4, 3, 5):
        script.says("w1", script.outcome(seq, run_s=1.0))
        order += [seq for _, seq, _ in script.leased()]
    assert order == [4, 3, 5, 2]


def test_a_pinned_task_waits_for_its_node() -> None:
    """A task for n2 does not run on n1, and runs on n2 as soon as that is there."""
    script = Script()
    script.join("n1", 2)
    script.submit(node="n2")
    assert script.leased() == []
    script.join("n2", 1)
    assert script.leased() == [("n2", 1, 1)]


def test_a_withdrawn_task_is_never_leased() -> None:
    """The owner is asked once before the first lease; if it says no, the task leaves without a word."""
    script = with_workers("w1", claim=lambda task: task.run.seq != 2)
    for _ in range(3):
        script.submit()
    script.says("w1", script.outcome(1, run_s=1.0))
    assert script.leased() == [("w1", 1, 1), ("w1", 3, 1)]
    assert script.ended() == [(1, "VALUE")]
    assert list(script.session.tasks) == [3]


def test_discard_takes_out_what_was_never_leased() -> None:
    """A queued task can be discarded once; a leased one cannot."""
    script = with_workers("w1")
    running, queued = script.submit(), script.submit()
    assert not script.scheduler.discard(running)
    assert script.scheduler.discard(queued)
    assert not script.scheduler.discard(queued)


# ---- windows


def test_nothing_waits_behind_an_unknown_run_time() -> None:
    """Until a function ended once, a worker has one task and a node one more than its slots."""
    script = with_workers("w1")
    script.join("n1", 2)
    for _ in range(10):
        script.submit()
    leases = [peer for peer, _, _ in script.leased()]
    assert (leases.count("w1"), leases.count("n1")) == (1, 3)


def test_known_short_tasks_are_leased_ahead_up_to_the_window() -> None:
    """Of tasks of 0.1 ms a worker gets 2 ms ahead, of tasks of 5 ms none."""
    script = with_workers("w1")
    script.learn("w1", run_s=0.0001)
    for _ in range(100):
        script.submit()
    assert 18 <= len(script.leased()) <= 20
    slow = with_workers("w1")
    slow.learn("w1", run_s=0.005)
    for _ in range(10):
        slow.submit()
    assert len(slow.leased()) == 1


def test_a_task_without_retries_takes_only_a_free_slot() -> None:
    """A task with retries=0 is not queued behind another, however short."""
    script = with_workers("w1")
    script.learn("w1")
    first = script.submit(solo=True, retries=0)
    script.submit(solo=True, retries=0)
    assert script.leased() == [("w1", first.run.seq, 1)]


# ---- taking back


def test_what_waits_behind_a_long_task_is_taken_back() -> None:
    """A worker overdue at its first task: the rest is revoked and, after 10 ms, run by another; nothing more follows."""
    script = with_workers("w1", slots=2)
    script.learn("w1")
    tasks = [script.submit() for _ in range(3)]
    script.heard()
    script.scheduler.tick(1.0, {"w1": (tasks[0].order, 0.006)})
    assert script.heard() == [Revoke("w1", tasks[1].order, tasks[2].order)]
    script.scheduler.revoked("w1", script.session, tasks[0].order, 1.01)
    assert script.heard() == [StartWorker(script.session)]
    script.scheduler.worker_ready("w2", script.session, 1.02)
    assert script.leased()[0] == ("w2", tasks[1].run.seq, 2)
    script.says("w1", script.outcome(tasks[0].run.seq, run_s=1.0))
    script.submit()
    assert all(peer != "w1" for peer, _, _ in script.leased())  # it has yet to skip what was revoked
    script.says("w1", Returned(1, [(tasks[1].run.seq, 1), (tasks[2].run.seq, 1)]))
    script.submit()
    assert "w1" in [peer for peer, _, _ in script.leased()]


def test_a_task_begun_just_before_its_revocation_stays() -> None:
    """The page says that a revoked order was begun: it is neither taken back nor run elsewhere."""
    script = with_workers("w1", slots=2)
    script.learn("w1")
    tasks = [script.submit() for _ in range(3)]
    script.scheduler.tick(1.0, {"w1": (tasks[0].order, 0.006)})
    script.heard()
    script.scheduler.revoked("w1", script.session, tasks[1].order, 1.01)
    assert (tasks[1].lane is not None, tasks[2].lane) == (True, None)
    script.scheduler.worker_ready("w2", script.session, 1.02)
    assert [lease[:2] for lease in script.leased()] == [("w2", tasks[2].run.seq)]


def test_a_running_task_is_killed_with_its_worker() -> None:
    """kill → what lies behind is revoked; the page says it runs → the worker is ended; its end says KILLED, uncharged."""
    script = with_workers("w1")
    script.learn("w1")
    task, behind = script.submit(), script.submit()
    script.heard()
    script.scheduler.kill(task)
    assert script.heard() == [Revoke("w1", task.order, behind.order, doomed=task.order)]
    script.scheduler.revoked("w1", script.session, task.order, 0.01)
    assert KillWorker("w1", f"task {task.run.seq} was to end") in script.heard()
    script.scheduler.worker_gone("w1", script.session, task.order, GONE, 0.02)
    assert script.ended() == [(task.run.seq, "KILLED")]
    assert behind.queued
    assert behind.deaths == 0


def test_a_running_task_is_killed_although_more_was_revoked_before() -> None:
    """A worker stuck in a long task whose followers were taken back can still be ended for the sake of that task."""
    script = with_workers("w1")
    script.learn("w1")
    task, behind = script.submit(), script.submit()
    script.scheduler.tick(1.0, {"w1": (task.order, 0.006)})
    script.scheduler.revoked("w1", script.session, task.order, 1.01)
    script.heard()
    script.scheduler.kill(task)
    assert script.heard() == [Revoke("w1", task.order, behind.order, doomed=task.order)]
    script.scheduler.revoked("w1", script.session, task.order, 1.03)
    assert [type(action) for action in script.heard()] == [KillWorker]


def test_a_worker_that_is_to_end_gets_nothing_more() -> None:
    """The doomed task ends by itself before the worker does: the worker is let go, not given another task."""
    script = with_workers("w1")
    task = script.submit()
    script.scheduler.kill(task)
    script.scheduler.revoked("w1", script.session, task.order, 0.01)
    script.heard()
    script.says("w1", script.outcome(1))
    script.submit()
    assert script.ended() == [(1, "VALUE")]
    assert script.heard() == [StopWorker("w1"), StartWorker(script.session)]


def test_a_time_limit_ends_the_attempt() -> None:
    """A task over its limit ends as TIMEOUT, and is not run again."""
    script = with_workers("w1")
    task = script.submit(timeout_s=0.5)
    script.scheduler.tick(1.0, {"w1": (task.order, 0.4)})
    assert [type(each) for each in script.heard() if not isinstance(each, tuple) or isinstance(each, Revoke)] == []
    script.scheduler.tick(1.2, {"w1": (task.order, 0.6)})
    script.scheduler.revoked("w1", script.session, task.order, 1.21)
    script.scheduler.worker_gone("w1", script.session, task.order, GONE, 1.22)
    assert script.ended() == [(1, "TIMEOUT")]


def test_a_killed_task_that_never_began_ends_at_once() -> None:
    """A queued task is killed without asking anybody."""
    script = with_workers("w1")
    script.submit()
    queued = script.submit()
    script.scheduler.kill(queued)
    assert script.ended() == [(2, "KILLED")]


def test_an_idle_slot_recalls_what_a_silent_node_has_beyond_its_slots() -> None:
    """n1 holds two on one slot and says nothing; n2 comes: the second is recalled, returned, and runs on n2, uncharged."""
    script = Script()
    script.join("n1", 1)
    script.submit(), script.submit()
    script.heard()
    script.join("n2", 1)
    script.scheduler.tick(1.0)
    assert script.heard() == [("n1", Recall(1, 1))]
    script.says("n1", Returned(1, [(2, 1)]))
    assert script.leased() == [("n2", 2, 2)]
    assert script.session.tasks[2].deaths == 0


# ---- workers


def test_workers_are_started_as_they_are_needed() -> None:
    """Two tasks on four slots ask for two workers; no more than the slots are asked for."""
    script = Script(4)
    script.submit(), script.submit()
    assert script.heard() == [StartWorker(script.session)] * 2
    for _ in range(10):
        script.submit()
    assert script.heard() == [StartWorker(script.session)] * 2


def test_a_worker_retires_after_its_last_task_and_another_comes() -> None:
    """max_tasks_per_child=2: the third task waits for a new worker."""
    script = with_workers("w1", spec=SessionSpec(max_tasks_per_child=2))
    for _ in range(3):
        script.submit()
    script.says("w1", script.outcome(1))
    script.heard()
    script.says("w1", script.outcome(2))
    assert script.heard() == [StopWorker("w1"), StartWorker(script.session)]
    script.scheduler.worker_ready("w2", script.session, 0.0)
    assert script.leased() == [("w2", 3, 1)]


def test_a_failed_start_lets_the_rest_finish_before_it_is_told() -> None:
    """An agent that cannot start a second worker gives back what waits, finishes what runs, then says SessionFailed."""
    script = with_workers("w1", slots=2, upstream=LINK)
    script.runs((1, 1), (2, 1))
    script.heard()
    script.scheduler.start_failed(script.session, GONE, b"error", 0.0)
    assert script.heard() == [(LINK, Returned(1, [(2, 1)])), (LINK, Offer(1, 0, 1))]
    script.runs((3, 1))
    assert script.heard() == [(LINK, Returned(1, [(3, 1)]))]
    script.says("w1", script.outcome(1))
    assert script.heard() == [(LINK, script.outcome(1)), (LINK, SessionFailed(1, GONE, b"error"))]


def test_a_failed_session_says_so_again_to_a_vertex_that_may_not_know() -> None:
    """The agent said SessionFailed, then its link broke: on the next link it says so once more."""
    script = with_workers(slots=1, upstream=LINK)
    script.runs((1, 1))
    script.scheduler.start_failed(script.session, GONE, b"", 0.0)
    assert (LINK, SessionFailed(1, GONE)) in script.heard()
    script.scheduler.upstream_lost(LINK, 1.0)
    script.scheduler.open_session(script.opened, LINK, 2.0)
    script.heard()
    script.says(LINK, Resume(1, [], []))
    assert script.heard() == [(LINK, Offer(1, 0, 1)), (LINK, SessionFailed(1, GONE))]


def test_a_failed_session_moves_its_tasks_uncharged() -> None:
    """A node says that it cannot run the session: its leases go elsewhere, and the root hears of it."""
    script = Script()
    script.join("n1", 1)
    script.submit()
    script.join("n2", 1)
    script.heard()
    script.says("n1", SessionFailed(1, GONE))
    assert script.leased() == [("n2", 1, 2)]
    assert script.session.tasks[1].deaths == 0
    assert [(peer, failure.evidence) for _, peer, failure in script.scheduler.take_failures()] == [("n1", GONE)]


# ---- an agent, and links that come and go


def test_an_agent_passes_outcomes_upward_and_keeps_them_until_acknowledged() -> None:
    """Run → lease → Outcome upward; kept; forgotten when the root has it."""
    script = with_workers("w1", upstream=LINK)
    script.runs((1, 1))
    assert script.leased() == [("w1", 1, 1)]
    script.says("w1", script.outcome(1))
    assert script.heard() == [(LINK, script.outcome(1))]
    assert list(script.session.unacked) == [1]
    script.says(LINK, Ack(1, [1]))
    assert not script.session.unacked


def test_an_agent_reports_a_death_and_requeues_the_unstarted() -> None:
    """A worker dies in one of two tasks: Lost for the one, the other waits here for a new worker."""
    script = with_workers("w1", upstream=LINK)
    script.runs((1, 1))
    script.says("w1", script.outcome(1))
    script.runs((2, 1), (3, 1))
    script.heard()
    script.scheduler.worker_gone("w1", script.session, 2, GONE, 0.0)
    assert (LINK, Lost(1, 2, 1, GONE)) in script.heard()
    assert script.session.tasks[3].queued


def test_a_short_cut_is_reconciled_without_running_anything_twice() -> None:
    """Cut and back: what is held stays leased, what was lost under way is asked for again or moves uncharged."""
    root = Script()
    root.join("n1", 3)
    for _ in range(3):
        root.submit()
    root.heard()
    root.scheduler.node_suspended("n1", 1.0)
    root.scheduler.node_joined("n1", "n1", 0.02)
    root.heard()
    root.says("n1", Held(1, [(1, 1)], [(2, 1)]))
    assert root.heard() == [("n1", Resume(1, [], []))]
    assert root.session.tasks[3].queued  # it had not arrived
    root.says("n1", root.outcome(2), Offer(1, 3))
    assert root.ended() == [(2, "VALUE")]
    assert root.leased() == [("n1", 3, 2)]
    assert root.session.tasks[3].deaths == 0


def test_an_agent_names_what_it_holds_when_its_link_returns() -> None:
    """Cut → outcomes are kept; the session comes on a new link → Held; Resume → outcomes and the offer again."""
    agent = with_workers("w1", upstream=LINK)
    agent.runs((1, 1), (2, 1))
    agent.heard()
    agent.scheduler.upstream_lost(LINK, 1.0)
    agent.says("w1", agent.outcome(1, run_s=1.0))
    assert all(peer != LINK for peer, _ in agent.heard())
    agent.scheduler.open_session(Open(5, agent.opened.id, agent.opened.token, 1.0, 0, SessionSpec()), "new link", 2.0)
    assert agent.heard() == [("new link", Held(5, [(2, 1)], [(1, 1)], 1))]
    agent.says("new link", Resume(5, [], []))
    assert agent.heard() == [("new link", Outcome(5, 1, 1, OutcomeKind.VALUE, b"", 10**9)), ("new link", Offer(5, 1, 1))]


def test_a_returning_attempt_is_adopted_until_its_replacement_is_handed_out() -> None:
    """The node was given up and its task charged and queued: it returns with the task still running → adopted, uncharged."""
    root = Script()
    root.join("n1", 1)
    task = root.submit(retries=1)
    root.scheduler.node_suspended("n1", 0.0)
    root.scheduler.tick(16.0)
    assert task.queued
    assert task.deaths == 1
    root.scheduler.node_joined("n1", "n1", 0.02)
    root.says("n1", Held(1, [(1, 1)], []))
    assert ("n1", Resume(1, [], [])) in root.heard()
    assert (task.deaths, task.run.attempt, task.lane is not None) == (0, 1, True)


def test_a_superseded_attempt_is_dropped_when_its_node_returns() -> None:
    """The task runs elsewhere already: the returning node is told to drop its attempt, and ends the worker for it."""
    root = Script()
    root.join("n1", 1)
    root.submit()
    root.scheduler.node_suspended("n1", 0.0)
    root.join("n2", 1)
    root.scheduler.tick(16.0)
    root.heard()
    root.scheduler.node_joined("n1", "n1", 0.02)
    root.says("n1", Held(1, [(1, 1)], []))
    assert ("n1", Resume(1, [(1, 1)], [])) in root.heard()

    agent = with_workers("w1", upstream=LINK)
    agent.runs((1, 1))
    agent.scheduler.upstream_lost(LINK, 1.0)
    agent.scheduler.open_session(Open(1, agent.opened.id, agent.opened.token, 1.0, 0, SessionSpec()), LINK, 2.0)
    agent.heard()
    agent.says(LINK, Resume(1, [(1, 1)], []))
    assert Revoke("w1", 1, 1, doomed=1) in agent.heard()
    agent.scheduler.revoked("w1", agent.session, 1, 2.01)
    agent.scheduler.worker_gone("w1", agent.session, 1, GONE, 2.02)
    said = agent.heard()
    assert any(isinstance(each, KillWorker) for each in said)
    assert not any(isinstance(each[1], (Outcome, Lost)) for each in said if each[0] == LINK)


def test_a_node_that_returns_just_in_time_is_not_given_up_while_it_reconciles() -> None:
    """The link is up again when node_timeout passes, `Held` still under way: the node stays."""
    root = Script()
    root.join("n1", 1)
    task = root.submit()
    root.scheduler.node_suspended("n1", 0.0)
    root.scheduler.node_joined("n1", "n1", 0.02)
    root.scheduler.tick(16.0)
    assert task.lane is not None


def test_a_node_that_began_the_session_anew_has_lost_what_it_was_leased() -> None:
    """The node ended the session and began it anew on a link that broke at once; it returns: charged, not unstarted."""
    root = Script()
    root.scheduler.node_joined("n1", "n1", 0.02)
    root.says("n1", Offer(1, 1, 1))
    task = root.submit()
    for _ in range(2):
        root.scheduler.node_suspended("n1", 1.0)
        root.scheduler.node_joined("n1", "n1", 0.02)
    root.says("n1", Held(1, [], [], 2))
    assert (task.deaths, task.queued) == (1, True)
    root.heard()
    root.says("n1", Offer(1, 1, 2))
    assert root.leased() == [("n1", 1, 2)]


def test_an_orphaned_session_ends_after_its_grace() -> None:
    """The client's link is gone for more than orphan_s: the session is closed with its workers."""
    agent = with_workers("w1", upstream=LINK)
    agent.runs((1, 1))
    agent.scheduler.upstream_lost(LINK, 0.0)
    agent.scheduler.tick(29.0)
    assert agent.scheduler.sessions
    agent.heard()
    agent.scheduler.tick(31.0)
    assert agent.heard() == [EndSession(agent.session, had_tasks=True)]
    assert not agent.scheduler.sessions


def test_who_stood_still_gives_nobody_up() -> None:
    """Link cut, then this process is stopped for longer than its patience → the clocks begin anew, for nodes and clients."""
    root = Script()
    root.join("n1", 1)
    root.submit()
    root.heard()
    root.scheduler.node_suspended("n1", 1.0)
    root.scheduler.stood_still(100.0)
    root.scheduler.tick(100.0)
    root.scheduler.tick(114.0)
    assert root.scheduler.leases_of("n1") == 1
    root.scheduler.tick(116.0)
    assert root.scheduler.leases_of("n1") == 0
    agent = with_workers("w1", upstream=LINK)
    agent.scheduler.upstream_lost(LINK, 1.0)
    agent.scheduler.stood_still(100.0)
    agent.scheduler.tick(129.0)
    assert agent.scheduler.sessions
    agent.scheduler.tick(131.0)
    assert not agent.scheduler.sessions


def test_a_drained_node_stays_drained_through_reconnects() -> None:
    """drain → its unstarted tasks are recalled, nothing new is leased; a cut does not change that."""
    root = Script()
    root.join("n1", 1)
    root.submit(), root.submit()
    root.heard()
    root.scheduler.drain_node("n1")
    assert root.heard() == [("n1", Recall(1, 2))]
    root.says("n1", Returned(1, [(2, 1)]))
    assert root.leased() == []
    root.scheduler.node_suspended("n1", 1.0)
    root.scheduler.node_joined("n1", "n1", 0.02)
    root.says("n1", Held(1, [], [(1, 1)]), root.outcome(1), Offer(1, 1))
    assert root.leased() == []
    assert root.ended() == [(1, "VALUE")]
    root.join("n2", 1)
    assert root.leased() == [("n2", 2, 2)]


def test_an_agent_that_stops_gives_back_what_has_not_started() -> None:
    """start_drain → Returned for the queue, Offer of nothing, revocation of what workers have not begun."""
    agent = with_workers("w1", upstream=LINK)
    agent.runs((1, 1), (2, 1))
    agent.heard()
    agent.scheduler.start_drain(0.0)
    assert agent.heard() == [(LINK, Returned(1, [(2, 1)])), (LINK, Offer(1, 0, 1))]
    agent.says("w1", agent.outcome(1))
    assert agent.heard() == [(LINK, agent.outcome(1))]


def test_closing_a_session_ends_it_below_too() -> None:
    """close → Close to each node whose link is up, also while it reconciles; the pool ends the workers."""
    root = Script()
    root.join("n1", 1)
    root.join("n2", 1)
    root.scheduler.node_suspended("n2", 0.0)
    root.scheduler.node_joined("n2", "n2", 0.02)
    root.heard()
    root.scheduler.close_session(root.session, 1.0)
    assert root.heard() == [("n1", Close(1)), ("n2", Close(1)), EndSession(root.session, had_tasks=False)]


# ---- a hub


def test_a_hub_forwards_leases_outcomes_acks_and_kills() -> None:
    """What comes from above goes below under the hub's own session number, and back."""
    hub = Script(upstream=LINK)
    hub.join("a1", 2)
    assert hub.heard() == [(LINK, Offer(1, 2, 1))]
    hub.runs((1, 4))
    assert hub.leased() == [("a1", 1, 4)]
    hub.says(LINK, Kill(1, 1, 4))
    assert hub.heard() == [("a1", Kill(1, 1, 4))]
    killed = hub.outcome(1, 4, kind=OutcomeKind.KILLED)
    hub.says("a1", killed)
    assert hub.heard() == [(LINK, killed)]
    hub.says(LINK, Ack(1, [1]))
    assert hub.heard() == [("a1", Ack(1, [1]))]


def test_a_hub_passes_up_what_was_recalled_from_above() -> None:
    """Recall → forwarded to the node that holds more than its slots; what it returns goes up, not back to it."""
    hub = Script(upstream=LINK)
    hub.join("a1", 1)
    hub.runs((1, 1), (2, 1))
    hub.heard()
    hub.says(LINK, Recall(1, 1))
    assert hub.heard() == [("a1", Recall(1, 1))]
    hub.says("a1", Returned(1, [(2, 1)]))
    assert hub.heard() == [(LINK, Returned(1, [(2, 1)]))]


def test_a_hub_reports_what_a_lost_agent_had() -> None:
    """An agent below is lost: Lost goes up for each lease; the offer shrinks."""
    hub = Script(upstream=LINK)
    hub.join("a1", 1)
    hub.runs((1, 1))
    hub.heard()
    hub.scheduler.node_lost("a1", GONE, 1.0)
    assert hub.heard() == [(LINK, Lost(1, 1, 1, GONE)), (LINK, Offer(1, 0, 1))]


# ---- the records


def _tasks(*priorities: int) -> list[Task]:
    session = Script().session
    return [Task(Run(1, seq, 1, FN, b"", (), Options(priority=each)), session) for seq, each in enumerate(priorities)]


def test_a_queue_orders_by_priority_then_arrival() -> None:
    """pop gives the highest priority first, pop_youngest the opposite end; push_front goes before equals."""
    a, b, c, d = _tasks(0, 1, 0, 1)
    queue = Queue()
    for task in (a, b, c):
        queue.push(task)
    queue.push_front(d)
    assert [queue.peek(), len(queue), list(queue)] == [d, 4, [d, b, a, c]]
    assert [queue.pop(), queue.pop_youngest(), queue.pop(), queue.pop()] == [d, c, b, a]
    assert queue.peek() is None
    with pytest.raises(AssertionError):
        queue.pop()


def test_a_queue_forgets_what_was_discarded() -> None:
    """A discarded task is skipped wherever it stood, counted no more, and can be put back once."""
    a, b, c = _tasks(0, 0, 0)
    queue = Queue()
    for task in (a, b, c):
        queue.push(task)
    queue.discard(b)
    queue.discard(a)
    assert (queue.peek(), len(queue)) == (c, 1)
    queue.push_front(a)
    assert list(queue) == [a, c]
    assert [queue.pop(), queue.pop(), len(queue)] == [a, c, 0]


def test_a_queue_does_not_keep_discarded_tasks_for_ever() -> None:
    """Discarding a thousand tasks behind one that stays leaves no thousand entries."""
    queue = Queue()
    tasks = _tasks(*[0] * 1001)
    for task in tasks:
        queue.push(task)
    for task in tasks[1:]:
        queue.discard(task)
    assert sum(len(level) for _, level in queue._levels) < 200


def test_an_estimate_is_the_largest_of_the_recent_runs() -> None:
    """Unknown before the first; then the largest of at least the last 16; an old peak is forgotten after 32 more."""
    estimate = Estimate()
    assert estimate.value_s == UNKNOWN
    estimate.saw(0.001)
    assert estimate.value_s == 0.001
    estimate.saw(1.0)
    for _ in range(15):
        estimate.saw(0.002)
        assert estimate.value_s == 1.0
    for _ in range(32):
        estimate.saw(0.002)
    assert estimate.value_s == 0.002


def test_an_estimate_is_never_less_than_the_age_of_what_runs() -> None:
    """A run older than the estimate raises it at once; an unknown one stays unknown until something ended."""
    estimate = Estimate()
    estimate.outgrown(3.0)
    assert estimate.value_s == UNKNOWN
    estimate.saw(0.001)
    estimate.outgrown(5.0)
    assert estimate.value_s == 5.0


# ---- shares


def _session(weight: float = 1.0, *, load: int = 0, ceiling: int = 0) -> Session:
    session = Session(Open(1, b"", b"", weight, ceiling, SessionSpec()), "link", 1)
    session.tasks = dict.fromkeys(range(load))  # type: ignore[assignment]
    return session


def test_shares_follow_demand_then_weight() -> None:
    """Nobody gets more than it can use while another wants more; what nobody wants is offered all the same."""
    greedy, modest = _session(load=100), _session(load=1)
    assert list(shares.targets(8, [greedy, modest], 0.0).values()) == [7, 1]
    heavy, light = _session(3.0, load=100), _session(1.0, load=100)
    assert list(shares.targets(8, [heavy, light], 0.0).values()) == [6, 2]
    idle, idle_too = _session(), _session()
    assert list(shares.targets(8, [idle, idle_too], 0.0).values()) == [4, 4]
    capped, other = _session(load=100, ceiling=2), _session(load=1)
    assert list(shares.targets(8, [capped, other], 0.0).values()) == [2, 6]


def test_a_slot_that_cannot_be_divided_goes_around() -> None:
    """One slot, three busy sessions: each has it a third of the time."""
    sessions = [_session(load=5) for _ in range(3)]
    had = dict.fromkeys(sessions, 0)
    for step in range(300):
        shares.regrant(1, sessions, shares.targets(1, sessions, step * 0.02))
        for session in sessions:
            had[session] += session.granted
    assert all(90 <= count <= 110 for count in had.values())


def test_a_grant_grows_only_as_slots_come_free() -> None:
    """A share that shrinks keeps its running tasks' slots until they end; the other waits for them."""
    first, second = _session(), _session()
    first.granted = first.busy = 4
    assert shares.regrant(4, [first, second], {first: 2, second: 2}) == []
    assert (first.granted, second.granted) == (2, 0)
    first.busy = 3
    assert shares.regrant(4, [first, second], {first: 2, second: 2}) == [second]
    assert second.granted == 1


def test_fewer_slots_are_never_used_by_more() -> None:
    """When slots are taken away nobody begins on one that another still uses."""
    first, second = _session(), _session()
    first.granted = first.busy = 2
    second.granted = 2
    shares.regrant(3, [first, second], {first: 1, second: 2})
    assert (first.granted, second.granted) == (1, 1)


# ---- renewal


def test_renewed_workers_finish_what_they_have_and_others_come() -> None:
    """Two workers, one busy; renewed → the idle one goes at once, the busy one after its task; a new one takes the next."""
    script = with_workers("w1", "w2")
    script.submit()
    script.heard()
    script.scheduler.renew_workers(script.session, SessionSpec(generation=1), 1, 0.0)
    assert script.heard() == [StopWorker("w1")]
    script.submit()
    assert script.heard() == [StartWorker(script.session)]
    script.says("w2", script.outcome(1))
    assert script.heard() == [StopWorker("w2")]
    script.scheduler.worker_ready("w3", script.session, 0.0, generation=1)
    assert script.leased() == [("w3", 2, 1)]


def test_worker_of_an_older_generation_is_replaced() -> None:
    """A worker that was on its way when the session was renewed gets no task; another is started in its place."""
    script = Script(slots=1)
    script.submit()
    assert script.heard() == [StartWorker(script.session)]
    script.scheduler.renew_workers(script.session, SessionSpec(generation=1), 1, 0.0)
    script.scheduler.worker_ready("w1", script.session, 0.0, generation=0)
    assert script.heard() == [StopWorker("w1"), StartWorker(script.session)]
    script.scheduler.worker_gone("w1", script.session, 0, GONE, 0.0)
    script.scheduler.start_failed(script.session, GONE, b"", 0.0, generation=0)
    assert script.heard() == [StartWorker(script.session)]
    script.scheduler.worker_ready("w2", script.session, 0.0, generation=1)
    assert script.leased() == [("w2", 1, 1)]


def test_renewal_may_mend_a_failed_session() -> None:
    """No worker could be had; renewed with work waiting → workers are asked for again."""
    script = Script(slots=1)
    script.submit()
    script.heard()
    script.scheduler.start_failed(script.session, GONE, b"error", 0.0, generation=0)
    assert script.session.failed
    script.scheduler.renew_workers(script.session, SessionSpec(generation=1), 1, 0.0)
    assert script.heard() == [StartWorker(script.session)]


def test_a_node_is_opened_with_the_spec_of_its_own() -> None:
    """A spec for one node is in its `Open`, now and on the next link, and only there; a change goes out as `Renew`."""
    script = Script()
    own = SessionSpec(name="own", generation=3)
    script.scheduler.renew_node(script.session, "n1", own, 0.0)
    specs = {}
    for node in ("n1", "n2"):
        script.scheduler.node_joined(node, node, 0.02)
        specs |= {peer: message.spec for peer, message in script.scheduler.take() if isinstance(message, Open)}
    assert specs == {"n1": own, "n2": script.opened.spec}
    newer = SessionSpec(name="own", generation=4)
    script.scheduler.renew_node(script.session, "n1", newer, 0.0)
    assert script.heard() == [("n1", Renew(script.session.no, newer))]
    script.scheduler.node_suspended("n1", 0.0)
    script.scheduler.renew_node(script.session, "n1", own, 0.0)
    assert script.heard() == []
    script.scheduler.node_joined("n1", "n1", 0.02)
    assert [message.spec for _, message in script.scheduler.take() if isinstance(message, Open)] == [own]


def test_failure_of_an_older_generation_does_not_count() -> None:
    """A node says that the setup failed, while it is told of the next one → it is still hoped for."""
    script = Script()
    script.join("n1", 1)
    script.scheduler.renew_node(script.session, "n1", SessionSpec(generation=1), 0.0)
    script.heard()
    script.says("n1", SessionFailed(script.session.no, GONE, b"", 0))
    assert script.scheduler.take_failures() == []
    script.submit()
    assert script.leased() == [("n1", 1, 1)]
    script.says("n1", SessionFailed(script.session.no, GONE, b"", 1))
    assert [peer for _, peer, _ in script.scheduler.take_failures()] == ["n1"]
