"""The storm: what breaks, when, and what must hold when it is over."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from distexec import ClusterExecutor
from tests import netns
from tests.agents import ROOT, AgentProcess
from tests.chaos import client as clients
from tests.leaks import wait_until
from tests.system import deeds

AGENTS = ("one", "two", "three")
CLIENTS = ("first", "second")
SLOTS = 2
PORT = 9730
PAUSE_S = (0.1, 1.0)
"""Between two faults. Shorter: little work is done between them. Longer: they seldom meet."""

WAIT_S = 60.0
SESSION_S = 30.0
"""How long a session may outlive its client."""


@dataclass
class Client:
    """One client process and where it writes."""

    host: str
    directory: Path
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        """What it wrote to standard error."""
        return (self.directory / "err").read_text(errors="replace")


@dataclass
class Figures:
    """What a storm came to."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    again: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        ends = ", ".join(f"{count} {name}" for name, count in self.ends.most_common())
        return (f"seed {self.seed}: {self.ended} tasks ended ({ends}), {self.again} attempts beyond the first; "
                f"faults: {faults}; {len(self.wrong)} wrong" + "".join(f"\n  {line}" for line in self.wrong))


class Storm:
    """Agents, clients, and what befalls them. Use in a `with` block: `run` for as long as it may take, then `settle`."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.figures = Figures(seed)
        self._chance = random.Random(seed)
        self._directory = directory
        self._secret = secrets.token_hex(32)
        self._stack = ExitStack()
        self._agents: dict[str, AgentProcess] = {}
        self._clients: dict[str, Client] = {}
        self._undo: list[tuple[float, str, Callable[[], None]]] = []  # when, what it concerns, what restores it
        self._number = 0

    def __enter__(self) -> Storm:
        with self._stack:
            self._network = self._stack.enter_context(netns.Network("here", *CLIENTS, *AGENTS))
            self._stack.enter_context(self._network.inside("here"))
            self._stack.callback(self._end_all)
            for name in AGENTS:
                self._start_agent(name)
            for host in CLIENTS:
                self._start_client(host)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end_all(self) -> None:
        self._restore(until=float("inf"))
        for each in self._clients.values():
            each.process.kill()
            each.process.wait()
        for agent in self._agents.values():
            agent.__exit__(None, None, None)

    # ---- the actors

    def _start_agent(self, name: str) -> None:
        host = self._network[name]
        agent = AgentProcess(SLOTS, name, self._secret, ("--drain", "2"), listen=f"{host.address}:{PORT}",
                             prefix=host.prefix)
        agent.__enter__()
        self._agents[name] = agent

    def _start_client(self, host: str) -> None:
        self._number += 1
        directory = self._directory / f"client-{self._number}"
        directory.mkdir()
        command = [*self._network[host].prefix, sys.executable, "-m", "tests.chaos.client", str(directory),
                   f"{self.figures.seed}-{self._number}", *(f"{self._network[name].address}:{PORT}" for name in AGENTS)]
        with open(directory / "out", "wb") as out, open(directory / "err", "wb") as err:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                       env=os.environ | {"DISTEXEC_SECRET": self._secret})
        self._clients[host] = Client(host, directory, process)

    def _processes(self, name: str) -> list[psutil.Process]:
        """What an agent started, and they."""
        try:
            return psutil.Process(self._agents[name].process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    # ---- what happens

    def run(self, seconds: float) -> None:
        """Let things break for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            fault, = self._chance.choices(list(FAULTS), list(FAULTS.values()))
            fault(self)
            self._look_at_clients()
            end = min(deadline, time.monotonic() + self._chance.uniform(*PAUSE_S))
            while time.monotonic() < end:
                self._restore(until=time.monotonic())
                time.sleep(0.02)  # the storm's own clock, not a wait for anything
        self._restore(until=float("inf"))

    def _restore(self, until: float) -> None:
        due = sorted((each for each in self._undo if each[0] <= until), key=lambda each: each[0])
        self._undo = [each for each in self._undo if each[0] > until]
        for _, _, undo in due:
            undo()

    def _later(self, concern: str, shortest_s: float, longest_s: float, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + self._chance.uniform(shortest_s, longest_s), concern, undo))

    def _is_whole(self, concern: str) -> bool:
        return all(concern != each for _, each, _ in self._undo)

    def _look_at_clients(self) -> None:
        for each in self._clients.values():
            if each.process.poll() is not None:
                raise AssertionError(f"a client ended by itself: {each.log()}")

    def kill_a_worker(self) -> None:
        """Kill one of the processes below an agent: a worker, a template, a task's child."""
        below = self._processes(self._chance.choice(AGENTS))
        if below:
            self._count("killed workers")
            _signal(self._chance.choice(below), signal.SIGKILL)

    def freeze_a_worker(self) -> None:
        """Stop one of them for a while."""
        below = self._processes(self._chance.choice(AGENTS))
        if below:
            self._count("frozen workers")
            victim = self._chance.choice(below)
            _signal(victim, signal.SIGSTOP)
            self._later(f"process {victim.pid}", 0.2, 3.0, lambda: _signal(victim, signal.SIGCONT))

    def kill_an_agent(self) -> None:
        """Kill an agent; another process takes its place."""
        self._end_agent("killed agents", signal.SIGKILL)

    def stop_an_agent(self) -> None:
        """Tell an agent to stop; another process takes its place."""
        self._end_agent("stopped agents", signal.SIGTERM)

    def _end_agent(self, what: str, number: signal.Signals) -> None:
        name = self._chance.choice(AGENTS)
        if self._is_whole(f"agent {name}"):
            self._count(what)
            agent = self._agents[name]
            agent.process.send_signal(number)
            self._later(f"agent {name}", 0.0, 5.0, lambda: self._restart(name, agent))

    def _restart(self, name: str, agent: AgentProcess) -> None:
        self._check_agent(agent)
        self._start_agent(name)

    def _check_agent(self, agent: AgentProcess) -> None:
        """See a process of an agent end, as it should."""
        try:
            code = agent.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.figures.wrong.append(f"agent {agent.name} does not end")
            agent.process.kill()
            code = agent.process.wait()
        log = agent.log()
        if code not in (0, -signal.SIGKILL) or "Traceback" in log:
            self.figures.wrong.append(f"agent {agent.name} ended with {code}: {log[-3000:]}")
        agent.__exit__(None, None, None)

    def freeze_an_agent(self) -> None:
        """Stop an agent for a while, perhaps for longer than its clients wait."""
        name = self._chance.choice(AGENTS)
        if self._is_whole(f"agent {name}"):
            self._count("frozen agents")
            agent = self._agents[name]
            agent.process.send_signal(signal.SIGSTOP)
            self._later(f"agent {name}", 0.1, 2 * clients.NODE_TIMEOUT_S, lambda: agent.process.send_signal(signal.SIGCONT))

    def cut_a_cable(self) -> None:
        """Pull a cable for a while, of an agent or a client."""
        self._cut("pulled cables", self._network.pull, self._network.plug)

    def cut_at_the_switch(self) -> None:
        """The same where the host does not see it."""
        self._cut("cuts at the switch", self._network.isolate, self._network.rejoin)

    def _cut(self, what: str, cut: Callable[[str], None], heal: Callable[[str], None]) -> None:
        host = self._chance.choice(AGENTS + CLIENTS)
        if self._is_whole(f"cable {host}"):
            self._count(what)
            cut(host)
            longest_s = self._chance.choice([0.1, 1.0, clients.NODE_TIMEOUT_S, 3 * clients.NODE_TIMEOUT_S])
            self._later(f"cable {host}", 0.0, longest_s, lambda: heal(host))

    def freeze_a_client(self) -> None:
        """Stop a client for a while, as a debugger does."""
        host = self._chance.choice(CLIENTS)
        if self._is_whole(f"client {host}"):
            self._count("frozen clients")
            process = self._clients[host].process
            process.send_signal(signal.SIGSTOP)
            self._later(f"client {host}", 0.1, 2 * clients.NODE_TIMEOUT_S, lambda: process.send_signal(signal.SIGCONT))

    def kill_a_client(self) -> None:
        """Kill a client; another takes its place."""
        host = self._chance.choice(CLIENTS)
        if self._is_whole(f"client {host}"):
            self._count("killed clients")
            self._clients[host].process.kill()
            self._clients[host].process.wait()
            self._start_client(host)

    def _count(self, what: str) -> None:
        self.figures.faults[what] += 1

    # ---- what must hold

    def settle(self) -> Figures:
        """With everything restored: see the clients finish, every slot at work at once, and nothing left on any node."""
        for each in self._clients.values():
            (each.directory / "stop").touch()
        for each in self._clients.values():
            self._take_report(each)
        self._use_all_slots()
        if not wait_until(lambda: not any(map(self._processes, AGENTS)), SESSION_S):
            self.figures.wrong += [f"left on {name}: {process}" for name in AGENTS for process in self._processes(name)]
        for agent in self._agents.values():
            agent.process.send_signal(signal.SIGTERM)
        for agent in self._agents.values():
            self._check_agent(agent)
        self._agents.clear()
        return self.figures

    def _take_report(self, each: Client) -> None:
        try:
            code = each.process.wait(clients.FINISH_S + WAIT_S)
        except subprocess.TimeoutExpired:
            each.process.send_signal(signal.SIGUSR1)
            wait_until(lambda: "most recent call first" in each.log())
            self.figures.wrong.append(f"the client on {each.host} does not end: {each.log()[-5000:]}")
            return
        if code or "Traceback" in each.log():
            self.figures.wrong.append(f"the client on {each.host} ended with {code}: {each.log()[-5000:]}")
        if (each.directory / "report.json").exists():
            report = json.loads((each.directory / "report.json").read_text())
            self.figures.ended += report["ended"]
            self.figures.again += report["again"]
            self.figures.ends.update(report["ends"])
            self.figures.wrong += report["wrong"]

    def _use_all_slots(self) -> None:
        count = SLOTS * len(AGENTS)
        directory = self._directory / "slots"
        directory.mkdir()
        nodes = [f"{self._network[name].address}:{PORT}" for name in AGENTS]
        with ClusterExecutor(nodes=nodes, secret=self._secret) as executor:
            futures = [executor.submit(deeds.hold, str(directory), number) for number in range(count)]
            if not wait_until(lambda: len(deeds.notes(directory)) == count, SESSION_S):
                self.figures.wrong.append(f"{len(deeds.notes(directory))} of {count} slots work: {executor.status()}")
            deeds.let_go(directory)
            for future in futures:
                future.result(WAIT_S)
            self.figures.wrong += [f"{node.name} is {node.state} with {node.slots} slots" for node in executor.nodes()
                                   if (node.state, node.slots) != ("up", SLOTS)]


FAULTS: dict[Callable[[Storm], None], float] = {
    Storm.kill_a_worker: 4, Storm.freeze_a_worker: 2, Storm.kill_an_agent: 2, Storm.stop_an_agent: 1,
    Storm.freeze_an_agent: 2, Storm.cut_a_cable: 3, Storm.cut_at_the_switch: 2, Storm.freeze_a_client: 1,
    Storm.kill_a_client: 0.3}
"""What may happen, and how often beside the others."""


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it was faster
