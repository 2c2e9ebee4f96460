"""What the user sees when workers, agents, links and clients die, and when tasks are to be ended."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from distexec import ClusterExecutor, TaskKilled, TaskTimeout, WorkerLost
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make, make_local
from tests.system.proxy import Proxy

WAIT_S = 20.0
FAR_S = 60.0
"""A node_timeout far beyond what a test waits: what happens sooner was not left to the clock."""

WAYS = [  # how to die, exit code, signal
    ("exit0", 0, 0), ("exit3", 3, 0), ("SIGKILL", None, signal.SIGKILL), ("SIGTERM", None, signal.SIGTERM),
    ("SIGABRT", None, signal.SIGABRT), ("segfault", None, signal.SIGSEGV),
]


def assert_both_slots_work(executor: Executor, directory: Path) -> None:
    """Two tasks run at the same time, so no slot was lost."""
    directory.mkdir()
    futures = [executor.submit(deeds.hold, str(directory), number) for number in range(2)]
    assert wait_until(lambda: len(deeds.notes(directory)) == 2, WAIT_S), "a slot was lost"
    deeds.let_go(directory)
    assert [future.result(WAIT_S) for future in futures] == [0, 1]


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- workers


@pytest.mark.parametrize(("way", "exitcode", "signum"), WAYS)
def test_worker_dies(make: Make, tmp_path: Path, way: str, exitcode: int | None, signum: int) -> None:
    """A task whose worker dies each time runs retries + 1 times, then raises WorkerLost with all that is known."""
    with make(2, retries=2) as executor:
        future = executor.submit(deeds.die, way, str(tmp_path))
        with pytest.raises(BrokenProcessPool) as caught:
            future.result(WAIT_S)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
        error = caught.value
        assert isinstance(error, WorkerLost)
        assert deeds.notes(tmp_path) == [way] * 3
        assert (error.attempts, future.attempts) == (3, 3)
        assert error.pid == deeds.pids(tmp_path)[-1]
        assert (error.exitcode, error.signal) == (exitcode, signum)
        assert error.node == executor.nodes()[0].name == future.node
        if error.node == "shared":
            assert "last words" in error.stderr_tail
            if way == "segfault":
                assert "Segmentation fault" in error.stderr_tail
        assert error.node in str(error)
        assert "3 times" in str(error)
        assert pickle.loads(pickle.dumps(error)).__dict__ == error.__dict__


def test_worker_kills_its_group_or_link(make: Make, tmp_path: Path) -> None:
    """A task that kills its process group or closes its worker's link is lost like others; nothing else suffers."""
    with make(2, retries=1) as executor:
        for way in ("group", "close"):
            with pytest.raises(WorkerLost) as caught:
                executor.submit(deeds.die, way, str(tmp_path)).result(WAIT_S)
            assert caught.value.attempts == 2
            assert caught.value.pid == deeds.pids(tmp_path)[-1]
            assert executor.submit(deeds.double, way).result(WAIT_S) == way * 2
    assert deeds.notes(tmp_path) == ["group"] * 2 + ["close"] * 2


def test_group_is_the_worker_alone(make: Make, tmp_path: Path) -> None:
    """A task that signals its process group does not reach the task in the other slot."""
    with make(2) as executor:
        held = executor.options(retries=0).submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path))
        with pytest.raises(WorkerLost):
            executor.options(retries=0).submit(deeds.die, "group").result(WAIT_S)
        deeds.let_go(tmp_path)
        assert held.result(WAIT_S) == "held"


def test_retry_succeeds(make: Make, tmp_path: Path) -> None:
    """A task whose worker died runs again, and its future then has its value and counts its attempts."""
    with make(2, retries=3) as executor:
        future = executor.submit(deeds.die_first, 2, str(tmp_path))
        assert future.result(WAIT_S) == 3
        assert future.attempts == 3
        assert executor.status().retried == 2


def test_no_retries(make: Make, tmp_path: Path) -> None:
    """With retries=0 every task runs exactly once, whatever dies around it."""
    with make(2) as executor:
        careful = executor.options(retries=0)
        futures = [careful.submit(deeds.die_if, number, (5, 17, 18), str(tmp_path)) for number in range(40)]
        wait(futures, WAIT_S)
        lost = [number for number, future in enumerate(futures) if isinstance(future.exception(0), WorkerLost)]
        assert lost == [5, 17, 18]
        assert all(future.attempts == 1 for future in futures)
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(40))


