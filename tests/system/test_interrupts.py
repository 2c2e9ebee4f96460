"""Ctrl-C as a terminal sends it, to the whole group: one traceback, nothing left running, whatever the program was doing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import make_local
from tests.system.test_faults import is_gone

WAIT_S = 20.0

PROGRAM = """
import sys, time
from concurrent.futures import as_completed, wait
from tests.system import deeds
from tests.system.test_endings import start_family
from distexec import ClusterExecutor

def submit(executor, number=50):
    return [executor.submit(start_family, sys.argv[1]) for _ in range(number)]

with ClusterExecutor(2, {kwargs}) as executor:
    {body}
"""

BODIES = {
    "leaving the block": "submit(executor)",
    "as_completed": "list(as_completed(submit(executor)))",
    "wait": "wait(submit(executor))",
    "something else": "submit(executor); time.sleep(1000)",
    "map": "list(executor.map(start_family, [sys.argv[1]] * 50))",
    "submitting": "while True: submit(executor)",
    "many pending": "submit(executor, 20_000)[0].result()",
}


@pytest.mark.parametrize("where", ["local", "agent"])
@pytest.mark.parametrize("body", BODIES)
def test_interrupted(request: pytest.FixtureRequest, tmp_path: Path, body: str, where: str) -> None:
    """The program ends by SIGINT with one traceback; its tasks, which ignore gentler signals, go with all they started."""
    kwargs = "nodes='local'"
    if where == "agent":
        agent: AgentProcess = request.getfixturevalue("shared_agent")
        kwargs = f"nodes=[{agent.address!r}], secret={agent.secret!r}"
    program = subprocess.Popen([sys.executable, "-c", PROGRAM.format(kwargs=kwargs, body=BODIES[body]), str(tmp_path)],
                               cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
    os.killpg(program.pid, signal.SIGINT)
    _, err = program.communicate(timeout=WAIT_S)
    assert (program.returncode, err.count("Traceback"), err.count("KeyboardInterrupt")) == (-signal.SIGINT, 1, 1), err
    family = [int(pid) for line in deeds.notes(tmp_path) for pid in line.split()] + deeds.pids(tmp_path)
    assert wait_until(lambda: all(map(is_gone, family)), WAIT_S)
    assert len(deeds.notes(tmp_path)) == 2, "nothing began after it"


def leave_child(directory: str) -> None:
    """Start a process, and leave it running."""
    deeds.note(directory, subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_context_worker_ends_its_offspring(tmp_path: Path, method: str) -> None:
    """What a task left running ends with its worker, also where that is a context's process."""
    with make_local(1, multiprocessing.get_context(method)) as executor:
        executor.submit(leave_child, str(tmp_path)).result(WAIT_S)
        [child] = map(int, deeds.notes(tmp_path))
        assert not is_gone(child)
    assert wait_until(lambda: is_gone(child), WAIT_S)
    multiprocessing.util._cleanup_tests()  # type: ignore[attr-defined]
