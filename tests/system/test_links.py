"""What happens to tasks, sessions and slots when cables are pulled and processes freeze: on a network of namespaces.

Every host is a namespace of its own on one switch (`tests.netns`), so a pulled cable is what it is in a rack: nothing is
said, and nothing arrives. The test itself is on the host "client".
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from distexec import ClusterExecutor
from distexec.opening import tune, unanswered_s
from tests import leaks, netns
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.test_faults import CLIENT, is_gone, processes_of_tasks

WAIT_S = 30.0
Act = Callable[[str], None]
Way = Callable[[netns.Network], tuple[Act, Act]]
FAR_S = 300.0
"""A node_timeout far beyond what a test waits: what happens sooner was not left to the clock."""


@pytest.fixture
def network() -> Iterator[netns.Network]:
    """Four hosts on one switch; the test is on "client"."""
    netns.require()
    with netns.Network("client", "other", "one", "two") as network, network.inside("client"):
        yield network


def agent_on(network: netns.Network, host: str, slots: int = 1, secret: str = "") -> AgentProcess:
    """An agent that is named as its host."""
    more = {"secret": secret} if secret else {}
    return AgentProcess(slots=slots, name=host, listen=f"{network[host].address}:9730", prefix=network[host].prefix, **more)


@contextmanager
def two_agents(network: netns.Network) -> Iterator[tuple[AgentProcess, AgentProcess]]:
    """Agents on "one" and "two" with one secret."""
    with agent_on(network, "one") as one, agent_on(network, "two", secret=one.secret) as two:
        yield one, two


def cluster(*agents: AgentProcess, **kwargs: object) -> ClusterExecutor:
    """An executor on agents."""
    return ClusterExecutor(nodes=[agent.address for agent in agents], secret=agents[0].secret, **kwargs)  # type: ignore[arg-type]


def state_of(executor: ClusterExecutor, name: str) -> str:
    """How a node stands with the executor."""
    return next(node.state for node in executor.nodes() if node.name == name)


def cable(network: netns.Network) -> tuple[Act, Act]:
    """Cut at the host: its own carrier goes."""
    return network.pull, network.plug


def switch_port(network: netns.Network) -> tuple[Act, Act]:
    """Cut farther away: the host sees nothing of it."""
    return network.isolate, network.rejoin


# ---- cuts


@pytest.mark.parametrize("end", ["client", "one"])
@pytest.mark.parametrize("way", [cable, switch_port])
def test_a_short_cut_is_invisible(network: netns.Network, tmp_path: Path, end: str, way: Way) -> None:
    """Cable pulled, noticed by silence, put back before node_timeout → work went on there, each task ran once, all told."""
    with agent_on(network, "one", slots=2) as agent, cluster(agent, node_timeout=12.0) as executor:
        held = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        quick = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(2, 40)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        cut, heal = way(network)
        cut(end)
        assert wait_until(lambda: state_of(executor, "one") == "suspended", WAIT_S)
        deeds.let_go(tmp_path)
        assert wait_until(lambda: len(deeds.notes(tmp_path)) > 2, WAIT_S), "the node did not go on by itself"
        assert not held[0].done()
        heal(end)
        assert [future.result(WAIT_S) for future in [*held, *quick]] == list(range(40))
        assert all(future.attempts == 1 for future in [*held, *quick])
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(40))


def test_cuts_too_short_to_be_noticed(network: netns.Network, tmp_path: Path) -> None:
    """Cable pulled and put back again and again under short tasks and large values → each ran once, all arrived whole."""
    with agent_on(network, "one", slots=2) as agent, cluster(agent, node_timeout=FAR_S) as executor:
        futures = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(2000)]
        blocks = [executor.submit(bytes, (2 << 20) + number) for number in range(10)]
        for mark in range(250, 2000, 250):
            assert wait_until(lambda mark=mark: futures[mark].done(), WAIT_S)
            network.pull("one")
            network.plug("one")
        assert [future.result(WAIT_S) for future in futures] == list(range(2000))
        assert [len(future.result(WAIT_S)) for future in blocks] == [(2 << 20) + number for number in range(10)]
        assert all(future.attempts == 1 for future in [*futures, *blocks])
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(2000))


def test_a_long_cut(network: netns.Network, tmp_path: Path) -> None:
    """Cut for longer than node_timeout → handed to another; the first attempt is stopped on return, and counts not."""
    with two_agents(network) as agents, cluster(*agents, node_timeout=1.5) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        [number] = [number for number, future in enumerate(futures) if future.node == "one"]
        stale = deeds.pids(tmp_path)[deeds.notes(tmp_path).index(str(number))]
        network.pull("one")
        assert wait_until(lambda: futures[number].node == "two", WAIT_S), "it was not handed out again"
        assert not is_gone(stale), "nobody can have told it yet"
        network.plug("one")
        assert wait_until(lambda: is_gone(stale), WAIT_S), "the attempt that was replaced still runs"
        assert executor.wait_for_slots(2, WAIT_S), "the slot of the stopped attempt is missing"
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]
        assert [future.attempts for future in futures] == [1 + (each == number) for each in range(2)]
    assert sorted(deeds.notes(tmp_path)) == sorted(["0", "1", str(number)])


def test_back_before_the_replacement(network: netns.Network, tmp_path: Path) -> None:
    """Cut for longer than node_timeout, back before anybody had room for its tasks → they are adopted, each ran once."""
    with two_agents(network) as agents, cluster(*agents, node_timeout=1.5) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(4)]  # one runs, one waits on each
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        network.pull("one")
        assert wait_until(lambda: executor.status().queued == 2, WAIT_S)
        network.plug("one")
        assert wait_until(lambda: executor.status().queued == 0, WAIT_S), "they were not adopted"
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == list(range(4))
        assert [future.attempts for future in futures] == [1] * 4
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(4))


# ---- what stands still


@pytest.mark.parametrize("is_short", [True, False])
def test_a_frozen_agent(network: netns.Network, tmp_path: Path, is_short: bool) -> None:
    """A stopped agent is noticed by its silence; back in time it goes on where it was, later its tasks run elsewhere."""
    with two_agents(network) as (one, two), cluster(one, two, node_timeout=12.0 if is_short else 1.5) as executor:
        assert executor.wait_for_slots(2, WAIT_S)
        futures = [executor.submit(deeds.hold, str(tmp_path), number) for number in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        one.process.send_signal(signal.SIGSTOP)
        try:
            if is_short:
                assert wait_until(lambda: state_of(executor, "one") == "suspended", WAIT_S)
            else:
                assert wait_until(lambda: all(future.node == "two" for future in futures), WAIT_S)
                deeds.let_go(tmp_path)
                assert [future.result(WAIT_S) for future in futures] == [0, 1]
        finally:
            one.process.send_signal(signal.SIGCONT)
        assert wait_until(lambda: state_of(executor, "one") == "up", WAIT_S)
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == [0, 1]
        assert executor.wait_for_slots(2, WAIT_S)
    assert len(deeds.notes(tmp_path)) == (2 if is_short else 3)
    assert sorted(future.attempts for future in futures) == ([1, 1] if is_short else [1, 2])


def hold_the_lock(directory: str, seconds: int) -> int:
    """Take the interpreter's lock and keep it."""
    deeds.note(directory, "held")
    ctypes.PyDLL(None).sleep(seconds)  # unlike CDLL it does not let go of the lock
    return seconds


