"""Calls made inside calls: on this machine's workers and through an agent, deep, broad, large, and when something dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from distexec import ClusterExecutor, DistexecError, TaskKilled
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import broods
from tests.system.conftest import Make, make_local
from tests.system.proxy import Proxy

WAIT_S = 60.0


def pids(directory: Path, name: str) -> list[int]:
    """Who left this note."""
    path = directory / name
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_running(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- who waits lends


def test_deeper_than_slots(make: Make) -> None:
    """Three levels of calls that wait for the next end on two slots, several at a time, and so they do on one."""
    with make(2) as executor:
        futures = [executor.submit(broods.depth, executor, 3) for _ in range(4)]
        assert [future.result(WAIT_S) for future in futures] == [3] * 4
    with make(1) as executor:
        assert executor.submit(broods.depth, executor, 5).result(WAIT_S) == 5


def test_broader_than_slots(make: Make) -> None:
    """A thousand parents with a child each end on two slots."""
    with make(2) as executor:
        futures = [executor.submit(broods.one_child, executor, number) for number in range(1000)]
        assert [future.result(WAIT_S) for future in futures] == [number * number for number in range(1000)]


def test_recursion(make: Make) -> None:
    """A recursion that stays within the bound ends with its value."""
    with make(2) as executor:
        assert executor.submit(broods.fibonacci, executor, 7).result(WAIT_S) == 13


def test_recursion_beyond_the_bound(make: Make) -> None:
    """When too many wait already, `result` raises what to do instead of hanging; the executor stays usable."""
    with make(1) as executor:
        with pytest.raises(DistexecError, match="tasks of this session wait for nested calls") as caught:
            executor.submit(broods.depth, executor, 40).result(WAIT_S)
        assert "nest less deeply" in str(caught.value)
        assert executor.submit(broods.depth, executor, 2).result(WAIT_S) == 2


@pytest.mark.parametrize("way", [broods.by_wait, broods.by_as_completed])
def test_all_ways_to_wait_lend(make: Make, way: object) -> None:
    """`wait` and `as_completed` of concurrent.futures lend the slot as `result` does: on one slot all children run."""
    with make(1) as executor:
        assert executor.submit(way, executor, 20).result(WAIT_S) == sum(number * number for number in range(20))  # type: ignore[arg-type]


@pytest.mark.parametrize("ordered", [True, False])
def test_map_inside(make: Make, ordered: bool) -> None:
    """`map` inside a task, in order or as results come, on one slot."""
    with make(1) as executor:
        found = executor.submit(broods.many, executor, 200, ordered).result(WAIT_S)
        assert (found if ordered else sorted(found)) == [number * number for number in range(200)]


def test_threads_and_with_blocks(make: Make) -> None:
    """A thread that the task started may wait; a `with` block waits for the calls made and leaves the executor usable."""
    with make(1) as executor:
        assert executor.submit(broods.in_thread, executor, 3).result(WAIT_S) == 9
        assert executor.submit(broods.in_with_block, executor, 3).result(WAIT_S) == (9, 16)


def test_waiting_in_a_callback_is_refused() -> None:
    """A callback runs in the thread that receives answers, so waiting there says why it cannot be."""
    with make_local(2) as executor:
        told = executor.submit(broods.waits_in_callback, executor, 3).result(WAIT_S)
        assert "a callback of a nested call cannot wait" in told


def test_callback_that_exits() -> None:
    """SystemExit in a callback ends nothing: later calls are answered."""
    with make_local(1) as executor:
        assert executor.submit(broods.exits_in_callback, executor, 3).result(WAIT_S) == 18


@pytest.mark.parametrize("way", [broods.chain_by_wait, broods.chain_by_as_completed, broods.chain_by_map])
def test_refusal_ends_every_way_to_wait(way: object) -> None:
    """Beyond the bound `wait`, `as_completed` and an iterator of `map` raise as `result` does."""
    with make_local(1) as executor, pytest.raises(DistexecError, match="wait for nested calls"):
        executor.submit(way, executor, 40).result(WAIT_S)  # type: ignore[arg-type]


# ---- what the executor is inside and elsewhere


def test_global_of_a_program(tmp_path: Path) -> None:
    """A program's own functions use its global executor, classes and lambdas inside tasks, without being told."""
    program = tmp_path / "program.py"
    program.write_text("""
from dataclasses import dataclass
from distexec import ClusterExecutor
@dataclass
class Sum:
    value: int
def add(left, right):
    return Sum(left.value + right.value)
def total(numbers):
    if len(numbers) == 1:
        return Sum(numbers[0])
    middle = len(numbers) // 2
    halves = executor.map(total, (numbers[:middle], numbers[middle:]))
    return executor.submit(lambda pair: add(*pair), tuple(halves)).result()
executor = ClusterExecutor(2)
with executor:
    found = executor.submit(total, list(range(9))).result(60)
    assert type(found) is Sum
    print(found.value)
""")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=WAIT_S,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout.strip(), done.returncode) == ("36", 0), done.stderr


