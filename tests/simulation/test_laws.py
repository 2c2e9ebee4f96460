"""Laws about time and fairness, each on a small simulated cluster made for it. All times are virtual."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from distexec.messages import Options

from .checker import Checker
from .vertices import Root, Vertex
from .world import Cable, Call, World

SHORT, LONG, OTHER = 1, 2, 3


class Cluster:
    """Some roots above some vertices; everything is up after `start`."""

    def __init__(
        self,
        *,
        agents: tuple[int, ...] = (),
        hub: bool = False,
        roots: tuple[float, ...] = (1.0,),
        local: int = 0,
        ceiling: int = 0,
    ) -> None:
        self.world = world = World(seed=1)
        self.checker = Checker(world)
        self.roots = [Root(world, f"root{n}", local, weight=weight, ceiling=ceiling) for n, weight in enumerate(roots)]
        self.root = self.roots[0]
        self.hub = Vertex(world, "hub", 0) if hub else None
        self.agents = [Vertex(world, f"agent{n}", slots) for n, slots in enumerate(agents)]
        for above in [self.hub] if self.hub is not None else self.roots:
            for agent in self.agents:
                self.join(above, agent)
        if self.hub is not None:
            for root in self.roots:
                self.join(root, self.hub)

    def join(self, up: Vertex, down: Vertex) -> Cable:
        """Lay a cable."""
        cable = Cable(up, down)
        up.cables.append(cable)
        self.world.cables.append(cable)
        return cable

    def start(self, *later: Vertex) -> None:
        """Boot everything but `later`, and let it connect."""
        for vertex in self.world.vertices:
            if vertex not in later:
                vertex.boot()
        self.run(0.2)

    def run(self, seconds: float, is_over: Callable[[], bool] | None = None) -> bool:
        """Let time pass."""
        return self.world.run(self.world.now + seconds, is_over)

    def teach(self, fn: int, duration_s: float, number: int = 40) -> None:
        """Let the scheduler see how long a function takes."""
        for root in self.roots:
            for _ in range(number):
                root.submit(fn, duration_s)
            assert self.run(60.0, lambda: not root.open_calls)  # noqa: B023

    def finish(self, calls: list[Call], seconds: float) -> None:
        """Everything ends within so long."""
        assert self.run(seconds, lambda: all(call.is_over for call in calls)), [c for c in calls if not c.is_over]
        self.run(1.0)
        self.checker.check_end()


class Blind:
    """An observer that looks at nothing, where only the scheduler's own work is to be counted."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def keep_busy(cluster: Cluster, root: Root, duration_s: float, waiting: int = 50) -> None:
    """Keep so many calls waiting at a root."""

    def top_up() -> None:
        while len(root.open_calls) < waiting:
            root.submit(LONG, duration_s)
        cluster.world.after(0.001, top_up)

    top_up()


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)])
def test_busy_sessions_share_by_weight(slots: int, weights: tuple[float, ...]) -> None:
    """Sessions that always have work get slots in proportion to their weights, also when these do not divide the slots."""
    cluster = Cluster(agents=(slots,), roots=weights)
    cluster.start()
    for root in cluster.roots:
        keep_busy(cluster, root, 0.010)
    cluster.run(1.0)
    before = [root.ended for root in cluster.roots]
    cluster.run(6.0)
    had = [root.ended - count for root, count in zip(cluster.roots, before, strict=True)]
    assert sum(had) > 0.85 * slots * 6.0 / 0.010
    for count, weight in zip(had, weights, strict=True):
        assert count / sum(had) == pytest.approx(weight / sum(weights), rel=0.12)


def test_an_idle_share_is_lent() -> None:
    """A session alone with work uses every slot, and gives half of them up when another begins."""
    cluster = Cluster(agents=(4,), roots=(1.0, 1.0))
    cluster.start()
    first, second = cluster.roots
    keep_busy(cluster, first, 0.010)
    cluster.run(1.0)
    alone = first.ended
    assert alone > 0.85 * 4 * 1.0 / 0.010
    call = second.submit(LONG, 0.010)
    assert cluster.run(0.2, lambda: call.is_over)
    keep_busy(cluster, second, 0.010)
    cluster.run(0.5)
    before = first.ended, second.ended
    cluster.run(2.0)
    assert (first.ended - before[0]) / (second.ended - before[1]) == pytest.approx(1.0, rel=0.1)


def test_unknown_run_times_are_not_hoarded() -> None:
    """While a function's run time is unknown at most slots + 1 tasks are leased to a node."""
    cluster = Cluster(agents=(3, 2))
    cluster.start()
    calls = [cluster.root.submit(LONG, 0.5) for _ in range(20)]
    most: dict[str, int] = {}

    def look() -> bool:
        for lane in cluster.root.session.lanes.values():
            most[lane.name] = max(most.get(lane.name, 0), len(lane.leases))
        return False

    cluster.run(0.4, look)
    assert most == {"agent0": 4, "agent1": 3}
    cluster.finish(calls, 10.0)


def test_short_tasks_are_leased_ahead_within_the_window() -> None:
    """Of known short tasks a node gets about its window's worth, no more."""
    cluster = Cluster(agents=(2,))
    cluster.start()
    cluster.teach(SHORT, 0.001)
    calls = [cluster.root.submit(SHORT, 0.001) for _ in range(500)]
    (lane,) = cluster.root.session.lanes.values()
    assert 30 <= len(lane.leases) <= 41  # 20 ms of 1 ms tasks per slot, and one
    cluster.finish(calls, 2.0)


