"""Pools and workers: processes that begin one task after the other, and die.

Rule: a worker's unsent outcomes die with it, its sent ones are read before its death is told; a page is read 10 ms after a
revocation; outcomes wait for up to 1 ms behind tasks that are expected to be quick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distexec.ledger import EndSession, KillWorker, PoolAction, Revoke, Session, StartWorker, StopWorker
from distexec.messages import (
    Answer,
    Blocked,
    Define,
    Evidence,
    Message,
    Outcome,
    OutcomeKind,
    Refuse,
    Returned,
    Run,
    Submit,
    Took,
    Undefine,
)

from .world import Execution, Violation

if TYPE_CHECKING:
    from .vertices import Vertex

QUICK_S = 0.001
REVOKE_SETTLE_S = 0.010


class Pool:
    """One vertex's workers."""

    def __init__(self, vertex: Vertex) -> None:
        self.vertex, self.world = vertex, vertex.world
        self.workers: dict[Session, set[Worker]] = {}
        self._births = 0

    def do(self, action: PoolAction) -> None:
        """Carry out what the scheduler asks."""
        world = self.world
        if isinstance(action, StartWorker):
            world.after(world.uniform(world.start_s), self._started, action.session)
        elif isinstance(action, Revoke):
            worker: Any = action.worker
            worker.revoked = (action.first, action.last)
            world.after(REVOKE_SETTLE_S, self._read_revoked, worker)
        elif isinstance(action, EndSession):
            world.after(world.uniform((0.0, 0.005)), self._end_session, action.session)
        elif isinstance(action, StopWorker):
            worker = action.worker
            if worker.running is not None:
                raise Violation(f"{worker} is to stop while it runs {worker.running.call}")
            world.after(world.uniform((0.0, 0.005)), worker.die)
        else:
            assert isinstance(action, KillWorker)
            worker = action.worker
            world.after(world.uniform((0.0, 0.005)), worker.die)

    def _started(self, session: Session) -> None:
        vertex, world = self.vertex, self.world
        if not vertex.is_alive or vertex.pool is not self or session.closing:
            return
        if world.random.random() < world.start_fails:
            vertex.act(
                vertex.scheduler.start_failed, session, Evidence(vertex.name, reason="it would not start"), b"", world.now
            )
            return
        self._births += 1
        worker = Worker(self, session, f"{vertex.name}.{vertex.life}/w{self._births}")
        self.workers.setdefault(session, set()).add(worker)
        vertex.act(vertex.scheduler.worker_ready, worker, session, world.now)

    def _read_revoked(self, worker: Worker) -> None:
        if worker.is_alive and self.vertex.is_alive:
            self.vertex.act(self.vertex.scheduler.revoked, worker, worker.session, worker.started, self.world.now)

    def _end_session(self, session: Session) -> None:
        for worker in sorted(self.workers.pop(session, ()), key=repr):
            worker.end_life()

    def perish(self) -> None:
        """All workers die at once, and nobody is told."""
        for workers in self.workers.values():
            for worker in sorted(workers, key=repr):
                worker.end_life()
        self.workers.clear()

    def hear(self, worker: Worker, messages: list[Message]) -> None:
        """Pass on what a worker said."""
        if self.vertex.is_alive and self.vertex.pool is self:
            self.vertex.act(self.vertex.scheduler.receive, worker, messages, self.world.now)

    def gone(self, worker: Worker) -> None:
        """Tell of a death, after all that the dead had sent."""
        self.workers.get(worker.session, set()).discard(worker)
        if self.vertex.is_alive and self.vertex.pool is self:
            evidence = Evidence(self.vertex.name, reason="the worker died")
            self.vertex.act(
                self.vertex.scheduler.worker_gone, worker, worker.session, worker.started, evidence, self.world.now
            )


