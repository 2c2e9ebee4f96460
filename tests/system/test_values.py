"""Shared and repeated values: what crosses the link, what is loaded, what is copied, and that nothing stays."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from distexec import ClusterExecutor, current_task, worker
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import rig
from tests.system.chores import wait_for
from tests.system.conftest import Make, make_local
from tests.system.proxy import Proxy

WAIT_S = 60.0
MIB = 1 << 20
SLACK_BYTES = 2 * MIB
"""What else crosses a link in a test."""

kept: list[Any] = []
loads = 0


class Model:
    """Counts how often it is unpickled in a process, and has a large and a small part."""

    def __init__(self, weights: Any, names: dict[str, int]) -> None:
        self.weights, self.names = weights, names

    def __setstate__(self, state: dict[str, Any]) -> None:
        global loads
        loads += 1
        vars(self).update(state)


def model(size: int = 4 * MIB) -> Model:
    """One that has a large array and a large pickle beside it."""
    return Model(numpy.arange(size, dtype="u1"), {f"name {number}": number for number in range(200_000)})


def use(shared: Model, number: int) -> tuple[int, int, int]:
    """Read it; give the process and how often that has loaded one."""
    assert int(shared.weights[number]) == shared.names[f"name {number}"] == number
    return number, os.getpid(), loads


def first_of(pair: list[dict[str, Any]]) -> tuple[Any, int]:
    """Look into a container."""
    return pair[0]["value"].weights[3], loads


def total(array: Any, *_: Any) -> int:
    """Sum it up."""
    return int(array.sum())


def write(array: Any, value: int) -> tuple[int, int]:
    """Change the array, and say what it was."""
    before = int(array[0])
    array[:] = value
    return before, os.getpid()


def count_kept(path: str | None = None) -> tuple[int, int]:
    """How many shared values this worker keeps."""
    wait_for(path)
    here = worker.this_worker
    assert here is not None
    return os.getpid(), len(here.keeper._kept) if here.keeper is not None else 0  # type: ignore[attr-defined]


def hold(array: Any) -> None:
    """Keep it beyond the task."""
    kept[:] = [array]


def held() -> int:
    """Sum up what an earlier task has kept."""
    return int(kept[0].sum())


def set_global(shared: Any = None) -> None:
    """An initializer, or a setup."""
    kept[:] = [shared]


def held_sum(_: int) -> int:
    """Use what the initializer was given."""
    return int(kept[0].weights.sum())


def wait_and_use(path: str, shared: Model) -> tuple[int, int, int]:
    """Use it once told to."""
    wait_for(path)
    return use(shared, 5)


def die_once(path: str, shared: Model) -> tuple[int, int, int]:
    """Be killed with it at hand, at the first attempt."""
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return use(shared, 7)


def smaps(pid: int | str, prefix: str = "Pss") -> int:
    """Sum up a number of a process's mapped memory files, in bytes."""
    found, is_file = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_file = "memfd:distexec" in line
        elif is_file and line.startswith(f"{prefix}:"):
            found += int(line.split()[1]) << 10
    return found


def read_all(array: Any, path: str) -> tuple[int, int, int]:
    """Touch every page, wait until all do, and measure this process's share of it and what it has alone."""
    assert int(array.sum()) == len(array)
    wait_for(path)
    return os.getpid(), smaps("self"), smaps("self", "Private_Dirty")


def pss_of(array: Any, paths: list[str], executor: Any) -> list[tuple[int, int, int]]:
    """Have one task per gate read the array, all at once, and give what each measured."""
    futures = [executor.submit(read_all, array, path) for path in paths]
    for path in paths:
        rig.await_arrival(path)
    found = []
    for path, future in zip(paths, futures, strict=True):
        rig.open_gate(path)
        found.append(future.result(WAIT_S))
    return found


# ---- share