def test_comes_back_as_itself(make: Make) -> None:
    """Returned by a task, or unpickled in its own process, an executor is that very object; a view keeps its options."""
    with make(1) as executor:
        assert executor.submit(broods.returns_executor, executor).result(WAIT_S) is executor
        view = pickle.loads(pickle.dumps(executor.options(priority=2)))
        assert view._options.priority == 2
        data = pickle.dumps(executor)
    with make_local(1) as other:
        assert other.submit(broods.catch, other, pickle.loads, data).result(WAIT_S)[0] == "DistexecError"


def test_options_inside() -> None:
    """Nested calls have options of their own, and a time limit ends the call alone."""
    with make_local(1) as executor:
        assert executor.submit(broods.configured, executor, 3).result(WAIT_S) == (9, "TaskTimeout")


def test_context_workers() -> None:
    """Workers of an explicit context nest as well."""
    import multiprocessing
    with make_local(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(broods.depth, executor, 2).result(WAIT_S) == 2


def test_durable_refuses(tmp_path: Path) -> None:
    """A durable executor says that calls inside its tasks would not be recorded."""
    with make_local(1, durable=tmp_path / "journal") as executor, pytest.raises(DistexecError, match="durable"):
        executor.submit(broods.depth, executor, 1).result(WAIT_S)


def test_fork_inside(make: Make) -> None:
    """A task that forks while a call is under way is single-threaded then, gets its answer, and the fork may not call."""
    with make(1) as executor:
        assert executor.submit(broods.fork_meanwhile, executor, 3).result(WAIT_S)[::2] == (9, "refused")


# ---- large values


def test_large_arrays(make: Make) -> None:
    """Arrays of some megabytes go down and come back, one after the other and many at once, and are the parent's own."""
    with make(2) as executor:
        array = numpy.arange(1_000_000)
        assert (executor.submit(broods.with_arrays, executor, array, 3).result(WAIT_S) == array + 3).all()
        arrays = [numpy.full(400_000, number) for number in range(8)]
        found = executor.submit(broods.collect, executor, arrays).result(WAIT_S)
        assert all((each == number + 1).all() for number, each in enumerate(found))


def test_large_arrays_between_nodes() -> None:
    """A parent on the local workers has children on a node, and the other way round: what is large goes between them."""
    with AgentProcess(slots=1, name="far") as agent, ClusterExecutor(
            nodes=["local", agent.address], secret=agent.secret) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        array = numpy.arange(500_000)
        futures = [executor.options(node=node).submit(broods.with_arrays, executor.options(node=other), array, 2)
                   for node, other in (("local", "far"), ("far", "local"))]
        assert all((future.result(WAIT_S) == array + 2).all() for future in futures)


# ---- what dies


def test_error_arrives_as_itself(make: Make) -> None:
    """What a child raises reaches its parent as that exception, with the remote traceback as its cause."""
    with make(1) as executor:
        caught = executor.submit(broods.catch, executor, broods.raises, "by zero").result(WAIT_S)
        assert caught == ("ZeroDivisionError", "by zero", True)


def test_poison_child_costs_its_parent_nothing(make: Make, tmp_path: Path) -> None:
    """A child whose worker dies each time fails with WorkerLost; its parent runs once."""
    with make(1, retries=1) as executor:
        future = executor.submit(broods.outlives_child, executor, str(tmp_path))
        assert future.result(WAIT_S) == "WorkerLost"
        assert (len(pids(tmp_path, "parent")), len(pids(tmp_path, "child"))) == (1, 2)


def test_children_end_before_a_lost_parent_runs_again(make: Make, tmp_path: Path) -> None:
    """A parent dies while a child of it runs: when it runs again that child's process has gone."""
    with make(2) as executor:
        assert executor.submit(broods.dies_after_child_began, executor, str(tmp_path)).result(WAIT_S) == "gone"


def test_killed_parent_takes_children_along(make: Make, tmp_path: Path) -> None:
    """`kill` ends a parent that waits, and then what it waits for."""
    with make(1) as executor:
        future = executor.submit(broods.waits_for_sleeper, executor, str(tmp_path))
        assert wait_until(lambda: bool(pids(tmp_path, "child")), WAIT_S)
        future.kill()
        with pytest.raises(TaskKilled):
            future.result(WAIT_S)
        assert wait_until(lambda: not any(map(is_running, pids(tmp_path, "child"))), WAIT_S)
        assert executor.submit(broods.depth, executor, 2).result(WAIT_S) == 2


def test_calls_left_behind_go_on(make: Make, tmp_path: Path) -> None:
    """A task that returns without waiting leaves its calls running, and `shutdown` waits for them, however many follow."""
    with make(1) as executor:
        assert executor.submit(broods.leaves_behind, executor, str(tmp_path), 50).result(WAIT_S) == "left"
    assert all(len(pids(tmp_path, f"level{level}")) == 1 for level in range(51))


def test_call_given_up_is_not_run(make: Make, tmp_path: Path) -> None:
    """A nested call that has not begun can be cancelled, and then does not run."""
    with make(2) as executor:
        blocker = executor.submit(broods.sleeps_until, str(tmp_path), "go")
        assert executor.submit(broods.gives_up, executor, str(tmp_path)).result(WAIT_S)
        blocker.result(WAIT_S)
    assert not pids(tmp_path, "second")


def test_dead_workers_of_parents(make: Make, tmp_path: Path) -> None:
    """A parent's worker is killed from outside while it waits: it runs again, its child too, and nothing is left over."""
    with make(1) as executor:
        future = executor.submit(broods.waits_for_sleeper, executor, str(tmp_path))
        assert wait_until(lambda: bool(pids(tmp_path, "child")), WAIT_S)
        os.kill(pids(tmp_path, "parent")[0], signal.SIGKILL)
        assert wait_until(lambda: len(pids(tmp_path, "child")) == 2, WAIT_S)
        assert not is_running(pids(tmp_path, "child")[0])
        future.kill()
        with pytest.raises(TaskKilled):
            future.result(WAIT_S)


def test_link_is_cut_meanwhile() -> None:
    """Links are cut and mended again and again while nested calls run: nothing is lost, nothing runs twice."""
    with AgentProcess(slots=2, name="cut off") as agent, Proxy(agent.address) as proxy, ClusterExecutor(
            nodes=[proxy.address], secret=agent.secret, node_timeout=WAIT_S) as executor:
        futures = [executor.submit(broods.one_child, executor, number) for number in range(300)]
        for done in (20, 80, 140, 200):
            assert wait_until(lambda done=done: sum(future.done() for future in futures) >= done, WAIT_S)  # type: ignore[misc]
            proxy.cut()
            proxy.heal()
        assert [future.result(WAIT_S) for future in futures] == [number * number for number in range(300)]
        assert {future.attempts for future in futures} == {1}
