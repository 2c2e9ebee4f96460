"""Everything around the schedulers: a clock, links, vertices, pools and workers, all driven by one heap of events.

    Root ── Downlink ── Line ──> Vertex (hub) ── Downlink ── Line ──> Vertex (agent) ── Pool ──> Worker
                          <── in order, late, lost when the line is cut ──

Rule: the machinery promises no more than the real one does. Messages on one line arrive in order or not at all; each end
learns of a cut at a moment of its own; a worker's unsent outcomes die with it, its sent ones are read before its death
is told; a page is read 10 ms after a revocation.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from distexec.ledger import EndSession, KillWorker, PoolAction, Revoke, Session, StartWorker, StopWorker, Task
from distexec.messages import (
    BlobRef,
    Define,
    Evidence,
    Lost,
    Message,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Returned,
    Run,
    SessionSpec,
    Undefine,
)
from distexec.scheduler import Scheduler

QUICK_S = 0.001
REVOKE_SETTLE_S = 0.010
HOUSEKEEPING_S = 0.5
REFUSALS_FOR_PROOF = 3
BLOB = BlobRef(b"b" * 16, 2 << 20)
NO_SPEC = SessionSpec()


class Violation(AssertionError):
    """An invariant does not hold."""


class Call:
    """One submitted call as the omniscient observer knows it."""

    __slots__ = ("begun", "cancelled", "discarded", "duration_s", "end", "fn", "is_error", "killed_at", "options", "retries",
                 "root", "seq", "task", "told", "unsent")

    def __init__(self, root: Root, seq: int, fn: int, duration_s: float, options: Options | None, retries: int,
                 is_error: bool) -> None:
        self.root, self.seq, self.fn, self.duration_s, self.options = root, seq, fn, duration_s, options
        self.retries, self.is_error = retries, is_error
        self.task: Task
        self.begun = 0  # executions that began
        self.unsent = 0  # executions that ended, but whose outcome died with their worker
        self.killed_at: float | None = None  # when its end was asked for first
        self.told: set[int] = set()  # attempts whose outcome left the worker
        self.cancelled = False  # the owner withdrew it
        self.discarded = False  # it left without an end
        self.end: Outcome | Lost | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be heard of it."""
        return self.discarded or self.end is not None

    def __repr__(self) -> str:
        return f"<Call {self.root.name}/{self.seq} begun={self.begun} end={self.end!r}>"


class Execution:
    """One run of a call in a worker."""

    __slots__ = ("attempt", "call", "worker")

    def __init__(self, call: Call, attempt: int, worker: Worker) -> None:
        self.call, self.attempt, self.worker = call, attempt, worker


class World:
    """The clock, the dice, and everything that exists."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0  # events that reached some scheduler or worker
        self.vertices: list[Vertex] = []
        self.roots: list[Root] = []
        self.cables: list[Cable] = []
        self.calls: dict[bytes, Call] = {}
        self.observer: Any = None  # the checker
        self.node_timeout_s = 1.0
        self.orphan_s = 3.0
        self.tick_s = 0.005
        self.latency_s = (0.00005, 0.0005)
        self.start_s = (0.001, 0.030)
        self.start_fails = 0.0  # probability
        self.absence = 0.0  # probability that a blob is missing
        self.log: list[str] | None = None
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._tie = 0

    def after(self, delay_s: float, event: Callable[..., object], *args: Any) -> None:
        """Let `event(*args)` happen later."""
        self._tie += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._tie, event, args))

    def run(self, until: float, is_over: Callable[[], bool] | None = None) -> bool:
        """Let time pass up to `until`, or until `is_over()`; say whether that came."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, event, args = heapq.heappop(heap)
            event(*args)
            self.steps += 1
            if is_over is not None and is_over():
                return True
        self.now = max(self.now, until)
        return is_over is None

    def uniform(self, bounds: tuple[float, float]) -> float:
        """Throw the dice."""
        return bounds[0] + (bounds[1] - bounds[0]) * self.random.random()

    def note(self, *words: object) -> None:
        """Write the history down, if somebody wants to read it."""
        if self.log is not None:
            self.log.append(f"{self.now * 1000:10.3f} ms  " + " ".join(map(str, words)))


