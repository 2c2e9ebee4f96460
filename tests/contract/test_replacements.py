"""What CPython's tests ask by looking inside ProcessPoolExecutor, asked through the public interface."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from pickle import PicklingError
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.contract.chores import PATIENCE_S, ErrorAtPickle, double, fail_to_initialize, has_module, stay
from tests.contract.substitute import IS_PEER, AgentExecutor, LocalExecutor, TemplateExecutor, import_line
from tests.leaks import wait_until

Make = Callable[..., Executor]


@pytest.fixture(params=["template", "forkserver", "agent"])
def make(request: pytest.FixtureRequest) -> Make:
    """A constructor of executors, for each kind of worker."""
    if request.param == "agent":
        request.getfixturevalue("agent")
        return AgentExecutor
    if request.param == "template":
        return TemplateExecutor

    def make_local(*args: Any, **kwargs: Any) -> Executor:
        return LocalExecutor(*args, mp_context=multiprocessing.get_context("forkserver"), **kwargs)
    return make_local


def let_go(directory: Path) -> None:
    (directory / "go").touch()


def staying(directory: Path) -> set[int]:
    """The processes that noted that they are here."""
    return {int(name) for name in os.listdir(directory) if name != "go"}


def wait_staying(directory: Path, count: int) -> set[int]:
    assert wait_until(lambda: len(staying(directory)) >= count, PATIENCE_S)
    return staying(directory)


def test_killed_worker(make: Make, tmp_path: Path) -> None:
    """A worker killed from outside fails its task with BrokenProcessPool; unlike there, the pool stays usable."""
    with make(1) as executor:
        careful: Any = executor if IS_PEER else executor.options(retries=0)
        future = careful.submit(stay, str(tmp_path))
        [pid] = wait_staying(tmp_path, 1)
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(BrokenProcessPool):
            future.result(PATIENCE_S)
        if not IS_PEER:
            assert executor.submit(pow, 2, 8).result(PATIENCE_S) == 256


def test_saturation(make: Make, tmp_path: Path) -> None:
    """However much is queued, as many processes run tasks as there are workers, and then all is done."""
    with make(3) as executor:
        futures = [executor.submit(stay, str(tmp_path)) for _ in range(45)]
        here = wait_staying(tmp_path, 3)
        let_go(tmp_path)
        assert {future.result(PATIENCE_S) for future in futures} == here
    assert len(here) == 3


def test_idle_worker_is_used_again(make: Make) -> None:
    """One worker runs task after task in the same process."""
    with make(1) as executor:
        assert len({executor.submit(os.getpid).result(PATIENCE_S) for _ in range(20)}) == 1


def test_max_tasks_per_child(make: Make) -> None:
    """After that many tasks a worker is replaced by a new process."""
    with make(1, max_tasks_per_child=3) as executor:
        pids = [executor.submit(os.getpid).result(PATIENCE_S) for _ in range(7)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4] == pids[5] != pids[6]


def test_max_tasks_per_child_gives_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a context, each new worker starts clean: it has inherited nothing that is in the client's memory."""
    monkeypatch.setitem(sys.modules, "made_in_the_client", ModuleType("made_in_the_client"))
    with TemplateExecutor(1, max_tasks_per_child=1) as executor:
        assert [executor.submit(has_module, "made_in_the_client").result(PATIENCE_S) for _ in range(3)] == [False] * 3


