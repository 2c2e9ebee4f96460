"""`distexec-agent` as the operator of a machine meets it: starting, stopping, and what it keeps."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from distexec import ClusterExecutor
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds

WAIT_S = 20.0
SECRET = "8f1c2e5a9b7d4460a3c1e8f2b5d79064"


def run_agent(*arguments: str, home: Path, secret: str | None = SECRET) -> subprocess.Popen[str]:
    """Start an agent."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTEXEC_")}
    environ |= {"XDG_CONFIG_HOME": str(home), "PYTHONPATH": str(ROOT)} | ({"DISTEXEC_SECRET": secret} if secret else {})
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from distexec.cli import agent_main; sys.exit(agent_main())", *arguments],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(*arguments: str, home: Path, secret: str | None = SECRET) -> tuple[int, str]:
    """Start an agent that cannot; give its exit code and what it said."""
    agent = run_agent(*arguments, home=home, secret=secret)
    try:
        out, err = agent.communicate(timeout=WAIT_S)
    finally:
        agent.kill()
        agent.wait()
    assert out == ""
    assert "Traceback" not in err
    return agent.returncode, err


@pytest.mark.parametrize(("arguments", "text"), [
    (["--slots", "0"], "--slots 0 leaves no slot"),
    (["--slots", "-999"], "--slots -999 leaves no slot"),
    (["--slots", "many"], "invalid int value"),
    (["--drain", "-1"], "--drain must be 0 or more"),
    (["--memory-limit", "lots"], "--memory-limit.*500M"),
    (["--memory-limit", ""], "--memory-limit.*500M"),
    (["--spool", "/no/such/directory"], "/no/such/directory.*make it"),
    (["--secret-file", "/no/such/file"], "/no/such/file"),
    (["--listen", "127.0.0.1:port"], "127.0.0.1:port"),
    (["--listen", "no-such-host.invalid"], "no-such-host.invalid"),
    (["--listen", "192.0.2.1"], "192.0.2.1"),
    (["--log-level", "loud"], "loud"),
    (["--name", ""], "--name"),
    (["--name", "two\nlines"], "--name"),
])
def test_bad_options(tmp_path: Path, arguments: list[str], text: str) -> None:
    """A bad option gets one message that names it, and an exit code that is not 0."""
    import re

    code, err = refused(*arguments, home=tmp_path)
    assert code in (1, 2)
    assert re.search(text, err), err


def test_port_taken(tmp_path: Path) -> None:
    """A port that is taken is named, with the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, err = refused("--listen", address, home=tmp_path)
    assert code == 1
    assert address.rpartition(":")[2] in err
    assert "choose another port" in err


@pytest.mark.skipif(os.getuid() == 0, reason="root can write everywhere")
def test_unwritable_spool(tmp_path: Path) -> None:
    """A spool directory that cannot be written to is named."""
    tmp_path.chmod(0o500)
    code, err = refused("--spool", str(tmp_path), home=tmp_path)
    assert code == 2
    assert str(tmp_path) in err


def test_spool_that_is_a_file(tmp_path: Path) -> None:
    """A spool that is no directory is named."""
    (tmp_path / "file").touch()
    code, err = refused("--spool", str(tmp_path / "file"), home=tmp_path)
    assert code == 2
    assert str(tmp_path / "file") in err


def test_short_secret(tmp_path: Path) -> None:
    """A secret under 128 bits is refused."""
    code, err = refused("--listen", "127.0.0.1:0", home=tmp_path, secret="abc123")
    assert code == 2
    assert "DISTEXEC_SECRET" in err


def test_open_secret_file(tmp_path: Path) -> None:
    """A secret file that others can read is refused, with the command that helps."""
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(0o644)
    code, err = refused("--secret-file", str(path), home=tmp_path)
    assert code == 2
    assert f"chmod 600 {path}" in err


def read_address(agent: subprocess.Popen[str]) -> str:
    """Wait for the line that says it is ready, and take the address from it."""
    assert agent.stdout is not None
    line = agent.stdout.readline()
    assert "ready" in line
    assert line.startswith("distexec-agent")
    return line.rsplit(" ", 1)[1].strip()


def test_makes_a_secret(tmp_path: Path) -> None:
    """Started without any secret it makes the per-user one, private, says so, and clients find it there."""
    agent = run_agent("--listen", "127.0.0.1:0", "--slots", "1", home=tmp_path, secret=None)
    try:
        address = read_address(agent)
        path = tmp_path / "distexec" / "secret"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with ClusterExecutor(nodes=[address], secret=path.read_text().strip()) as executor:
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
    finally:
        agent.terminate()
        out, err = agent.communicate(timeout=WAIT_S)
    assert agent.returncode == 0
    assert f"made a new secret in {path}" in err
    assert path.read_text().strip() not in out + err


def test_secret_stays_with_the_agent(shared_agent: AgentProcess) -> None:
    """No worker finds the cluster's secret, in its own environment or in that of its parents, though it comes from there."""
    with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret) as executor:
        environment, memory = executor.submit(look_for, shared_agent.secret).result(WAIT_S)
    assert not environment
    assert not memory