class Cable:
    """What joins two vertices physically: over it one line after the other is made."""

    def __init__(self, up: Vertex, down: Vertex) -> None:
        self.up, self.down = up, down
        self.is_whole = True
        self.downlink: Downlink | None = None

    def cut(self) -> None:
        """Nothing gets through any more."""
        self.is_whole = False
        if self.downlink is not None and self.downlink.line is not None:
            self.downlink.line.cut()

    def mend(self) -> None:
        """Lines can be made again."""
        self.is_whole = True

    def __repr__(self) -> str:
        return f"{self.up.name}--{self.down.name}"


class Line:
    """One connection: batches arrive in order, until it is cut; each end learns of that at its own moment."""

    def __init__(self, world: World, downlink: Downlink, node: Vertex) -> None:
        self.world, self.downlink, self.node = world, downlink, node
        self.life = node.life
        self.is_cut = False
        self._last = [0.0, 0.0]  # arrival of the last batch, downward and upward

    def send(self, upward: bool, messages: list[Message]) -> None:
        """Put a batch on its way."""
        if self.is_cut:
            self._lose(upward, messages)
            return
        world = self.world
        arrival = max(self._last[upward], world.now + world.uniform(world.latency_s))
        self._last[upward] = arrival
        world.after(arrival - world.now, self._arrive, upward, messages)

    def _arrive(self, upward: bool, messages: list[Message]) -> None:
        if self.is_cut:
            self._lose(upward, messages)
            return
        if upward:
            self.downlink.hear(self, messages)
        else:
            self.node.hear(self, messages)

    def _lose(self, upward: bool, messages: list[Message]) -> None:
        if upward:  # some come late after all, when a new line is up: a scheduler must be able to tell
            self.downlink.ghosts += [message for message in messages if isinstance(message, (Outcome, Lost))]

    def cut(self) -> None:
        """Lose what is under way, and let both ends find out."""
        if self.is_cut:
            return
        self.is_cut = True
        world = self.world
        world.after(world.uniform((0.0, 0.05)), self.downlink.on_closed, self)
        world.after(world.uniform((0.0, 0.05)), self.node.on_upstream_closed, self)

    def __repr__(self) -> str:
        return f"<Line {self.downlink!r}>"


class Downlink:
    """The upstream end's view of one node; the scheduler's name for it, through all reconnects."""

    def __init__(self, cable: Cable, owner: Vertex) -> None:
        self.cable, self.owner, self.world = cable, owner, owner.world
        self.line: Line | None = None
        self.is_closed = False
        self.has_said_bye = False
        self.heard: deque[Message] = deque(maxlen=20)  # ends of tasks
        self.ghosts: deque[Message] = deque(maxlen=20)  # ends that were under way when a line was cut
        self._known_life = 0  # of the node, as the scheduler has it; 0: it has not
        self._refusals = 0

    def __repr__(self) -> str:
        return f"{self.owner.name}>{self.cable.down.name}"

    def send(self, messages: list[Message]) -> None:
        """Say it, if there is a line to say it on."""
        if self.line is not None:
            self.line.send(False, messages)

    def dial(self) -> None:
        """Try to make a line; again later if it fails."""
        if self.is_closed or self.line is not None:
            return
        node = self.cable.down
        if self.cable.is_whole and node.is_alive:
            self.connect()
            return
        if self.cable.is_whole:  # the machine answers: nobody listens there
            self._refusals += 1
            if self._refusals >= REFUSALS_FOR_PROOF and self._known_life:
                self._lose("its process is gone")
        self.world.after(self.world.uniform((0.01, 0.15)), self.dial)

    def connect(self) -> None:
        """Make a line; a newer one replaces the older."""
        node = self.cable.down
        if self.line is not None:
            self.line.is_cut = True  # both ends close the older one unread when the newer one's Hello comes
            node.on_upstream_closed(self.line)
            self.on_closed(self.line, redial=False)
        if self._known_life and self._known_life != node.life:
            self._lose("it came back as a new process")
        self._refusals = 0
        self.has_said_bye = False
        self._known_life = node.life
        self.line = Line(self.world, self, node)
        node.lines.append(self.line)
        if self.ghosts:
            for _ in range(3):
                self.world.after(self.world.uniform((0.0, 0.3)), self.echo)
        self.owner.act(self.owner.scheduler.node_joined, self, node.name, 0.02)

    def on_closed(self, line: Line, redial: bool = True) -> None:
        """Learn that a line is gone."""
        if line is not self.line or self.is_closed:
            return
        self.line = None
        if self.has_said_bye:
            self._lose("it was stopped")
        else:
            self.owner.act(self.owner.scheduler.node_suspended, self, self.world.now)
        if redial:
            self.world.after(self.world.uniform((0.0, 0.05)), self.dial)

    def _lose(self, reason: str) -> None:
        self._known_life = 0
        self.owner.act(self.owner.scheduler.node_lost, self, Evidence(self.cable.down.name, reason=reason), self.world.now)

    def leave(self) -> None:
        """Give the node up for good."""
        line = self.line
        self.line = None
        if self._known_life:
            self._lose("it was removed")
        self.is_closed = True
        self.cable.downlink = None
        if line is not None:
            line.cut()

    def hear(self, line: Line, messages: list[Message]) -> None:
        """Pass on what the node said."""
        if line is self.line and not self.is_closed:
            self.owner.act(self.owner.scheduler.receive, self, messages, self.world.now)
            self.heard += [message for message in messages if isinstance(message, (Outcome, Lost))]

    def echo(self) -> None:
        """Hear the ends of some tasks late or again."""
        if self.line is not None and not self.is_closed:
            self.owner.act(self.owner.scheduler.receive, self, [*self.ghosts, *self.heard], self.world.now)


