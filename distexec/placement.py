"""Which task goes to which lane: leasing, prefetching, taking back, staffing.

The one place where tasks move between a session's queue and its lanes, so that the indexes kept beside them (free lanes,
busy workers, windows) are right after every move. Pure. Rule: if a task may run now and a slot is free, `fill` hands it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .ledger import (
    ABANDONED,
    NODE_AHEAD_S,
    UNKNOWN,
    KillWorker,
    Lane,
    LaneState,
    Peer,
    PoolAction,
    Revoke,
    Session,
    StartWorker,
    StopWorker,
    Task,
)
from .messages import Lend, Message, Recall, Returned, Run, Undefine, Want

OVERDUE_S = 0.005
"""How long a worker may be at one task with work behind it, before that work is taken back. Smaller: short stalls cost
revocations. Larger: tasks wait behind a long one while a slot is idle."""

STALE_S = 0.020
"""How long a node may be silent with work beyond its slots before another's idle slot claims it; about one window."""

SPARE_S = 5.0
"""How long a worker that was started for a lent slot may be idle. Smaller: recursion starts and stops processes. Larger:
they use memory for longer."""


class Placement:
    """Moves tasks; what is to be said about it collects in `out` (peer, message) and `pool` (actions), in order."""

    def __init__(self, claim: Callable[[Task], bool] | None) -> None:
        self.out: list[tuple[Peer, Message]] = []
        self.pool: list[PoolAction] = []
        self.draining = False
        self.lanes: dict[tuple[Peer, int], Lane] = {}  # by the peer below and the session's number there
        self.touched: dict[Session, dict[Lane, None] | None] = {}  # to be filled after this batch; None: every lane
        self._claim = claim

    # ---- handing out

    def submit(self, session: Session, task: Task) -> None:
        """Take in one new task at the root: to a free slot if nothing waits before it, else into the queue."""
        if session.free and not session.queue.count and task.run.options is None:
            lane = self._free_lane(session)
            if lane is not None:
                if task.claimed or self.is_wanted(task):
                    self._lease(task, lane)
                return
        queue = session.queue_of(task)
        queue.push(task)
        if queue.count == 1:  # behind a longer queue every lane is at its window already, and each outcome looks again
            if session.ahead is not None and not session.free:
                self._fill_ahead(session, session.ahead)
            if queue.count:
                self.fill(session)
        elif session.workers + session.starting < session.granted + session.paused:
            self._staff(session)

    def fill(self, session: Session, touched: Iterable[Lane] | None = None) -> None:
        """Hand out all that may run now: to free slots first, then into the windows of `touched` lanes (None: of all)."""
        queue = session.queue
        if session.broods is not None:
            self._fill_lent(session)
        if not queue.count and not session.pinned and session.broods is None:
            self.tell_want(session)
            return
        while queue.count and session.free:
            lane = self._free_lane(session)
            if lane is None:
                break
            self._hand_out(session.next_for(lane), lane)
        if session.pinned or session.broods is not None:
            self._fill_pinned(session)
        if queue.count or session.pinned or session.broods is not None:
            for lane in list(session.lanes.values()) if touched is None else touched:
                self._fill_ahead(session, lane)
                if not queue.count and not session.pinned and session.broods is None:
                    break
        if session.workers + session.starting < session.granted + session.paused:
            self._staff(session)
        self.tell_want(session)

    def touch(self, lane: Lane) -> None:
        """Note that the lane is to be filled after this batch."""
        lanes = self.touched.setdefault(lane.session, {})
        if lanes is not None:
            lanes[lane] = None

    def _free_lane(self, session: Session) -> Lane | None:
        """Pick a lane with a free slot: the worker that ended last (its caches are warm), nodes in turn."""
        for lane in reversed(session.free):
            if not lane.is_worker:
                session.free.move_to_end(lane, last=False)
                return lane
            if session.busy < session.granted + session.spare:
                return lane
            if len(session.lanes) == session.workers:
                return None
        return None

    def _fill_pinned(self, session: Session) -> None:
        for lane in list(session.free):
            while lane.is_free() and not (lane.is_worker and session.busy >= session.granted + session.spare):
                task = session.next_for(lane)
                if task is None:
                    break
                self._hand_out(task, lane)
        for key in [key for key, queue in session.pinned.items() if not queue.count]:
            del session.pinned[key]
            session.wary.discard(key)  # which has no names in it

    def _fill_lent(self, session: Session) -> None:
        """Hand out nested calls to the slots of those who wait for such: our own workers', and at nodes."""
        nested = session.broods
        assert nested is not None, "the caller looked"
        if not nested.count:
            session.broods = None
            return
        if session.active < session.granted:
            for lane in [lane for lane in reversed(session.free) if lane.is_worker]:
                if session.active >= session.granted or not self._borrow(session, lane):
                    break
        if len(session.lanes) > session.workers and session.blocked:
            for lane in [lane for lane in session.lanes.values() if lane.has_lent_slot()]:
                while lane.has_lent_slot() and self._borrow(session, lane):
                    pass

    def _borrow(self, session: Session, lane: Lane) -> bool:
        """Hand out the deepest nested call that may use a slot lent on this lane; False if there is none."""
        assert session.broods is not None, "there are nested calls"
        brood = session.broods.first(lambda each: session.may_borrow(each) and session.may_run(each, lane), deepest=True)
        if brood is None:
            return False
        task = brood.pop()
        assert task.kin is not None, "a nested call has kin"
        self._lease(task, lane)
        task.kin.has_borrowed = True
        lane.lent += 1
        session.lent += lane.is_worker
        self._recount(lane)
        return True

    def tell_lent(self, task: Task, lane: Lane) -> None:
        """Let a nested call use slots lent at the node it is leased to, if one that it descends from waits."""
        options = task.run.options
        if options is not None and (any(each in task.session.blocked for each in options.ancestors)
                                    or (task.kin is not None and task.kin.is_lent)):
            self.out.append((lane.peer, Lend(task.session.no, task.run.seq, task.run.attempt)))

    def pause(self, task: Task, lane: Lane) -> None:
        """Lend the slot of a task that waits for nested calls; what is leased behind it is taken back."""
        assert task.kin is not None, "it has made calls"
        session = lane.session
        task.kin.is_blocked = True
        session.blocked[task.run.seq] = task
        lane.paused += 1
        session.paused += lane.is_worker
        self._recount(lane)
        if lane.is_worker and len(lane.leases) > 1:
            self.revoke(lane, task.order + 1)

    def resume(self, task: Task, lane: Lane) -> None:
        """A task goes on: nothing is stopped for that, but nothing begins until so many run as there are slots."""
        assert task.kin is not None, "it has made calls"
        session = lane.session
        task.kin.is_blocked = False
        session.blocked.pop(task.run.seq, None)
        lane.paused -= 1
        session.paused -= lane.is_worker
        self._recount(lane)

    def _leave_slot(self, task: Task, lane: Lane) -> None:
        """A nested call, or one that has made some, leaves its lane: undo what `pause` and `_borrow` noted."""
        assert task.kin is not None, "the caller looked"
        if task.kin.is_blocked:
            self.resume(task, lane)
        if task.kin.has_borrowed:
            task.kin.has_borrowed = False
            lane.lent -= 1
            lane.session.lent -= lane.is_worker
            self._recount(lane)

    def _recount(self, lane: Lane) -> None:
        session = lane.session
        session.spare = min(session.lent, session.paused)
        if not lane.is_worker:
            lane.spare = min(lane.lent, lane.paused)
            if session.lanes.get(lane.peer) is lane:
                self.reindex(lane)

    def let_spares_go(self, session: Session, slots: int, now: float) -> None:
        """Stop workers that were started for lent slots and have been idle for a while."""
        for lane in [lane for lane in session.free if lane.is_worker and now - lane.since > SPARE_S]:
            if session.workers - session.paused <= slots:
                return
            self.drop_lane(lane)
            self.pool.append(StopWorker(lane.peer))

    def _fill_ahead(self, session: Session, lane: Lane) -> None:
        if not lane.leases or lane.state is not LaneState.ACTIVE or lane.revoke_end is not None or lane.remaining:
            return
        if lane.is_worker and (session.busy > session.granted + session.spare or lane.paused or lane.lent):
            return  # it waits, or is nobody's place to wait in; or one of these workers is to become another session's slot
        queue, estimates = session.queue, session.estimates
        while True:
            task = session.next_for(lane) if session.pinned or session.broods is not None else queue.peek()
            if task is None:
                return
            run = task.run
            estimate = estimates.get(run.fn)
            estimate_s = UNKNOWN if estimate is None else estimate.value_s
            if not lane.has_room(estimate_s, task.is_solo if run.options is not None else False):
                return
            (queue if run.options is None and not task.shuns else session.queue_of(task)).pop()
            if task.claimed or self.is_wanted(task):
                self._lease(task, lane, estimate_s)
                session.ahead = lane

    def _hand_out(self, task: Task | None, lane: Lane) -> None:
        assert task is not None, "fill asks only while something is queued"
        session = lane.session
        (session.queue if task.run.options is None and not task.shuns else session.queue_of(task)).pop()
        if task.claimed or self.is_wanted(task):
            self._lease(task, lane)

    def is_wanted(self, task: Task) -> bool:
        """Ask the owner, once, whether the task may still run; a withdrawn one leaves without a word."""
        task.claimed = self._claim is None or self._claim(task)
        if not task.claimed:
            task.session.forget(task)
        return task.claimed

    def _lease(self, task: Task, lane: Lane, estimate_s: float | None = None) -> None:
        session = lane.session
        run = task.run
        if task.renew:
            task.renew = task.charged = False
            attempt = max(run.attempt + 1, session.first_attempt)
            run = task.run = Run(run.session, run.seq, attempt, run.fn, run.data, run.buffers, run.options)
        fn = run.fn
        if fn not in lane.defined and fn in session.code:
            lane.defined.add(fn)
            self.out.append((lane.peer, session.code[fn]))
        if estimate_s is None:
            estimate = session.estimates.get(fn)
            estimate_s = UNKNOWN if estimate is None else estimate.value_s
        lane.put(task, estimate_s)
        task.node = lane.name
        if lane.is_worker:
            lane.sent = task.order = lane.sent + 1
            if len(lane.leases) == 1:
                session.busy += 1
                session.free.pop(lane, None)
            if lane.remaining:
                lane.remaining -= 1
                if not lane.remaining:
                    lane.state = LaneState.DRAINING
        elif len(lane.leases) == lane.slots + lane.spare:
            session.free.pop(lane, None)
        self.out.append((lane.peer, run))
        if task.kin is not None and not lane.is_worker:
            self.tell_lent(task, lane)

    def adopt(self, task: Task, lane: Lane) -> None:
        """Record that a node still holds a queued or waiting task it was leased before."""
        session = lane.session
        if task.queued:
            session.queue_of(task).discard(task)
        else:
            del session.waiting[task.run.seq]
            task.node = lane.name
        task.renew = False
        if task.charged:
            task.charged = False
            task.deaths -= 1
        lane.put(task, session.estimate_of(task.run.fn).value_s)
        if len(lane.leases) >= lane.slots:
            session.free.pop(lane, None)

    def undefine(self, session: Session, fns: list[int]) -> None:
        """Forget functions that no task names any more, here and below."""
        for fn in fns:
            session.code.pop(fn, None)
            session.estimates.pop(fn, None)
        for lane in session.lanes.values():
            known = [fn for fn in fns if fn in lane.defined]
            if known and lane.state is not LaneState.SUSPENDED:
                lane.defined.difference_update(known)
                self.out.append((lane.peer, Undefine(session.no, known)))

    # ---- taking back

    def unlease(self, task: Task) -> None:
        """End a lease; the task is nowhere until the caller puts it somewhere."""
        lane = task.lane
        assert lane is not None, "only a leased task can be unleased"
        lane.take(task)
        if task.kin is not None:
            self._leave_slot(task, lane)
        if not lane.is_worker:
            if len(lane.leases) == lane.slots + lane.spare - 1:  # elsewhere its place among the free ones does not change
                self.reindex(lane)
        elif not lane.leases:
            lane.session.busy -= 1
            if lane.state is LaneState.DRAINING:  # it has run its last task (max_tasks_per_child), or is to be ended
                self.drop_lane(lane)
                self.pool.append(StopWorker(lane.peer))
            else:
                self.reindex(lane)

    def reindex(self, lane: Lane) -> None:
        """Put a lane among the free ones, or take it out."""
        if lane.is_free():
            lane.session.free[lane] = None
        else:
            lane.session.free.pop(lane, None)

    def drop_lane(self, lane: Lane) -> None:
        """Forget a lane; the caller knows what becomes of its leases."""
        session = lane.session
        if lane.paused or lane.lent:
            for task in lane.leases.values():
                if task.kin is not None:
                    self._leave_slot(task, lane)
        session.lanes.pop(lane.peer, None)
        self.lanes.pop((lane.peer, session.no), None)
        session.free.pop(lane, None)
        if session.ahead is lane:
            session.ahead = None
        touched = self.touched.get(session)
        if touched:
            touched.pop(lane, None)
        lane.slots = 0
        if lane.is_worker:
            session.workers -= 1
            session.busy -= bool(lane.leases)

    def stop_workers(self, session: Session) -> None:
        """Let all workers of a session go, which are idle."""
        for lane in [each for each in session.lanes.values() if each.is_worker]:
            self.drop_lane(lane)
            self.pool.append(StopWorker(lane.peer))

    def renew_workers(self, session: Session, generation: int) -> None:
        """Let the workers go that a session has now, each after what it was leased; others take their place.

        `generation` is the pool's number of the preparation from which those come.
        """
        session.generation = generation
        for lane in [each for each in session.lanes.values() if each.is_worker]:
            if lane.leases:
                lane.state = LaneState.DRAINING
                self.reindex(lane)
            else:
                self.drop_lane(lane)
                self.pool.append(StopWorker(lane.peer))

    def requeue(self, task: Task) -> None:
        """Put back, before its equals and uncharged, a task that certainly never ran."""
        session = task.session
        task.lane = None
        task.renew = session.is_root
        if not session.is_root and (self.draining or session.failed or not session.told):
            self.give_back(session, [task])
        elif session.owed:
            session.owed -= 1
            self.give_back(session, [task])
        else:
            session.queue_of(task).push_front(task)

    def give_back(self, session: Session, tasks: list[Task]) -> None:
        """Return queued or just unleased tasks to the vertex above; while it is away, its next `Open` tells it."""
        for task in tasks:
            session.forget(task)
        if tasks and session.upstream is not None:
            self.out.append((session.upstream,
                             Returned(session.uplink_no, [(t.run.seq, t.run.attempt) for t in tasks])))

    def revoke(self, lane: Lane, first: int) -> None:
        """Begin to take back what a worker has not started, from order `first` on; one revocation at a time."""
        if lane.revoke_range is not None or first > lane.sent:
            return  # the end of the present one looks at every doomed task again
        if lane.revoke_end is None:
            last = next(reversed(lane.leases.values()))
            lane.revoke_end = (last.run.seq, last.run.attempt)
        else:
            first = min(first, lane.revoked_from)  # what is revoked stays so: it may have been handed out again
        lane.revoked_from = first
        lane.revoke_range = (first, lane.sent)
        lane.session.free.pop(lane, None)
        doomed = min((task.order for task in lane.leases.values() if task.doom is not None), default=0)
        self.pool.append(Revoke(lane.peer, first, lane.sent, doomed))

    def taken_back(self, lane: Lane, started: int) -> list[Task]:
        """End a revocation: give the tasks the worker had not started, youngest first; end it if it runs a doomed one."""
        assert lane.revoke_range is not None
        first, last = lane.revoke_range
        lane.revoke_range = None
        back = [task for task in lane.leases.values() if first <= task.order <= last and task.order > started]
        for task in reversed(back):
            self.unlease(task)
        self.end_doomed(lane, started)
        return back[::-1]

    def end_doomed(self, lane: Lane, started: int) -> None:
        """Go on with doomed tasks a worker still has: end the worker if it runs one, take back those it has not begun."""
        doomed = [task for task in lane.leases.values() if task.doom is not None and task.order >= started]
        if not doomed:
            return
        if any(task.order > started for task in lane.leases.values()):
            self.revoke(lane, doomed[0].order)  # first, so that the worker does not begin another before it is ended
        else:
            lane.state = LaneState.DRAINING
            self.pool.append(KillWorker(lane.peer, f"task {doomed[0].run.seq} was to end"))

    def passed_revocation(self, lane: Lane, seq: int, attempt: int) -> None:
        """Learn that a worker is past (seq, attempt): with the last revoked task, it may be given work again."""
        if lane.revoke_end == (seq, attempt):
            lane.revoke_end = None
            self.reindex(lane)
            doomed = [task.order for task in lane.leases.values() if task.doom is not None]
            if doomed:
                self.revoke(lane, min(doomed))

    def abandon(self, task: Task) -> None:
        """End a superseded attempt without a word."""
        lane = task.lane
        task.session.forget(task)
        task.doom = ABANDONED
        if lane is not None:
            assert lane.is_worker, "hubs pass Resume on before they let a newer attempt in"
            self.revoke(lane, task.order)

    def recall_for_idle(self, session: Session, now: float) -> None:
        """Ask back, for idle slots, what a silent node holds beyond its own."""
        if session.queue.count or not session.free:
            return
        idle_s = NODE_AHEAD_S * sum(lane.slots - len(lane.leases) for lane in session.free)
        for lane in session.lanes.values():
            ahead = len(lane.leases) - lane.slots
            if idle_s > 0.0 and not lane.is_worker and ahead > 0 and now - lane.since > STALE_S:
                each_s = NODE_AHEAD_S if lane.unknown else min(NODE_AHEAD_S, lane.work_s / len(lane.leases) + 1e-6)
                count = min(ahead, math.ceil(idle_s / each_s))  # short ones by the window, of long ones one for each slot
                idle_s -= count * each_s
                lane.since, lane.is_stalled = now, True
                self.out.append((lane.peer, Recall(session.no, count)))

    # ---- asking for slots

    def tell_want(self, session: Session) -> None:
        """Tell nodes, when it changes, whether more tasks wait than they offer slots."""
        if len(session.lanes) == session.workers:
            return
        waiting = session.queued() or session.want
        if session.wanted is bool(waiting):
            return
        session.wanted = bool(waiting)
        for lane in session.lanes.values():
            if not lane.is_worker and lane.wanted != bool(waiting) and lane.state is LaneState.ACTIVE:
                lane.wanted = bool(waiting)
                self.out.append((lane.peer, Want(session.no, waiting)))

    def _staff(self, session: Session) -> None:
        """Ask for workers while tasks wait that no idle one can take."""
        if session.failed or session.closing:
            return
        idle = session.workers - session.busy
        need = min(session.granted + session.spare - session.workers, session.queued() - idle)
        if session.paused > session.spare and session.broods is not None:
            borrowers = sum(brood.count for brood in session.broods if session.may_borrow(brood))
            need = max(need, min(session.granted + session.paused - session.workers, borrowers - idle))
        for _ in range(need - session.starting):
            session.starting += 1
            self.pool.append(StartWorker(session))
