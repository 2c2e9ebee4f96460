"""The executor as its user sees it: submit, map, limits, ends; on local workers and through an agent alike."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy
import pytest

from distexec import ClusterExecutor
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make, make_local

WAIT_S = 30.0


class Counted:
    """Counts from 0, and knows how far it was asked to go."""

    def __init__(self, end: int | None = None) -> None:
        self.given = 0
        self._end = end

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.given == self._end:
            raise StopIteration
        self.given += 1
        return self.given - 1


# ---- futures


def test_future_knows_its_task(make: Make) -> None:
    """A future tells number, node, attempts and times of its task, and its repr names them."""
    with make(1) as executor:
        first, second = executor.submit(deeds.nap, 0.05, "a"), executor.submit(deeds.double, 4)
        assert (first.result(WAIT_S), second.result(WAIT_S)) == ("a", 8)
        assert (first.task_id, second.task_id) == (1, 2)
        assert first.node == executor.nodes()[0].name
        assert first.attempts == second.attempts == 1
        assert first.timing.run_s is not None
        assert first.timing.run_s >= 0.05
        assert first.timing.finished_at is not None
        assert first.timing.finished_at - first.timing.submitted_at >= first.timing.run_s
        assert "finished" in repr(first)
        assert first.node in repr(first)


def test_running_is_not_cancelled(make: Make, tmp_path: Path) -> None:
    """A task that was handed out is RUNNING: cancel() is False and it ends; a queued one is withdrawn and never runs."""
    with make(1) as executor:
        running = executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path) == ["held"])
        queued = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(10)]
        assert running.running()
        assert not running.cancel()
        cancelled = [future for future in queued if future.cancel()]
        assert len(cancelled) >= 9, "at most one task is ahead of a slot whose function is unknown"
        assert not running.cancelled()
        deeds.let_go(tmp_path)
        assert running.result(WAIT_S) == "held"
        for future in cancelled:
            with pytest.raises(CancelledError):
                future.result(WAIT_S)
    assert len(deeds.notes(tmp_path)) == 1 + len(queued) - len(cancelled)


def test_value_at_submit(make: Make, tmp_path: Path) -> None:
    """A task gets its arguments as they were at submit, small ones and buffers alike."""
    with make(1) as executor:
        blocker = executor.submit(deeds.hold, str(tmp_path))
        small, large = [1], numpy.ones(1 << 20)
        futures = [executor.submit(deeds.double, small), executor.submit(numpy.sum, large)]
        small.append(2)
        large[:] = 0
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [[1, 1], float(1 << 20)]
        blocker.result(WAIT_S)


def test_max_workers_is_a_ceiling(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """With nodes, max_workers is the most that runs at once."""
    with ClusterExecutor(1, nodes=[shared_agent.address], secret=shared_agent.secret) as executor:
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        others = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(3)]
        assert wait_until(lambda: deeds.notes(tmp_path))
        assert executor.status().slots == 1
        assert not wait(others, 0.3).done
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in [held, *others]] == ["held", 0, 1, 2]


def test_priority_runs_first(make: Make, tmp_path: Path) -> None:
    """Among queued tasks those of higher priority run first, equals in order of submission."""
    with make(1) as executor:
        executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path))
        executor.submit(deeds.note_and_return, str(tmp_path), "ahead")  # may be with a node already
        for priority in (0, 5, 0, 7, -1, 5):
            executor.options(priority=priority).submit(deeds.note_and_return, str(tmp_path), priority)
        deeds.let_go(tmp_path)
    order = deeds.notes(tmp_path)
    order.remove("ahead")
    assert order == ["held", "7", "5", "5", "0", "0", "-1"]


def test_pins(shared_agent: AgentProcess) -> None:
    """options(node=) runs a task on that node and on no other."""
    with ClusterExecutor(nodes=["local", shared_agent.address], secret=shared_agent.secret) as executor:
        assert executor.wait_for_slots(3, WAIT_S)
        local = [executor.options(node="local").submit(deeds.double, 1) for _ in range(20)]
        remote = [executor.options(node="shared").submit(deeds.double, 1) for _ in range(20)]
        wait([*local, *remote], WAIT_S)
        assert {future.node for future in local} == {"local"}
        assert {future.node for future in remote} == {"shared"}


def test_options_add_up_on_views(make: Make) -> None:
    """A view is an executor of its own options: it can be changed further, mapped and closed."""
    with make(1) as executor:
        view = executor.options(retries=0).options(priority=3)
        assert "priority=3" in repr(view)
        assert "retries=0" in repr(view)
        assert list(view.map(deeds.double, range(5))) == [0, 2, 4, 6, 8]
        with view:
            pass
        with pytest.raises(RuntimeError):
            executor.submit(deeds.double, 1)


# ---- map


@pytest.mark.parametrize("chunksize", [1, 3])
def test_buffersize_is_exact(make: Make, chunksize: int) -> None:
    """At most buffersize items are taken from the input beyond what was yielded."""
    items = Counted()
    with make(2) as executor:
        results = executor.map(deeds.double, items, buffersize=6, chunksize=chunksize)
        assert items.given == 6
        for number in range(20):
            assert next(results) == 2 * number
            assert items.given <= number + 1 + 6
        results.close()  # type: ignore[attr-defined]
        assert items.given <= 20 + 6


@pytest.mark.parametrize("chunksize", [4, 7])
def test_buffersize_below_chunksize(make: Make, chunksize: int) -> None:
    """A chunk is never larger than the buffer."""
    items = Counted(30)
    with make(1) as executor:
        results = executor.map(deeds.double, items, buffersize=2, chunksize=chunksize)
        assert items.given <= 2
        assert list(results) == [2 * number for number in range(30)]


def test_pins_below_a_ceiling(shared_agent: AgentProcess) -> None:
    """A pinned task gets its slot also where max_workers leaves room for no node but another one."""
    with ClusterExecutor(1, nodes=["local", shared_agent.address], secret=shared_agent.secret) as executor:
        for node in ("local", "shared", "local", "shared"):
            assert executor.options(node=node).submit(deeds.double, 1).result(WAIT_S) == 2


def test_unordered(make: Make, tmp_path: Path) -> None:
    """ordered=False gives results as they come; a slow first item holds nobody up."""
    with make(2) as executor:
        results = executor.map(deeds_hold_first, [str(tmp_path)] * 10, range(10), ordered=False)
        first = [next(results) for _ in range(9)]
        assert sorted(first) == list(range(1, 10))
        deeds.let_go(tmp_path)
        assert list(results) == [0]


def deeds_hold_first(directory: str, number: int) -> int:
    return deeds.hold(directory, number) if number == 0 else number  # type: ignore[no-any-return]


def test_unordered_with_buffersize(make: Make) -> None:
    """ordered=False and buffersize together give every result once."""
    items = Counted(200)
    with make(2) as executor:
        results = executor.map(deeds.double, items, ordered=False, buffersize=5)
        assert items.given == 5
        got = []
        for value in results:
            got.append(value)
            assert items.given <= len(got) + 5
    assert sorted(got) == [2 * number for number in range(200)]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("chunksize", [1, 5])
def test_error_ends_a_map(make: Make, tmp_path: Path, chunksize: int, ordered: bool) -> None:
    """An item's error is raised in its place and cancels what was not handed out."""
    with make(1) as executor:
        results = executor.map(fail_or_note, [str(tmp_path)] * 5000, range(5000), chunksize=chunksize, ordered=ordered)
        got = []
        with pytest.raises(ValueError, match="bad 12"):
            got.extend(results)  # extend keeps what came before the error only if the list is read one by one
        with pytest.raises(StopIteration):
            next(results)
    assert len(deeds.notes(tmp_path)) < 5000


