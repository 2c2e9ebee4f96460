"""Tasks that are ended or end their workers, again and again: what else there is goes on as if nothing had happened.

How often is RUNS; the environment variable ENDINGS sets another number for a long run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from distexec import ClusterExecutor, TaskKilled, TaskTimeout, WorkerLost
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make, make_local
from tests.system.test_faults import FAR_S, WAIT_S, assert_both_slots_work, cluster, is_gone, two_agents

RUNS = int(os.environ.get("ENDINGS", "40"))


def start_family(directory: str) -> None:
    """Start a process that starts another, which leaves the group; note all of them, and wait for ever."""
    code = ("import subprocess, sys, time\n"
            "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
            "print(child.pid, flush=True); time.sleep(1000)")
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    deeds.note(directory, f"{child.pid} {child.stdout.readline().strip()}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child.wait()


@pytest.mark.timeout(120 + 3 * RUNS)
def test_many_endings(make: Make, tmp_path: Path) -> None:
    """Tasks with families, ended by kill() and by time limits in turn: all their processes go, and no slot is lost."""
    with make(2, retries=0) as executor:
        for number in range(RUNS):
            directory = tmp_path / str(number)
            directory.mkdir()
            if number % 2:
                future = executor.submit(start_family, str(directory))
                assert wait_until(lambda d=directory: deeds.notes(d), WAIT_S)
                assert future.kill()
                kind: type[Exception] = TaskKilled
            else:
                future = executor.options(timeout=0.3).submit(start_family, str(directory))
                kind = TaskTimeout
            assert type(future.exception(WAIT_S)) is kind
            assert executor.submit(deeds.double, number).result(WAIT_S) == 2 * number
            family = [int(pid) for line in deeds.notes(directory) for pid in line.split()] + deeds.pids(directory)
            assert wait_until(lambda family=family: all(map(is_gone, family)), WAIT_S), "it left somebody behind"
        assert_both_slots_work(executor, tmp_path / "both")
        status = executor.status()
        assert (status.slots, status.queued, status.running, status.retried) == (2, 0, 0, 0)


@pytest.mark.parametrize("way", ["exit7", "segfault", "SIGKILL"])
def test_poison_harms_nobody(make: Make, tmp_path: Path, way: str) -> None:
    """A task that always kills its worker costs retries + 1 of them, and none of 400 others beside it an attempt."""
    (tmp_path / "poison").mkdir()
    with make(2, retries=2) as executor:
        innocent = [executor.submit(deeds.nap, 0.002, number) for number in range(200)]
        poison = executor.submit(deeds.die, way, str(tmp_path / "poison"))
        innocent += [executor.submit(deeds.double, number) for number in range(200)]
        assert isinstance(poison.exception(WAIT_S), WorkerLost)
        assert [future.result(WAIT_S) for future in innocent] == [*range(200), *(2 * number for number in range(200))]
        assert {future.attempts for future in innocent} == {1}
        assert executor.status().retried == 2
    assert len(set(deeds.pids(tmp_path / "poison"))) == len(deeds.pids(tmp_path / "poison")) == 3


def crash_deep(depth: int) -> None:
    """Print, and crash at the end of a recursion."""
    if depth:
        crash_deep(depth - 1)
    print("almost there", file=sys.stderr)
    os.abort()


def test_last_words(make: Make) -> None:
    """What a worker printed to stderr at last, and the Python stack of its crash, are in the error, wherever it ran."""
    with make(1, retries=0) as executor:
        error = executor.submit(crash_deep, 0).exception(WAIT_S)
        assert isinstance(error, WorkerLost)
        assert "almost there\nFatal Python error: Aborted" in error.stderr_tail
        assert "in crash_deep" in error.stderr_tail
        assert "in crash_deep" in str(error)
        deep = executor.submit(crash_deep, 200).exception(WAIT_S)
        assert isinstance(deep, WorkerLost)
        assert "Fatal Python error: Aborted" in deep.stderr_tail, "the place of the crash is not cut off"
        quiet = executor.submit(os._exit, 3).exception(WAIT_S)
        assert isinstance(quiet, WorkerLost)
        assert quiet.stderr_tail == "", "it is another worker's"


def test_crash_is_printed_locally(capfd: pytest.CaptureFixture[str]) -> None:
    """The stack of a local worker's crash is on the client's stderr too, once, behind what the task printed."""
    with make_local(1, retries=0) as executor:
        assert isinstance(executor.submit(crash_deep, 0).exception(WAIT_S), WorkerLost)
    err = capfd.readouterr().err
    assert err.count("almost there") == err.count("Fatal Python error") == 1
    assert err.index("almost there") < err.index("Fatal Python error")


# ---- nodes


def die_if_broken(directory: str, number: int) -> int:
    """Die if there is a file that says that this node is broken."""
    if os.path.exists(os.path.join(directory, "broken-" + os.environ["NODE"])):
        os.abort()
    time.sleep(0.02)
    return number


def test_broken_node_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that die on one node run on the other; after a few that node is left alone, shown and told as such, with why."""
    with two_that_know_themselves(monkeypatch) as executor:
        (tmp_path / "broken-one").touch()
        futures = [executor.submit(die_if_broken, str(tmp_path), number) for number in range(100)]
        assert [future.result(WAIT_S) for future in futures] == list(range(100))
        assert {future.node for future in futures} == {"two"}
        assert max(future.attempts for future in futures) == 2
        row = next(node for node in executor.nodes() if node.name == "one")
        assert row.state == "quarantined"
        assert "SIGABRT" in row.problem
        assert "quarantined" in str(executor.status())
        assert wait_until(lambda: [each for each in caplog.records if "gets no tasks" in each.message], WAIT_S)
        [told] = [each.message for each in caplog.records if "gets no tasks" in each.message]
        assert "'one'" in told
        assert "SIGABRT" in told


