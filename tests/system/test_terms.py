"""On what terms an operator lets tasks run: an init file, another user, limits; and how many threads they may use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy
import psutil
import pytest

from distexec import ClusterExecutor, InitializerFailed, WorkerLost
from distexec.cpus import usable_cpus
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds, filework, states
from tests.system.conftest import make_local
from tests.system.test_agent import refused
from tests.system.test_faults import is_gone

WAIT_S = 30.0


def connect(agent: AgentProcess, **more: object) -> ClusterExecutor:
    """An executor on an agent."""
    return ClusterExecutor(nodes=[agent.address], secret=agent.secret, **more)  # type: ignore[arg-type]


# ---- --init


def test_init_file_is_run_once_per_session(tmp_path: Path) -> None:
    """Tasks and setup find what it defines as `distexec_init`; each session runs it anew."""
    init = tmp_path / "init.py"
    init.write_text(f"from tests.system import deeds\ndeeds.note({str(tmp_path)!r}, __name__)\n"
                    "TABLE = {'a': 1}\nWHERE = __file__\n")
    with AgentProcess(arguments=("--init", str(init))) as agent:
        for _ in range(2):
            with connect(agent, setup=states.set_from_init) as executor:
                assert executor.submit(states.from_init, "TABLE").result(WAIT_S) == {"a": 1}
                assert executor.submit(states.from_init, "WHERE").result(WAIT_S) == str(init)
                assert executor.submit(states.look).result(WAIT_S)[0] == {"a": 1}
        with connect(agent) as executor:
            assert set(executor.map(states.from_init, ["TABLE"] * 20, chunksize=1).__next__()) == {"a"}
    assert deeds.notes(tmp_path) == ["distexec_init"] * 3


def test_init_file_that_raises_is_told_to_clients(tmp_path: Path) -> None:
    """The session cannot run there, and its client sees why, with the line; the agent stays."""
    init = tmp_path / "init.py"
    init.write_text("ready = True\nraise LookupError('no licence')\n")
    with AgentProcess(arguments=("--init", str(init))) as agent:
        for _ in range(2):
            with connect(agent) as executor:
                error = executor.submit(deeds.double, 1).exception(WAIT_S)
                assert isinstance(error, InitializerFailed)
                assert f"init file {init} raised LookupError: no licence" in str(error)
                assert "line 2" in str(error.__cause__.__cause__)  # type: ignore[union-attr]


@pytest.mark.parametrize(("arguments", "text"), [
    (["--init", "/no/such/file.py"], "--init /no/such/file.py.*readable|--init /no/such/file.py: No such file.*can be read"),
    (["--init", "{tmp}/broken.py"], "broken.py.*not Python.*line 1"),
    (["--init", "{tmp}"], "Is a directory"),
    (["--user", "no-such-user"], "--user no-such-user.*there is no user.*useradd"),
    (["--max-open-files", "3"], "--max-open-files 3.*64 or more"),
    (["--max-file-size", "lots"], "--max-file-size.*500M"),
])
def test_terms_that_cannot_be_meant(arguments: list[str], text: str, tmp_path: Path) -> None:
    """One line that says what and what to do, exit code 2, before anything listens."""
    (tmp_path / "broken.py").write_text("def (:\n")
    code, err = refused(*(each.format(tmp=tmp_path) for each in arguments), home=tmp_path)
    assert code == 2
    assert re.search(text, err, re.DOTALL), err


# ---- limits


@pytest.mark.parametrize("setup", [None, states.greet_nobody])
def test_limits_are_those_of_tasks(tmp_path: Path, setup: object) -> None:
    """Open files and file sizes are limited for tasks, prepared or not; large results and arguments travel all the same."""
    with AgentProcess(arguments=("--max-open-files", "100", "--max-file-size", "4M")) as agent, connect(
            agent, setup=setup) as executor:
        assert executor.submit(states.limits).result(WAIT_S) == (100, 4 << 20)
        path = str(tmp_path / "file")
        assert executor.submit(states.write, path, 3 << 20).result(WAIT_S) == 3 << 20
        with pytest.raises(OSError, match="too large"):
            executor.submit(states.write, path, 5 << 20).result(WAIT_S)
        assert len(executor.submit(states.zeros, 9 << 20).result(WAIT_S)) == 9 << 20
        assert executor.submit(numpy.sum, numpy.ones(2 << 20)).result(WAIT_S) == 2 << 20
        assert executor.submit(states.limits).result(WAIT_S) == (100, 4 << 20)
        assert not os.path.exists(path) or os.stat(path).st_size <= 4 << 20


# ---- threads


def test_threads_of_tasks_are_the_slots_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs divided by slots, at least one, unless the client's environment or env= says otherwise."""
    for name in states.threads():
        monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    with make_local(1, env={"NUMBA_NUM_THREADS": "3"}) as executor:
        found = executor.submit(states.threads).result(WAIT_S)
    share = str(usable_cpus())
    assert found == {"OMP_NUM_THREADS": share, "OPENBLAS_NUM_THREADS": share, "BLIS_NUM_THREADS": share,
                     "NUMEXPR_NUM_THREADS": share, "VECLIB_MAXIMUM_THREADS": share, "MKL_NUM_THREADS": "5",
                     "NUMBA_NUM_THREADS": "3"}
    with make_local(4 * usable_cpus(), env={"OMP_NUM_THREADS": "2"}) as executor:
        found = executor.submit(states.threads).result(WAIT_S)
    assert found == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "5", "VECLIB_MAXIMUM_THREADS": "1",
                     "NUMBA_NUM_THREADS": "1"}