def test_tasks_get_the_value_and_load_it_once(make: Make) -> None:
    """As an argument, in containers, as a keyword, in a closure, in map and through views: one load per worker."""
    with make() as executor, executor.share(model()) as shared:
        found = [executor.submit(use, shared, number).result(WAIT_S) for number in range(5)]
        found += executor.map(use, [shared] * 50, range(50), timeout=WAIT_S)
        found += executor.options(retries=0).map(use, [shared] * 50, range(50), timeout=WAIT_S)
        found.append(executor.submit(use, number=9, shared=shared).result(WAIT_S))
        found.append(executor.submit(lambda: use(shared, 8)).result(WAIT_S))
        assert {count for _, _, count in found} == {1}
        assert executor.submit(first_of, [{"value": shared}]).result(WAIT_S) == (3, 1)


def test_what_a_task_writes_stays_in_its_worker(make: Make) -> None:
    """A worker's later tasks see it, its neighbours and the client do not, and the next loads are as it was."""
    array = numpy.zeros(4 * MIB, "u1")
    with make(1) as executor, executor.share(array) as shared:
        assert executor.submit(write, shared, 7).result(WAIT_S)[0] == 0
        before, pid = executor.submit(write, shared, 8).result(WAIT_S)
        assert before == 7
        assert not array.any()
        os.kill(pid, signal.SIGKILL)
        assert executor.submit(write, shared, 9).result(WAIT_S)[0] == 0


def test_free_while_calls_wait(make: Make, tmp_path: Path) -> None:
    """Calls that were submitted before have the value still; new ones fail; then no worker keeps it, nor the client."""
    gate = rig.gate(tmp_path)
    with make(1) as executor:
        shared = executor.share(model())
        first = executor.submit(wait_and_use, gate, shared)
        others = [executor.submit(use, shared, number) for number in range(5)]
        rig.await_arrival(gate)
        shared.free()
        assert shared.is_freed
        with pytest.raises(ValueError, match="share the value again"):
            executor.submit(use, shared, 1).result(WAIT_S)
        rig.open_gate(gate)
        assert first.result(WAIT_S)[0] == 5
        assert [other.result(WAIT_S)[0] for other in others] == list(range(5))
        assert_forgotten(executor)
        shared.free()


def assert_forgotten(executor: ClusterExecutor) -> None:
    """Nothing is kept of shared values, here or by a worker."""
    root = executor._root
    assert wait_until(lambda: executor.submit(count_kept).result(WAIT_S)[1] == 0)
    assert wait_until(lambda: not root.store._blobs)


def test_what_a_worker_has_mapped_is_held_for_it() -> None:
    """Of a shared array the pool holds a reference for each worker that has it, until that lets go."""
    with make_local(1) as executor:
        with executor.share(numpy.ones(MIB, "u1")) as shared:
            (ref,) = executor._root.store._blobs.values()
            assert executor.submit(total, shared).result(WAIT_S) == MIB
            assert executor._root.supply.pool.count_kept(ref.ref) == 1  # type: ignore[union-attr]
        assert_forgotten(executor)


def test_dropping_the_handle(make: Make) -> None:
    """The garbage collector frees it, also when it stood in closures and globals of functions that were sent."""
    with make(1) as executor:
        handles = [executor.share(model())]
        assert executor.submit(lambda: use(handles[0], 8)[0]).result(WAIT_S) == 8
        assert executor.submit(use, handles[0], 3).result(WAIT_S)[0] == 3
        assert executor.submit(count_kept).result(WAIT_S)[1] == 1
        handles.clear()
        gc.collect()
        assert_forgotten(executor)


def test_shared_twice(make: Make) -> None:
    """Two handles of equal values are one value below; it stays until both are gone."""
    with make(1) as executor:
        one, two = executor.share(model()), executor.share(model())
        assert [executor.submit(use, each, 4).result(WAIT_S)[2] for each in (one, two)] == [1, 1]
        one.free()
        time.sleep(0.5)  # in vain, for nothing is to happen
        assert executor.submit(count_kept).result(WAIT_S)[1] == 1
        assert executor.submit(use, two, 4).result(WAIT_S)[2] == 1
        two.free()
        assert_forgotten(executor)
        with executor.share(model()) as three:
            assert executor.submit(use, three, 4).result(WAIT_S)[2] == 2


