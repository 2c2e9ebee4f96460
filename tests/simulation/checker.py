"""The invariants, told by an observer who sees every vertex and knows what each worker really runs.

Light checks look, after every step, at the vertex that took it: counts and indexes, free slots, and the tasks that the step
named. Deep checks recompute everything, every 50 steps and at the end. What is checked against the real executions:

* a task begins once, plus once for each charged death, plus once for each outcome that died unsent with its worker;
* a future ends once, with the outcome of the present attempt, which really ended so; never both withdrawn and ended;
* charged deaths never exceed the retries by more than one.
"""

from __future__ import annotations

# ruff: noqa: B023  (the lambdas in loops are called at once, or never)
from collections.abc import Callable, Sequence
from typing import Any

from distexec.ledger import ABANDONED, UNKNOWN, Lane, LaneState, Session, Task
from distexec.ledger import WORKER_AHEAD_S as AHEAD_S
from distexec.messages import Lost, Outcome, OutcomeKind, Returned, Run
from distexec.placement import Placement

from .vertices import Vertex
from .world import Call, Execution, Line, Violation, World

DEEP_EVERY = 50
TIMES_OUT_S = 0.15
"""How long after its time limit a task may still end by itself: a tick, a revocation, another, and the signal."""

KILLS_S = 0.35
"""How long after `kill` a task may still end by itself while all links are up."""

AGREES_S = 0.4
"""How long the two ends of a line may differ on who has a task: a few messages under way, and a revocation."""

AGREES_LOOKS = 4
"""In how many looks it must be so: between two of them the task may have gone to and fro."""

ROUNDING_S = 1e-9


class WatchedPlacement(Placement):
    """Checks each lease at the moment it is made."""

    def _lease(self, task: Task, lane: Lane, estimate_s: float | None = None) -> None:
        before = len(lane.leases) - lane.spare
        is_borrowing = vars(self).get("is_borrowing", False)
        super()._lease(task, lane, estimate_s)
        _expect(lane.state is not LaneState.SUSPENDED, lambda: f"{task} was leased to suspended {lane}")
        _expect(lane.state is not LaneState.QUARANTINED, lambda: f"{task} was leased to quarantined {lane}")
        _expect(
            lane.peer not in task.shuns or not lane.session.can_do_without(task.shuns),
            lambda: f"{task} was leased to {lane}, where it died before",
        )
        _expect(lane.revoke_end is None, lambda: f"{task} was leased into a revocation on {lane}")
        _expect(len(lane.leases) - lane.spare == before + 1, lambda: f"{task} took the place of another lease on {lane}")
        if is_borrowing:
            has_slot = lane.lent < lane.paused or (lane.state is LaneState.DRAINING and before < lane.slots + lane.paused)
            _expect(lane.is_worker or has_slot, lambda: f"{task} is leased to a slot that nobody lends on {lane}")
            _expect(not lane.is_worker or lane.session.active <= lane.session.granted,
                    lambda: f"{task} runs beyond the share of {lane.session}")
        elif before >= lane.slots:
            _expect(not task.is_solo, lambda: f"{task} (retries=0) was leased ahead on {lane}")
            if lane.is_worker:
                _expect(
                    not lane.unknown and lane.work_s <= AHEAD_S + ROUNDING_S,
                    lambda: f"worker window passed by {task} on {lane}",
                )
            else:
                _expect(
                    before == lane.slots or (not lane.unknown and lane.work_s <= lane.window_s * lane.slots + ROUNDING_S),
                    lambda: f"node window passed by {task} on {lane}",
                )
        elif lane.is_worker:
            session = lane.session
            _expect(session.busy <= session.granted + session.spare, lambda: f"{task} runs beyond the share of {session}")

    def _borrow(self, session: Session, lane: Lane) -> bool:
        vars(self)["is_borrowing"] = True
        has_leased = super()._borrow(session, lane)
        vars(self)["is_borrowing"] = False
        if has_leased:
            task = next(reversed(lane.leases.values()))
            options, kin = task.run.options, task.kin
            _expect(
                options is not None and kin is not None and (kin.is_lent or any(
                    seq in session.blocked for seq in options.ancestors)),
                lambda: f"{task} runs in a slot lent on {lane}, and nobody waits for it",
            )
        return has_leased

    def resume(self, task: Task, lane: Lane) -> None:
        """A task goes on without asking."""
        vars(self)["resumed"] = vars(self).get("resumed", 0) + 1
        super().resume(task, lane)