@contextmanager
def two_that_know_themselves(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterExecutor]:
    """An executor on two agents, "one" and "two", whose workers find in their environment which is theirs."""
    monkeypatch.setenv("NODE", "one")
    with AgentProcess(slots=1, name="one") as one:
        monkeypatch.setenv("NODE", "two")
        with AgentProcess(slots=1, name="two", secret=one.secret) as two, \
                cluster(one, two, node_timeout=FAR_S) as executor:
            assert executor.wait_for_slots(2, WAIT_S)
            yield executor


def test_removed_node_is_drained(tmp_path: Path) -> None:
    """remove_node lets a node finish what runs; what waits there moves on, and even retries=0 is not charged."""
    with two_agents() as (one, two), cluster(one, two, node_timeout=FAR_S, retries=0) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.options(retries=number % 2).submit(deeds.hold, str(tmp_path), number) for number in range(12)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        executor.remove_node("one")
        deeds.let_go(tmp_path)
        wait(futures, WAIT_S)
        assert [future.result(0) for future in futures] == list(range(12))
        assert {future.attempts for future in futures} == {1}
        assert [future.node for future in futures].count("one") == 1
        assert wait_until(lambda: len(executor.nodes()) == 1, WAIT_S)
        assert executor.status().retried == 0
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(12))


def test_drain_under_load(tmp_path: Path) -> None:
    """An agent told to stop while thousands of short tasks flow: every one runs once, uncharged, and the agent ends well."""
    with two_agents(2) as (one, two), cluster(one, two, node_timeout=FAR_S, retries=0) as executor:
        assert executor.wait_for_slots(4, WAIT_S)
        futures = [executor.options(retries=number % 2).submit(deeds.note_and_return, str(tmp_path), number)
                   for number in range(3000)]
        assert wait_until(lambda: futures[random.Random(1).randrange(200, 900)].done(), WAIT_S)
        one.process.send_signal(signal.SIGTERM)
        assert [future.result(WAIT_S) for future in futures] == list(range(3000))
        assert {future.attempts for future in futures} == {1}
        assert one.process.wait(WAIT_S) == 0
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(3000))
