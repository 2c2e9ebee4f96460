"""`current_task()` and what tasks publish, on local workers and through an agent."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from distexec import ClusterExecutor, TaskContext, TaskKilled, current_task
from distexec.messages import BlobRef
from distexec.shipping import BlobStore, BlobWriter
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import rig
from tests.system.chores import wait_for
from tests.system.conftest import Make, make_local
from tests.system.proxy import Proxy

WAIT_S = 60.0


def here() -> TaskContext:
    """The task that runs."""
    task = current_task()
    assert task is not None
    return task


def count(number: int, path: str | None = None) -> int:
    """Publish 0 to `number` - 1, wait at a gate, return `number`."""
    for each in range(number):
        here().publish(each)
    wait_for(path)
    return number


def count_in_threads(number: int) -> int:
    """Publish from ten threads."""
    task = here()
    threads = [threading.Thread(target=lambda start=start: [task.publish(each) for each in range(start, number, 10)])
               for start in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return number


def count_and_die(path: str) -> int:
    """Publish twice and be killed, at the first attempt."""
    task = here()
    task.publish((task.attempt, "begins"))
    task.publish((task.attempt, "goes on"))
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task.attempt


def arrays(number: int, size: int) -> int:
    """Publish large arrays, each filled with its number."""
    for each in range(number):
        here().publish(numpy.full(size, each % 251, "u1"))
    return number


def describe() -> tuple[Any, ...]:
    """What a task knows of itself, here and in a thread."""
    task, found = here(), []
    thread = threading.Thread(target=lambda: found.append(current_task()))
    thread.start()
    thread.join()
    return task.task_id, task.attempt, task.node, task.cancelled, found[0].task_id, repr(task)


def in_child() -> tuple[str, str]:
    """What `current_task()`, and a context from before the fork, say in a forked child."""
    task = here()
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            task.publish("from a child")
        except RuntimeError as error:
            os.write(into, f"{current_task()}|{error}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(into)
    with os.fdopen(out) as pipe:
        said, _, error = pipe.read().partition("|")
    return said, error


left: list[Any] = []


def leave_thread(path: str) -> None:
    """Leave a thread behind that publishes when the task is over."""
    task, go = here(), threading.Event()

    def late() -> None:
        go.wait()
        try:
            task.publish("too late")
        except RuntimeError as error:
            Path(path).write_text(str(error))
    thread = threading.Thread(target=late)
    thread.start()
    left.append((thread, go))


def let_it_publish() -> None:
    """Let the thread go on that another task has left."""
    thread, go = left.pop()
    go.set()
    thread.join()


def publish_lambda() -> str:
    """Publish what cannot be pickled."""
    try:
        here().publish(threading.Lock())
    except TypeError as error:
        return str(error)
    return "nothing"


def watch_for_the_end(path: str) -> None:
    """Write down that this is to end, which leaves little time."""
    task = here()
    task.publish("watching")
    while not task.cancelled:
        pass
    Path(path).write_text("cancelled")
    time.sleep(WAIT_S)


def test_outside_a_task_there_is_none() -> None:
    """The client's own code is no task."""
    assert current_task() is None


def test_what_a_task_knows(make: Make) -> None:
    """Number, attempt and node are the future's; the same in the task's threads."""
    with make() as executor:
        future = executor.submit(describe)
        task_id, attempt, node, is_cancelled, in_thread, text = future.result(WAIT_S)
        assert (task_id, attempt, node, is_cancelled) == (future.task_id, 1, future.node, False)
        assert in_thread == task_id
        assert "running" in text


def test_in_order_and_once_each(make: Make) -> None:
    """A thousand values come as published, to several readers, before the result; late readers get them too."""
    with make() as executor:
        future = executor.submit(count, 1000)
        first = future.partials(WAIT_S)
        assert [next(first) for _ in range(10)] == list(range(10))
        assert list(future.partials(WAIT_S)) == list(range(1000))
        assert list(first) == list(range(10, 1000))
        assert future.result(WAIT_S) == 1000
        assert list(future.partials(0)) == list(range(1000))