class Checker:
    """Looks at one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.world.observer = self
        self.begun = self.ended = self.checks = 0
        self.is_calm = False  # no link is cut in this history, no process dies
        self._busy: dict[Vertex, int] = {}
        self._disputed: dict[
            object, tuple[float, int]
        ] = {}  # (line, session, seq, attempt): since when only one end has it, and looks

    # ---- what is told to it

    def on_boot(self, vertex: Vertex) -> None:
        """A vertex begins a life."""
        vertex.scheduler._place.__class__ = WatchedPlacement  # type: ignore[assignment]
        self._busy[vertex] = 0

    def on_begin(self, execution: Execution) -> None:
        """A worker begins a task."""
        call = execution.call
        self.begun += 1
        deaths = call.task.deaths
        _expect(
            call.begun <= deaths + call.unsent + call.excused,
            lambda: (
                f"{call} begins once more (attempt {execution.attempt}, {execution.worker}) with {deaths} charged "
                f"deaths and {call.unsent} outcomes lost"
            ),
        )
        for attempt, child in call.children:
            _expect(
                child.is_over or attempt >= execution.attempt,  # a node that is cut off may begin an older one
                lambda: f"{call} begins again while {child}, called by attempt {attempt}, has not ended",
            )
        _expect(not call.discarded or call.root.is_closed, lambda: f"{call} begins though it was withdrawn")
        if call.retries == 0:
            _expect(call.begun <= call.excused, lambda: f"{call} has retries=0 and begins again")

    def on_end(self, call: Call, task: Task, end: Outcome | Lost) -> None:
        """A root says that a call has ended."""
        self.ended += 1
        _expect(call.end is None, lambda: f"{call} ends again, with {end}")
        _expect(not call.discarded, lambda: f"{call} was withdrawn and ends with {end}")
        _expect(
            end.attempt == task.run.attempt, lambda: f"{call} ends with a superseded attempt: {end}, now {task.run.attempt}"
        )
        _expect(task.lane is None and not task.queued, lambda: f"{call} ended but is still {task}")
        if isinstance(end, Lost):
            _expect(
                task.deaths == call.retries + 1 <= task.run.attempt, lambda: f"{call} is lost after {task.deaths} deaths"
            )
        elif end.kind is OutcomeKind.KILLED:
            _expect(call.killed_at is not None, lambda: f"{call} was killed, and nobody asked for it")
        elif end.kind is OutcomeKind.TIMEOUT:
            limit_s = call.options.timeout_s if call.options is not None else 0.0
            _expect(0.0 < limit_s < call.duration_s, lambda: f"{call} timed out with a limit of {limit_s}")
        else:
            _expect(end.attempt in call.told, lambda: f"{call} has an outcome of an attempt that has told none: {end}")
            limit_s = call.options.timeout_s if call.options is not None else 0.0
            _expect(
                not limit_s or call.duration_s < limit_s + TIMES_OUT_S,
                lambda: f"{call} ran on beyond its limit of {limit_s}",
            )
        _expect(
            not self.is_calm or call.killed_at is None or self.world.now < call.killed_at + KILLS_S,
            lambda: f"{call} was to be killed at {call.killed_at} and goes on",
        )

    def on_nested_end(self, call: Call, task: Task) -> None:
        """A root says that a nested call has ended."""
        _expect(not call.is_over, lambda: f"{call} ends again")
        _expect(task.lane is None and not task.queued, lambda: f"{call} ended but is still {task}")
        _expect(task.deaths <= call.retries + 1, lambda: f"{call} died {task.deaths} times")

    def on_step(self, vertex: Vertex, arguments: tuple[Any, ...]) -> None:
        """A scheduler took a step."""
        self.checks += 1
        if self.checks % DEEP_EVERY == 0:
            self.check_everything()
            return
        for session in vertex.scheduler.sessions:
            self._check_light(vertex, session)
        self._check_slots(vertex)
        self._check_named(vertex, arguments)

    def check_everything(self) -> None:
        """Recompute everything."""
        disputed: dict[object, tuple[float, int]] = {}
        for vertex in self.world.vertices:
            if vertex.is_alive:
                self.check_vertex(vertex)
                for session in vertex.scheduler.sessions:
                    self._compare_ends(session, disputed)
        self._disputed = disputed

    def _compare_ends(self, session: Session, disputed: dict[object, tuple[float, int]]) -> None:
        """Let the two ends of a line agree on what is leased, give or take what is under way."""
        line = session.upstream
        if not isinstance(line, Line) or line.is_cut or line.downlink.line is not line or session.reconciling:
            return
        above = next((each for each in line.downlink.owner.scheduler.sessions if each.id == session.id), None)
        lane = above.lanes.get(line.downlink) if above is not None else None
        if lane is None or lane.state is LaneState.SUSPENDED:
            return
        leased = {(seq, task.run.attempt) for seq, task in lane.leases.items()}
        held = {(seq, task.run.attempt) for seq, task in session.tasks.items()}
        ended = {(seq, end.attempt) for seq, (end, _) in session.unacked.items()}
        for lease in (leased - held - ended) | (held - leased):
            key = (line, session, lease)
            since, looks = self._disputed.get(key, (self.world.now, 0))
            disputed[key] = since, looks + 1
            if looks >= AGREES_LOOKS and self.world.now - since > AGREES_S:
                raise Violation(f"{line}: only one end has {lease} of {session}")

    # ---- vertices

    def _check_slots(self, vertex: Vertex) -> None:
        busy = sum(session.active for session in vertex.scheduler.sessions)
        resumed = vars(vertex.scheduler._place).pop("resumed", 0)
        # after a shrink it may only fall, but for those who go on
        allowed = max(vertex.scheduler.slots, self._busy[vertex] + resumed)
        _expect(busy <= allowed, lambda: f"{busy} of {vertex.scheduler.slots} slots busy at {vertex}")
        self._busy[vertex] = busy

    def _check_light(self, vertex: Vertex, session: Session) -> None:
        """Counts, indexes, and that nothing waits that could run."""
        where = vertex.name
        busy = workers = leased = 0
        has_free = None
        can_use_own = session.busy < session.granted + session.spare
        for lane in session.lanes.values():
            count = len(lane.leases)
            leased += count
            if lane.is_worker:
                workers += 1
                busy += count > 0
            is_free = count < lane.slots + lane.spare and lane.state is LaneState.ACTIVE and lane.revoke_end is None
            if is_free is not (lane in session.free):
                raise Violation(f"{where}: {lane} among the free: {lane in session.free}")
            if is_free and has_free is None and (not lane.is_worker or can_use_own) and session.next_for(lane) is not None:
                has_free = lane
        if has_free is not None:
            raise Violation(f"{where}: {session.next_for(has_free)} waits though {has_free} is free")
        _expect(busy == session.busy, lambda: f"{where}: busy {session.busy}, really {busy}")
        _expect(workers == session.workers, lambda: f"{where}: workers {session.workers}, really {workers}")
        _expect(len(session.free) <= len(session.lanes), lambda: f"{where}: a dropped lane among the free")
        queued = session.queue.count
        for queue in [*session.pinned.values(), *(session.broods or ())]:
            queued += queue.count
        if session.broods is not None and session.broods.count:
            self._check_lent(where, session)
        # abandoned attempts are leased, but not among the tasks
        _expect(
            queued + len(session.waiting) <= len(session.tasks) <= queued + len(session.waiting) + leased,
            lambda: f"{where}: {len(session.tasks)} tasks, {queued} queued, {len(session.waiting)} waiting, {leased} leased",
        )
        if session.queue.count and not session.failed and can_use_own:
            idle = session.workers - session.busy
            need = min(session.granted + session.spare - session.workers, session.queue.count - idle) - session.starting
            _expect(need <= 0, lambda: f"{where}: {need} workers should be starting for {session}")

    def _check_lent(self, where: str, session: Session) -> None:
        """No nested call waits that could use a slot that is lent."""
        lanes = [lane for lane in session.free if lane.is_worker] if (
            session.active < session.granted) else []
        for lane in [*lanes[:1], *(lane for lane in session.lanes.values() if lane.has_lent_slot())]:
            for brood in session.broods or ():
                task = brood.peek()
                _expect(
                    task is None or not session.may_run(brood, lane) or not session.may_borrow(brood),
                    lambda: f"{where}: {task} waits though a slot is lent on {lane}",
                )

    def _check_named(self, vertex: Vertex, arguments: tuple[Any, ...]) -> None:
        for argument in arguments:
            if type(argument) is list:
                self._check_messages(vertex, argument)
            elif type(argument) is Task:
                self._check_task(vertex, argument.session, argument)

    def _check_messages(self, vertex: Vertex, messages: Sequence[Any]) -> None:
        for message in messages:
            if isinstance(message, (Outcome, Lost, Run)):
                seqs = [message.seq]
            elif isinstance(message, Returned):
                seqs = [seq for seq, _ in message.tasks]
            else:
                continue
            for session in vertex.scheduler.sessions:
                for seq in seqs:
                    task = session.tasks.get(seq)
                    if task is not None:
                        self._check_task(vertex, session, task)

    def _check_task(self, vertex: Vertex, session: Session, task: Task) -> None:
        if session.tasks.get(task.run.seq) is not task:
            return
        lane = task.lane
        places = int(task.queued) + (session.waiting.get(task.run.seq) is task) + (lane is not None)
        _expect(places == 1, lambda: f"{vertex.name}: {task} is in {places} places")
        if lane is not None:
            _expect(
                lane.leases.get(task.run.seq) is task and session.lanes.get(lane.peer) is lane,
                lambda: f"{vertex.name}: {task} is not where it says",
            )
        _expect(
            task.deaths <= min(task.retries + 1, task.run.attempt) or not session.is_root,
            lambda: f"{task} was charged {task.deaths} times",
        )
        _expect(task.doom is not ABANDONED, lambda: f"{vertex.name}: abandoned {task} is among the tasks")

    def check_vertex(self, vertex: Vertex) -> None:
        """Recompute everything at one vertex."""
        scheduler = vertex.scheduler
        self._check_slots(vertex)
        lanes = 0
        for session in scheduler.sessions:
            self._check_light(vertex, session)
            self._check_session(vertex, session)
            for lane in session.lanes.values():
                found = scheduler._lanes.get((lane.peer, session.no)) is lane
                lanes += found
                _expect(
                    found or lane.state is LaneState.SUSPENDED, lambda: f"{vertex.name}: {lane} is not found by its peer"
                )
            if session.upstream is not None:
                _expect(
                    scheduler._uplinks.session(session.upstream, session.uplink_no) is session,
                    lambda: f"{vertex.name}: {session} is not found by its uplink",
                )
        _expect(
            len(scheduler._lanes) == lanes,
            lambda: f"{vertex.name}: {len(scheduler._lanes)} lanes indexed, {lanes} there are",
        )
        _expect(
            len(scheduler._uplinks._sessions) == sum(s.upstream is not None for s in scheduler.sessions),
            lambda: f"{vertex.name}: uplinks {scheduler._uplinks._sessions}",
        )
        _expect(not scheduler._place.touched, lambda: f"{vertex.name}: a touched session was not settled")
        granted = sum(max(s.granted, s.active) for s in scheduler.sessions)
        _expect(
            granted <= max(scheduler.slots, sum(s.active for s in scheduler.sessions)),
            lambda: f"{vertex.name}: {granted} granted of {scheduler.slots}",
        )

    def _check_session(self, vertex: Vertex, session: Session) -> None:
        where = vertex.name
        nested = [(brood.ancestors, brood) for brood in session.broods or ()]
        for name, queue in [("", session.queue), *session.pinned.items(), *nested]:
            tasks = list(queue)
            _expect(
                len(tasks) == len(set(tasks)) == queue.count,
                lambda: f"{where}: queue {name!r} counts {queue.count}, has {tasks}",
            )
            entries = sum(len(level) for _, level in queue._levels)
            _expect(
                entries - queue._stale == queue.count,
                lambda: f"{where}: {queue._stale} stale of {entries}, count {queue.count}",
            )
            for task in tasks:
                _expect(session.tasks.get(task.run.seq) is task, lambda: f"{where}: queued {task} is not among the tasks")
        for task in session.tasks.values():
            self._check_task(vertex, session, task)
        for lane in session.lanes.values():
            self._check_lane(vertex, session, lane)
        leased = [task for lane in session.lanes.values() if lane.is_worker for task in lane.leases.values()]
        paused = sum(task.kin is not None and task.kin.is_blocked for task in leased)
        lent = sum(task.kin is not None and task.kin.has_borrowed for task in leased)
        _expect((paused, lent) == (session.paused, session.lent),
                lambda: f"{where}: {session.paused} paused, {session.lent} lent, really {paused} and {lent}")
        _expect(all(task.lane is not None and task.kin is not None and task.kin.is_blocked
                    for task in session.blocked.values()), lambda: f"{where}: {session.blocked} do not all wait")
        ceiling = session.ceiling
        if ceiling:
            used = session.granted + sum(lane.slots for lane in session.lanes.values() if not lane.is_worker)
            _expect(used <= max(ceiling, session.busy), lambda: f"{where}: {used} slots used, the ceiling is {ceiling}")

    def _check_lane(self, vertex: Vertex, session: Session, lane: Lane) -> None:
        where = vertex.name
        unknown, work_s = 0, 0.0
        for seq, task in lane.leases.items():
            _expect(task.lane is lane and task.run.seq == seq and not task.queued, lambda: f"{where}: {lane} has {task}")
            _expect(
                session.tasks.get(seq) is task or task.doom is ABANDONED,
                lambda: f"{where}: leased {task} is not among the tasks",
            )
            if task.estimate_s == UNKNOWN:
                unknown += 1
            else:
                work_s += task.estimate_s
        _expect(unknown == lane.unknown, lambda: f"{where}: {lane} counts {lane.unknown} unknown, has {unknown}")
        _expect(abs(work_s - lane.work_s) < 1e-6, lambda: f"{where}: {lane} counts {lane.work_s} s of work, has {work_s}")
        if lane.is_worker:
            worker: Any = lane.peer
            running = worker.running
            if worker.is_alive and running is not None:
                _expect(
                    running.call.seq in lane.leases,
                    lambda: f"{where}: {worker} runs {running.call}, which is not leased to it",
                )

    # ---- the end

    def check_end(self) -> None:
        """Nothing is left to do, and every future ended once."""
        for root in self.world.roots:
            if not root.is_alive:
                continue
            for call in root.calls.values():
                _expect(call.is_over, lambda: f"{call} never ended; its task is {call.task}")
        served = {root.session.id for root in self.world.roots if root.is_alive and not root.is_closed}
        for vertex in self.world.vertices:
            if vertex.is_alive:
                self.check_vertex(vertex)
                for session in vertex.scheduler.sessions:
                    if session.id in served:  # others are orphans, and will be closed
                        self._check_idle(vertex, session)

    def _check_idle(self, vertex: Vertex, session: Session) -> None:
        left = {
            "tasks": session.tasks,
            "unacknowledged": session.unacked,
            "waiting": session.waiting,
            "queue": list(session.queue),
            "busy": session.busy,
            "waiting for nested calls": session.blocked,
            "paused or lent": session.paused or session.lent or session.spare,
            "calls left behind": session.left,
            "nested": session.broods is not None and session.broods.count,
            "pinned": [q for q in session.pinned.values() if q],
            "leases": [task for lane in session.lanes.values() for task in lane.leases.values()],
        }
        left = {name: what for name, what in left.items() if what}
        _expect(not left, lambda: f"{vertex.name}: left at the end: {left}")

    def check_empty(self) -> None:
        """After the sessions closed: no vertex remembers anything of them."""
        for vertex in self.world.vertices:
            if vertex.is_alive:
                scheduler = vertex.scheduler
                left = [
                    scheduler.sessions,
                    scheduler._uplinks._sessions,
                    scheduler._lanes,
                    [worker for workers in vertex.pool.workers.values() for worker in workers],
                ]
                _expect(not any(left), lambda: f"{vertex.name}: left after all sessions closed: {left}")


def _expect(holds: bool, otherwise: Callable[[], str]) -> None:
    if not holds:
        raise Violation(otherwise())
