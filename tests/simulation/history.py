"""From a seed: a tree, a load, a series of misfortunes, then peace, in which everything must come to its end.

    draw the cluster ─> trouble (submissions and faults, for a second or two) ─> mend everything ─> every future ends
    ─> nothing is left ─> close the sessions ─> nothing is remembered

The kinds of histories differ in what may happen, so that the strict laws (no task begins twice while cuts are short) and
the wild ones (everything fails) are both visited often.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from random import Random

from distexec.messages import Options

from .checker import Checker
from .durable import LINGER_S, DurableRoot
from .vertices import Root, Vertex
from .world import Cable, Call, Plan, Violation, World

LOCAL, AGENTS, TREE = "local", "agents", "tree"
CALM, SHORT_CUTS, WILD, STORM = "calm", "short cuts", "wild", "storm"

PROGRESS_S = 120.0
"""Virtual time within which everything must have ended once there is peace."""


@dataclass
class History:
    """One run and what came of it."""

    seed: int
    shape: str = ""
    mood: str = ""
    steps: int = 0
    checks: int = 0
    calls: int = 0
    begun: int = 0
    seconds: float = 0.0


def play(
    seed: int,
    *,
    shape: str | None = None,
    mood: str | None = None,
    log: list[str] | None = None,
    nests: bool | None = None,
) -> History:
    """Play the history of a seed; raises `Violation` naming it when an invariant does not hold.

    `nests`: whether calls make calls; None: in some histories they do.
    """
    story = _Story(seed, shape, mood, nests)
    story.world.log = log
    try:
        story.play()
    except Exception as failure:
        failure.add_note(f"seed {seed} ({story.shape}, {story.mood}) at {story.world.now * 1000:.3f} ms")
        raise
    world, checker = story.world, story.checker
    return History(seed, story.shape, story.mood, world.steps, checker.checks, len(world.calls), checker.begun, world.now)


@dataclass
class Total:
    """What many histories came to."""

    histories: int = 0
    steps: int = 0
    checks: int = 0
    calls: int = 0
    begun: int = 0
    failures: list[str] = field(default_factory=list)

    def __add__(self, other: Total) -> Total:
        return Total(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Total)))

    def __str__(self) -> str:
        return (
            f"{self.histories} histories, {self.steps} events, {self.checks} scheduler steps checked, {self.calls} calls, "
            f"{self.begun} attempts begun, {len(self.failures)} failures"
        )


def play_shard(seeds: Sequence[int]) -> Total:
    """Play the histories of these seeds; stop at the first that fails."""
    total = Total()
    for seed in seeds:
        try:
            history = play(seed)
        except Exception as failure:  # an invariant, or a scheduler that trips over its own feet
            last = traceback.extract_tb(failure.__traceback__)[-1]
            notes = "; ".join(getattr(failure, "__notes__", ()))
            total.failures.append(f"{type(failure).__name__}: {failure}\n  {notes}, in {last.filename}:{last.lineno}")
            break
        total += Total(1, history.steps, history.checks, history.calls, history.begun)
    return total


def play_shards(seeds: Sequence[int], size: int = 50) -> Iterator[Total]:
    """Play histories on all processors, `size` at a time; give what each shard came to as it ends."""
    shards = [seeds[at : at + size] for at in range(0, len(seeds), size)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap_unordered(play_shard, shards)


class _Story:
    def __init__(self, seed: int, shape: str | None, mood: str | None, nests: bool | None) -> None:
        self.world = world = World(seed)
        self.random = random = world.random
        self.shape = shape or random.choice((LOCAL, AGENTS, AGENTS, TREE, TREE))
        self.mood = mood or (
            random.choice((CALM, WILD, WILD))
            if self.shape == LOCAL
            else random.choice((CALM, SHORT_CUTS, WILD, WILD, STORM, STORM))
        )
        self.checker = Checker(world)
        self.checker.is_calm = self.mood == CALM
        self.trouble_s = random.choice((0.05, 0.2, 0.5, 1.5))
        world.tick_s = random.choice((0.005, 0.020, 0.040))
        world.latency_s = random.choice(((0.00002, 0.0002), (0.0001, 0.002), (0.001, 0.02)))
        world.node_timeout_s = {WILD: random.choice((0.03, 0.15, 1.0)), STORM: random.choice((0.02, 0.1))}.get(
            self.mood, 1.0
        )
        world.orphan_s = random.choice((0.1, 3.0)) if self.mood in (WILD, STORM) else 3.0
        world.absence = random.choice((0.0, 0.0, 0.5))
        self.uses_pins = random.random() < 0.3
        self.uses_limits = random.random() < 0.3
        self.max_calls = random.choice((5, 20, 60, 150))
        self.agents: list[Vertex] = []
        self.hubs: list[Vertex] = []
        self.is_peaceful = False
        self.nesting = Random(~seed)  # dice of its own, so that other histories stay what they are
        self.uses_nesting = self.nesting.random() < 0.3 if nests is None else nests
        self._build()

    # ---- the cluster

    def _build(self) -> None:
        world, random = self.world, self.random
        has_workers = self.shape == LOCAL or random.random() < 0.2
        for number in range(1 if self.shape == LOCAL else random.choice((1, 1, 2, 2, 3))):
            slots = random.randint(1, 4) if has_workers and (self.shape == LOCAL or number == 0) else 0
            make: Callable[..., Root] = Root
            if self.mood != CALM and random.random() < 0.3:
                make = partial(DurableRoot, is_strict=self.mood == SHORT_CUTS)
            make(
                world,
                f"root{number}",
                slots,
                weight=random.choice((1.0, 1.0, 2.0)),
                ceiling=random.choice((0, 0, 0, random.randint(1, 6))) if self.shape != LOCAL else 0,
                max_tasks_per_child=random.choice((0, 0, 0, 1, 3)),
            )
        if self.shape != LOCAL:
            self.hubs = [Vertex(world, f"hub{n}", 0) for n in range(random.randint(1, 2) if self.shape == TREE else 0)]
            self.agents = [Vertex(world, f"agent{n}", random.randint(1, 4)) for n in range(random.randint(1, 5))]
        for hub in self.hubs:
            for root in world.roots:
                self._join(root, hub)
        for agent in self.agents:
            above = [random.choice(self.hubs)] if self.hubs and random.random() < 0.8 else world.roots
            for each in above:
                self._join(each, agent)
        for vertex in world.vertices:
            if random.random() < 0.2 and vertex not in world.roots:
                world.after(random.random() * self.trouble_s, self._boot, vertex)  # it joins late
            else:
                vertex.boot()
        if self.mood == WILD and random.random() < 0.1:
            world.start_fails = 0.1
        if self.mood == WILD and self.agents and random.random() < 0.3:
            random.choice(self.agents).fails = random.choice((0.3, 1.0))

    def _boot(self, vertex: Vertex) -> None:
        if not vertex.is_alive:
            vertex.boot()

    def _join(self, up: Vertex, down: Vertex) -> None:
        cable = Cable(up, down)
        up.cables.append(cable)
        self.world.cables.append(cable)

    # ---- the load

    def _submit(self) -> None:
        random = self.random
        root = random.choice(self.world.roots)
        if not root.is_alive or root.is_closed or len(root.calls) >= self.max_calls:
            return
        if self.uses_nesting and not isinstance(root, DurableRoot) and self.nesting.random() < 0.7:
            self._submit_nested(root)
            return
        for _ in range(random.choice((1, 1, 2, 5, 20))):
            self._submit_one(root)

    def _submit_nested(self, root: Root) -> None:
        for _ in range(self.nesting.choice((1, 1, 2, 6))):
            plan = self._plan(self.nesting.choice((1, 1, 2, 3)))
            root.submit(8, plan.duration_s, retries=plan.retries, plan=plan, is_error=plan.is_error)

    def _plan(self, levels: int) -> Plan:
        dice = self.nesting
        count = dice.choice((0, 1, 1, 2, 3)) if levels else 0
        return Plan(
            duration_s=dice.choice((1e-5, 1e-5, dice.uniform(0.0, 0.01), dice.uniform(0.0, 0.2))),
            calls=tuple(self._plan(levels - 1) for _ in range(count)),
            waits=dice.random() < 0.85,
            gives_up=count if dice.random() < 0.1 else 0,
            is_error=dice.random() < 0.1,
            retries=dice.choice((0, 1, 3, 3)),
            priority=dice.choice((0, 0, 0, 2)),
        )

    def _submit_one(self, root: Root) -> Call:
        random = self.random
        fn = random.choice((1, 3, 3, 4) if self.mood == STORM else (1, 1, 1, 2, 3, 4, 5, 6))
        duration_s = {
            1: lambda: random.uniform(1e-6, 5e-5),
            2: lambda: random.uniform(2e-4, 3e-3),
            3: lambda: random.uniform(0.005, 0.05),
            4: lambda: random.uniform(0.1, 2.5 if self.mood == STORM else 0.8),
            5: lambda: random.choice((1e-5,) * 9 + (0.3,)),
            6: lambda: 2e-4,
        }[fn]()
        retries = random.choice((0, 1, 3, 3))
        priority = random.choice((0, 0, 0, 1, 5))
        limit_s = random.choice((0.0, 0.02, 2.0)) if self.uses_limits else 0.0
        below = [cable.down.name for cable in root.cables if cable.down in self.agents]
        node = (
            random.choice((*below, root.name)) if self.uses_pins and random.random() < 0.3 and (below or root.slots) else ""
        )
        if node == root.name and not root.slots:
            node = ""
        options = Options(limit_s, priority, node, retries == 0) if priority or limit_s or node or not retries else None
        return root.submit(
            fn, duration_s, options=options, retries=retries, is_error=fn == 6, has_blob=random.random() < 0.2
        )

    def _pick_call(self) -> Call | None:
        root = self.random.choice(self.world.roots)
        if not root.is_alive or root.is_closed or not root.open_calls:
            return None
        return self.random.choice(list(root.open_calls.values()))

    def _cancel(self) -> None:
        call = self._pick_call()
        if call is not None:
            call.root.cancel(call)

    def _kill(self) -> None:
        call = self._pick_call()
        if call is not None:
            call.root.kill(call)

    def _undefine(self) -> None:
        root = self.random.choice(self.world.roots)
        if root.is_alive and not root.is_closed:
            used = {call.fn for call in root.open_calls.values()}
            idle = [fn for fn in root.session.code if fn not in used]
            if idle:
                root.act(root.scheduler.undefine, root.session, idle)

    # ---- misfortunes

    def _kill_worker(self) -> None:
        vertex = self.random.choice(self.world.vertices)
        if vertex.is_alive:
            workers = sorted((w for ws in vertex.pool.workers.values() for w in ws), key=repr)
            if workers:
                self.random.choice(workers).die()

    def _cut(self) -> None:
        random = self.random
        if not self.world.cables:
            return
        cable = random.choice(self.world.cables)
        if not cable.is_whole:
            return
        longest = {WILD: random.choice((0.05, 0.3, 2.0)), STORM: 0.3}.get(self.mood, 0.4)
        self.world.note("cut", cable)
        cable.cut()
        self.world.after(random.uniform(0.0, longest), self._mend, cable)

    def _mend(self, cable: Cable) -> None:
        cable.mend()
        self.world.note("mend", cable)
        if cable.downlink is not None and cable.down.is_alive and self.random.random() < 0.5:
            cable.downlink.connect()  # the node dialled: the new line may be there before the old one is missed

    def _echo(self) -> None:
        downlinks = [cable.downlink for cable in self.world.cables if cable.downlink is not None]
        if downlinks:
            self.random.choice(downlinks).echo()

    def _crash(self) -> None:
        mortals = self.agents + self.hubs
        if not mortals:
            return
        vertex = self.random.choice(mortals)
        if vertex.is_alive:
            vertex.crash()
            self.world.after(self.random.uniform(0.0, 1.5), self._boot, vertex)

    def _drain(self) -> None:
        mortals = self.agents + self.hubs
        if not mortals:
            return
        vertex = self.random.choice(mortals)
        if vertex.is_alive and not vertex.is_draining:
            vertex.is_draining = True
            vertex.act(vertex.scheduler.start_drain, self.world.now)
            self.world.after(self.random.uniform(0.01, 1.0), self._stop, vertex, vertex.life)

    def _stop(self, vertex: Vertex, life: int) -> None:
        if vertex.life == life and vertex.is_alive:
            vertex.stop()
            self.world.after(self.random.uniform(0.0, 0.5), self._boot, vertex)

    def _remove_node(self) -> None:
        root = self.random.choice(self.world.roots)
        cables = [cable for cable in root.cables if cable.downlink is not None]
        if not root.is_alive or not cables:
            return
        cable = self.random.choice(cables)
        downlink = cable.downlink
        assert downlink is not None
        if self.random.random() < 0.3:
            self._leave(root, cable)
        else:
            root.act(root.scheduler.drain_node, downlink)
            self._leave_when_drained(root, cable, downlink)

    def _leave_when_drained(self, root: Root, cable: Cable, downlink: object) -> None:
        if not root.is_alive or cable.downlink is not downlink or cable.downlink is None:
            return
        if root.scheduler.leases_of(downlink):
            self.world.after(0.05, self._leave_when_drained, root, cable, downlink)
        else:
            self._leave(root, cable)

    def _leave(self, root: Root, cable: Cable) -> None:
        if cable.downlink is not None:
            cable.downlink.leave()
        if self.is_peaceful:
            root.dial(cable)

    def _set_slots(self) -> None:
        vertex = self.random.choice(self.agents + [root for root in self.world.roots if root.slots] or self.world.roots)
        if vertex.is_alive and vertex.slots:
            vertex.act(vertex.scheduler.set_slots, self.random.randint(0, 5), self.world.now)

    def _limit_node(self) -> None:
        root = self.random.choice(self.world.roots)
        cables = [cable for cable in root.cables if cable.downlink is not None]
        if root.is_alive and cables:
            root.act(
                root.scheduler.limit_node, self.random.choice(cables).downlink, self.random.randint(0, 3), self.world.now
            )

    def _crash_client(self) -> None:
        durable = [root for root in self.world.roots if isinstance(root, DurableRoot) and root.is_alive]
        if durable:
            self.random.choice(durable).crash()

    def _end_client(self) -> None:
        alive = [root for root in self.world.roots if root.is_alive]
        if len(alive) > 1:
            root = self.random.choice(alive)
            if self.random.random() < 0.5:
                root.crash()
            elif not root.is_closed:
                root.close()
                for call in root.open_calls.values():
                    call.discarded = True

    # ---- the plot

    def _acts(self) -> list[Callable[[], object]]:
        if self.mood == STORM:
            often = [self._submit] * 6 + [self._cut] * 12 + [self._echo] * 3
            return [*often, self._kill, self._kill_worker, self._crash, self._crash_client]
        acts: list[Callable[[], object]] = (
            [self._submit] * 12 + [self._cancel] * 2 + [self._kill] * 2 + [self._undefine, self._echo]
        )
        if self.mood != CALM:
            acts += [self._cut] * 3 + [self._crash_client]
        if self.mood == WILD:
            acts += (
                [self._kill_worker] * 3
                + [self._crash] * 2
                + [self._drain, self._remove_node, self._set_slots, self._limit_node, self._end_client]
            )
        return acts

    def play(self) -> None:
        """Play it."""
        world, random = self.world, self.random
        acts = self._acts()
        at = 0.0
        number = 100 if self.mood == STORM else random.choice((5, 20, 50))
        for _ in range(number):
            at += random.expovariate(number / self.trouble_s)
            world.after(at, random.choice(acts))
        for _ in range(2):
            world.after(random.random() * 0.01, self._submit)
        world.run(at + 0.001)
        self._make_peace()
        if not world.run(world.now + PROGRESS_S, self._is_over):
            self._give_up_on_hopeless()
            if not world.run(world.now + PROGRESS_S, self._is_over):
                stuck = [call for root in world.roots if root.is_alive for call in root.open_calls.values()]
                raise Violation(f"no progress: {stuck[:5]} of {len(stuck)}, tasks {[call.task for call in stuck[:5]]}")
        world.run(world.now + 2.0)
        self.checker.check_end()
        if self.mood in (CALM, SHORT_CUTS):
            self._check_strict()
        for root in world.roots:
            if root.is_alive and not root.is_closed:
                root.close()
        world.run(world.now + max(world.orphan_s, LINGER_S) + 2.0)
        self.checker.check_empty()

    def _make_peace(self) -> None:
        world = self.world
        world.start_fails = 0.0
        world.note("peace")
        self.is_peaceful = True
        for cable in world.cables:
            if not cable.is_whole:
                self._mend(cable)
        for vertex in world.vertices:
            if vertex in world.roots:
                continue
            if vertex.is_alive and vertex.is_draining:
                vertex.stop()
            self._boot(vertex)
            vertex.fails = 0.0
            if vertex in self.agents:
                vertex.act(vertex.scheduler.set_slots, vertex.slots, world.now)
        for root in world.roots:
            if isinstance(root, DurableRoot) and not root.is_alive and not root.is_closed:
                root.boot()
            if not root.is_alive:
                continue
            root.act(root.scheduler.set_slots, root.slots, world.now)
            for cable in root.cables:
                root.dial(cable)
                if cable.downlink is not None:
                    root.act(root.scheduler.limit_node, cable.downlink, 1 << 30, world.now)

    def _is_over(self) -> bool:
        return not any(root.open_calls for root in self.world.roots if root.is_alive and not root.is_closed)

    def _give_up_on_hopeless(self) -> None:
        """Where no node can run a session, the executor breaks: it ends what is left."""
        for root in self.world.roots:
            if root.is_alive and root.failed_nodes:
                for call in list(root.open_calls.values()):
                    root.kill(call)

    def _check_strict(self) -> None:
        for root in self.world.roots:
            for call in root.calls.values():
                if call.begun > 1 + call.unsent + call.excused:
                    raise Violation(f"{call} began {call.begun} times though no cut was long")