def test_they_come_while_the_task_runs(make: Make, tmp_path: Path) -> None:
    """What was published is there although the task still runs; a reader that waits in vain is told."""
    gate = rig.gate(tmp_path)
    with make() as executor:
        future = executor.submit(count, 3, gate)
        reader = future.partials(WAIT_S)
        assert [next(reader) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(TimeoutError, match="task"):
            [*future.partials(0.05)]
        assert future.running()
        rig.await_arrival(gate)
        rig.open_gate(gate)
        assert future.result(WAIT_S) == 3


def test_threads_of_a_task_publish(make: Make) -> None:
    """Ten threads at once: nothing is lost or doubled, and each thread's own order is kept."""
    with make() as executor:
        values = list(executor.submit(count_in_threads, 500).partials(WAIT_S))
        assert sorted(values) == list(range(500))
        for start in range(10):
            assert [value for value in values if value % 10 == start] == list(range(start, 500, 10))


def test_large_values(make: Make) -> None:
    """Arrays larger than a message, three times as much as may be under way, in order and writable."""
    with make() as executor:
        number = 0
        future = executor.submit(arrays, 12, 4 << 20)
        for array in future.partials(WAIT_S):
            assert (array == number).all()
            array[0] = 7
            number += 1
        assert future.result(WAIT_S) == number == 12


def test_a_value_larger_than_what_may_be_under_way(make: Make) -> None:
    """It goes alone."""
    with make() as executor:
        sizes = [len(array) for array in executor.submit(arrays, 2, 20 << 20).partials(WAIT_S)]
        assert sizes == [20 << 20] * 2


def test_callbacks(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Called in order, also with what came before, each on its own; one that raises is logged and called again."""
    with make() as executor:
        future = executor.submit(count, 50)
        early: list[int] = []
        raised: list[int] = []

        def fail(value: int) -> None:
            raised.append(value)
            raise SystemExit(3)
        future.add_partial_callback(early.append)
        with caplog.at_level(logging.CRITICAL, logger="distexec"):
            future.add_partial_callback(fail)
            assert future.result(WAIT_S) == 50
        late: list[int] = []
        future.add_partial_callback(late.append)
        assert early == raised == late == list(range(50))


def test_a_callback_kills_the_rest(make: Make, tmp_path: Path) -> None:
    """The first good value ends the task that runs and those that wait."""
    gate = rig.gate(tmp_path)
    with make() as executor:
        future = executor.submit(count, 3, gate)
        others = [executor.submit(time.sleep, WAIT_S) for _ in range(5)]

        def stop(value: int) -> None:
            if value == 2:
                for each in [future, *others]:
                    each.kill()
        future.add_partial_callback(stop)
        with pytest.raises(TaskKilled):
            future.result(WAIT_S)
        assert all(other.exception(WAIT_S) for other in others if not other.cancelled())
        assert list(future.partials(0)) == [0, 1, 2]


def test_after_a_retry(make: Make, tmp_path: Path) -> None:
    """What the lost attempt published stays; the next one's follows, and the reader knows which is which."""
    with make() as executor:
        future = executor.submit(count_and_die, str(tmp_path / "mark"))
        reader = future.partials(WAIT_S)
        found = [(reader.attempt, *value) for value in reader]
        last = future.result(WAIT_S)
        assert last > 1
        assert found == [(1, 1, "begins"), (1, 1, "goes on"), (last, last, "begins"), (last, last, "goes on")]


def test_in_a_forked_child(make: Make) -> None:
    """It is no task, and a context that it inherited says so."""
    with make() as executor:
        task, error = executor.submit(in_child).result(WAIT_S)
        assert task == "None"
        assert "forked" in error


def test_a_thread_that_was_left_behind(tmp_path: Path) -> None:
    """Its publish fails, clearly, and no other task gets the value."""
    path = tmp_path / "said"
    with make_local(1) as executor:
        first = executor.submit(leave_thread, str(path))
        second = executor.submit(let_it_publish)
        second.result(WAIT_S)
        assert "has ended" in path.read_text()
        assert [*first.partials(0), *second.partials(0)] == []


def test_what_cannot_be_pickled(make: Make) -> None:
    """publish raises what pickling raises, and the task goes on."""
    with make() as executor:
        assert "pickle" in executor.submit(publish_lambda).result(WAIT_S)


def test_a_task_that_is_to_end_knows(make: Make, tmp_path: Path) -> None:
    """kill → `cancelled` is true for the moment that is left."""
    path = tmp_path / "seen"
    with make() as executor:
        future = executor.submit(watch_for_the_end, str(path))
        next(future.partials(WAIT_S))
        future.kill()
        with pytest.raises(TaskKilled):
            future.result(WAIT_S)
    assert path.read_text() == "cancelled"


def test_nobody_reads() -> None:
    """A task publishes more than is kept: it is not held up, and the newest are there."""
    with make_local(1) as executor:
        future = executor.submit(arrays, 40, 4 << 20)
        assert future.result(WAIT_S) == 40
        kept = [int(array[0]) for array in future.partials(0)]
        assert kept == list(range(40 - len(kept), 40))
        assert 10 < len(kept) < 20


def test_no_memory_for_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A large value finds no memory at the client: that is told, the link stays, and the others come."""
    writer, sizes = BlobStore.writer, []

    def fail_once(self: BlobStore, ref: BlobRef) -> BlobWriter:
        sizes.append(ref.size_bytes)
        if len(sizes) == 2:
            raise OSError("no memory")
        return writer(self, ref)
    monkeypatch.setattr(BlobStore, "writer", fail_once)
    with AgentProcess(slots=1) as agent, ClusterExecutor(nodes=[agent.address], secret=agent.secret) as executor:
        future = executor.submit(arrays, 4, 2 << 20)
        assert [int(array[0]) for array in future.partials(WAIT_S)] == [0, 2, 3]
        assert future.result(WAIT_S) == 4
    assert "partial result 2 of task 1" in caplog.text


def test_across_cut_links(tmp_path: Path) -> None:
    """The link is cut again and again while a task publishes small and large values: all come, in order, once each."""
    with AgentProcess(slots=1) as agent, Proxy(agent.address) as proxy, ClusterExecutor(
            nodes=[proxy.address], secret=agent.secret) as executor:
        future = executor.submit(publish_steadily, 300, str(tmp_path / "stop"))
        values: list[int] = []
        future.add_partial_callback(lambda value: values.append(int(value[0])))
        for number in range(1, 6):
            assert wait_until(lambda number=number: len(values) >= 50 * number)
            proxy.cut()
            proxy.heal()
        assert future.result(WAIT_S) == 300
        assert values == list(range(300))
        assert future.attempts == 1


def publish_steadily(number: int, path: str) -> int:
    """Publish arrays, some of them large, every few milliseconds."""
    for each in range(number):
        here().publish(numpy.full(200_000 if each % 10 else 1, each))
        threading.Event().wait(0.003)
    return number


def test_while_the_link_is_away(tmp_path: Path) -> None:
    """The link is down until the task has ended: what it published comes with the outcome, before it."""
    mark = tmp_path / "mark"
    with AgentProcess(slots=1) as agent, Proxy(agent.address) as proxy, ClusterExecutor(
            nodes=[proxy.address], secret=agent.secret) as executor:
        gate = rig.gate(tmp_path)
        future = executor.submit(wait_and_count, gate, 500, str(mark))
        rig.await_arrival(gate)
        proxy.cut(silently=True)
        rig.open_gate(gate)
        assert wait_until(mark.exists)
        proxy.cut()
        proxy.heal()
        assert list(future.partials(WAIT_S)) == list(range(500))
        assert future.result(WAIT_S) == 500
        assert future.attempts == 1


def wait_and_count(path: str, number: int, mark: str) -> int:
    """Publish once told to, and leave a mark."""
    wait_for(path)
    count(number)
    Path(mark).touch()
    return number