def fail_or_note(directory: str, number: int) -> int:
    deeds.note(directory, number)
    return deeds.fail_at(number, 12)


def test_values_before_an_error_come_first(make: Make) -> None:
    """With chunks too, every item before the bad one is yielded."""
    with make(2) as executor:
        for chunksize in (1, 4, 100):
            results = executor.map(deeds.fail_at, range(50), [12] * 50, chunksize=chunksize)
            assert [next(results) for _ in range(12)] == list(range(12))
            with pytest.raises(ValueError, match="bad 12"):
                next(results)


def test_map_timeout(make: Make, tmp_path: Path) -> None:
    """A map that is not done in time raises TimeoutError, and takes its rest back."""
    with make(1) as executor:
        for ordered in (True, False):
            results = executor.map(deeds.hold, [str(tmp_path)] * 20, range(20), timeout=0.2, ordered=ordered)
            with pytest.raises(TimeoutError):
                list(results)
        assert wait_until(lambda: executor.status().queued == 0)
        deeds.let_go(tmp_path)
    assert len(deeds.notes(tmp_path)) <= 4


def test_closing_a_map_takes_the_rest_back(make: Make, tmp_path: Path) -> None:
    """Closing the iterator cancels what was not handed out."""
    with make(1) as executor:
        results = executor.map(deeds.note_and_return, [str(tmp_path)] * 20_000, range(20_000))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        results.close()  # type: ignore[attr-defined]
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
    assert len(deeds.notes(tmp_path)) < 20_000