def test_others_are_not_charged(make: Make, tmp_path: Path) -> None:
    """Tasks that wait behind one that kills its worker are not charged for it."""
    victims = tuple(range(3, 300, 29))
    with make(2, retries=1) as executor:
        futures = [executor.submit(deeds.die_if, number, victims, str(tmp_path)) for number in range(300)]
        assert [future.result(WAIT_S) for future in futures] == list(range(300))
        assert {number for number, future in enumerate(futures) if future.attempts > 1} == set(victims)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_of_a_context_dies(tmp_path: Path, method: str) -> None:
    """Workers that are a context's processes are replaced like others."""
    import multiprocessing

    with make_local(2, multiprocessing.get_context(method), retries=1) as executor:
        with pytest.raises(WorkerLost) as caught:
            executor.submit(deeds.die, "SIGKILL", str(tmp_path)).result(WAIT_S)
        assert (caught.value.signal, caught.value.attempts) == (signal.SIGKILL, 2)
        with pytest.raises(WorkerLost) as caught:
            executor.submit(deeds.die, "exit3", str(tmp_path)).result(WAIT_S)
        assert (caught.value.exitcode, caught.value.attempts) == (3, 2)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
    multiprocessing.util._cleanup_tests()  # type: ignore[attr-defined]


def test_what_is_no_death(make: Make) -> None:
    """SystemExit, MemoryError, endless recursion and a fork are the task's own affair, and never retried."""
    with make(1) as executor:
        for call, kind in (((deeds.exit_politely, 3), SystemExit), ((deeds.fill_memory,), MemoryError),
                           ((deeds.recurse,), RecursionError), ((deeds.fail, KeyboardInterrupt("mine")), KeyboardInterrupt),
                           ((deeds.fail, GeneratorExit()), GeneratorExit)):
            future = executor.submit(*call)
            error = future.exception(WAIT_S)
            assert type(error) is kind
            assert type(error.__cause__).__name__ == "_RemoteTraceback"
            assert future.attempts == 1
        with pytest.raises(SystemExit) as caught:
            executor.submit(deeds.exit_politely, "why").result(WAIT_S)
        assert caught.value.code == "why"
        assert executor.submit(deeds.fork_and_go_on).result(WAIT_S) == 5


def test_worker_dies_while_idle(make: Make) -> None:
    """An idle worker that is killed is replaced when it is needed, and charges nobody."""
    with make(2, retries=0) as executor:
        for _ in range(5):
            pid = executor.submit(deeds.pid, 0).result(WAIT_S)
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda pid=pid: is_gone(pid), WAIT_S)
            # The pool may not have noticed: then the task certainly did not start, and moves on.
            future = executor.submit(deeds.double, 4)
            assert future.result(WAIT_S) == 8


def test_template_dies(make: Make, tmp_path: Path) -> None:
    """When the process that workers are forked from is killed, its workers are replaced, by a new one."""
    with make(2, retries=1) as executor:
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(3)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        psutil.Process(psutil.Process(deeds.pids(tmp_path)[0]).ppid()).kill()
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1, 2]


# ---- ending tasks


def test_kill_queued(make: Make, tmp_path: Path) -> None:
    """kill() withdraws what is queued and recalls what was handed out but not begun; none of it ever runs."""
    with make(2) as executor:
        held = [executor.submit(deeds.hold, str(tmp_path), "held") for _ in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        others = [executor.submit(deeds.note_and_return, str(tmp_path), "other") for _ in range(5)]
        for future in others:
            assert future.kill()
        for future in others:
            assert isinstance(_error_of(future), TaskKilled | CancelledError)
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in held] == ["held"] * 2
        assert not held[0].kill(), "what has ended cannot be killed"
    assert deeds.notes(tmp_path) == ["held"] * 2


def _error_of(future: object) -> BaseException | None:
    try:
        return future.exception(WAIT_S)  # type: ignore[attr-defined, no-any-return]
    except CancelledError as error:
        return error


