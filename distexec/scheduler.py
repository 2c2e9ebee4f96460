"""Who runs what: the same decisions at the executor, a hub and an agent.

Pure: an event and the time go in, what to say to whom comes out (`take`), and at the root the tasks that ended
(`take_ended`). No socket, thread, clock or random number. The rule it keeps: a task is in exactly one place, queued here
or leased to one peer, and every task leaves exactly once.

    submit / Run from above ──> queue ──lease──> lane of a worker or node ──Outcome──> ended (root) or passed upward
                                  ^                        │
                                  └── revoked, returned, lost (root: charged if it may have run)

`ledger` holds the records, `placement` moves tasks between queue and lanes, `shares` divides a vertex's own slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import shares
from .fates import Fates, renumbered, verdict
from .ledger import (
    ABANDONED,
    EndSession,
    Lane,
    LaneState,
    Peer,
    PoolAction,
    Session,
    Task,
)
from .messages import (
    Ack,
    Close,
    Define,
    Evidence,
    Held,
    Kill,
    Lost,
    Message,
    Offer,
    Open,
    Outcome,
    OutcomeKind,
    Recall,
    Resume,
    Returned,
    Run,
    SessionFailed,
    Undefine,
    Want,
)
from .placement import OVERDUE_S, Placement


class Scheduler:
    """Decides for one vertex of the tree.

    `slots` is the number of tasks that workers of this vertex may run at once (0 for a hub) and `name` what pins call their
    node; `node_timeout_s` is how long a suspended node keeps its leases, `orphan_s` how long a session outlives the link
    above it; `absent(run)` says whether blobs the task needs are missing here; `claim(task)` asks the owner, once per task,
    whether it still wants it run.
    """

    def __init__(self, slots: int, name: str, *, node_timeout_s: float = 15.0, orphan_s: float = 30.0,
                 absent: Callable[[Run], bool] | None = None, claim: Callable[[Task], bool] | None = None) -> None:
        self.slots = slots
        self.name = name
        self.sessions: list[Session] = []
        self._place = Placement(claim)
        self._by_uplink: dict[tuple[Peer, int], Session] = {}  # by the link above and the session's number there
        self._lanes = self._place.lanes
        self._nodes: dict[Peer, tuple[str, float]] = {}  # name and window of each node below whose link is up
        self._limits: dict[Peer, int] = {}  # most slots of a node to use
        self._drained: set[Peer] = set()  # nodes that are to get nothing more
        self._node_timeout_s, self._orphan_s = node_timeout_s, orphan_s
        self._absent = absent
        self._fates = Fates(self._place)
        self._last_number = 0
        self._touched: dict[Session, dict[Lane, None] | None] = {}  # to be filled after this batch; None: every lane
        self._last_touched: Lane | None = None  # saves looking it up in `_touched` for each outcome of a batch
        self._table: dict[type, Callable[[Peer, Message, float], None]] = {
            kind: getattr(self, f"_on_{name}") for kind, name in (
                (Run, "run"), (Define, "define"), (Undefine, "undefine"), (Recall, "recall"), (Kill, "kill"),
                (Ack, "ack"), (Want, "want"), (Resume, "resume"), (Close, "close"), (Offer, "offer"), (Lost, "lost"),
                (Returned, "returned"), (Held, "held"), (SessionFailed, "session_failed"))}

    # ---- what comes out

    @property
    def has_news(self) -> bool:
        """Whether anything came out that nobody took yet."""
        return bool(self._place.out or self._place.pool or self._fates.ended or self._fates.failures)

    @property
    def only_speaks(self) -> bool:
        """Whether what came out is one message and nothing else."""
        return len(self._place.out) == 1 and not (self._place.pool or self._fates.ended or self._fates.failures)

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
            self._take_up(known, opened, upstream)
            return known
        self._last_number += 1
        number = self._last_number if self.slots == 0 or not opened.session else opened.session
        session = Session(opened, upstream, number, self._last_number)
        self.sessions.append(session)
        if upstream is not None:
            self._by_uplink[upstream, opened.session] = session
        for peer in self._nodes:
            self._open_lane(session, peer)
        self._share(now)
        return session

    def _take_up(self, session: Session, opened: Open, upstream: Peer | None) -> None:
        assert upstream is not None, "a root opens its session once"
        self._by_uplink.pop((session.upstream, session.uplink_no), None)
        session.upstream, session.uplink_no, session.orphaned_at = upstream, opened.session, None
        self._by_uplink[upstream, opened.session] = session
        session.reconciling, session.has_confessed = True, False
        leases = [(task.run.seq, task.run.attempt) for task in session.tasks.values()]
        ended = [(message.seq, message.attempt) for message, _ in session.unacked.values()]
        self._place.out.append((upstream, Held(opened.session, leases, ended, session.birth)))

    def close_session(self, session: Session, now: float) -> list[Task]:
        """End a session here and below. Gives the tasks that had not ended; nothing more is said of them."""
        session.closing = True
        left = list(session.tasks.values())
        for lane in list(session.lanes.values()):
            if not lane.is_worker and lane.peer in self._nodes:
                self._place.out.append((lane.peer, Close(session.no)))
            self._drop_lane(lane)
        session.tasks.clear()
        session.unacked.clear()
        session.granted = 0
        self.sessions.remove(session)
        self._touched.pop(session, None)
        self._by_uplink.pop((session.upstream, session.uplink_no), None)
        self._place.pool.append(EndSession(session, bool(left)))
        self._share(now)
        return left

    def upstream_lost(self, upstream: Peer, now: float) -> None:
        """Learn that a link above is gone: its sessions work on for a while, their outcomes are kept."""
        for session in self.sessions:
            if session.upstream == upstream:
                self._by_uplink.pop((upstream, session.uplink_no), None)
                session.upstream, session.orphaned_at = None, now

    # ---- the root's own calls

    def submit(self, session: Session, task: Task) -> None:
        """Take in a new task; it is handed out at once if a slot is free and nothing waits before it."""
        session.tasks[task.run.seq] = task
        if task.run.options is not None and task.run.options.timeout_s:
            session.limited = True
        self._place.submit(session, task)

    def discard(self, task: Task) -> bool:
        """Take out a task that was never leased; False if it was, or has ended."""
        session = task.session
        if not task.queued or task.claimed or session.tasks.get(task.run.seq) is not task:
            return False
        session.forget(task)
        self._place.tell_want(session)
        return True

    def kill(self, task: Task, kind: OutcomeKind = OutcomeKind.KILLED) -> None:
        """End a task wherever it is: it is reported as ended with `kind`, or with its outcome if that was faster."""
        session, lane = task.session, task.lane
        if session.tasks.get(task.run.seq) is not task or task.doom is not None:
            return
        if lane is None:
            self._fates.finish(task, verdict(task, kind))
            return
        task.doom = kind
        if lane.is_worker:
            self._place.revoke(lane, task.order)
        elif lane.state is not LaneState.SUSPENDED:
            self._place.out.append((lane.peer, Kill(session.no, task.run.seq, task.run.attempt)))

    def define(self, session: Session, definition: Define) -> None:
        """Make a function known before its first task is submitted."""
        session.code[definition.fn] = definition

    def undefine(self, session: Session, fns: list[int]) -> None:
        """Forget functions that no task names any more, here and below."""
        for fn in fns:
            session.code.pop(fn, None)
            session.estimates.pop(fn, None)
        for lane in session.lanes.values():
            known = [fn for fn in fns if fn in lane.defined]
            if known and lane.state is not LaneState.SUSPENDED:
                lane.defined.difference_update(known)
                self._place.out.append((lane.peer, Undefine(session.no, known)))

    # ---- nodes below

    def node_joined(self, peer: Peer, name: str, window_s: float) -> None:
        """Learn that the link to a node is up, for the first time or again: every session is opened there."""
        self._nodes[peer] = (name, window_s)
        for session in self.sessions:
            self._open_lane(session, peer)

    def set_window(self, peer: Peer, window_s: float) -> None:
        """Set how much work to queue at a node per slot, seconds."""
        for session in self.sessions:
            if peer in session.lanes:
                session.lanes[peer].window_s = window_s

    def limit_node(self, peer: Peer, slots: int, now: float) -> None:
        """Use at most `slots` of a node's slots, now and when it comes back."""
        self._limits[peer] = slots
        for session in self.sessions:
            if peer in session.lanes:
                session.lanes[peer].limit = slots
                self._cap(session, now)

    def node_suspended(self, peer: Peer, now: float) -> None:
        """Learn that the link to a node is cut; it keeps its leases for `node_timeout_s`."""
        self._nodes.pop(peer, None)
        for session in self.sessions:
            lane = session.lanes.get(peer)
            if lane is not None:
                lane.state, lane.suspended_at = LaneState.SUSPENDED, now
                lane.offered = lane.slots = 0
                self._lanes.pop((peer, session.no), None)
                self._cap(session, now)

    def node_lost(self, peer: Peer, evidence: Evidence, now: float) -> None:
        """Learn that a node is dead: what it had may have been running, so that is charged and runs elsewhere."""
        self._nodes.pop(peer, None)
        for session in list(self.sessions):
            lane = session.lanes.get(peer)
            if lane is not None:
                tasks = list(lane.leases.values())
                self._drop_lane(lane)
                for task in reversed(tasks):
                    self._fates.died(task, evidence)
                self._cap(session, now)

    def drain_node(self, peer: Peer) -> None:
        """Give a node nothing more, and ask back what it has not started."""
        self._drained.add(peer)
        for session in self.sessions:
            lane = session.lanes.get(peer)
            if lane is not None and lane.state is LaneState.ACTIVE:
                self._resume_lane(lane)

    def _resume_lane(self, lane: Lane) -> None:
        """Use a lane again after its link came back, unless its node is to get nothing more."""
        is_drained = lane.peer in self._drained
        lane.session.wanted = None
        lane.state = LaneState.DRAINING if is_drained else LaneState.ACTIVE
        self._place.reindex(lane)
        if is_drained and lane.leases:
            self._place.out.append((lane.peer, Recall(lane.session.no, len(lane.leases))))

    def leases_of(self, peer: Peer) -> int:
        """Count what a peer holds, over all sessions."""
        return sum(len(session.lanes[peer].leases) for session in self.sessions if peer in session.lanes)

    def expects(self, peer: Peer, outcome: Outcome) -> bool:
        """Say whether an outcome would count now, so that its blobs will be wanted."""
        lane = self._lanes.get((peer, outcome.session))
        task = lane.session.tasks.get(outcome.seq) if lane is not None else None
        return task is not None and task.run.attempt == outcome.attempt

    def _open_lane(self, session: Session, peer: Peer) -> None:
        name, window_s = self._nodes[peer]
        lane = session.lanes.get(peer)
        if lane is None:
            lane = session.lanes[peer] = Lane(peer, session, name, is_worker=False)
            lane.limit = self._limits.get(peer, lane.limit)
            if peer in self._drained:
                lane.state = LaneState.DRAINING
            if session.failed and not self.slots:
                session.failed, session.failure, session.has_confessed = False, None, False  # this node may be able to
        lane.window_s, lane.wanted, session.wanted = window_s, False, None
        lane.defined.clear()
        self._lanes[peer, session.no] = lane
        opened = session.opened
        self._place.out.append((peer, Open(session.no, opened.id, opened.token, opened.weight, opened.ceiling, opened.spec)))

    def _drop_lane(self, lane: Lane) -> None:
        self._place.drop_lane(lane)
        touched = self._touched.get(lane.session)
        if touched:
            touched.pop(lane, None)

    # ---- workers of the pool beneath

    def worker_ready(self, worker: Peer, session: Session, now: float) -> None:
        """Learn that a worker of the session is up, with one slot."""
        if session.closing:
            return
        session.starting = max(0, session.starting - 1)
        lane = Lane(worker, session, self.name, is_worker=True, remaining=session.opened.spec.max_tasks_per_child)
        lane.since = now
        session.lanes[worker] = self._lanes[worker, session.no] = lane
        session.workers += 1
        session.free[lane] = None
        self._place.fill(session)

    def start_failed(self, session: Session, evidence: Evidence, data: bytes, now: float) -> None:
        """Learn that no worker of the session can be had here; `data` is its initializer's pickled exception, if any."""
        session.starting = max(0, session.starting - 1)
        if session.closing or session.failed:
            return
        self._fates.fail(session, None, SessionFailed(session.uplink_no, evidence, data))
        self._share(now)

    def worker_gone(self, worker: Peer, session: Session, started: int, evidence: Evidence, now: float) -> None:
        """Learn that a worker died, all it sent having been received; `started` is the order it began last."""
        lane = session.lanes.get(worker)
        if lane is None:
            return
        tasks = list(lane.leases.values())
        self._drop_lane(lane)
        for task in reversed(tasks):
            task.lane = None
            if task.doom is not None:
                self._fates.finish(task, verdict(task, task.doom))
            elif task.order == started:
                self._fates.died(task, evidence)
            else:
                self._place.requeue(task)
        self._share(now)
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
        if self._touched:
            self._settle(now)

    def _settle(self, now: float) -> None:
        """Refill what the batch touched, once."""
        touched, self._touched, self._last_touched = self._touched, {}, None
        for session, lanes in touched.items():
            self._place.fill(session, lanes)
            if session.failed:
                self._fates.tell_failure(session)
        if len(self.sessions) > 1:
            self._share(now)

    def _touch(self, lane: Lane) -> None:
        lanes = self._touched.setdefault(lane.session, {})
        if lanes is not None:
            lanes[lane] = None

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
        if self._last_touched is not lane:
            self._last_touched = lane
            self._touch(lane)
        if session.uplink_no == 0:
            session.tasks.pop(message.seq, None)
            self._fates.ended.append((task, message))
            if not lane.is_worker:
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
        self._touch(lane)
        if lane.session.is_root or task.doom is not None:
            self._place.out.append((peer, Ack(lane.session.no, [message.seq])))
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
        self._touch(lane)

    def _on_offer(self, peer: Peer, message: Offer, now: float) -> None:
        lane = self._lanes.get((peer, message.session))
        if lane is None:
            return
        lane.offered = message.slots
        lane.has_failed = lane.has_failed and not message.slots
        if lane.state is LaneState.SUSPENDED:  # it comes back without `Held`: it ended the session meanwhile
            self._resume_lane(lane)
            lane.birth = -1
        self._check_birth(lane, message.birth)
        self._cap(lane.session, now)

    def _check_birth(self, lane: Lane, birth: int) -> None:
        """Give up what a node was leased before it ended the session and began it anew, on this link or one cut at once."""
        if lane.birth != birth:
            lane.birth = birth
            for task in reversed(list(lane.leases.values())):
                self._place.unlease(task)
                self._fates.died(task, Evidence(lane.name, reason="the node ended the session while its link was away"))

    def _on_held(self, peer: Peer, message: Held, now: float) -> None:
        """Reconcile with a node that kept the session while its link was away."""
        lane = self._lanes.get((peer, message.session))
        if lane is None:
            return
        self._check_birth(lane, message.birth)
        held = {tuple(key) for key in message.leases} | {tuple(key) for key in message.outcomes}
        for task in reversed(list(lane.leases.values())):
            if (task.run.seq, task.run.attempt) not in held:
                self._place.unlease(task)  # it never arrived: ends and losses are kept below until acknowledged
                self._fates.come_back(task)
        drop = [(seq, attempt) for seq, attempt in message.leases if not self._is_held_for(lane, seq, attempt)]
        ack = [seq for seq, attempt in message.outcomes if not self._is_held_for(lane, seq, attempt)]
        self._place.out.append((peer, Resume(lane.session.no, drop, ack)))
        self._resume_lane(lane)
        self._touched[lane.session] = None
        for task in list(lane.leases.values()):
            if task.doom is not None:
                self._place.out.append((peer, Kill(lane.session.no, task.run.seq, task.run.attempt)))

    def _is_held_for(self, lane: Lane, seq: int, attempt: int) -> bool:
        task = lane.session.tasks.get(seq)
        if task is None or task.run.attempt != attempt:
            return False
        if task.queued and task.claimed:
            self._place.adopt(task, lane)
        return task.lane is lane

    def _on_session_failed(self, peer: Peer, message: SessionFailed, now: float) -> None:
        lane = self._lanes.get((peer, message.session))
        if lane is None:
            return
        session = lane.session
        lane.has_failed = True  # it stays, for acknowledgements and `Close`
        lane.offered = 0
        for task in reversed(list(lane.leases.values())):
            self._place.unlease(task)
            self._fates.come_back(task)
        if session.is_root:
            self._fates.failures.append((session, peer, message))
        elif all(each.has_failed for each in session.lanes.values()):
            self._fates.fail(session, peer, message)
        self._cap(session, now)

    def _on_run(self, peer: Peer, message: Run, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is None:
            return
        seq = message.seq
        older = session.tasks.get(seq)
        if older is not None:
            if older.run.attempt >= message.attempt:
                return
            self._abandon(older)
        if session.no != message.session:
            message = Run(session.no, seq, message.attempt, message.fn, message.data, message.buffers, message.options)
        task = session.tasks[seq] = Task(message, session)
        if message.options is not None and message.options.timeout_s:
            session.limited = True
        if session.failed or self._place.draining or not session.told:
            self._place.give_back(session, [task])
        elif self._absent is not None and self._may_be_absent(session, message) and self._absent(message):
            session.waiting[seq] = task
        else:
            session.queue_of(task).push(task)
            self._touched[session] = None

    def _may_be_absent(self, session: Session, run: Run) -> bool:
        definition = session.code.get(run.fn)
        return bool(run.buffers) or definition is None or bool(definition.buffers)

    def arrived(self, session: Session, seq: int) -> None:
        """Learn that the blobs a task was waiting for are here."""
        task = session.waiting.pop(seq, None)
        if task is not None:
            session.queue_of(task).push(task)
            self._place.fill(session)

    def _abandon(self, task: Task) -> None:
        lane = task.lane
        if lane is not None and not lane.is_worker:
            self._place.unlease(task)
            if lane.state is not LaneState.SUSPENDED:
                self._place.out.append((lane.peer, Kill(task.session.no, task.run.seq, task.run.attempt)))
        self._place.abandon(task)

    def _on_define(self, peer: Peer, message: Define, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is not None:
            if session.no != message.session:
                message = Define(session.no, message.fn, message.data, message.buffers)
            session.code[message.fn] = message

    def _on_undefine(self, peer: Peer, message: Undefine, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is not None:
            self.undefine(session, message.fns)

    def _on_recall(self, peer: Peer, message: Recall, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is None:
            return
        returned = [session.queue.pop_youngest() for _ in range(min(message.count, session.queue.count))]
        self._place.give_back(session, returned[::-1])
        session.owed = missing = message.count - len(returned)
        for lane in session.lanes.values():
            if missing > 0 and not lane.is_worker and len(lane.leases) > lane.slots:
                self._place.out.append((lane.peer, Recall(session.no, missing)))
                missing -= len(lane.leases) - lane.slots

    def _on_kill(self, peer: Peer, message: Kill, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        task = session.tasks.get(message.seq) if session is not None else None
        if task is not None and task.run.attempt == message.attempt:
            self.kill(task)

    def _on_ack(self, peer: Peer, message: Ack, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is None:
            return
        below: dict[Lane, list[int]] = {}
        for position, seq in enumerate(message.seqs):
            entry = session.unacked.get(seq)
            if entry is None or (message.attempts and message.attempts[position] != entry[0].attempt):
                continue
            del session.unacked[seq]
            if entry[1] is not None:
                below.setdefault(entry[1], []).append(seq)
        for lane, seqs in below.items():
            if session.lanes.get(lane.peer) is lane and lane.state is not LaneState.SUSPENDED:
                self._place.out.append((lane.peer, Ack(session.no, seqs)))

    def _on_want(self, peer: Peer, message: Want, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is not None:
            session.want = message.count
            self._place.tell_want(session)
            self._share(now)

    def _on_resume(self, peer: Peer, message: Resume, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is None:
            return
        for seq, attempt in message.drop:
            task = session.tasks.get(seq)
            if task is not None and task.run.attempt == attempt:
                self._abandon(task)
        self._on_ack(peer, Ack(message.session, message.ack), now)
        for seq, (end, lane) in session.unacked.items():
            session.unacked[seq] = (renumbered(end, session.uplink_no), lane)
            self._place.out.append((peer, session.unacked[seq][0]))
        session.reconciling, session.told = False, -1
        self._offer(session)
        self._fates.tell_failure(session)

    def _on_close(self, peer: Peer, message: Close, now: float) -> None:
        session = self._by_uplink.get((peer, message.session))
        if session is not None:
            self.close_session(session, now)

    # ---- slots

    def set_slots(self, slots: int, now: float) -> None:
        """Change how many tasks this vertex's own workers may run at once."""
        self.slots = slots
        self._share(now)

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
        self._share(now)

    def _share(self, now: float) -> None:
        """Divide our own slots among the sessions anew, and offer upward what changed."""
        able = [] if self._place.draining else [session for session in self.sessions if not session.failed]
        aims = shares.targets(self.slots, able, now) if able else {}
        grown = shares.regrant(self.slots, self.sessions, aims)
        for session in self.sessions:
            self._offer(session)
        for session in grown:
            self._place.fill(session)

    def _offer(self, session: Session) -> None:
        if session.is_root or session.upstream is None or session.reconciling:
            return
        slots = 0 if self._place.draining else session.granted + sum(
            lane.slots for lane in session.lanes.values() if not lane.is_worker)
        if slots == session.told:
            return
        session.told = slots
        self._place.out.append((session.upstream, Offer(session.uplink_no, slots, session.birth)))
        if not slots:
            self._place.give_back(session, session.unleased())

    def _cap(self, session: Session, now: float) -> None:
        """Use no more of the offered slots than the session's ceiling, first on nodes that tasks must go to."""
        nodes = [lane for lane in session.lanes.values() if not lane.is_worker]
        if session.pinned and session.ceiling:
            nodes.sort(key=lambda lane: lane.name not in session.pinned)
        shares.cap(session, nodes)
        for lane in nodes:
            self._place.reindex(lane)
        self._offer(session)
        self._place.fill(session)

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

    def tick(self, now: float, progress: Mapping[Peer, tuple[int, float]] | None = None) -> None:
        """Let time pass: `progress` gives, for each watched worker, the order it began last and since how long (s)."""
        for session in list(self.sessions):
            if session.orphaned_at is not None and now - session.orphaned_at > self._orphan_s:
                self.close_session(session, now)
                continue
            for peer, (started, age_s) in (progress or {}).items():
                if peer in session.lanes:
                    self._watch(session.lanes[peer], started, age_s)
            if len(session.lanes) > session.workers:
                self._end_silent(session, now)
                self._place.recall_for_idle(session, now)
                if session.ceiling and (session.capped or session.pinned):
                    self._share(now)
                    self._cap(session, now)
        if len(self.sessions) > 1:
            self._share(now)

    def _end_silent(self, session: Session, now: float) -> None:
        for lane in list(session.lanes.values()):
            if lane.state is LaneState.SUSPENDED and lane.peer not in self._nodes and (
                    now - lane.suspended_at > self._node_timeout_s):
                self.node_lost(lane.peer, Evidence(lane.name, reason=f"node {lane.name!r} was out of reach for more than "
                                                   f"{self._node_timeout_s:g} s (node_timeout)"), now)

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