SHAPES: dict[str, dict[str, Any]] = {
    "workers": {"local": 2},
    "agent": {"agents": (2,)},
    "agents": {"agents": (1, 1)},
    "hub": {"agents": (1, 1), "hub": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_task_waits_behind_a_long_one_while_a_slot_is_idle(shape: str) -> None:
    """One call runs ten thousand times longer than its kind so far: those sent after it to the same place end elsewhere."""
    cluster = Cluster(**SHAPES[shape])
    cluster.start()
    cluster.teach(SHORT, 0.0002)
    long = cluster.root.submit(SHORT, 2.0)
    calls = [cluster.root.submit(SHORT, 0.0002) for _ in range(200)]
    assert cluster.run(0.3, lambda: all(call.is_over for call in calls)), [c for c in calls if not c.is_over]
    assert not long.is_over
    assert all(call.begun == 1 for call in calls)
    cluster.finish([long], 3.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_tasks_that_wait_for_each_other_both_run(shape: str) -> None:
    """On two slots two tasks run at the same time, whatever ran before."""
    cluster = Cluster(**SHAPES[shape])
    cluster.start()
    cluster.teach(SHORT, 0.00001)
    talkers = [cluster.root.submit(SHORT, 5.0) for _ in range(2)]
    assert cluster.run(0.2, lambda: all(call.begun for call in talkers))
    cluster.finish(talkers, 10.0)


def test_an_idle_node_is_given_what_waits_elsewhere() -> None:
    """A node that joins late takes over what waits at another behind long tasks."""
    cluster = Cluster(agents=(1, 1))
    late = cluster.agents[1]
    cluster.start(late)
    calls = [cluster.root.submit(LONG, 3.0) for _ in range(2)]
    cluster.run(0.2)
    assert [call.begun for call in calls] == [1, 0]
    assert calls[1].task.lane is not None
    late.boot()
    assert cluster.run(0.3, lambda: calls[1].begun == 1)
    assert calls[1].task.node == "agent1"
    cluster.finish(calls, 10.0)


def test_a_ceiling_is_never_exceeded() -> None:
    """With `max_workers` below what nodes offer no more tasks run at once; one pinned to a later node still gets there."""
    cluster = Cluster(agents=(2, 2), ceiling=2)
    cluster.start()
    calls = [cluster.root.submit(LONG, 0.05) for _ in range(20)]
    pinned = cluster.root.submit(LONG, 0.05, options=Options(node="agent1"))

    def look() -> bool:
        running = sum(
            worker.running is not None
            for agent in cluster.agents
            for workers in agent.pool.workers.values()
            for worker in workers
        )
        assert running <= 2
        return pinned.is_over

    assert cluster.run(3.0, look)
    cluster.finish(calls, 5.0)


def test_cost_is_linear_in_tasks() -> None:
    """Ten times the tasks take at most eleven times the function calls in the scheduler, queued all at once or cancelled."""

    def cost(number: int) -> int:
        cluster = Cluster(agents=(4, 4), hub=True)
        cluster.world.observer = Blind()
        cluster.start()
        cluster.teach(SHORT, 0.0001)
        calls = 0

        def count(frame: FrameType, event: str, _argument: object) -> None:
            nonlocal calls
            if event in ("call", "c_call") and "/distexec/" in frame.f_code.co_filename:
                calls += 1

        sys.setprofile(count)
        try:
            submitted = [cluster.root.submit(SHORT, 0.0001) for _ in range(number)]
            for call in submitted[number // 2 :: 2]:
                cluster.root.cancel(call)
            assert cluster.run(60.0, lambda: not cluster.root.open_calls)
        finally:
            sys.setprofile(None)
        return calls

    cluster_of_200, cluster_of_2000 = cost(200), cost(2000)
    assert cluster_of_2000 <= 11 * cluster_of_200


def test_cost_of_a_task_does_not_grow_with_nodes() -> None:
    """With fifty nodes a task takes the root at most 1.3 times the function calls that it takes with two."""

    def cost(nodes: int) -> float:
        cluster = Cluster(agents=(2,) * nodes)
        cluster.world.observer = Blind()
        cluster.start()
        cluster.teach(SHORT, 0.0001, 20 * nodes)
        calls = 0

        def count(frame: FrameType, event: str, _argument: object) -> None:
            nonlocal calls
            if event in ("call", "c_call") and "/distexec/" in frame.f_code.co_filename:
                calls += 1

        def act(event: Callable[..., Any], *arguments: Any) -> Any:
            sys.setprofile(count)
            try:
                return plain_act(event, *arguments)
            finally:
                sys.setprofile(None)

        number = 400 * nodes
        plain_act, cluster.root.act = cluster.root.act, act  # type: ignore[method-assign]
        submitted = [cluster.root.submit(SHORT, 0.0001) for _ in range(number)]
        assert cluster.run(60.0, lambda: not cluster.root.open_calls)
        assert all(call.begun == 1 for call in submitted)
        return calls / number

    assert cost(50) <= 1.3 * cost(2)