def test_a_task_that_holds_the_lock(network: netns.Network, tmp_path: Path) -> None:
    """A task that holds its interpreter's lock for many node_timeouts does not make its node look dead."""
    with agent_on(network, "one") as agent, cluster(agent, node_timeout=1.0) as executor:
        future = executor.submit(hold_the_lock, str(tmp_path), 6)
        states = set()
        while not future.done():
            states.add(state_of(executor, executor.nodes()[0].name))
            wait_until(future.done, 0.05)
        assert (future.result(), future.attempts) == (6, 1)
        assert "suspended" not in states
    assert deeds.notes(tmp_path) == ["held"]


def test_a_client_that_holds_the_lock(network: netns.Network, tmp_path: Path) -> None:
    """A program that holds its own interpreter's lock beyond node_timeout takes nobody for dead: it did not listen."""
    with agent_on(network, "one") as agent, cluster(agent, node_timeout=0.6, retries=0) as executor:
        future = executor.submit(deeds.hold, str(tmp_path), "held")
        assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
        for _ in range(8):
            ctypes.PyDLL(None).sleep(1)
            assert not wait_until(future.done, 0.1)
        deeds.let_go(tmp_path)
        assert (future.result(WAIT_S), future.attempts) == ("held", 1)
    assert deeds.notes(tmp_path) == ["held"]


