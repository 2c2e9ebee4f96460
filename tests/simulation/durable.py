"""Executors with a journal: they die, and go on in another life with what was recorded.

Rule: what the journal has is what a real one has at that moment. Calls are recorded before they are submitted, ends some
milliseconds after they came; an end that was not recorded is forgotten with the life that heard it.
"""

from __future__ import annotations

from typing import Any

from distexec.ledger import Session, Task
from distexec.messages import Define, Lost, Open, Outcome, Run
from distexec.recovery import UNHEARD

from .vertices import NO_SPEC, Root
from .world import Call, World

RECORDS_S = (0.0, 0.02)
"""How long an end waits to be recorded."""

LINGER_S = 4.0
"""How long nodes keep its session: longer than it is dead and links are cut together."""


class DurableRoot(Root):
    """An executor whose session outlives it."""

    def __init__(self, world: World, name: str, slots: int, *, is_strict: bool, **arguments: Any) -> None:
        super().__init__(world, name, slots, **arguments)
        self.lives = 0
        self._is_strict = is_strict  # nothing but this root and the links fail: every node comes back in time
        self._opened: Open | None = None
        self._code: dict[int, Define] = {}

    def boot(self) -> None:
        """Begin a life; from the second on with what is recorded."""
        super().boot()
        self.session.is_durable = True
        if self.lives:
            self._recover()
        self.lives += 1

    def _open(self) -> Session:
        if self._opened is None:
            spec = super()._open().opened
            self.scheduler.sessions.clear()
            self.scheduler.take()
            self.scheduler.take_pool()
            self._opened = Open(0, spec.id, spec.token, spec.weight, spec.ceiling, spec.spec or NO_SPEC, LINGER_S)
        session: Session = self.act(self.scheduler.open_session, self._opened, None, self.world.now)
        return session

    # ---- the journal

    def submit(self, fn: int, duration_s: float, **arguments: Any) -> Call:
        """Submit one call; it is recorded already."""
        call = super().submit(fn, duration_s, **arguments)
        self._code.setdefault(fn, Define(self.session.no, fn, b""))
        return call

    def _conclude(self) -> None:
        ended = self.scheduler.take_ended()
        if ended:
            self.world.after(self.world.uniform(RECORDS_S), self._record, ended, self.life)
        for _, peer, _ in self.scheduler.take_failures():
            self.failed_nodes.append(peer)

    def _record(self, ended: list[tuple[Task, Outcome | Lost]], life: int) -> None:
        if life != self.life or not self.is_alive or self.is_closed:
            return
        for task, end in ended:
            self.end(task, end)
        self.act(self.scheduler.acknowledge, self.session, [task.run.seq for task, _ in ended])

    def cancel(self, call: Call) -> None:
        """Withdraw a call, if this life's program has it."""
        if call.seq not in self.session.parked:
            super().cancel(call)

    def kill(self, call: Call) -> None:
        """End a call, if this life's program has it."""
        if call.seq not in self.session.parked:
            super().kill(call)

    # ---- death, and what comes after

    def crash(self) -> None:
        """Die; local workers too. What they had, and what only this life knew, is made good."""
        if not self.is_alive:
            return
        for call in [each for each in self.open_calls.values() if not each.is_over]:
            if call.cancelled:
                self._withdrawn(call)  # that is recorded as well
                continue
            call.excused += call.task.deaths + (self.slots > 0) + (not self._is_strict)
        super().crash()
        if not self.is_closed:
            self.world.after(self.world.uniform((0.0, 0.2)), self._come_back, self.life)

    def _come_back(self, life: int) -> None:
        if life == self.life and not self.is_alive:
            self.boot()

    def _recover(self) -> None:
        """Take up the calls that have no recorded end; the program is one that recovers all, or one that asks again."""
        world = self.world
        is_rerun = world.random.random() < 0.5
        tasks = []
        for call in self.open_calls.values():
            key = call.task.run.data
            run = Run(self.session.no, call.seq, UNHEARD, call.fn, key, call.task.run.buffers, call.options)
            call.task = Task(run, self.session, call, call.retries)
            tasks.append(call.task)
            if is_rerun:
                world.after(world.uniform((0.0, 0.5)), self._ask, call, self.life)
        for definition in self._code.values():
            self.act(self.scheduler.define, self.session, Define(self.session.no, definition.fn, b""))
        nodes = [cable.downlink for cable in self.cables if cable.downlink is not None]
        for downlink in nodes:
            downlink.is_expected = True
        parked = {call.seq for call in self.open_calls.values()} if is_rerun else set()
        self.act(self.scheduler.recovery.recover, self.session, tasks, parked, nodes, self.lives, world.now)

    def _ask(self, call: Call, life: int) -> None:
        if life == self.life and self.is_alive and not self.is_closed and not call.is_over and not call.cancelled:
            self.act(self.scheduler.recovery.ask, self.session, call.task, self.world.now)
