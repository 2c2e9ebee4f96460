"""What lies between the schedulers: a clock, and lines that are late or cut, driven by one heap of events.

    Root ── Downlink ── Line ──> Vertex (hub) ── Downlink ── Line ──> Vertex (agent) ── Pool ──> Worker
                          <── in order, late, lost when the line is cut ──

Rule: the machinery promises no more than the real one does. Messages on one line arrive in order or not at all; each end
learns of a cut at a moment of its own.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from distexec.ledger import Task
from distexec.messages import Evidence, Lost, Message, Options, Outcome

if TYPE_CHECKING:
    from .vertices import Root, Vertex
    from .workers import Worker

REFUSALS_FOR_PROOF = 3


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Plan:
    """What a call does: how long it works, what it calls, whether it waits for that, how many of it it gives up at once."""

    duration_s: float
    calls: tuple[Plan, ...] = ()
    waits: bool = True
    gives_up: int = 0
    is_error: bool = False
    retries: int = 3
    priority: int = 0


class Call:
    """One submitted call as the omniscient observer knows it."""

    __slots__ = (
        "begun",
        "cancelled",
        "children",
        "discarded",
        "duration_s",
        "end",
        "excused",
        "fn",
        "is_error",
        "killed_at",
        "options",
        "plan",
        "retries",
        "root",
        "seq",
        "task",
        "told",
        "unsent",
    )

    def __init__(
        self, root: Root, seq: int, fn: int, duration_s: float, options: Options | None, retries: int, is_error: bool
    ) -> None:
        self.root, self.seq, self.fn, self.duration_s, self.options = root, seq, fn, duration_s, options
        self.retries, self.is_error = retries, is_error
        self.task: Task
        self.plan: Plan | None = None  # what it calls
        self.children: list[tuple[int, Call]] = []  # what it has called, and in which attempt
        self.begun = 0  # executions that began
        self.excused = 0  # executions more that a death of its root may cost
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

    __slots__ = ("attempt", "call", "is_blocked", "is_refused", "pending", "worker")

    def __init__(self, call: Call, attempt: int, worker: Worker) -> None:
        self.call, self.attempt, self.worker = call, attempt, worker
        self.is_blocked = self.is_refused = False
        self.pending: set[int] = set()  # nested calls that were not answered


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
        self.plans: dict[bytes, Plan] = {}  # of nested calls, by their arguments
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
        self.is_expected = False  # it may hold tasks of an earlier life of its owner
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
            if self._refusals >= REFUSALS_FOR_PROOF and (self._known_life or self.is_expected):
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
        self.is_expected = False
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