def test_kill_running(make: Make, tmp_path: Path) -> None:
    """kill() ends a running task with all the processes it started, sessions of their own included."""
    with make(2) as executor:
        future = executor.submit(deeds.start_children, str(tmp_path))
        assert wait_until(lambda: deeds.notes(tmp_path))
        assert future.running()
        assert future.kill()
        with pytest.raises(TaskKilled, match="kill"):
            future.result(WAIT_S)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
        children = [*map(int, deeds.notes(tmp_path)[0].split()), *deeds.pids(tmp_path)]
        assert wait_until(lambda: all(map(is_gone, children)))


def test_hundred_kills(make: Make, tmp_path: Path) -> None:
    """A hundred kills at every moment of a task's life lose no slot and hit nobody else."""
    (tmp_path / "work").mkdir()
    random.seed(4)
    with make(2, retries=0) as executor:
        bystanders = []
        for number in range(100):
            future = executor.submit(deeds.nap, 5)
            bystanders.append(executor.submit(deeds.note_and_return, str(tmp_path / "work"), number))
            if number % 3:
                wait_until(future.running, 5)
            if number % 3 == 2:
                wait([future], random.random() * 0.01)
            future.kill()
            assert isinstance(_error_of(future), TaskKilled | CancelledError)
        assert [future.result(WAIT_S) for future in bystanders] == list(range(100))
        assert_both_slots_work(executor, tmp_path / "both")
    assert sorted(map(int, deeds.notes(tmp_path / "work"))) == list(range(100))


def test_kill_while_arguments_travel(make: Make, tmp_path: Path) -> None:
    """Tasks killed while their large arguments are on their way end, and those between them get theirs."""
    with make(2) as executor:
        pairs = [(executor.submit(len, bytes([number]) * (4 << 20)), executor.submit(len, bytes([number]) * (2 << 20)))
                 for number in range(12)]
        for victim, _ in pairs:
            victim.kill()
        for victim, other in pairs:
            assert isinstance(_error_of(victim), TaskKilled | CancelledError | None)
            assert other.result(WAIT_S) == 2 << 20
        assert_both_slots_work(executor, tmp_path / "both")


def test_hundred_timeouts(make: Make, tmp_path: Path) -> None:
    """A hundred tasks that end about when their time is up: each ends or times out, and no slot is lost."""
    random.seed(5)
    with make(2) as executor:
        limited = executor.options(timeout=0.03)
        futures = [limited.submit(deeds.nap, 0.02 + 0.02 * random.random(), number) for number in range(98)]
        futures += [limited.submit(deeds.nap, 10, 98), limited.submit(deeds.nap, 0, 99)]
        wait(futures, WAIT_S)
        for number, future in enumerate(futures):
            error = future.exception(0)
            assert error is None or isinstance(error, TaskTimeout), error
            assert error is not None or future.result() == number
            assert future.attempts <= 1
        assert isinstance(futures[98].exception(), TaskTimeout)
        assert "0.03" in str(futures[98].exception())
        assert isinstance(futures[98].exception(), TimeoutError)
        assert_both_slots_work(executor, tmp_path / "both")


def test_timeout_ends_children(make: Make, tmp_path: Path) -> None:
    """A task that runs too long is ended with the processes it started, and is not run again."""
    with make(1) as executor:
        future = executor.options(timeout=0.5).submit(deeds.start_children, str(tmp_path))
        with pytest.raises(TaskTimeout, match=r"0\.5 s"):
            future.result(WAIT_S)
        children = [*map(int, deeds.notes(tmp_path)[0].split()), *deeds.pids(tmp_path)]
        assert wait_until(lambda: all(map(is_gone, children)))
    assert len(deeds.notes(tmp_path)) == 1


def test_timeout_counts_from_the_start(make: Make, tmp_path: Path) -> None:
    """The time in the queue does not count against a task's limit."""
    with make(1) as executor:
        first = executor.submit(deeds.nap, 0.6, "first")
        second = executor.options(timeout=0.5).submit(deeds.nap, 0.01, "second")
        assert (first.result(WAIT_S), second.result(WAIT_S)) == ("first", "second")


# ---- agents


@contextmanager
def two_agents(slots: int = 1) -> Iterator[tuple[AgentProcess, AgentProcess]]:
    """Two agents with one secret."""
    with AgentProcess(slots=slots, name="one") as one, AgentProcess(slots=slots, name="two", secret=one.secret) as two:
        yield one, two