def test_small_values(make: Make) -> None:
    """What needs no blob is loaded once all the same, and forgotten."""
    with make(1) as executor:
        with executor.share(Model(numpy.arange(9), {"name 1": 1})) as shared:
            assert [executor.submit(use, shared, 1).result(WAIT_S)[2] for _ in range(3)] == [1, 1, 1]
        assert_forgotten(executor)


def test_a_worker_that_is_new(make: Make, tmp_path: Path) -> None:
    """A retry in another worker, and workers that come later, load it for themselves."""
    with make(1) as executor, executor.share(model()) as shared:
        before = executor.submit(use, shared, 6).result(WAIT_S)
        again = executor.submit(die_once, str(tmp_path / "mark"), shared).result(WAIT_S)
        assert before[1] != again[1]
        assert (before[2], again[2]) == (1, 1)


def test_what_outlives_the_handle(make: Make) -> None:
    """A task keeps the array; the handle goes and other values take the memory: it is as it was."""
    with make(1) as executor:
        with executor.share(numpy.full(4 * MIB, 3, "u1")) as shared:
            executor.submit(hold, shared).result(WAIT_S)
        assert_forgotten(executor)
        for value in range(4, 10):
            executor.submit(total, numpy.full(4 * MIB, value, "u1")).result(WAIT_S)
        assert executor.submit(held).result(WAIT_S) == 12 * MIB


def test_a_closure_that_is_forgotten(make: Make) -> None:
    """The same, where it came with a function."""
    with make(1) as executor:
        with executor.share(numpy.full(4 * MIB, 3, "u1")) as shared:
            executor.submit(lambda: hold(shared)).result(WAIT_S)
        assert_forgotten(executor)
        for value in range(4, 10):
            executor.submit(total, numpy.full(4 * MIB, value, "u1")).result(WAIT_S)
        assert executor.submit(held).result(WAIT_S) == 12 * MIB


def test_a_function_that_is_forgotten(make: Make) -> None:
    """What a task keeps of a large constant is its own when the function, and so the memory, is let go."""
    constant = numpy.full(4 * MIB, 3, "u1")
    with make(1) as executor:
        executor.submit(lambda: hold(constant)).result(WAIT_S)
        store, values = executor._root.store, executor._root.values
        values.forget_code([blob.ref for blob in store._blobs.values()])
        assert wait_until(lambda: not store._blobs)
        for value in range(4, 10):
            executor.submit(total, numpy.full(4 * MIB, value, "u1")).result(WAIT_S)
        assert executor.submit(held).result(WAIT_S) == 12 * MIB


def test_a_handle_outlives_its_executor() -> None:
    """It can be freed, and dropped, when everything is over."""
    with make_local(1) as executor:
        shared, other = executor.share(model()), executor.share(model(9))
        executor.submit(use, shared, 1).result(WAIT_S)
    shared.free()
    del other
    gc.collect()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_context(method: str) -> None:
    """They load it once, and publish, as others do."""
    context = multiprocessing.get_context(method)
    with make_local(1, mp_context=context) as executor, executor.share(model()) as shared:
        assert [executor.submit(use, shared, number).result(WAIT_S)[2] for number in range(3)] == [1, 1, 1]
        future = executor.submit(publish_one)
        assert list(future.partials(WAIT_S)) == [("local", future.task_id)]
    assert not executor._root.store._blobs


def publish_one() -> None:
    """Publish what the task knows."""
    task = current_task()
    assert task is not None
    task.publish((task.node, task.task_id))


