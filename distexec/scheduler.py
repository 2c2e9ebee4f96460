"""Who runs what: the same decisions at the executor, a hub and an agent.

Pure: an event and the time go in, what to say to whom comes out (`take`), and at the root the tasks that ended
(`take_ended`). No socket, thread, clock or random number. The rule it keeps: a task is in exactly one place, queued here
or leased to one peer, and every task leaves exactly once.

    submit / Run from above ──> queue ──lease──> lane of a worker or node ──Outcome──> ended (root) or passed upward
                                  ^                        │
                                  └── revoked, returned, lost (root: charged if it may have run)

`ledger` holds the records, `placement` moves tasks between queue and lanes, `shares` divides a vertex's own slots, `fates`
ends attempts, `uplinks` and `downlinks` keep the links above and below; here is what the owner and the pool say, and how
attempts end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import structs

from .downlinks import Downlinks
from .fates import Fates, verdict
from .kin import News
from .ledger import (
    ABANDONED,
    EndSession,
    Lane,
    LaneState,
    Peer,
    PoolAction,
    Session,
    StartWorker,
    StopWorker,
    Task,
)
from .messages import (
    Ack,
    Close,
    Define,
    Delivery,
    Evidence,
    Lost,
    Message,
    Open,
    Outcome,
    OutcomeKind,
    Recall,
    Returned,
    Run,
    SessionFailed,
    SessionSpec,
    Submit,
)
from .placement import OVERDUE_S, Placement
from .quarantine import Quarantine
from .recovery import Recovery
from .shares import Shares
from .uplinks import Uplinks


class Scheduler:
    """Decides for one vertex of the tree.

    `slots` is the number of tasks that workers of this vertex may run at once (0 for a hub) and `name` what pins call their
    node; `node_timeout_s` is how long a suspended node keeps its leases, `orphan_s` how long a session outlives the link
    above it; `absent(run)` says whether blobs the task needs are missing here; `claim(task)` asks the owner, once per task,
    whether it still wants it run.
    """

    def __init__(self, slots: int, name: str, *, node_timeout_s: float = 15.0, orphan_s: float = 30.0,
                 absent: Callable[[Run], bool] | None = None, claim: Callable[[Task], bool] | None = None) -> None:
        self.name = name
        self.sessions: list[Session] = []
        self._place = Placement(claim)
        self._lanes = self._place.lanes
        self._node_timeout_s, self._orphan_s = node_timeout_s, orphan_s
        self._fates = Fates(self._place, lambda: self._shares.slots)
        self.kin = self._fates.kin
        self._shares = Shares(self._place, slots, self.sessions)
        self._uplinks = Uplinks(self._place, self._fates, self._shares, absent)
        self.recovery = Recovery(self._place)  # the root's, and what it asks of it goes there directly
        self._quarantine = Quarantine(self._place, self.sessions)
        self._downlinks = Downlinks(self._place, self._fates, self._shares, self.sessions, self.recovery, self._quarantine)
        self._last_number = 0
        self._last_touched: Lane | None = None  # saves looking it up among the touched for each outcome of a batch
        self._table: dict[type, Callable[[Peer, Any, float], None]] = {
            **self._uplinks.table, **self._downlinks.table, **self.kin.table, Close: self._on_close, Lost: self._on_lost,
            Returned: self._on_returned}

    @property
    def slots(self) -> int:
        """How many tasks this vertex's own workers may run at once."""
        return self._shares.slots

    # ---- what comes out

    @property
    def has_news(self) -> bool:
        """Whether anything came out that nobody took yet."""
        return bool(self._place.out or self._place.pool or self._fates.ended or self._fates.failures or self.kin.news)

    def take(self) -> list[tuple[Peer, Message]]:
        """Give what is to be said since the last call, in order."""
        out, self._place.out = self._place.out, []
        return out

    def take_pool(self) -> list[PoolAction]:
        """Give what the pool beneath is asked to do since the last call, in order."""
        actions, self._place.pool = self._place.pool, []
        return actions

    def take_ended(self) -> list[tuple[Task, Outcome | Lost]]:
        """Give the root's tasks that ended: each once, with its outcome or the loss that was one too many."""
        ended, self._fates.ended = self._fates.ended, []
        return ended

    def take_kin(self) -> list[News]:
        """Give what is to be done about nested calls since the last call, in order."""
        news, self.kin.news = self.kin.news, []
        return news

    def take_notices(self) -> list[str]:
        """Give what the user should know of nodes since the last call, a sentence each."""
        notices, self._quarantine.notices = self._quarantine.notices, []
        return notices

    def quarantine_of(self, peer: Peer, now: float) -> str:
        """Say why and how long a node is to get no tasks; "" if it gets some."""
        return self._quarantine.problem(peer, now)

    def take_failures(self) -> list[tuple[Session, Peer | None, SessionFailed]]:
        """Give the root's sessions that a node (None: the pool beneath) found itself unable to run."""
        failures, self._fates.failures = self._fates.failures, []
        return failures

    # ---- sessions

    def open_session(self, opened: Open, upstream: Peer | None, now: float) -> Session:
        """Begin a session, or take up on a new link the one with the same id; the caller has checked the token.

        At the root `upstream` is None and the number in `opened` 0.
        """
        known = next((session for session in self.sessions if session.id == opened.id), None)
        if known is not None:
            assert upstream is not None, "a root opens its session once"
            self._uplinks.take_up(known, opened, upstream)
            return known
        self._last_number += 1
        number = self._last_number if self.slots == 0 or not opened.session else opened.session
        session = Session(opened, upstream, number, self._last_number)
        self.sessions.append(session)
        self._uplinks.attach(session)
        self._downlinks.open_all(session)
        self._shares.divide(now)
        return session

    def renew_workers(self, session: Session, spec: SessionSpec, generation: int, now: float) -> None:
        """Let a session's workers go after what they have; others are prepared as `spec` says, which may now succeed.

        `generation` is what the pool calls this preparation. Nodes below are told by `renew_node`.
        """
        session.opened = structs.replace(session.opened, spec=spec)
        self._place.renew_workers(session, generation)
        session.failed, session.failure, session.has_confessed = False, None, False
        self._shares.divide(now)
        self._place.fill(session)

    def renew_node(self, session: Session, peer: Peer, spec: SessionSpec, now: float) -> None:
        """Have a node prepare the session's workers anew, now or when it comes."""
        self._downlinks.renew(session, peer, spec)

    def arrived(self, session: Session, seq: int) -> None:
        """Learn that the blobs a task was waiting for are here."""
        task = session.waiting.pop(seq, None)
        if task is not None:
            session.queue_of(task).push(task)
            self._place.fill(session)

    def cannot_arrive(self, session: Session, key: int, evidence: Evidence, now: float) -> None:
        """Learn that blobs cannot be had here for which a task, or those of a function (its number, negative), wait.

        That counts as an attempt.
        """
        for task in [task for seq, task in session.waiting.items() if key in (seq, -task.run.fn)]:
            self._fates.died(task, evidence)

    def close_session(self, session: Session, now: float) -> list[Task]:
        """End a session here and below. Gives the tasks that had not ended; nothing more is said of them."""
        session.closing = True
        left = list(session.tasks.values())
        self.kin.close(session)
        for lane in list(session.lanes.values()):
            if not lane.is_worker and lane.peer in self._downlinks.up:
                self._place.out.append((lane.peer, Close(session.no)))
            self._place.drop_lane(lane)
        session.tasks.clear()
        session.unacked.clear()
        session.granted = 0
        self.sessions.remove(session)
        self._place.touched.pop(session, None)
        self._uplinks.detach(session)
        self._place.pool.append(EndSession(session, bool(left)))
        self._shares.divide(now)
        return left

    def upstream_lost(self, upstream: Peer, now: float) -> None:
        """Learn that a link above is gone: its sessions work on for a while, their outcomes are kept."""
        for session in self.sessions:
            if session.upstream == upstream:
                self._uplinks.detach(session)
                session.upstream, session.orphaned_at, session.want = None, now, 0

    # ---- the root's own calls

    def submit(self, session: Session, task: Task) -> None:
        """Take in a new task; it is handed out at once if a slot is free and nothing waits before it."""
        session.tasks[task.run.seq] = task
        if task.run.options is not None and task.run.options.timeout_s:
            session.limited = True
        self._place.submit(session, task)

    def submit_nested(self, parent: Task, submit: Submit, task: Task, now: float) -> bool:
        """Take in a nested call of a task; False if that is not wanted any more."""
        if not self.kin.adopt(parent, submit, task):
            return False
        self.submit(task.session, task)
        return True

    def refuse_nested(self, parent: Task, submit: Submit, evidence: Evidence, now: float) -> None:
        """Answer a nested call that cannot be made a task."""
        self.kin.refuse(parent, submit, evidence)

    def discard(self, task: Task) -> bool:
        """Take out a task that was never leased; False if it was, or has ended."""
        session = task.session
        is_waiting = task.queued or session.waiting.get(task.run.seq) is task
        if not is_waiting or task.claimed or session.tasks.get(task.run.seq) is not task:
            return False
        session.forget(task)
        self._place.tell_want(session)
        return True

    def kill(self, task: Task, kind: OutcomeKind = OutcomeKind.KILLED) -> None:
        """End a task wherever it is: it is reported as ended with `kind`, or with its outcome if that was faster."""
        self._fates.kill(task, kind)

    def acknowledge(self, session: Session, seqs: list[int]) -> None:
        """Let nodes forget the outcomes of these tasks: they are recorded. For sessions that are durable."""
        self._uplinks.acknowledge(session, seqs)

    def define(self, session: Session, definition: Define) -> None:
        """Make a function known before its first task is submitted."""
        session.code[definition.fn] = definition

    def undefine(self, session: Session, fns: list[int]) -> None:
        """Forget functions that no task names any more, here and below."""
        self._place.undefine(session, fns)

    # ---- nodes below

    def node_joined(self, peer: Peer, name: str, window_s: float) -> None:
        """Learn that the link to a node is up, for the first time or again: every session is opened there."""
        self._downlinks.joined(peer, name, window_s)

    def set_window(self, peer: Peer, window_s: float) -> None:
        """Set how much work to queue at a node per slot, seconds."""
        for session in self.sessions:
            if peer in session.lanes:
                session.lanes[peer].window_s = window_s

    def limit_node(self, peer: Peer, slots: int, now: float) -> None:
        """Use at most `slots` of a node's slots, now and when it comes back."""
        self._downlinks.limit(peer, slots)

    def node_suspended(self, peer: Peer, now: float) -> None:
        """Learn that the link to a node is cut; it keeps its leases for `node_timeout_s`."""
        self._downlinks.suspend(peer, now)

    def node_lost(self, peer: Peer, evidence: Evidence, now: float) -> None:
        """Learn that a node is dead: what it had may have been running, so that is charged and runs elsewhere."""
        self._downlinks.lose(peer, evidence, now)

    def drain_node(self, peer: Peer) -> None:
        """Give a node nothing more, and ask back what it has not started."""
        self._downlinks.drain(peer)

    def leases_of(self, peer: Peer) -> int:
        """Count what a peer holds, over all sessions."""
        return sum(len(session.lanes[peer].leases) for session in self.sessions if peer in session.lanes)

    def expects(self, peer: Peer, outcome: Outcome | Delivery) -> bool:
        """Say whether an outcome would count now, so that its blobs will be wanted; or a file that the task sends."""
        lane = self._lanes.get((peer, outcome.session))
        task = lane.session.tasks.get(outcome.seq) if lane is not None else None
        return task is not None and task.run.attempt == outcome.attempt

    def is_nested(self, peer: Peer, outcome: Outcome) -> bool:
        """Say whether this is what a nested call came to."""
        lane = self._lanes.get((peer, outcome.session))
        task = lane.session.tasks.get(outcome.seq) if lane is not None else None
        return task is not None and task.kin is not None and task.kin.is_nested

    # ---- workers of the pool beneath

    def worker_ready(self, worker: Peer, session: Session, now: float, generation: int | None = None) -> None:
        """Learn that a worker of the session is up, with one slot; of which generation, where there may be several."""
        if session.closing:
            return
        if generation is not None and generation != session.generation:  # it was on its way when the session was renewed
            self._place.pool += [StopWorker(worker), StartWorker(session)]
            return
        session.starting = max(0, session.starting - 1)
        lane = Lane(worker, session, self.name, is_worker=True, remaining=session.opened.spec.max_tasks_per_child)
        lane.since = now
        session.lanes[worker] = self._lanes[worker, session.no] = lane
        session.workers += 1
        session.free[lane] = None
        self._place.fill(session)

    def start_failed(self, session: Session, evidence: Evidence, data: bytes, now: float,
                     generation: int | None = None) -> None:
        """Learn that no worker of the session can be had here; `data` is the pickled exception that is why, if any."""
        if generation is not None and generation != session.generation and not session.closing:
            self._place.pool.append(StartWorker(session))  # what failed is not wanted any more
            return
        session.starting = max(0, session.starting - 1)
        if session.closing or session.failed:
            return
        failure = SessionFailed(session.uplink_no, evidence, data, session.opened.spec.generation)
        self._fates.fail(session, None, failure)
        self._shares.divide(now)

    def worker_gone(self, worker: Peer, session: Session, started: int, evidence: Evidence, now: float) -> None:
        """Learn that a worker died, all it sent having been received; `started` is the order it began last."""
        lane = session.lanes.get(worker)
        if lane is None:
            return
        tasks = list(lane.leases.values())
        self._place.drop_lane(lane)
        for task in reversed(tasks):
            task.lane = None
            if task.doom is not None:
                self._fates.finish(task, verdict(task, task.doom))
            elif task.order == started:
                self._fates.died(task, evidence)
            else:
                self._place.requeue(task)
        self._shares.divide(now)
        self._place.fill(session)
        self._fates.tell_failure(session)

    def revoked(self, worker: Peer, session: Session, started: int, now: float) -> None:
        """Learn, 10 ms after `Revoke`, which order the worker began last: what was revoked beyond it is ours again."""
        lane = session.lanes.get(worker)
        if lane is None or lane.revoke_range is None:
            return
        for task in self._place.taken_back(lane, started):
            self._fates.come_back(task)
        self._place.fill(session)
        self._fates.tell_failure(session)

    # ---- messages

    def receive(self, peer: Peer, messages: Sequence[Message], now: float) -> None:
        """Take in what one peer said; what names no session or attempt known here is answered or ignored."""
        acks: dict[int, list[int]] = {}
        if self._quarantine.is_watching:
            self._quarantine.saw(peer, self._lanes, messages)
        for message in messages:
            if type(message) is Outcome:
                lane = self._lanes.get((peer, message.session))
                if lane is not None:
                    self._on_outcome(lane, message, acks, now)
            else:
                handle = self._table.get(type(message))
                if handle is not None:
                    handle(peer, message, now)
        for number, seqs in acks.items():
            self._place.out.append((peer, Ack(number, seqs)))
        if self._place.touched:
            self._settle(now)

    def _settle(self, now: float) -> None:
        """Refill what the batch touched, once."""
        touched, self._place.touched, self._last_touched = self._place.touched, {}, None
        for session, lanes in touched.items():
            self._place.fill(session, lanes)
            if session.failed:
                self._fates.tell_failure(session)
        if len(self.sessions) > 1:
            self._shares.divide(now)

    def _on_outcome(self, lane: Lane, message: Outcome, acks: dict[int, list[int]], now: float) -> None:
        session = lane.session
        task = lane.leases.get(message.seq)
        if task is None or task.run.attempt != message.attempt:
            self._fates.late(lane, message)
            return
        lane.since, lane.is_stalled = now, False
        self._place.unlease(task)
        if lane.revoke_end is not None:
            self._place.passed_revocation(lane, message.seq, message.attempt)
        if message.kind <= OutcomeKind.ERROR:
            estimate = session.estimates.get(task.run.fn)
            (session.estimate_of(task.run.fn) if estimate is None else estimate).saw(message.run_ns * 1e-9)
        if self._last_touched is not lane and (len(self.sessions) > 1 or not session.is_calm):
            self._last_touched = lane
            self._place.touch(lane)
        if task.kin is not None:
            self.kin.over(task, has_returned=message.kind == OutcomeKind.VALUE and task.doom is None)
        if session.uplink_no == 0:
            session.tasks.pop(message.seq, None)
            if task.kin is not None:
                self._fates.end(task, message)
            else:
                self._fates.ended.append((task, message))
            if task.deaths:
                self._quarantine.saw_end(task, lane, message, now)
            if lane.is_worker:
                pass
            elif session.is_durable and (task.kin is None or not task.kin.is_nested):
                session.unacked[message.seq] = (message, lane)
            else:
                acks.setdefault(message.session, []).append(message.seq)
        elif task.doom is not ABANDONED:
            self._fates.pass_up(task, message, lane)

    def _on_lost(self, peer: Peer, message: Lost, now: float) -> None:
        lane = self._lanes.get((peer, message.session))
        if lane is None or lane.state is LaneState.SUSPENDED:  # before `Held`: it will be said again after `Resume`
            return
        task = lane.leases.get(message.seq)
        if task is None or task.run.attempt != message.attempt:
            self._fates.late(lane, message)
            return
        self._place.unlease(task)
        self._place.touch(lane)
        if lane.session.is_root or task.doom is not None:
            self._place.out.append((peer, Ack(lane.session.no, [message.seq])))
            if lane.session.is_root and task.doom is None:
                self._quarantine.saw_death(task, lane, message.evidence.reason, now)
            self._fates.died(task, message.evidence)
        else:
            self._fates.pass_up(task, message, lane)

    def _on_returned(self, peer: Peer, message: Returned, now: float) -> None:
        lane = self._lanes.get((peer, message.session))
        if lane is None:
            return
        for seq, attempt in reversed(message.tasks):
            task = lane.leases.get(seq)
            if task is not None and task.run.attempt == attempt:
                self._place.unlease(task)
                self._fates.come_back(task)
        for seq, attempt in message.tasks if lane.is_worker else ():
            self._place.passed_revocation(lane, seq, attempt)
        self._place.touch(lane)

    def _on_close(self, peer: Peer, message: Close, now: float) -> None:
        session = self._uplinks.session(peer, message.session)
        if session is not None:
            self.close_session(session, now)

    # ---- slots

    def set_slots(self, slots: int, now: float) -> None:
        """Change how many tasks this vertex's own workers may run at once."""
        self._shares.slots = slots
        self._shares.divide(now)

    def start_drain(self, now: float) -> None:
        """Stop taking work: give back what has not started, finish what runs."""
        self._place.draining = True
        for session in self.sessions:
            self._place.give_back(session, session.unleased())
            for lane in session.lanes.values():
                if lane.is_worker and len(lane.leases) > 1:
                    self._place.revoke(lane, next(iter(lane.leases.values())).order + 1)
                elif not lane.is_worker and lane.leases and lane.state is not LaneState.SUSPENDED:
                    self._place.out.append((lane.peer, Recall(session.no, len(lane.leases))))
        self._shares.divide(now)

    # ---- time

    def watched(self) -> list[tuple[Session, Peer]]:
        """Name the workers whose page `tick` needs: those with work behind what runs, or a time limit on it."""
        return [(session, lane.peer) for session in self.sessions if session.busy for lane in session.lanes.values()
                if lane.is_worker and lane.leases and (len(lane.leases) > 1 or session.limited)]

    def needs_tick(self) -> bool:
        """Say whether `tick` has anything to look at within milliseconds."""
        for session in self.sessions:
            if session.capped or (session.limited and session.busy):
                return True
            if len(session.tasks) <= session.busy:
                continue  # no worker has anything behind what it runs
            if session.busy and any(len(lane.leases) > 1 for lane in session.lanes.values() if lane.is_worker):
                return True
            if session.free and not session.queue.count and len(session.lanes) > session.workers and any(
                    len(lane.leases) > lane.slots for lane in session.lanes.values() if not lane.is_worker):
                return True
        return len(self.sessions) > 1 and any(session.tasks or session.want for session in self.sessions)

    def stood_still(self, now: float) -> None:
        """Learn that this process did not run for a while: silence that nobody listened to does not count."""
        for session in self.sessions:
            if session.orphaned_at is not None:
                session.orphaned_at = now
            for lane in session.lanes.values():
                if lane.state is LaneState.SUSPENDED:
                    lane.suspended_at = now

    def tick(self, now: float, progress: Mapping[Peer, tuple[int, float]] | None = None) -> None:
        """Let time pass: `progress` gives, for each watched worker, the order it began last and since how long (s)."""
        for session in list(self.sessions):
            if session.orphaned_at is not None and self._is_over(session, now - session.orphaned_at, now):
                continue
            self.recovery.give_up_late(session, self._node_timeout_s, now)
            self._quarantine.tick(session, now)
            if session.workers > self._shares.slots:
                self._place.let_spares_go(session, self._shares.slots, now)
            for peer, (started, age_s) in (progress or {}).items():
                if peer in session.lanes:
                    self._watch(session.lanes[peer], started, age_s)
            if len(session.lanes) > session.workers:
                self._downlinks.end_silent(session, self._node_timeout_s, now)
                self._place.recall_for_idle(session, now)
                if session.ceiling and (session.capped or session.pinned):
                    self._shares.divide(now)
                    self._shares.cap(session)
        if len(self.sessions) > 1:
            self._shares.divide(now)

    def patience_s(self, session: Session) -> float:
        """How long the session is kept without its client."""
        return max(self._orphan_s, session.linger_s)

    def _is_over(self, session: Session, alone_s: float, now: float) -> bool:
        """End a session whose client stays away too long; of one that lingers for it, end workers that are idle."""
        if alone_s > self.patience_s(session):
            self.close_session(session, now)
            return True
        if alone_s > self._orphan_s and session.workers and not session.tasks:
            self._place.stop_workers(session)
        return False

    def _watch(self, lane: Lane, started: int, age_s: float) -> None:
        """Look at a worker: is its task over its time limit, or in the way of what is queued behind it?"""
        if lane.revoke_range is not None:
            return
        current = next((task for task in lane.leases.values() if task.order == started), None)
        if current is None:
            return
        limit_s = current.run.options.timeout_s if current.run.options is not None else 0.0
        if limit_s and age_s > limit_s:
            self.kill(current, OutcomeKind.TIMEOUT)
        elif lane.revoke_end is None and len(lane.leases) > 1 and age_s > OVERDUE_S:
            lane.session.estimate_of(current.run.fn).outgrown(age_s)
            self._place.revoke(lane, started + 1)
