"""Workers that use more memory than they may, or than there is: ended, and told why with the figures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distexec import ClusterExecutor, WorkerLost
from distexec.memorywatch import overusers, trees
from tests import leaks
from tests.agents import ROOT, AgentProcess
from tests.system import deeds
from tests.system.conftest import make_local
from tests.system.test_faults import is_gone

WAIT_S = 30.0
MEBI = 1 << 20


def fill(size_bytes: int, directory: str = "") -> None:
    """Use so much memory until somebody ends it."""
    memory = bytearray(b"x") * size_bytes
    if directory:
        deeds.note(directory, len(memory))
    time.sleep(WAIT_S)


def fill_in_child(size_bytes: int, directory: str) -> None:
    """Have a child process use so much memory."""
    code = "import sys, time; memory = bytearray(b'x') * int(sys.argv[1]); time.sleep(1000)"
    child = subprocess.Popen([sys.executable, "-c", code, str(size_bytes)])
    deeds.note(directory, child.pid)
    child.wait()


@contextmanager
def limited_agent() -> Iterator[ClusterExecutor]:
    """An executor on an agent whose workers may use 200 MiB each."""
    with AgentProcess(slots=2, arguments=("--memory-limit", "200M")) as agent, \
            ClusterExecutor(nodes=[agent.address], secret=agent.secret) as executor:
        yield executor


@contextmanager
def limited_local(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterExecutor]:
    """An executor whose own workers may use 200 MiB each."""
    monkeypatch.setenv("DISTEXEC_MEMORY_LIMIT", "200M")
    with make_local(2) as executor:
        yield executor


@pytest.fixture(params=["local", "agent"])
def limited(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterExecutor]:
    """An executor whose two workers may use 200 MiB each."""
    with limited_agent() if request.param == "agent" else limited_local(monkeypatch) as executor:
        yield executor


def test_limit(limited: ClusterExecutor, tmp_path: Path) -> None:
    """A task that takes more than the limit is lost, with both figures and what to do; its neighbour notices nothing."""
    held = limited.submit(deeds.hold, str(tmp_path), "held")
    assert leaks.wait_until(lambda: deeds.notes(tmp_path))
    with pytest.raises(WorkerLost) as caught:
        limited.options(retries=1).submit(fill, 300 * MEBI).result(WAIT_S)
    reason = caught.value.reason
    assert "200 MiB" in reason
    assert 200 < int(reason.split("it used ")[1].split(" MiB of memory")[0]) < 340, "perhaps while it was still growing"
    assert "--memory-limit" in reason or "$DISTEXEC_MEMORY_LIMIT" in reason
    assert (caught.value.signal, caught.value.attempts) == (signal.SIGKILL, 2)
    assert limited.submit(fill_and_end, 100 * MEBI).result(WAIT_S) == 100 * MEBI
    deeds.let_go(tmp_path)
    assert held.result(WAIT_S) == "held"
    assert held.attempts == 1


def fill_and_end(size_bytes: int) -> int:
    return len(bytearray(b"x") * size_bytes)


def test_limit_counts_children(limited: ClusterExecutor, tmp_path: Path) -> None:
    """What the processes use that a task started counts, and they are ended with it."""
    with pytest.raises(WorkerLost, match="2 processes"):
        limited.options(retries=0).submit(fill_in_child, 300 * MEBI, str(tmp_path)).result(WAIT_S)
    assert leaks.wait_until(lambda: is_gone(int(deeds.notes(tmp_path)[0])))


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run some Python until it says that it is ready."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


FAMILY = """
import os, signal
memory = bytearray(b"x") * (100 << 20)
for _ in range(3):
    if os.fork() == 0:
        signal.pause()
print("ready", flush=True)
signal.pause()
"""


def test_shared_memory_counts_once() -> None:
    """A family that shares 100 MiB uses 100 MiB, not 400; who is no suspect any more goes on."""
    with running(FAMILY) as parent:
        assert len(trees([parent.pid])[parent.pid]) == 4
        assert sum(trees([parent.pid])[parent.pid].values()) > 390 * MEBI
        assert overusers([parent.pid], 200 * MEBI) == []
        assert leaks.wait_until(lambda: _state(parent.pid) != "T")
        (pid, used), = overusers([parent.pid], 90 * MEBI)
        assert (pid, used.processes) == (parent.pid, 4)
        assert 100 * MEBI <= used.size_bytes < 150 * MEBI
        assert leaks.wait_until(lambda: _state(parent.pid) == "T"), "it is left stopped"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("text", ["lots", "0"])
def test_bad_limit(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A limit that is no size is refused at once, by the name of what set it."""
    monkeypatch.setenv("DISTEXEC_MEMORY_LIMIT", text)
    with pytest.raises(ValueError, match=r"DISTEXEC_MEMORY_LIMIT.*500M"):
        make_local(1)


# ---- the kernel

GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def control_group(limit_bytes: int) -> Iterator[Path]:
    """A control group with a memory limit; the test is skipped where this process may not make one."""
    group = next(filter(None, (_new_group(GROUPS / "memory", "memory.limit_in_bytes", limit_bytes),
                               _new_group(GROUPS, "memory.max", limit_bytes))), None)
    if group is None:
        pytest.skip("making a control group with a memory limit needs root and the memory controller")
    try:
        yield group
    finally:
        leaks.wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _new_group(base: Path, limit: str, limit_bytes: int) -> Path | None:
    group = base / f"distexec-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / limit).write_text(str(limit_bytes))
    except OSError:
        group.rmdir()
        return None
    return group


CLIENT = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from distexec import ClusterExecutor, WorkerLost
from tests.system.test_memory import fill
with ClusterExecutor(1, nodes="local", retries=0) as executor:
    try:
        executor.submit(fill, 400 << 20).result()
    except WorkerLost as error:
        print(error.signal, error.reason)
"""


def test_killed_by_the_kernel() -> None:
    """A worker that the kernel kills because memory ran out is told as such, with what it used and the limit."""
    with control_group(200 * MEBI) as group:
        client = subprocess.run([sys.executable, "-c", CLIENT, str(group)], cwd=ROOT, capture_output=True, text=True,
                                timeout=60)
    assert client.stdout.startswith("9 it was killed by SIGKILL after it had used up to 1"), client
    assert "by the kernel because memory ran out" in client.stdout
    assert "200 MiB" in client.stdout
    assert str(group) in client.stdout


def test_killed_by_somebody() -> None:
    """A SIGKILL of unknown origin is called that, with what the worker had used."""
    with make_local(1, retries=0) as executor, pytest.raises(WorkerLost, match=r"used up to .*not by distexec"):
        executor.submit(deeds.die, "SIGKILL").result(WAIT_S)