def cluster(*agents: AgentProcess | str, secret: str = "", **kwargs: object) -> ClusterExecutor:
    """An executor on agents."""
    addresses = [agent if isinstance(agent, str) else agent.address for agent in agents]
    known = [agent.secret for agent in agents if isinstance(agent, AgentProcess)]
    return ClusterExecutor(nodes=addresses, secret=secret or known[0], **kwargs)  # type: ignore[arg-type]


def test_agent_killed(tmp_path: Path) -> None:
    """When an agent is killed its tasks run elsewhere, on proof and not after node_timeout; its workers die with it."""
    with two_agents() as (one, two), cluster(one, two, node_timeout=FAR_S) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(6)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        workers = deeds.pids(tmp_path)
        one.process.kill()
        assert wait_until(lambda: any(map(is_gone, workers)))
        assert wait_until(lambda: {node.name for node in executor.nodes() if node.state == "up"} == {"two"})
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == list(range(6))
        assert {future.node for future in futures} == {"two"}
        assert all(future.attempts <= 2 for future in futures)


def test_all_agents_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With every agent gone the queue waits, a warning names each node and why, and an agent that returns is used."""
    caplog.set_level(logging.WARNING, "distexec")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ("--listen", address)
    with AgentProcess(slots=1, name="phoenix", arguments=arguments) as first:
        executor = cluster(address, secret=first.secret, node_timeout=FAR_S)
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path))
        first.process.kill()
        first.process.wait()
        queued = executor.submit(deeds.double, 2)
        assert wait_until(lambda: any("no node offers a slot" in record.message for record in caplog.records), WAIT_S)
        [warning] = [record.message for record in caplog.records if "no node offers a slot" in record.message]
        assert address in warning
        assert "refused" in warning
        assert not queued.done()
    with AgentProcess(slots=1, name="phoenix", secret=first.secret, arguments=arguments), executor:
        deeds.let_go(tmp_path)
        assert (held.result(WAIT_S), queued.result(WAIT_S)) == ("held", 4)
        assert held.attempts == 2


def test_agent_drains(tmp_path: Path) -> None:
    """SIGTERM lets an agent finish what runs; what has not begun runs elsewhere, and nothing counts as a failure."""
    with two_agents() as (one, two), cluster(one, two, node_timeout=FAR_S, retries=0) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(12)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        noted = deeds.notes(tmp_path)
        [running] = [future for future in futures if future.node == "one" and str(future.task_id - 1) in noted]
        one.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: "draining" in one.log())
        assert wait_until(lambda: next(node.slots for node in executor.nodes() if node.name == "one") == 0)
        assert one.process.poll() is None
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == list(range(12))
        assert all(future.attempts == 1 for future in futures)
        assert {future.node for future in futures if future is not running} == {"two"}
        assert running.node == "one"
        assert one.process.wait(WAIT_S) == 0
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(12))


def test_agent_told_twice(tmp_path: Path) -> None:
    """A second SIGTERM stops an agent at once; what ran there runs elsewhere."""
    with two_agents() as (one, two), cluster(one, two, node_timeout=FAR_S) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        one.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: "draining" in one.log())
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(WAIT_S) == 0
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]
        assert {future.node for future in futures} == {"two"}


def test_drain_has_a_limit(tmp_path: Path) -> None:
    """A drain waits for running tasks no longer than it was told; then they run elsewhere."""
    with AgentProcess(slots=1, name="one", arguments=("--drain", "0.3")) as one, \
            AgentProcess(slots=1, name="two", secret=one.secret) as two, cluster(one, two, node_timeout=FAR_S) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(WAIT_S) == 0
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]


# ---- links


@pytest.mark.parametrize("silently", [False, True])
def test_link_cut_shortly(tmp_path: Path, silently: bool) -> None:
    """A link that is away for less than node_timeout costs nothing: work goes on, no task runs twice, all results come."""
    with AgentProcess(slots=2) as agent, Proxy(agent.address) as proxy, \
            cluster(proxy.address, secret=agent.secret, node_timeout=10.0) as executor:
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
        held = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        quick = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(2, 50)]
        for _ in range(3):
            proxy.cut(silently)
            if not silently:
                assert wait_until(lambda: executor.nodes()[0].state == "suspended", WAIT_S)
            deeds.let_go(tmp_path)
            assert wait_until(lambda: len(deeds.notes(tmp_path)) > 2 or len(deeds.notes(tmp_path)) == 2)
            proxy.heal()
            assert wait_until(lambda: executor.nodes()[0].state == "up", WAIT_S)
        assert [future.result(WAIT_S) for future in [*held, *quick]] == list(range(50))
        assert all(future.attempts == 1 for future in [*held, *quick])
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(50))


def test_task_ends_while_the_link_is_away(tmp_path: Path) -> None:
    """What a task came to while its link was away is told when it returns, once."""
    with AgentProcess(slots=2) as agent, Proxy(agent.address) as proxy, \
            cluster(proxy.address, secret=agent.secret, node_timeout=FAR_S) as executor:
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        dying = executor.submit(hold_and_die, str(tmp_path))
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        workers = deeds.pids(tmp_path)
        proxy.cut()
        assert wait_until(lambda: executor.nodes()[0].state == "suspended", WAIT_S)
        deeds.let_go(tmp_path)
        assert wait_until(lambda: any(map(is_gone, workers)), WAIT_S)
        assert not held.done()
        proxy.heal()
        assert held.result(WAIT_S) == "held"
        assert dying.result(WAIT_S) == 2
        assert (held.attempts, dying.attempts) == (1, 2)
        assert deeds.notes(tmp_path).count("held") == 1


def hold_and_die(directory: str) -> int:
    deeds.note(directory, "dying")
    deeds.wait_for_file(os.path.join(directory, "go"))
    count = deeds.notes(directory).count("dying")
    if count == 1:
        os._exit(1)
    return count


def test_cuts_under_load(tmp_path: Path) -> None:
    """Links that break again and again while thousands of short tasks flow: every one runs exactly once."""
    with AgentProcess(slots=2) as agent, Proxy(agent.address) as proxy, \
            cluster(proxy.address, secret=agent.secret, node_timeout=FAR_S) as executor:
        futures = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(6000)]
        for mark in range(500, 6000, 500):
            assert wait_until(lambda mark=mark: futures[mark].done(), WAIT_S)
            proxy.cut()
            proxy.heal()
        assert [future.result(WAIT_S) for future in futures] == list(range(6000))
        assert all(future.attempts == 1 for future in futures)
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(6000))


def test_cuts_during_transfers(tmp_path: Path) -> None:
    """A link that breaks in the middle of large arguments and results: all arrive whole, and no task runs twice."""
    with AgentProcess(slots=2) as agent, Proxy(agent.address) as proxy, \
            cluster(proxy.address, secret=agent.secret, node_timeout=FAR_S) as executor:
        blocks = [bytes([number]) * (3 << 20) for number in range(24)]
        futures = [executor.submit(deeds.note_and_return, str(tmp_path), block) for block in blocks[:12]]
        futures += [executor.submit(bytes, (3 << 20) + number) for number in range(12)]
        for _ in range(8):
            before = proxy.forwarded
            assert wait_until(lambda before=before: proxy.forwarded > before + (5 << 20), WAIT_S)
            proxy.cut()
            proxy.heal()
        assert [future.result(WAIT_S) for future in futures[:12]] == blocks[:12]
        assert [len(future.result(WAIT_S)) for future in futures[12:]] == [(3 << 20) + number for number in range(12)]
        assert all(future.attempts == 1 for future in futures)
    assert len(deeds.pids(tmp_path)) == 12


@pytest.mark.parametrize("silently", [False, True])
def test_link_cut_for_good(tmp_path: Path, silently: bool) -> None:
    """Tasks of a node that is out of reach for longer than node_timeout run elsewhere."""
    with two_agents() as (one, two), Proxy(one.address) as proxy, \
            cluster(proxy.address, two.address, secret=one.secret, node_timeout=1.0) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        proxy.cut(silently)
        assert wait_until(lambda: all(future.node == "two" for future in futures), WAIT_S)
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]
        assert sorted(future.attempts for future in futures) == [1, 2]
        assert {future.node for future in futures} == {"two"}


def test_node_comes_back_late(tmp_path: Path) -> None:
    """A node that was given up and returns before its task was handed to another is taken back at its word."""
    with AgentProcess(slots=1) as agent, Proxy(agent.address) as proxy, \
            cluster(proxy.address, secret=agent.secret, node_timeout=0.5) as executor:
        future = executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path))
        proxy.cut()
        assert wait_until(lambda: executor.status().queued == 1, WAIT_S)
        proxy.heal()
        assert wait_until(lambda: executor.nodes()[0].state == "up", WAIT_S)
        deeds.let_go(tmp_path)
        assert future.result(WAIT_S) == "held"
    assert deeds.notes(tmp_path) == ["held"]


# ---- clients

CLIENT = """
import sys
from tests.system import deeds
from distexec import ClusterExecutor
executor = ClusterExecutor({kwargs})
futures = [executor.submit(deeds.start_children, sys.argv[1]) for _ in range(4)]
futures[0].result()
"""


def start_client(directory: Path, kwargs: str) -> subprocess.Popen[bytes]:
    """Run a client whose tasks never end."""
    return subprocess.Popen([sys.executable, "-c", CLIENT.format(kwargs=kwargs), str(directory)], cwd=ROOT)


def processes_of_tasks(directory: Path) -> list[int]:
    """The workers that noted something, and the children whose pids they noted."""
    return [*deeds.pids(directory), *(int(pid) for line in deeds.notes(directory) for pid in line.split())]


def test_client_killed_locally(tmp_path: Path) -> None:
    """When a client in local mode is killed, its workers and all they started go at once."""
    client = start_client(tmp_path, "2, nodes='local'")
    assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
    client.kill()
    client.wait()
    assert wait_until(lambda: all(map(is_gone, processes_of_tasks(tmp_path))), 5)


def test_client_killed_remotely(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """When a client is killed its session ends on the agent within the grace, and the slots are anybody's meanwhile."""
    client = start_client(tmp_path, f"nodes=[{shared_agent.address!r}], secret={shared_agent.secret!r}")
    assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
    client.kill()
    client.wait()
    assert wait_until(lambda: all(map(is_gone, processes_of_tasks(tmp_path))), 30)