class Vertex:
    """A hub or an agent: a scheduler, its dispatcher, and a pool if it has slots."""

    def __init__(self, world: World, name: str, slots: int) -> None:
        self.world, self.name, self.slots = world, name, slots
        self.life = 0
        self.is_alive = False
        self.is_draining = False
        self.lines: list[Line] = []  # to vertices above
        self.cables: list[Cable] = []  # to vertices below
        self.pool: Pool
        self.scheduler: Scheduler
        self._is_ticking = False
        world.vertices.append(self)

    def __repr__(self) -> str:
        return f"<Vertex {self.name} life {self.life}>"

    # ---- life

    def boot(self) -> None:
        """Begin a life: nothing is known."""
        world = self.world
        self.life += 1
        self.is_alive, self.is_draining = True, False
        self.lines = []
        self.scheduler = self._new_scheduler()
        self.pool = Pool(self)
        world.observer.on_boot(self)
        for cable in self.cables:
            self.dial(cable)
        self._is_ticking = False
        world.after(HOUSEKEEPING_S, self._keep_house, self.life)

    def _new_scheduler(self) -> Scheduler:
        world = self.world
        return Scheduler(self.slots, self.name, node_timeout_s=world.node_timeout_s, orphan_s=world.orphan_s,
                         absent=self._is_absent)

    def dial(self, cable: Cable) -> None:
        """Take up a cable to a node below."""
        if cable.downlink is None or cable.downlink.is_closed or cable.downlink.owner is not self:
            cable.downlink = Downlink(cable, self)
            cable.downlink.dial()

    def crash(self) -> None:
        """Die with everything beneath in this process and its pool."""
        if not self.is_alive:
            return
        self.world.note(self.name, "crashes")
        self.is_alive = False
        self.pool.perish()
        for line in self.lines:
            line.cut()
        for cable in self.cables:
            if cable.downlink is not None:
                downlink, cable.downlink = cable.downlink, None
                downlink.is_closed = True
                if downlink.line is not None:
                    downlink.line.cut()

    def stop(self) -> None:
        """End after a drain: say goodbye first."""
        if self.is_alive:
            for line in self.lines:
                if not line.is_cut:
                    line.downlink.has_said_bye = True
            self.crash()

    # ---- the dispatcher

    def act(self, event: Callable[..., Any], *args: Any) -> Any:
        """Let an event happen to the scheduler and carry out what follows."""
        if not self.is_alive:
            return None
        world = self.world
        if world.log is not None:
            world.note(self.name, "<-", event.__name__, *args)
        result = event(*args)
        scheduler = self.scheduler
        out = scheduler.take()
        if out:
            if world.log is not None:
                for peer, message in out:
                    world.note(self.name, "->", peer, message)
            batches: dict[Any, list[Message]] = {}
            for peer, message in out:
                if peer in batches:
                    batches[peer].append(message)
                else:
                    batches[peer] = [message]
            for port, batch in batches.items():
                if isinstance(port, Line):
                    port.send(True, batch)
                else:
                    port.send(batch)
        actions = scheduler.take_pool()
        for action in actions:
            if world.log is not None:
                world.note(self.name, "does", action)
            self.pool.do(action)
        self._conclude()
        if out or actions or event != scheduler.tick:  # most ticks change nothing; should one, the next step shows it
            world.observer.on_step(self, args)
        if not self._is_ticking and scheduler.needs_tick():
            self._is_ticking = True
            world.after(world.tick_s, self._tick, self.life)
        return result

    def _conclude(self) -> None:
        assert not self.scheduler.take_ended(), "only roots own tasks"

    def hear(self, line: Line, messages: list[Message]) -> None:
        """Take in what the vertex above said; `Open` is the dispatcher's to judge."""
        if not self.is_alive or line.life != self.life:
            return
        batch: list[Message] = []
        for message in messages:
            if isinstance(message, Open):
                if batch:
                    self.act(self.scheduler.receive, line, batch, self.world.now)
                    batch = []
                self.act(self.scheduler.open_session, message, line, self.world.now)
            else:
                batch.append(message)
        if batch:
            self.act(self.scheduler.receive, line, batch, self.world.now)

    def on_upstream_closed(self, line: Line) -> None:
        """Learn that the link above is gone."""
        if self.is_alive and line.life == self.life and line in self.lines:
            self.lines.remove(line)
            self.act(self.scheduler.upstream_lost, line, self.world.now)

    def _tick(self, life: int) -> None:
        if life == self.life and self.is_alive:
            self._is_ticking = False
            self._pass_time()

    def _keep_house(self, life: int) -> None:
        if life == self.life and self.is_alive:
            self._pass_time()
            self.world.after(HOUSEKEEPING_S, self._keep_house, life)

    def _pass_time(self) -> None:
        now = self.world.now
        progress = {}
        for _, peer in self.scheduler.watched():
            worker: Any = peer
            if worker.started:
                progress[worker] = (worker.started, now - worker.started_at)
        self.act(self.scheduler.tick, now, progress)

    # ---- blobs

    def _is_absent(self, run: Run) -> bool:
        world = self.world
        if not run.buffers or world.random.random() >= world.absence:
            return False
        world.after(world.uniform((0.0, 0.05)), self._arrived, run, self.life)
        return True

    def _arrived(self, run: Run, life: int) -> None:
        if life != self.life or not self.is_alive:
            return
        for session in self.scheduler.sessions:
            task = session.waiting.get(run.seq)
            if task is not None and task.run is run:
                self.act(self.scheduler.arrived, session, run.seq)
                return