def test_threads_of_tasks_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the agent's environment counts, and its slots; never the client's environment."""
    for name in states.threads():
        monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    with AgentProcess(slots=3 * usable_cpus()) as agent:
        monkeypatch.setenv("MKL_NUM_THREADS", "7")
        monkeypatch.setenv("NUMEXPR_NUM_THREADS", "7")
        with connect(agent) as executor:
            found = executor.submit(states.threads).result(WAIT_S)
    assert (found["OMP_NUM_THREADS"], found["NUMEXPR_NUM_THREADS"], found["MKL_NUM_THREADS"]) == ("1", "1", "5")


# ---- --user


def _open_interpreter() -> str | None:
    """An interpreter of this version that the user may start; None: there is none."""
    for path in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        try:
            subprocess.run([path, "-c", "import sys"], check=True, user="nobody", cwd="/", timeout=WAIT_S,
                           stderr=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError):
            continue
        return path
    return None


@pytest.fixture
def nobodys(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AgentProcess, Path]]:
    """An agent whose tasks are nobody's, and a directory that nobody may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can have tasks run as another user")
    interpreter = _open_interpreter()
    if interpreter is None:
        pytest.skip("there is no interpreter that another user could start")
    packages = [entry for entry in sys.path if entry.endswith("site-packages")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(packages))
    monkeypatch.setattr(sys, "executable", interpreter)
    with tempfile.TemporaryDirectory(prefix="pytest-of-spool-", dir="/var/tmp") as spool:
        os.chmod(spool, 0o755)
        with AgentProcess(arguments=("--user", "nobody", "--spool", spool)) as agent:
            yield agent, Path(spool)
        assert not list(Path(spool).iterdir())