def test_client_stopped_in_a_debugger(tmp_path: Path) -> None:
    """A client that is stopped for longer than any heartbeat keeps its session."""
    with AgentProcess(slots=1) as agent:
        script = CLIENT.replace("start_children", "hold").replace("range(4)", "range(1)")
        client = subprocess.Popen(
            [sys.executable, "-c", script.format(kwargs=f"nodes=[{agent.address!r}], secret={agent.secret!r}, "
             "node_timeout=0.5"), str(tmp_path)], cwd=ROOT)
        assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
        client.send_signal(signal.SIGSTOP)
        assert not wait_until(lambda: client.poll() is not None, 3)
        client.send_signal(signal.SIGCONT)
        deeds.let_go(tmp_path)
        assert client.wait(WAIT_S) == 0
    assert len(deeds.notes(tmp_path)) == 1


def test_agent_killed_leaves_nothing(tmp_path: Path) -> None:
    """When an agent is killed, its workers and all they started go at once."""
    with AgentProcess(slots=2) as agent, cluster(agent, nodes_timeout=0.5) as executor:
        executor.submit(deeds.start_children, str(tmp_path))
        executor.submit(deeds.start_children, str(tmp_path))
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        agent.process.kill()
        agent.process.wait()
        assert wait_until(lambda: all(map(is_gone, processes_of_tasks(tmp_path))), 5)


def test_many_threads_and_deaths(make: Make, tmp_path: Path) -> None:
    """Eight threads that submit, cancel and kill while workers die: every future ends, and no slot is lost."""
    with make(2, retries=5) as executor:
        def use(seed: int) -> None:
            chance = random.Random(seed)
            for number in range(40):
                way = chance.random()
                if way < 0.05:
                    executor.options(retries=0).submit(deeds.die, "SIGKILL").exception(WAIT_S)
                elif way < 0.2:
                    future = executor.submit(deeds.nap, 0.01)
                    chance.choice([future.kill, future.cancel])()
                    _error_of(future)
                else:
                    assert executor.submit(deeds.double, number).result(WAIT_S) == 2 * number

        with_errors: list[BaseException] = []

        def guarded(seed: int) -> None:
            try:
                use(seed)
            except BaseException as error:
                with_errors.append(error)

        threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not with_errors
        assert not any(thread.is_alive() for thread in threads)
        assert_both_slots_work(executor, tmp_path / "both")