def test_a_client_stopped_while_the_cable_is_out(network: netns.Network, tmp_path: Path) -> None:
    """A client whose link is away when it is stopped listens again before it gives its node up."""
    script = CLIENT.replace("start_children", "hold").replace("range(4)", "range(1)")
    with agent_on(network, "one") as agent:
        code = script.format(kwargs=f"nodes=[{agent.address!r}], secret={agent.secret!r}, node_timeout=5.0, retries=0")
        client = subprocess.Popen([*network["other"].prefix, sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
        assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
        network.pull("one")
        client.send_signal(signal.SIGSTOP)
        assert not wait_until(lambda: client.poll() is not None, 7)
        network.plug("one")
        client.send_signal(signal.SIGCONT)
        deeds.let_go(tmp_path)
        assert client.wait(WAIT_S) == 0
    assert len(deeds.notes(tmp_path)) == 1


# ---- clients that go


def test_clients_that_vanish(network: netns.Network, tmp_path: Path) -> None:
    """One client is killed, another's machine unplugged → within 30 s their slots are free, none of their processes left."""
    with agent_on(network, "one", slots=4) as agent:
        kwargs = f"nodes=[{agent.address!r}], secret={agent.secret!r}"
        clients = []
        for host in ("client", "other"):
            (tmp_path / host).mkdir()
            code = CLIENT.format(kwargs=kwargs).replace("range(4)", "range(2)")
            command = [*network[host].prefix, sys.executable, "-c", code, str(tmp_path / host)]
            clients.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
        assert wait_until(lambda: all(len(deeds.notes(tmp_path / host)) == 2 for host in ("client", "other")), WAIT_S)
        of_tasks = [pid for host in ("client", "other") for pid in processes_of_tasks(tmp_path / host)]
        clients[0].kill()
        network.pull("other")
        try:
            assert wait_until(lambda: all(map(is_gone, of_tasks)), 30), [pid for pid in of_tasks if not is_gone(pid)]
            assert clients[1].poll() is None
            with cluster(agent) as executor:
                assert executor.wait_for_slots(4, WAIT_S)
        finally:
            for client in clients:
                client.kill()
                client.wait()
        assert wait_until(lambda: not psutil.Process(agent.process.pid).children(recursive=True), WAIT_S)


READER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    sys.stdin.read()
"""


@contextmanager
def connected(network: netns.Network) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection from a program on "other" that never reads, and that program."""
    with socket.create_server((network["client"].address, 0)) as server:
        host, port = server.getsockname()
        command = [*network["other"].prefix, sys.executable, "-c", READER, host, str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as reader:
            try:
                connection, _ = server.accept()
                with connection:
                    tune(connection)
                    connection.setblocking(False)
                    yield connection, reader
            finally:
                reader.kill()


def test_a_stopped_program_is_not_a_vanished_machine(network: netns.Network) -> None:
    """The kernel of a stopped program answers for it, its window full or not; that of an unplugged machine does not."""
    with connected(network) as (connection, reader):
        reader.send_signal(signal.SIGSTOP)
        connection.send(b"some")
        assert not wait_until(lambda: unanswered_s(connection), 3)
        with suppress(BlockingIOError):
            while True:
                connection.send(bytes(1 << 16))
        assert not wait_until(lambda: unanswered_s(connection), 6)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
    with connected(network) as (connection, _):
        network.pull("other")
        assert unanswered_s(connection) == 0.0, "nothing was asked yet"
        connection.send(b"some")
        assert wait_until(lambda: unanswered_s(connection) > 3, WAIT_S)
        network.plug("other")
        assert wait_until(lambda: unanswered_s(connection) == 0.0, WAIT_S)


# ---- who does not read

TALKER = """
import sys
from tests.system import deeds, test_links
from distexec import ClusterExecutor
with ClusterExecutor({kwargs}) as executor:
    future = executor.submit(test_links.talk_on, sys.argv[1], {size})
    assert future.result() == {size}
    assert future.attempts == 1
"""


def talk_on(directory: str, size: int) -> int:
    """Say that it begins, wait for word, print so many bytes, and say that it is done."""
    deeds.hold(directory, "begun")
    for _ in range(size >> 20):
        sys.stdout.write("x" * (1 << 20))
    sys.stdout.flush()
    deeds.note(directory, "printed")
    return size


def test_a_client_that_does_not_read(network: netns.Network, tmp_path: Path) -> None:
    """A stopped client whose task prints without end costs the agent a bounded memory, nobody else any time, and is told."""
    size = 400 << 20
    with agent_on(network, "one", slots=2) as agent:
        code = TALKER.format(kwargs=f"nodes=[{agent.address!r}], secret={agent.secret!r}", size=size)
        with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
            talker = subprocess.Popen([*network["other"].prefix, sys.executable, "-c", code, str(tmp_path)], cwd=ROOT,
                                      stdout=out, stderr=err)
        try:
            assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
            talker.send_signal(signal.SIGSTOP)
            before = psutil.Process(agent.process.pid).memory_info().rss
            deeds.let_go(tmp_path)
            with cluster(agent) as executor:
                peak = before
                while "printed" not in deeds.notes(tmp_path):
                    assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
                    peak = max(peak, psutil.Process(agent.process.pid).memory_info().rss)
            assert peak - before < size / 3, f"{(peak - before) >> 20} MiB for {size >> 20} MiB printed"
            talker.send_signal(signal.SIGCONT)
            assert talker.wait(WAIT_S) == 0
        finally:
            talker.kill()
            talker.wait()
        err = (tmp_path / "err").read_text()
        assert "node 'one': " in err
        assert "bytes printed there are missing before this line" in err


def test_pressure_reaches_the_iterable(network: netns.Network) -> None:
    """An agent that stands still → `map(buffersize=)` takes no more from its iterable, and goes on when it does."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(3000):
            taken.append(number)
            yield number

    with agent_on(network, "one", slots=2) as agent, cluster(agent, node_timeout=FAR_S) as executor:
        results = executor.map(deeds.double, numbers(), buffersize=50)
        got = [next(results) for _ in range(100)]
        agent.process.send_signal(signal.SIGSTOP)
        try:
            reader = threading.Thread(target=got.extend, args=(results,))
            reader.start()
            assert not wait_until(lambda: len(taken) > len(got) + 60, 2)
            assert len(taken) < 3000
        finally:
            agent.process.send_signal(signal.SIGCONT)
        reader.join(WAIT_S)
        assert got == [2 * number for number in range(3000)]


# ---- the network itself


def test_networks_are_looked_after(network: netns.Network) -> None:
    """The namespaces of a test are found by the leak check, and those whose maker is gone by the next network."""
    assert {each.namespace for each in network.hosts.values()} < netns.namespaces(os.getpid())
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    stale = f"{netns.PREFIX}{nobody.pid}-left"
    subprocess.run(["ip", "netns", "add", stale], check=True)
    before = leaks.Footprint(namespaces=set())
    assert any("network namespace" in leak for leak in before._found())
    netns._remove_stale()
    assert stale not in netns.namespaces()