def look_for(secret: str) -> tuple[list[str], bool]:
    """Give the processes of ours above that have the secret in their environment, the agent excepted."""
    import psutil

    own = [psutil.Process(), psutil.Process().parent()]
    return [str(each) for each in own if each and secret in str(each.environ())], secret in str(dict(os.environ))


def test_slots_left_free(tmp_path: Path) -> None:
    """A negative number of slots leaves that many CPUs free."""
    cpus = len(os.sched_getaffinity(0))
    if cpus < 2:
        pytest.skip("one CPU only")
    agent = run_agent("--listen", "127.0.0.1:0", "--slots", "-1", home=tmp_path)
    try:
        address = read_address(agent)
        with ClusterExecutor(nodes=[address], secret=SECRET) as executor:
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
            assert executor.status().slots == cpus - 1
    finally:
        agent.terminate()
        agent.communicate(timeout=WAIT_S)


def test_once(tmp_path: Path) -> None:
    """With --once it stops when the first client has gone."""
    agent = run_agent("--listen", "127.0.0.1:0", "--slots", "1", "--once", home=tmp_path)
    with ClusterExecutor(nodes=[read_address(agent)], secret=SECRET) as executor:
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
    agent.communicate(timeout=WAIT_S)
    assert agent.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_when_told(tmp_path: Path, number: signal.Signals) -> None:
    """Idle, it ends at once at SIGTERM or Ctrl-C, without a traceback, and leaves its spool empty."""
    (tmp_path / "spool").mkdir()
    agent = run_agent("--listen", "127.0.0.1:0", "--slots", "1", "--spool", str(tmp_path / "spool"), home=tmp_path)
    with ClusterExecutor(nodes=[read_address(agent)], secret=SECRET) as executor:
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
    agent.send_signal(number)
    _, err = agent.communicate(timeout=WAIT_S)
    assert agent.returncode == 0
    assert "Traceback" not in err
    assert not list((tmp_path / "spool").iterdir())


def test_idle_agent_holds_nothing(tmp_path: Path) -> None:
    """When its clients have gone, an agent has no workers, no session directories, and no more descriptors than before."""
    spool = tmp_path / "spool"
    spool.mkdir()
    with AgentProcess(slots=2, arguments=("--spool", str(spool))) as agent:
        def descriptors() -> int:
            return len(os.listdir(f"/proc/{agent.process.pid}/fd"))

        def children() -> str:
            return Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text()

        counts = []
        for _ in range(3):
            with ClusterExecutor(nodes=[agent.address], secret=agent.secret) as executor:
                list(executor.map(deeds.double, [bytes(2 << 20)] * 8))
            assert wait_until(lambda: not children() and not [*next(spool.iterdir()).iterdir()], WAIT_S)
            counts.append(descriptors())
        assert wait_until(lambda: descriptors() <= counts[0] + 1, WAIT_S), counts


def test_agent_memory_is_given_back(shared_agent: AgentProcess) -> None:
    """Large results that the client has are not kept by the agent."""
    with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret) as executor:
        for number in range(30):
            assert len(executor.submit(bytes, (8 << 20) + number).result(WAIT_S)) == (8 << 20) + number

        def shared_bytes() -> int:
            count = 0
            for fd in os.listdir(f"/proc/{shared_agent.process.pid}/fd"):
                try:
                    path = f"/proc/{shared_agent.process.pid}/fd/{fd}"
                    if "memfd" in os.readlink(path):
                        count += os.stat(path).st_blocks * 512
                except FileNotFoundError:
                    continue
            return count

        assert wait_until(lambda: shared_bytes() < 160 << 20, WAIT_S), shared_bytes()


def test_one_agent_under_two_names_is_one_node(shared_agent: AgentProcess, tmp_path: Path,
                                               caplog: pytest.LogCaptureFixture) -> None:
    """Named as 127.0.0.1, as localhost and twice → one of them is used, nothing runs twice, and the user is told once."""
    port = shared_agent.address.rpartition(":")[2]
    names = [shared_agent.address, f"localhost:{port}", shared_agent.address]
    with ClusterExecutor(nodes=names, secret=shared_agent.secret, retries=0) as executor:
        assert list(executor.map(deeds.note_and_return, [str(tmp_path)] * 40, range(40))) == list(range(40))
        wait_until(lambda: [node.state for node in executor.nodes()].count("refused") == 1)
        assert sum(node.slots for node in executor.nodes()) == shared_agent.slots
        wait_until(lambda: "name a node once" in caplog.text)
    assert sorted(deeds.notes(tmp_path), key=int) == [str(number) for number in range(40)]
    assert caplog.text.count("name a node once") == 1


def test_a_node_that_is_missing_is_named_while_others_work(shared_agent: AgentProcess,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    """One good node, one with another secret → the work is done, and one warning says why the other takes no part."""
    with AgentProcess(slots=1, name="stranger") as stranger:
        nodes = [shared_agent.address, stranger.address]
        with ClusterExecutor(nodes=nodes, secret=shared_agent.secret) as executor:
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
            wait_until(lambda: f"takes no part: {stranger.address}" in caplog.text)