class Root(Vertex):
    """An executor: it owns the calls."""

    def __init__(self, world: World, name: str, slots: int, *, weight: float = 1.0, ceiling: int = 0,
                 max_tasks_per_child: int = 0) -> None:
        super().__init__(world, name, slots)
        self.weight, self.ceiling, self.max_tasks_per_child = weight, ceiling, max_tasks_per_child
        self.calls: dict[int, Call] = {}
        self.open_calls: dict[int, Call] = {}
        self.failed_nodes: list[Any] = []
        self.session: Session
        self.is_closed = False
        self.ended = 0
        self._last_seq = 0
        world.roots.append(self)

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.slots, self.name, node_timeout_s=self.world.node_timeout_s, claim=self._claim)

    def boot(self) -> None:
        """Begin the only life, with the session."""
        super().boot()
        spec = SessionSpec(max_tasks_per_child=self.max_tasks_per_child) if self.max_tasks_per_child else NO_SPEC
        token = self.world.random.randbytes(16)
        opened = Open(0, token, token, self.weight, self.ceiling, spec)
        self.session = self.act(self.scheduler.open_session, opened, None, self.world.now)

    def submit(self, fn: int, duration_s: float, *, options: Options | None = None, retries: int = 3,
               is_error: bool = False, has_blob: bool = False) -> Call:
        """Submit one call."""
        self._last_seq += 1
        seq = self._last_seq
        call = Call(self, seq, fn, duration_s, options, retries, is_error)
        key = f"{self.name}/{seq}".encode()
        run = Run(self.session.no, seq, 1, fn, key, (BLOB,) if has_blob else (), options)
        self.calls[seq] = self.open_calls[seq] = self.world.calls[key] = call
        call.task = Task(run, self.session, call, retries)
        if fn not in self.session.code:
            self.act(self.scheduler.define, self.session, Define(self.session.no, fn, b""))
        self.act(self.scheduler.submit, self.session, call.task)
        return call

    def cancel(self, call: Call) -> None:
        """Withdraw a call that is not running; the scheduler may learn of it now, or when it asks."""
        if call.is_over or call.task.claimed:
            return
        call.cancelled = True
        if self.world.random.random() < 0.5 and self.act(self.scheduler.discard, call.task):
            self._withdrawn(call)

    def kill(self, call: Call) -> None:
        """End a call wherever it is."""
        if not call.is_over:
            if call.killed_at is None:
                call.killed_at = self.world.now
            self.act(self.scheduler.kill, call.task)

    def _claim(self, task: Task) -> bool:
        call: Call = task.owner
        if call.cancelled:
            self._withdrawn(call)
        return not call.cancelled

    def _withdrawn(self, call: Call) -> None:
        if call.is_over:
            raise Violation(f"{call} was withdrawn after its end")
        call.discarded = True
        del self.open_calls[call.seq]

    def _conclude(self) -> None:
        for task, end in self.scheduler.take_ended():
            call: Call = task.owner
            self.world.observer.on_end(call, task, end)
            call.end = end
            self.ended += 1
            del self.open_calls[call.seq]
        for _, peer, _ in self.scheduler.take_failures():
            self.failed_nodes.append(peer)

    def close(self) -> None:
        """Shut down."""
        self.is_closed = True
        self.act(self.scheduler.close_session, self.session, self.world.now)


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
            vertex.act(vertex.scheduler.start_failed, session, Evidence(vertex.name, reason="it would not start"), b"",
                       world.now)
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
            self.vertex.act(self.vertex.scheduler.worker_gone, worker, worker.session, worker.started, evidence,
                            self.world.now)