def test_for_setup(make: Make) -> None:
    """resetup takes a handle for the value."""
    with make(1, setup=set_global) as executor, executor.share(Model(numpy.ones(MIB // 2, "u1"), {})) as shared:
        executor.resetup(None, shared)
        assert executor.submit(held_sum, 1).result(WAIT_S) == MIB // 2


def test_in_initargs(make: Make) -> None:
    """A handle of one executor may prepare the workers of another: there it is a value like others."""
    with make_local(1) as executor, executor.share(Model(numpy.ones(MIB // 2, "u1"), {})) as shared, make(
            1, initializer=set_global, initargs=(shared,)) as other:
        assert list(other.map(held_sum, range(3), timeout=WAIT_S)) == [MIB // 2] * 3


def parent(executor: Any, size: int) -> list[int]:
    """Share a value with nested calls."""
    with executor.share(numpy.ones(size, "u1")) as shared:
        futures = [executor.submit(total, shared, number) for number in range(4)]
        futures.append(executor.submit(lambda: total(shared)))
        return [future.result(WAIT_S) for future in futures]


@pytest.mark.parametrize("size", [10, 3 * MIB])
def test_in_nested_calls(make: Make, size: int) -> None:
    """A task shares a value with the calls that it makes."""
    with make() as executor:
        assert executor.submit(parent, executor, size).result(WAIT_S) == [size] * 5


def test_in_a_durable_session(make: Make, tmp_path: Path) -> None:
    """Calls with shared values are recorded like others, and found again by them."""
    path = tmp_path / "journal"
    with make(1, durable=path) as executor, executor.share(model()) as shared:
        assert executor.submit(use, shared, 5).result(WAIT_S)[0] == 5
    with make(1, durable=path) as executor, executor.share(model()) as shared:
        future = executor.submit(use, shared, 5)
        assert future.result(WAIT_S)[0] == 5
        assert future.attempts in (0, 1)
        assert future.task_id == 1, "it was found in the journal"


def test_the_handle_is_no_value() -> None:
    """It is not copied, says how large it is, and outside a task its pickle gives the value, by every protocol."""
    with make_local(1) as executor, executor.share(numpy.ones(MIB, "u1")) as shared:
        assert copy.deepcopy([shared])[0] is copy.copy(shared) is shared
        assert MIB <= shared.size_bytes < MIB + 1000
        assert "ndarray" in repr(shared)
        for protocol in range(2, 6):
            assert int(pickle.loads(pickle.dumps(shared, protocol)).sum()) == MIB
    assert "freed" in repr(shared)


def test_what_cannot_be_shared() -> None:
    """share raises what pickling raises, and after shutdown what submit raises; nothing is left in the store."""
    with make_local(1) as executor:
        with pytest.raises(TypeError):
            executor.share([numpy.ones(MIB, "u1"), signal.signal, open(os.devnull)])  # noqa: SIM115
        assert not executor._root.store._blobs
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.share(1)


# ---- what crosses the link


@pytest.fixture
def through_proxy() -> Any:
    """An executor on an agent with two slots, and the proxy between them."""
    with AgentProcess(slots=2) as agent, Proxy(agent.address) as proxy, ClusterExecutor(
            nodes=[proxy.address], secret=agent.secret) as executor:
        executor.submit(total, numpy.ones(1)).result(WAIT_S)
        yield executor, proxy


def test_forty_tasks_with_the_same_array(through_proxy: Any) -> None:
    """Shared: the bytes cross the link once, whether the calls come together or one after the other."""
    executor, proxy = through_proxy
    before = proxy.forwarded
    with executor.share(numpy.ones(16 * MIB, "u1")) as shared:
        assert set(executor.map(total, [shared] * 20, range(20), timeout=WAIT_S)) == {16 * MIB}
        for _ in range(20):
            assert executor.submit(total, shared).result(WAIT_S) == 16 * MIB
    assert 16 * MIB < proxy.forwarded - before < 16 * MIB + SLACK_BYTES


def test_a_repeated_argument(through_proxy: Any) -> None:
    """Nobody shared it: sent once all the same, though no call has it in between; another one evicts nothing."""
    executor, proxy = through_proxy
    before = proxy.forwarded
    for _ in range(10):
        assert executor.submit(total, numpy.ones(16 * MIB, "u1")).result(WAIT_S) == 16 * MIB
    assert 16 * MIB < proxy.forwarded - before < 16 * MIB + SLACK_BYTES
    assert executor.submit(total, numpy.full(16 * MIB, 2, "u1")).result(WAIT_S) == 32 * MIB
    assert executor.submit(total, numpy.ones(16 * MIB, "u1")).result(WAIT_S) == 16 * MIB
    assert 32 * MIB < proxy.forwarded - before < 32 * MIB + SLACK_BYTES


def test_a_large_constant_in_a_closure(through_proxy: Any) -> None:
    """A function's code and what it captured cross the link once per session."""
    executor, proxy = through_proxy
    before = proxy.forwarded
    constant = numpy.ones(8 * MIB, "u1")
    for number in range(10):
        assert executor.submit(lambda n: int(constant.sum()) + n, number).result(WAIT_S) == 8 * MIB + number
    assert 8 * MIB < proxy.forwarded - before < 8 * MIB + SLACK_BYTES


def test_after_a_cut(through_proxy: Any) -> None:
    """What a node has, it has after its link was cut, too."""
    executor, proxy = through_proxy
    with executor.share(numpy.ones(16 * MIB, "u1")) as shared:
        executor.submit(total, shared).result(WAIT_S)
        before = proxy.forwarded
        proxy.cut()
        proxy.heal()
        assert executor.submit(total, shared).result(WAIT_S) == 16 * MIB
        assert proxy.forwarded - before < SLACK_BYTES


def test_freed_while_the_link_is_away(through_proxy: Any) -> None:
    """The node is told when it comes back."""
    executor, proxy = through_proxy
    shared = executor.share(numpy.ones(4 * MIB, "u1"))
    assert executor.submit(total, shared).result(WAIT_S) == 4 * MIB
    proxy.cut()
    shared.free()
    assert wait_until(lambda: executor._root.values._freed)
    proxy.heal()
    assert wait_until(lambda: {executor.submit(count_kept).result(WAIT_S)[1] for _ in range(4)} == {0})


def test_a_node_that_comes_late() -> None:
    """It is sent what it needs, once."""
    array = numpy.ones(8 * MIB, "u1")
    with AgentProcess(slots=1, name="one") as one, AgentProcess(slots=1, name="two", secret=one.secret) as two, Proxy(
            two.address) as proxy, ClusterExecutor(nodes=[one.address], secret=one.secret) as executor, executor.share(
            array) as shared:
        assert executor.submit(total, shared).result(WAIT_S) == 8 * MIB
        executor.add_node(proxy.address)
        assert executor.wait_for_slots(2, WAIT_S)
        assert set(executor.options(node="two").map(total, [shared] * 5, timeout=WAIT_S)) == {8 * MIB}
        assert 8 * MIB < proxy.forwarded < 8 * MIB + SLACK_BYTES


# ---- memory


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_machine_has_a_large_array_once(make: Make, tmp_path: Path, *, is_shared: bool) -> None:
    """Two workers read it all: each has half of it, and no page alone; as a plain argument and shared."""
    size = 64 * MIB
    array = numpy.ones(size, "u1")
    paths = [rig.gate(tmp_path, name) for name in ("one", "two")]
    with make() as executor:
        shared = executor.share(array) if is_shared else array
        found = pss_of(shared, paths, executor)
        assert len({pid for pid, _, _ in found}) == 2
        for _, own_bytes, dirty_bytes in found[:1]:  # the second is alone when it measures
            assert own_bytes <= 0.6 * size
            assert dirty_bytes < MIB


def test_a_repeated_argument_is_not_copied_here() -> None:
    """From the third time on the client's store has it already: no new memory is taken for it."""
    array = numpy.ones(8 * MIB, "u1")
    with make_local(1) as executor:
        store, places = executor._root.store, []
        for _ in range(5):
            future = executor.submit(total, array)
            assert future.result(WAIT_S) == 8 * MIB
            places.append(len(store._blobs))
        assert places[-1] == 1
        executor.submit(total, numpy.ones(3 * MIB, "u1")).result(WAIT_S)
        assert len(store._blobs) == 1, "what came once is not kept"
