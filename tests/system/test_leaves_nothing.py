"""Whatever happens, nothing is left: no process, thread, socket, shared memory or file.

The fixture `leaves_nothing` looks after every test; here are the ends that are not orderly.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from distexec import ClusterExecutor
from tests.agents import ROOT, AgentProcess
from tests.leaks import Footprint, wait_until
from tests.system import deeds
from tests.system.conftest import Make, make_local
from tests.system.test_faults import is_gone

WAIT_S = 20.0

CLIENT = """
import sys
from tests.system import deeds
from distexec import ClusterExecutor
executor = ClusterExecutor({kwargs})
large = bytes(3 << 20)
futures = [executor.submit(deeds.start_children, sys.argv[1]) for _ in range(2)]
futures += [executor.submit(deeds.double, large) for _ in range(20)]
{end}
futures[0].result()
"""

ENDS = {
    "killed": ("", True),
    "killed while a child of its own lives": ("import subprocess; child = subprocess.Popen(['true'])", True),
    "os._exit": ("deeds.wait_for_file(sys.argv[1] + '/go'); import os; os._exit(3)", False),
    "an exception": ("deeds.wait_for_file(sys.argv[1] + '/go'); [each.kill() for each in futures]; 1 / 0", False),
}


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize("context", ["template", "spawn"])
def test_client_ends(tmp_path: Path, end: str, context: str) -> None:
    """However a client in local mode ends, its workers, what they started, its shared memory and files go at once."""
    code, is_killed = ENDS[end]
    kwargs = "2, nodes='local'"
    if context == "spawn":
        kwargs += ", mp_context=__import__('multiprocessing').get_context('spawn')"
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n" + "\n".join(
        "    " + line for line in CLIENT.format(kwargs=kwargs, end=code).splitlines()))
    client = subprocess.Popen([sys.executable, str(script), str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
    processes = [*deeds.pids(tmp_path), *(int(pid) for line in deeds.notes(tmp_path) for pid in line.split())]
    if is_killed:
        client.kill()
    else:
        deeds.let_go(tmp_path)
    assert client.wait(WAIT_S) != 0
    assert wait_until(lambda: all(map(is_gone, processes)), 5), [each for each in processes if not is_gone(each)]


def test_worker_and_template_killed_together(make: Make, tmp_path: Path) -> None:
    """The whole tree of worker processes can be killed at once; it is built anew, and nothing of the old one stays."""
    with make(2, retries=1) as executor:
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        template = psutil.Process(psutil.Process(deeds.pids(tmp_path)[0]).ppid())
        for each in [*template.children(recursive=True), template]:
            each.kill()
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]


def test_template_of_an_agent_killed(tmp_path: Path) -> None:
    """A template killed on an agent takes along even what tasks left in sessions of their own, which nobody watches then."""
    with AgentProcess(slots=1) as agent, ClusterExecutor(nodes=[agent.address], secret=agent.secret, retries=1) as executor:
        stray = executor.submit(deeds.abandon_a_child).result(WAIT_S)
        [template] = psutil.Process(agent.process.pid).children()
        os.kill(psutil.Process(stray).ppid(), signal.SIGKILL)
        assert wait_until(lambda: psutil.Process(stray).ppid() == template.pid, WAIT_S)
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
        template.kill()
        assert wait_until(lambda: is_gone(stray), WAIT_S)
        deeds.let_go(tmp_path)
        assert held.result(WAIT_S) == "held"
        assert wait_until(lambda: len(psutil.Process(agent.process.pid).children()) == 1, WAIT_S), "zombies stay"


def test_many_executors(make: Make) -> None:
    """Executors that come and go leave no threads and descriptors behind, not even while the program runs."""
    with make(1) as executor:
        executor.submit(deeds.double, 1).result(WAIT_S)
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(8):
        with make(1) as executor:
            executor.submit(deeds.double, 1).result(WAIT_S)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert threading.active_count() <= threads


def test_results_hold_no_descriptors(make: Make) -> None:
    """Large results that the program keeps cost memory, not descriptors."""
    with make(2) as executor:
        before = len(os.listdir("/proc/self/fd"))
        results = list(executor.map(bytes, [2 << 20] * 60))
        assert wait_until(lambda: len(os.listdir("/proc/self/fd")) < before + 20), os.listdir("/proc/self/fd")
        assert len(results) == 60


def test_constructor_that_fails() -> None:
    """An executor that could not be made leaves nothing."""
    before = Footprint()
    for arguments in ({"nodes": ["no-such-host.invalid"], "secret": "8f1c2e5a9b7d4460a3c1e8f2b5d79064"},
                      {"nodes": "local", "initializer": deeds.double, "initargs": (deeds.Unpicklable(),)}):
        with pytest.raises((ValueError, TypeError)):
            ClusterExecutor(**arguments)  # type: ignore[arg-type]
    assert not before.leaks()


def test_abandoned_iterators_and_futures(make: Make) -> None:
    """Futures and map iterators that nobody looks at again keep nothing alive."""
    executor = make(2)
    iterator = executor.map(deeds.double, range(1000))
    next(iterator)
    executor.submit(deeds.fail, ValueError("never seen"))
    del iterator, executor
    gc.collect()


def test_executor_in_a_cycle() -> None:
    """An executor that only the garbage collector finds is ended too."""
    executor = make_local(1)
    executor.submit(deeds.double, 1)
    executor.itself = executor  # type: ignore[attr-defined]
    del executor
    gc.collect()


def test_agent_killed_under_work(tmp_path: Path) -> None:
    """An agent killed with -9 leaves no processes; the files in its spool go when the next one starts there."""
    spool = tmp_path / "spool"
    spool.mkdir()
    with AgentProcess(slots=1, name="bystander", arguments=("--spool", str(spool))):
        with AgentProcess(slots=2, arguments=("--spool", str(spool))) as agent, \
                ClusterExecutor(nodes=[agent.address], secret=agent.secret, nodes_timeout=0.2) as executor:
            executor.submit(deeds.start_children, str(tmp_path))
            assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
            processes = [*deeds.pids(tmp_path), *map(int, deeds.notes(tmp_path)[0].split())]
            agent.process.kill()
            agent.process.wait()
            assert wait_until(lambda: all(map(is_gone, processes)), 5)
        assert len(list(spool.iterdir())) == 2
        with AgentProcess(slots=1, arguments=("--spool", str(spool))):
            assert len(list(spool.iterdir())) == 2, "the killed one's is gone, the bystander's is not"
    assert not list(spool.iterdir())