class Worker:
    """A worker process and its page: one task after the other, outcomes in batches."""

    def __init__(self, pool: Pool, session: Session, name: str) -> None:
        self.pool, self.session, self.name, self.world = pool, session, name, pool.world
        self.is_alive = True
        self.started, self.started_at = 0, 0.0
        self.revoked = (0, 0)
        self.running: Execution | None = None
        self._inbox: deque[Run] = deque()
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
        for message in messages:
            if isinstance(message, Run):
                self._inbox.append(message)
            elif isinstance(message, Define):
                self._inbox.append(message)  # type: ignore[arg-type]
            elif isinstance(message, Undefine):
                self._inbox.append(message)  # type: ignore[arg-type]
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
            if type(run) is not Run:
                (self._defined.update if isinstance(run, Define) else self._defined.difference_update)(
                    [run.fn] if isinstance(run, Define) else run.fns)
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
        world.after(call.duration_s, self._end, execution, run)

    def _end(self, execution: Execution, run: Run) -> None:
        if not self.is_alive:
            return
        call, now = execution.call, self.world.now
        self.running = None
        self._seen[run.fn] = max(call.duration_s, self._seen.get(run.fn, 0.0) * 0.5)
        kind = OutcomeKind.ERROR if call.is_error else OutcomeKind.VALUE
        self._untold.append(execution)
        self._outbox.append(Outcome(run.session, run.seq, run.attempt, kind, run.data, round(call.duration_s * 1e9)))
        if (run.options is not None and run.options.solo) or now - self._flushed_at > QUICK_S:
            self._flush()
        self._go_on()

    # ---- death

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