def test_tasks_are_the_users(nobodys: tuple[AgentProcess, Path], tmp_path: Path) -> None:
    """Tasks, setup and what they start are the user's; arguments, results, output and files work; the secret is closed."""
    agent, _ = nobodys
    secret = tmp_path / "secret"
    secret.write_text("closed")
    secret.chmod(0o600)
    with connect(agent, setup=states.keep_user) as executor:
        assert executor.submit(states.look).result(WAIT_S)[0] == executor.submit(states.who).result(WAIT_S)[:2]
        uid, home, directory_mode, owner = executor.submit(states.who).result(WAIT_S)
        assert uid == owner != 0
        assert home == os.path.expanduser("~nobody")
        assert directory_mode == 0o700
        for path in (secret, f"/proc/{agent.process.pid}/environ", f"/proc/{agent.process.pid}/mem"):
            with pytest.raises(PermissionError):
                executor.submit(states.read, str(path)).result(WAIT_S)
        assert agent.secret.encode() not in executor.submit(states.read, "/proc/self/environ").result(WAIT_S)
        assert agent.secret.encode() not in executor.submit(states.read_parents_environ).result(WAIT_S)
        array = numpy.ones(3 << 20)
        assert (executor.submit(deeds.double, array).result(WAIT_S) == 2 * array).all()
        assert executor.submit(states.read_parents_environ).result(WAIT_S)


def test_users_tasks_have_files(nobodys: tuple[AgentProcess, Path], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to nodes and calls is the user's to read, private modes included; what tasks send arrives."""
    agent, spool = nobodys
    monkeypatch.chdir(tmp_path)
    Path("private").write_text("private")
    Path("private").chmod(0o600)
    Path("large").write_bytes(bytes(2 << 20))
    with connect(agent, depends=["private"], downloads="results") as executor:
        assert executor.submit(filework.read, "private").result(WAIT_S) == b"private"
        executor.submit(filework.overwrite, "private").result(WAIT_S)
        found = executor.options(files=["private", "large"]).submit(filework.tree).result(WAIT_S)
        assert found["private"] == (0o600, b"private")
        mode, content = found["large"]
        assert content == bytes(64)
        assert mode in (0o444, 0o644)  # linked to, or, where one may link only to what is one's own, copied
        directory, mode, _ = executor.submit(filework.own_directory).result(WAIT_S)
        assert directory.startswith(str(spool))
        assert mode == 0o700
        assert not os.path.exists(directory)
        executor.send_file("large", name="sub/large")
        assert len(executor.submit(filework.read, "sub/large").result(WAIT_S)) == 2 << 20
        executor.submit(filework.send, b"content").result(WAIT_S)
        assert Path("results/file.out").read_bytes() == b"content"


def test_users_cannot_lead_the_agent_elsewhere(nobodys: tuple[AgentProcess, Path], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """What tasks put in the place of the session's directories is not followed by the agent, which may do more than they."""
    agent, _ = nobodys
    monkeypatch.chdir(tmp_path)
    Path("small").write_text("small")
    Path("large").write_bytes(bytes(200_000))
    (tmp_path / "outside").mkdir()
    with connect(agent, depends=["small"]) as executor:
        work = executor.submit(filework.cwd).result(WAIT_S)
        for name in ("work", "files"):
            executor.submit(filework.exchange, os.path.join(os.path.dirname(work), name),
                            str(tmp_path / "outside")).result(WAIT_S)
        for name in ("small", "large"):
            with pytest.raises(OSError, match="could not be put on node"):
                executor.send_file(name, timeout=WAIT_S)
        with pytest.raises(WorkerLost, match="could not be brought"):
            executor.options(files="large", retries=0).submit(filework.cwd).result(WAIT_S)
    assert not list((tmp_path / "outside").iterdir())


def test_users_tasks_end_with_their_agent(nobodys: tuple[AgentProcess, Path]) -> None:
    """kill -9 of the agent: nothing of the user's is left."""
    agent, spool = nobodys
    executor = connect(agent, setup=states.keep_user)
    pids = [executor.submit(os.getpid).result(WAIT_S), executor.submit(states.look).result(WAIT_S)[1]]
    pids.append(psutil.Process(pids[1]).ppid())  # the guardian, which removes what it may
    agent.process.kill()
    agent.process.wait()
    assert wait_until(lambda: all(map(is_gone, pids)))
    executor.kill_workers()
    executor.shutdown()
    for left in spool.iterdir():  # for its next start to remove
        shutil.rmtree(left)