class Worker:
    """A worker process and its page: one task after the other, outcomes in batches."""

    def __init__(self, pool: Pool, session: Session, name: str) -> None:
        self.pool, self.session, self.name, self.world = pool, session, name, pool.world
        self.is_alive = True
        self.started, self.started_at = 0, 0.0
        self.revoked = (0, 0)
        self.running: Execution | None = None
        self._inbox: deque[Run | Define | Undefine] = deque()
        self._order = 0
        self._outbox: list[Message] = []
        self._untold: list[Execution] = []
        self._skipped: list[tuple[int, int]] = []
        self._flushed_at = 0.0
        self._is_armed = False
        self._defined: set[int] = set()
        self._seen: dict[int, float] = {}  # expected run times
        self._last_down = self._last_up = 0.0

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # ---- the link

    def send(self, messages: list[Message]) -> None:
        """Pool to worker."""
        world = self.world
        self._last_down = max(self._last_down, world.now + world.random.random() * 0.0001)
        world.after(self._last_down - world.now, self._hear, messages)

    def _hear(self, messages: Sequence[Message]) -> None:
        if not self.is_alive:
            return
        self._inbox += [message for message in messages if isinstance(message, (Run, Define, Undefine))]
        for message in messages:
            if isinstance(message, Answer):
                self._on_answer(message)
            elif isinstance(message, Refuse):
                self._on_refuse(message)
        if self.running is None:
            self._flushed_at = self.world.now
            self._go_on()

    def _flush(self) -> None:
        if not self._outbox:
            return
        world = self.world
        for execution in self._untold:
            execution.call.told.add(execution.attempt)
        self._untold.clear()
        messages, self._outbox = self._outbox, []
        self._flushed_at = world.now
        self._last_up = max(self._last_up, world.now + world.random.random() * 0.0001)
        world.after(self._last_up - world.now, self.pool.hear, self, messages)

    def _flush_late(self) -> None:
        self._is_armed = False
        if self.is_alive:
            self._flush()

    # ---- the tasks

    def _go_on(self) -> None:
        inbox, world = self._inbox, self.world
        while inbox:
            run = inbox.popleft()
            if isinstance(run, Define):
                self._defined.add(run.fn)
                continue
            if isinstance(run, Undefine):
                self._defined.difference_update(run.fns)
                continue
            if run.fn not in self._defined:
                raise Violation(f"{self} got {run} without its function")
            is_solo = run.options is not None and run.options.solo
            if self._outbox:
                if is_solo or self._seen.get(run.fn, 1.0) > QUICK_S:
                    self._flush()
                elif not self._is_armed:
                    self._is_armed = True
                    world.after(world.random.random() * QUICK_S, self._flush_late)
            self._order += 1
            self.started, self.started_at = self._order, world.now
            if self.revoked[0] and self.revoked[0] <= self._order <= self.revoked[1]:
                self._skipped.append((run.seq, run.attempt))
                continue
            if self._skipped:
                self._hand_back(run.session)
            self._begin(run)
            return
        if self._skipped:
            self._hand_back(self.session.no)
        self._flush()

    def _hand_back(self, number: int) -> None:
        skipped, self._skipped = self._skipped, []
        self._outbox.append(Returned(number, skipped))
        self._flush()

    def _begin(self, run: Run) -> None:
        world = self.world
        call = world.calls[run.data]
        if world.log is not None:
            world.note(self, "begins", call, "attempt", run.attempt)
        execution = self.running = Execution(call, run.attempt, self)
        world.observer.on_begin(execution)
        call.begun += 1
        self._call(execution, run)
        fails = self.pool.vertex.fails
        if fails and world.random.random() < fails:
            world.after(call.duration_s * world.random.random(), self._die_of, execution)
            return
        world.after(call.duration_s, self._end, execution, run)

    # ---- nested calls

    def _call(self, execution: Execution, run: Run) -> None:
        plan = execution.call.plan
        if plan is None or not plan.calls:
            return
        for number, each in enumerate(plan.calls, 1):
            data = f"{run.data.decode()}.{run.attempt}.{number}".encode()
            self.world.plans[data] = each
            self._outbox.append(
                Submit(run.session, run.seq, run.attempt, number, b"", b"", (), data, (), None, each.retries)
            )
            execution.pending.add(number)
        given_up = list(range(1, plan.gives_up + 1))
        if given_up:
            self._outbox.append(Took(run.session, run.seq, run.attempt, given_up))
            execution.pending.difference_update(given_up)
        self._flush()

    def _is_of_running(self, message: Answer | Refuse) -> bool:
        running = self.running
        return running is not None and (running.call.seq, running.attempt) == (message.seq, message.attempt)

    def _on_answer(self, message: Answer) -> None:
        running = self.running
        if running is None or not self._is_of_running(message):
            return
        running.pending.discard(message.call)
        self._outbox.append(Took(message.session, message.seq, message.attempt, [message.call]))
        if running.is_blocked and not running.pending:
            self._unblock(running, message)
        self._flush()

    def _on_refuse(self, message: Refuse) -> None:
        running = self.running
        if running is not None and self._is_of_running(message) and running.is_blocked:
            running.is_refused = True
            self._unblock(running, message)
            self._flush()

    def _unblock(self, running: Execution, message: Answer | Refuse) -> None:
        running.is_blocked = False
        self._outbox.append(Blocked(message.session, message.seq, message.attempt, False))
        run = running.call.task.run
        here = Run(message.session, run.seq, message.attempt, run.fn, run.data, run.buffers, run.options)
        self.world.after(0.00001, self._end, running, here)

    def _waits(self, execution: Execution, run: Run) -> bool:
        plan = execution.call.plan
        if plan is None or not plan.waits or not execution.pending or execution.is_refused:
            return False
        execution.is_blocked = True
        self._outbox.append(Blocked(run.session, run.seq, run.attempt, True))
        self._flush()
        return True

    def _end(self, execution: Execution, run: Run) -> None:
        if not self.is_alive or self._waits(execution, run):
            return
        call, now = execution.call, self.world.now
        self.running = None
        self._seen[run.fn] = max(call.duration_s, self._seen.get(run.fn, 0.0) * 0.5)
        kind = OutcomeKind.ERROR if call.is_error or execution.is_refused else OutcomeKind.VALUE
        self._untold.append(execution)
        self._outbox.append(Outcome(run.session, run.seq, run.attempt, kind, run.data, round(call.duration_s * 1e9)))
        if (run.options is not None and run.options.solo) or now - self._flushed_at > QUICK_S:
            self._flush()
        self._go_on()

    # ---- death

    def _die_of(self, execution: Execution) -> None:
        if self.running is execution:
            self.die()

    def end_life(self) -> None:
        """Stop existing; what was not sent is lost."""
        if not self.is_alive:
            return
        self.is_alive = False
        for execution in self._untold:
            execution.call.unsent += 1

    def die(self) -> None:
        """Die, and be found dead once all that was sent has been read."""
        if self.is_alive:
            self.world.note(self, "dies")
            self.end_life()
            delay = max(self._last_up, self.world.now + self.world.random.random() * 0.002) - self.world.now
            self.world.after(delay, self.pool.gone, self)
