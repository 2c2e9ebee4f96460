"""Hubs, agents and executors: what stands around each scheduler, as the real dispatcher, nodes and root do.

Rule: `Open` is judged before the scheduler hears the rest of its batch; a tick comes only while the scheduler asks for it,
and every half second; a vertex that crashes takes its pool and its links with it and comes back knowing nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distexec.kin import Called, Ended, Spent, ancestors_of
from distexec.ledger import Session, Task
from distexec.messages import (
    BlobRef,
    Define,
    Lost,
    Message,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Run,
    SessionSpec,
    Submit,
)
from distexec.scheduler import Scheduler

from .workers import Pool
from .world import Cable, Call, Downlink, Line, Plan, Violation, World

HOUSEKEEPING_S = 0.5
BLOB = BlobRef(b"b" * 16, 2 << 20)
NO_SPEC = SessionSpec()
NESTED_FN = 9


class Vertex:
    """A hub or an agent: a scheduler, its dispatcher, and a pool if it has slots."""

    def __init__(self, world: World, name: str, slots: int) -> None:
        self.world, self.name, self.slots = world, name, slots
        self.life = 0
        self.is_alive = False
        self.is_draining = False
        self.fails = 0.0  # probability that a task which runs here kills its worker
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
        return Scheduler(
            self.slots, self.name, node_timeout_s=world.node_timeout_s, orphan_s=world.orphan_s, absent=self._is_absent
        )

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
        assert all(isinstance(each, Spent) for each in self.scheduler.take_kin()), "only roots make nested calls tasks"

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

    def __init__(
        self, world: World, name: str, slots: int, *, weight: float = 1.0, ceiling: int = 0, max_tasks_per_child: int = 0
    ) -> None:
        super().__init__(world, name, slots)
        self.weight, self.ceiling, self.max_tasks_per_child = weight, ceiling, max_tasks_per_child
        self.calls: dict[int, Call] = {}
        self.open_calls: dict[int, Call] = {}
        self.failed_nodes: list[Any] = []
        self.session: Session
        self.is_closed = False
        self.ended = 0
        self.made: set[tuple[Call, int, int]] = set()  # nested calls: whose, of which attempt, which
        self._last_seq = 0
        world.roots.append(self)

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.slots, self.name, node_timeout_s=self.world.node_timeout_s, claim=self._claim)

    def boot(self) -> None:
        """Begin the only life, with the session."""
        super().boot()
        self.session = self._open()

    def _open(self) -> Session:
        spec = SessionSpec(max_tasks_per_child=self.max_tasks_per_child) if self.max_tasks_per_child else NO_SPEC
        token = self.world.random.randbytes(16)
        opened = Open(0, token, token, self.weight, self.ceiling, spec)
        session: Session = self.act(self.scheduler.open_session, opened, None, self.world.now)
        return session

    def submit(
        self,
        fn: int,
        duration_s: float,
        *,
        options: Options | None = None,
        retries: int = 3,
        is_error: bool = False,
        has_blob: bool = False,
        plan: Plan | None = None,
    ) -> Call:
        """Submit one call."""
        self._last_seq += 1
        seq = self._last_seq
        call = Call(self, seq, fn, duration_s, options, retries, is_error)
        call.plan = plan
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

    def _make(self, parent: Task, submit: Submit) -> None:
        """Make a nested call a task."""
        plan = self.world.plans[submit.data]
        self._last_seq += 1
        seq, fn = self._last_seq, NESTED_FN
        options = Options(0.0, plan.priority, "", plan.retries == 0, ancestors_of(parent))
        call = Call(self, seq, fn, plan.duration_s, options, plan.retries, plan.is_error)
        key = f"{self.name}/{seq}".encode()
        call.plan = plan
        call.task = Task(Run(self.session.no, seq, 1, fn, key, (), options), self.session, call, plan.retries)
        if fn not in self.session.code:
            self.act(self.scheduler.define, self.session, Define(self.session.no, fn, b""))
        self.calls[seq] = self.open_calls[seq] = self.world.calls[key] = call
        if (parent.owner, submit.attempt, submit.call) in self.made:
            raise Violation(f"{parent} made call {submit.call} of attempt {submit.attempt} twice")
        self.made.add((parent.owner, submit.attempt, submit.call))
        parent.owner.children.append((submit.attempt, call))
        if not self.act(self.scheduler.submit_nested, parent, submit, call.task, self.world.now):
            call.discarded = True
            del self.open_calls[seq]

    def _conclude(self) -> None:
        for each in self.scheduler.take_kin():
            if isinstance(each, Called):
                self._make(each.parent, each.submit)
            elif isinstance(each, Ended):
                nested: Call = each.task.owner
                self.world.observer.on_nested_end(nested, each.task)
                nested.end = Outcome(0, nested.seq, each.task.run.attempt, OutcomeKind.VALUE, b"", 0)
                del self.open_calls[nested.seq]
        for task, end in self.scheduler.take_ended():
            self.end(task, end)
        for _, peer, _ in self.scheduler.take_failures():
            self.failed_nodes.append(peer)

    def end(self, task: Task, end: Outcome | Lost) -> None:
        """End a call."""
        call: Call = task.owner
        self.world.observer.on_end(call, task, end)
        call.end = end
        self.ended += 1
        del self.open_calls[call.seq]

    def close(self) -> None:
        """Shut down."""
        self.is_closed = True
        self.act(self.scheduler.close_session, self.session, self.world.now)