@pytest.mark.skipif(IS_PEER, reason="ProcessPoolExecutor leaves processes here, and hangs at exit")
def test_no_thread_can_be_started(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the interpreter starts no more threads, work fails with an error; nothing hangs."""
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises((RuntimeError, BrokenProcessPool)):
            make(2).submit(double, 4).result(PATIENCE_S)


def test_workers_end_with_shutdown(make: Make, tmp_path: Path) -> None:
    """Workers finish what they run; after shutdown none is left."""
    executor = make(3)
    futures = [executor.submit(stay, str(tmp_path)) for _ in range(3)]
    here = wait_staying(tmp_path, 3)
    let_go(tmp_path)
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in here), PATIENCE_S)


def test_workers_end_with_the_block(make: Make) -> None:
    """Leaving the with block waits for the results, and no worker is left."""
    with make(2) as executor:
        values = executor.map(double, range(-5, 5))
        pid = executor.submit(os.getpid)
    assert list(values) == [double(x) for x in range(-5, 5)]
    assert wait_until(lambda: not psutil.pid_exists(pid.result()), PATIENCE_S)


def test_dropping_the_executor_ends_it(make: Make) -> None:
    """Work submitted is done although nobody holds the executor any more; then no worker is left."""
    executor = make(2)
    futures = [executor.submit(double, x) for x in range(10)]
    pid = executor.submit(os.getpid)
    del executor
    assert [future.result(PATIENCE_S) for future in futures] == [double(x) for x in range(10)]
    assert wait_until(lambda: not psutil.pid_exists(pid.result(PATIENCE_S)), PATIENCE_S)


def test_shutdown_without_waiting(make: Make, tmp_path: Path) -> None:
    """shutdown(wait=False) returns while tasks run; they finish, and no worker is left."""
    executor = make(2)
    running = executor.submit(stay, str(tmp_path))
    futures = [executor.submit(double, x) for x in range(10)]
    [pid] = wait_staying(tmp_path, 1)
    executor.shutdown(wait=False)
    assert not running.done()
    let_go(tmp_path)
    assert running.result(PATIENCE_S) == pid
    assert [future.result(PATIENCE_S) for future in futures] == [double(x) for x in range(10)]
    assert wait_until(lambda: not psutil.pid_exists(pid), PATIENCE_S)


def test_pickling_error_and_shutdown_without_waiting(make: Make) -> None:
    """A call that cannot be pickled fails with its own error, also when shutdown follows at once; all threads end."""
    threads = set(threading.enumerate())
    with make(2) as executor:
        executor.submit(id, 42).result(PATIENCE_S)
        future = executor.submit(id, ErrorAtPickle())
        executor.shutdown(wait=False)
        with pytest.raises(PicklingError):
            future.result(PATIENCE_S)
    assert wait_until(lambda: set(threading.enumerate()) <= threads, PATIENCE_S)


def test_submitting_never_blocks(make: Make, tmp_path: Path) -> None:
    """With every worker busy thousands of tasks can be submitted, and all are done in the end."""
    with make(2) as executor:
        staying_on = [executor.submit(stay, str(tmp_path)) for _ in range(2)]
        wait_staying(tmp_path, 2)
        futures = [executor.submit(double, x) for x in range(5000)]
        assert not any(future.done() for future in staying_on)
        let_go(tmp_path)
        assert not wait(futures, PATIENCE_S).not_done
        assert [future.result() for future in futures] == [double(x) for x in range(5000)]


def test_failing_initializer(make: Make) -> None:
    """An initializer that raises breaks the executor: what is queued and what is submitted later fails."""
    with make(2, initializer=fail_to_initialize) as executor:
        with pytest.raises(BrokenExecutor) as caught:
            executor.submit(os.getpid).result(PATIENCE_S)
        if not IS_PEER:
            assert isinstance(caught.value.__cause__, ValueError)
            assert str(caught.value.__cause__) == "error in initializer"
        with pytest.raises(BrokenExecutor):
            executor.submit(os.getpid)


SCRIPT = """
import multiprocessing
from concurrent.futures import BrokenExecutor
from tests.contract.chores import fail_to_initialize

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    with {executor_type}(2, mp_context=context, initializer=fail_to_initialize, initargs=(queue,)) as executor:
        try:
            executor.submit(id, 1).result(60)
        except BrokenExecutor:
            print("broken")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("executor_type", [LocalExecutor, TemplateExecutor])
def test_failing_initializer_leaks_no_semaphore(executor_type: type[Executor], method: str) -> None:
    """A queue given to a failing initializer is tidied up: multiprocessing has nothing to complain about at the end."""
    script = import_line(executor_type) + SCRIPT.format(method=method, executor_type=executor_type.__name__)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout == "broken\n"
    assert "leaked" not in done.stderr