def test_endless_input_keeps_memory_flat() -> None:
    """An endless generator with a buffersize runs in memory that does not grow with what was yielded."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    with make_local(2) as executor:
        submit = executor._root.submit

        def watched(*args: Any, **kwargs: Any) -> Any:
            future = submit(*args, **kwargs)
            alive.add(future)
            return future

        executor._root.submit = watched  # type: ignore[method-assign]
        results = executor.map(deeds.double, Counted(), buffersize=50)
        for _ in range(3000):
            next(results)
        gc.collect()
        assert len(alive) <= 60
        assert len(executor._root.session.tasks) <= 51
        results.close()  # type: ignore[attr-defined]
        executor._root.submit = submit  # type: ignore[method-assign]


def test_chunk_whose_worker_dies(make: Make, tmp_path: Path) -> None:
    """When a chunk kills its worker only its items run again, and the map gives every result in order."""
    with make(2, retries=2) as executor:
        results = list(executor.map(deeds.die_if, range(60), [(7, 33)] * 60, [str(tmp_path)] * 60, chunksize=10))
    assert results == list(range(60))
    noted = deeds.notes(tmp_path)
    assert {word for word in noted if noted.count(word) > 1} <= {str(number) for number in [*range(10), *range(30, 40)]}


def test_bad_map_arguments(make: Make) -> None:
    """Arguments of map that cannot be meant are refused at once."""
    with make(1) as executor:
        for arguments in ({"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}, {"buffersize": -3}):
            with pytest.raises(ValueError, match=next(iter(arguments))):
                executor.map(deeds.double, [1], **arguments)
        with pytest.raises(TypeError, match="buffersize"):
            executor.map(deeds.double, [1], buffersize=1.5)  # type: ignore[arg-type]


# ---- limits and ends


def test_max_pending_blocks(tmp_path: Path) -> None:
    """submit blocks while max_pending tasks are pending, and goes on when one ends, fails or is cancelled."""
    with make_local(1, max_pending=2) as executor:
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        queued = executor.submit(deeds.double, 1)
        later: list[Any] = []
        blocked = threading.Thread(target=lambda: later.append(executor.submit(deeds.double, 2)))
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive()
        assert queued.cancel()
        blocked.join(WAIT_S)
        assert not blocked.is_alive()
        deeds.let_go(tmp_path)
        assert held.result(WAIT_S) == "held"
        assert later[0].result(WAIT_S) == 4
        for _ in range(10):
            with pytest.raises(TypeError):
                executor.submit(deeds.double, deeds.Unpicklable()).result(WAIT_S)
            with pytest.raises(ValueError, match="no"):
                executor.submit(deeds.fail, ValueError("no")).result(WAIT_S)
        assert list(executor.map(deeds.double, range(20))) == [2 * number for number in range(20)]


def test_shutdown_frees_who_waits_for_room(tmp_path: Path) -> None:
    """A submit blocked by max_pending does not outlive the executor: it raises RuntimeError."""
    executor = make_local(1, max_pending=1)
    executor.submit(deeds.hold, str(tmp_path))
    caught: list[BaseException] = []

    def submit() -> None:
        try:
            executor.submit(deeds.double, 1)
        except RuntimeError as error:
            caught.append(error)

    blocked = threading.Thread(target=submit)
    blocked.start()
    assert wait_until(lambda: deeds.notes(tmp_path))
    executor.shutdown(wait=False)
    deeds.let_go(tmp_path)
    blocked.join(WAIT_S)
    assert not blocked.is_alive()
    assert "shutdown" in str(caught[0])


def test_cancel_futures(make: Make, tmp_path: Path) -> None:
    """shutdown(cancel_futures=True) finishes what runs and cancels the rest."""
    executor = make(1)
    running = executor.submit(deeds.hold, str(tmp_path), "held")
    assert wait_until(lambda: deeds.notes(tmp_path))
    queued = [executor.submit(deeds.double, number) for number in range(50)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert sum(future.cancelled() for future in queued) >= 49
    deeds.let_go(tmp_path)
    executor.shutdown()
    assert running.result(0) == "held"
    assert all(future.done() for future in queued)


def test_submit_after_shutdown(make: Make) -> None:
    """A closed executor takes no more, and says so."""
    executor = make(1)
    executor.shutdown()
    executor.shutdown()
    for call in (lambda: executor.submit(deeds.double, 1), lambda: executor.map(deeds.double, [1])):
        with pytest.raises(RuntimeError, match="shutdown"):
            call()
    assert "shut down" in repr(executor)


def test_dropped_executor_finishes(make: Make, tmp_path: Path) -> None:
    """Dropping the last reference lets submitted work finish, then everything goes."""
    executor = make(1)
    futures = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(200)]
    del executor
    gc.collect()
    assert [future.result(WAIT_S) for future in futures] == list(range(200))


def test_dropped_unused_executor(make: Make) -> None:
    """An executor that was never used leaves nothing either."""
    executor = make(1)
    del executor
    gc.collect()


def test_blocks_in_blocks(make: Make) -> None:
    """Executors can be used inside one another's blocks, and one inside its own view's."""
    with make(1) as outer:
        with make(1) as inner:
            assert inner.submit(deeds.double, outer.submit(deeds.double, 1).result(WAIT_S)).result(WAIT_S) == 4
        assert outer.submit(deeds.double, 3).result(WAIT_S) == 6


@pytest.mark.parametrize("end", ["terminate_workers", "kill_workers"])
def test_ending_the_workers(make: Make, tmp_path: Path, end: str) -> None:
    """terminate_workers and kill_workers end what runs with BrokenProcessPool, cancel what is queued, take no more."""
    executor = make(1)
    running = executor.submit(deeds.start_children, str(tmp_path))
    assert wait_until(lambda: deeds.notes(tmp_path))
    queued = [executor.submit(deeds.double, number) for number in range(20)]
    getattr(executor, end)()
    with pytest.raises(BrokenProcessPool, match=end):
        running.result(WAIT_S)
    assert wait(queued, WAIT_S).done == set(queued)
    with pytest.raises(Exception, match=r"shutdown|ended by"):
        executor.submit(deeds.double, 1)
    executor.shutdown()


def test_slots_can_be_changed(make: Make, tmp_path: Path) -> None:
    """set_slots changes how many tasks run at once, down and up again; wait_for_slots sees it."""
    with make(2) as executor:
        executor.submit(deeds.double, 1).result(WAIT_S)
        name = executor.nodes()[0].name
        assert executor.wait_for_slots(2, WAIT_S)
        assert not executor.wait_for_slots(3, 0.05)
        executor.set_slots(name, 1)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(4)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 1)
        assert not wait_until(lambda: len(deeds.notes(tmp_path)) > 1, 0.2)
        executor.set_slots(name, 2)
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="0 or more"):
            executor.set_slots(name, -1)
        with pytest.raises(ValueError, match="nowhere"):
            executor.set_slots("nowhere", 1)


def test_nodes_come_and_go(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """A node can be added to and removed from a working executor; what ran there finishes, the rest runs elsewhere."""
    with ClusterExecutor(1, nodes="local", secret=shared_agent.secret) as executor:
        executor.add_node(shared_agent.address)
        assert executor.wait_for_slots(3, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(8)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 3)
        executor.remove_node("shared")
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == list(range(8))
        assert all(future.attempts == 1 for future in futures)
        assert wait_until(lambda: len(executor.nodes()) == 1)
        assert len(deeds.notes(tmp_path)) == 8
        with pytest.raises(ValueError, match="shared"):
            executor.remove_node("shared")


def test_node_removed_at_once(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """remove_node(drain=False) runs elsewhere what ran there."""
    with ClusterExecutor(1, nodes=["local", shared_agent.address], secret=shared_agent.secret) as executor:
        assert wait_until(lambda: executor.nodes()[1].state == "up")
        future = executor.options(retries=1).submit(deeds.double, 1)
        assert future.result(WAIT_S) == 2
        held = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(3)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) >= 1)
        executor.remove_node("shared", drain=False)
        deeds.let_go(tmp_path)
        assert [each.result(WAIT_S) for each in held] == [0, 1, 2]
        assert {each.node for each in held} == {"local"}


def test_status_counts(make: Make, tmp_path: Path) -> None:
    """status() and nodes() count what was done and failed, and print as tables."""
    with make(2) as executor:
        list(executor.map(deeds.double, range(10)))
        with pytest.raises(ValueError, match="no"):
            executor.submit(deeds.fail, ValueError("no")).result(WAIT_S)
        status = executor.status()
        assert (status.done, status.failed, status.queued, status.running) == (11, 1, 0, 0)
        assert sum(node.done for node in status.nodes) == 11
        assert status.nodes[0].name in str(status)
        assert "11 done (1 failed" in str(status)
        assert str(executor.nodes()[0]).startswith("node")


# ---- values


def test_large_arrays(make: Make) -> None:
    """50 MB arrays go and come back equal; a task may write into its argument, which is its own; results are writable."""
    array = numpy.arange(50_000_000 // 8, dtype="i8")
    with make(2) as executor:
        futures = [executor.submit(deeds.negate, array) for _ in range(3)]
        for future in futures:
            result, was_writable = future.result(WAIT_S)
            assert was_writable
            assert (result == -array).all()
            result[0] = 1
            assert result[0] == 1
    assert array[1] == 1
    assert array[-1] == len(array) - 1


def test_large_pickles(make: Make) -> None:
    """A pickle of 30 MB without buffers goes both ways: as argument, as keyword, as result, in an exception."""
    large = bytes(range(256)) * (30_000_000 // 256)
    with make(2) as executor:
        assert executor.submit(len, large).result(WAIT_S) == len(large)
        assert executor.submit(sorted, [large], key=None).result(WAIT_S) == [large]
        with pytest.raises(ValueError, match=r"ÿ|xff") as caught:
            executor.submit(deeds.fail, ValueError(large)).result(WAIT_S)
        assert caught.value.args == (large,)
        code = b"x" * 5_000_000
        assert executor.submit(lambda: len(code)).result(WAIT_S) == len(code)


def test_thousand_buffers_pending(make: Make, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A thousand pending tasks with 2 MB buffers each (through an agent 200) do not use up descriptors."""
    count = 1000 if "local" in request.node.name else 200
    block = numpy.zeros(2 << 20, "u1")
    with make(1) as executor:
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        before = len(os.listdir("/proc/self/fd"))
        futures = []
        for number in range(count):
            block[0] = number % 256
            block[-1] = number // 256
            futures.append(executor.submit(deeds.ends, block))
        assert len(os.listdir("/proc/self/fd")) < before + 50
        deeds.let_go(tmp_path)
        assert held.result(WAIT_S) == "held"
        assert [future.result(60) for future in futures] == [(number % 256, number // 256) for number in range(count)]


def test_workers_per_tasks(make: Make) -> None:
    """max_tasks_per_child replaces a worker after so many tasks, and loses none."""
    with make(2, max_tasks_per_child=5) as executor:
        workers = list(executor.map(deeds.pid, range(22)))
    assert max(workers.count(pid) for pid in set(workers)) <= 5


def test_environment_for_workers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """env= sets variables of the workers; the cluster's secret is never among them."""
    monkeypatch.setenv("DISTEXEC_SECRET", "8f1c2e5a9b7d4460a3c1e8f2b5d79064")
    with make(1, env={"COLOUR": "blue"}) as executor:
        assert executor.submit(os.getenv, "COLOUR").result(WAIT_S) == "blue"
        assert executor.submit(os.getenv, "DISTEXEC_SECRET").result(WAIT_S) is None


def test_initializer(make: Make) -> None:
    """The initializer runs once in each worker before its tasks, with its arguments."""
    with make(2, initializer=remember, initargs=("word", [1])) as executor:
        got = [executor.submit(recall) for _ in range(20)]
        assert {future.result(WAIT_S) for future in got} == {("word", 1)}


_kept: list[Any] = []


def remember(*args: Any) -> None:
    _kept.append(args)


def recall() -> tuple[str, int]:
    assert len(_kept) == 1
    word, numbers = _kept[0]
    return word, len(numbers)


# ---- Ctrl-C and the end of the interpreter

SCRIPT = """
import sys, threading
from tests.system import deeds
from distexec import ClusterExecutor

directory, kwargs = sys.argv[1], {kwargs}
executor = ClusterExecutor(2, **kwargs)
"""

BODIES = {
    "result": """
with executor:
    future = executor.submit(deeds.hold, directory, "a")
    try:
        future.result()
    except KeyboardInterrupt:
        print("only the wait ended", future.done())
        deeds.let_go(directory)
        print(future.result(), executor.submit(deeds.double, 4).result())
""",
    "map": """
with executor:
    results = executor.map(deeds.hold, [directory] * 1000, range(1000))
    try:
        list(results)
    except KeyboardInterrupt:
        deeds.let_go(directory)
        print(executor.submit(deeds.double, 4).result())
print(len(deeds.notes(directory)) < 10)
""",
    "block": """
with executor:
    futures = [executor.submit(deeds.hold, directory, number) for number in range(100)]
    futures[0].result()
""",
    "exit": """
futures = [executor.submit(deeds.hold, directory, number) for number in range(100)]
futures[0].result()
""",
}


def start_script(body: str, directory: Path, agent: AgentProcess | None, option: str = "-c") -> subprocess.Popen[str]:
    """Run a script with an executor, local or through the agent, in a process of its own."""
    kwargs = {"nodes": "local"} if agent is None else {"nodes": [agent.address], "secret": agent.secret}
    return subprocess.Popen([sys.executable, option, SCRIPT.format(kwargs=kwargs) + body, str(directory)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("where", ["local", "agent"])
@pytest.mark.parametrize(("body", "said", "is_interrupted"), [
    ("result", "only the wait ended False\na 8\n", False),
    ("map", "8\nTrue\n", False),
    ("block", "", True),
    ("exit", "", True),
])
def test_interrupt(request: pytest.FixtureRequest, tmp_path: Path, where: str, body: str, said: str,
                   is_interrupted: bool) -> None:
    """Ctrl-C in result() ends the wait, in map() that map; leaving the block or the interpreter by it ends everything."""
    agent = request.getfixturevalue("shared_agent") if where == "agent" else None
    script = start_script(BODIES[body], tmp_path, agent)
    assert wait_until(lambda: len(deeds.notes(tmp_path)) >= (1 if body == "result" else 2), WAIT_S)
    script.send_signal(signal.SIGINT)
    out, err = script.communicate(timeout=10)
    assert out == said, err
    assert (script.returncode == -signal.SIGINT) == is_interrupted, (script.returncode, err)
    assert ("KeyboardInterrupt" in err) == is_interrupted, err
    assert err.count("Traceback") == is_interrupted, err


@pytest.mark.parametrize("where", ["local", "agent"])
def test_work_pending_at_exit_is_done(request: pytest.FixtureRequest, tmp_path: Path, where: str) -> None:
    """A program that ends with work pending ends when that is done, as with ProcessPoolExecutor."""
    agent = request.getfixturevalue("shared_agent") if where == "agent" else None
    body = "for number in range(300): executor.submit(deeds.note_and_return, directory, number)\nprint('end')\n"
    script = start_script(body, tmp_path, agent)
    out, err = script.communicate(timeout=30)
    assert (out, err, script.returncode) == ("end\n", "", 0)
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(300))


def test_forked_child_of_the_client(make: Make) -> None:
    """A fork of a program with an open executor can end without disturbing it, and can use an executor of its own."""
    with make(1) as executor:
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
        child = os.fork()
        if child == 0:
            try:
                with make_local(1) as own:
                    os._exit(own.submit(deeds.double, 4).result(10))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
        assert executor.submit(deeds.double, 2).result(WAIT_S) == 4
