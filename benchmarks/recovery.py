"""How long a task stands still after what ran it died: from the death, or the last sign of life, to its next beginning.

The task notes when it begins and waits; the clocks of all processes of one machine agree. A silent node is one whose agent
is stopped with SIGSTOP: its sockets stay open and its kernel answers, but nothing is said any more.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

from benchmarks.contenders import start_agent
from benchmarks.measures import Numbers
from benchmarks.work import note_begin
from distexec import ClusterExecutor

NODE_TIMEOUT_S = 5.0
"""Of the executor that waits for a silent node. What is reported is how much longer than that it took."""

PATIENCE_S = 60.0


def recovery(name: str) -> Numbers:
    """Seconds: of local workers, how long after a worker's death; of agents, after theirs and their falling silent too."""
    if name == "cluster":
        with ClusterExecutor(1, nodes="local") as executor:
            return {"worker_s": _seconds_after(executor, _kill_worker)}
    numbers: Numbers = {}
    with _two_agents() as (executor, _agents):
        numbers["worker_s"] = _seconds_after(executor, _kill_worker)
    with _two_agents() as (executor, agents):
        numbers["agent_s"] = _seconds_after(executor, lambda _pid, node: agents[node].kill())
    with _two_agents() as (executor, agents):
        stopped_s = _seconds_after(executor, lambda _pid, node: agents[node].send_signal(signal.SIGSTOP))
        numbers["silent_beyond_s"] = stopped_s - NODE_TIMEOUT_S
    return numbers


def _kill_worker(pid: int, _node: str) -> None:
    os.kill(pid, signal.SIGKILL)


def _seconds_after(executor: Executor, strike: Callable[[int, str], object]) -> float:
    """Have a task begin, strike, and see when it begins again."""
    with tempfile.TemporaryDirectory() as directory:
        future = executor.submit(note_begin, directory)
        pid, _ = _begins(directory, 1)[0]
        struck_at = time.monotonic()
        strike(pid, future.node)  # type: ignore[attr-defined]
        _, begun_at = _begins(directory, 2)[1]
        Path(directory, "go").touch()
        future.result(PATIENCE_S)
    return begun_at - struck_at


def _begins(directory: str, count: int) -> list[tuple[int, float]]:
    """Wait until a task has begun so often; give each time the process and the moment."""
    log = Path(directory, "begins")
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) >= count:
            return [(int(line.split()[0]), float(line.split()[1])) for line in lines]
        time.sleep(0.005)
    raise TimeoutError(f"no beginning number {count} within {PATIENCE_S:g} s")


@contextlib.contextmanager
def _two_agents() -> Iterator[tuple[ClusterExecutor, dict[str, subprocess.Popen[str]]]]:
    secret = secrets.token_hex(32)
    agents: dict[str, subprocess.Popen[str]] = {}
    addresses = []
    try:
        for name in ("one", "two"):
            agents[name], address = start_agent(1, name, secret)
            addresses.append(address)
        with ClusterExecutor(nodes=addresses, secret=secret, node_timeout=NODE_TIMEOUT_S) as executor:
            if not executor.wait_for_slots(2, PATIENCE_S):
                raise TimeoutError(f"two slots were to come: {executor.status()}")
            yield executor, agents
    finally:
        for agent in agents.values():
            agent.send_signal(signal.SIGCONT)
            agent.terminate()
            agent.communicate()
