"""Durable sessions: what is recorded stays, whoever dies; what has ended is never run again."""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distexec import ClusterExecutor, DistexecError, JournalError, TaskKilled, TaskTimeout, WorkerLost
from distexec.address import parse_address, resolve
from distexec.auth import Secret
from distexec.cli import main
from distexec.journal import Journal, NodeRow
from distexec.survey import drop_session
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make, make_local

WAIT_S = 20.0
KILLS = int(os.environ.get("JOURNAL_KILLS", "10"))
"""How often the client of the long run is killed; JOURNAL_KILLS=100 for the thorough one."""

TASKS = 2000


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    """An agent of one's own: sessions that are left behind on it end with it."""
    with AgentProcess(slots=2, name="n1") as process:
        yield process


class Program:
    """durable_program.py with a journal, to be started again and again."""

    def __init__(self, agent: AgentProcess | None, directory: Path, count: int, seconds: float) -> None:
        self.directory, self.journal = directory, directory / "run.db"
        self.environ = os.environ | {"PYTHONPATH": str(ROOT)}
        address = "local"
        if agent is not None:
            self.environ["DISTEXEC_SECRET"], address = agent.secret, agent.address
        self._command = [sys.executable, "-m", "tests.system.durable_program", str(self.journal), address, str(directory),
                         str(count), str(seconds)]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Start it."""
        return subprocess.Popen([*self._command, *more], cwd=ROOT, env=self.environ, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def finish(self, *more: str) -> str:
        """Let it run to its end; gives what it printed last."""
        with self.start(*more) as process:
            out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        return out.splitlines()[-1]

    def shell(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the `distexec` command."""
        return subprocess.run([sys.executable, "-m", "distexec", *arguments], cwd=self.directory, env=self.environ,
                              text=True, capture_output=True, timeout=90)


# ---- the same program again, and recover


def test_a_program_run_again_gets_what_it_had(make: Make, tmp_path: Path) -> None:
    """Second run with the journal → the recorded values and errors, a thousand samples as a thousand; nothing runs."""
    runs = []
    for _ in range(2):
        with make(2, durable=tmp_path / "run.db") as executor:
            squares = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(50)]
            samples = [executor.submit(os.urandom, 8) for _ in range(1000)]
            mapped = executor.map(deeds.double, range(100), chunksize=7)
            failed = executor.submit(deeds.fail, ValueError("mine"))
            named = executor.options(key="seed").submit(os.urandom, 8)
            twins = [executor.options(key="twin").submit(os.urandom, 8) for _ in range(2)]
            assert twins[0].result(WAIT_S) == twins[1].result(WAIT_S)
            assert named.result(WAIT_S) == executor.options(key="seed").submit(os.urandom, 4).result(WAIT_S)
            assert isinstance(failed.exception(WAIT_S), ValueError)
            runs.append(([each.result(WAIT_S) for each in squares], [each.result(WAIT_S) for each in samples], list(mapped),
                         named.result(WAIT_S)))
    assert runs[0] == runs[1]
    assert len(set(runs[0][1])) == 1000
    assert len(deeds.notes(tmp_path)) == 50


def test_what_was_not_the_functions_doing_runs_again(make: Make, tmp_path: Path) -> None:
    """Lost, timed out, cancelled → recorded as such for `recover`, run again by the program."""
    def submit(executor: ClusterExecutor, seconds: float) -> list[Any]:
        return [executor.options(key="lost", retries=0).submit(deeds.die_first, 1, str(tmp_path)),
                executor.options(key="late", timeout=0.2).submit(deeds.nap, seconds, "in time")]
    with make(2, durable=tmp_path / "run.db") as executor:
        futures = submit(executor, 30.0)
        assert isinstance(futures[0].exception(WAIT_S), WorkerLost)
        assert isinstance(futures[1].exception(WAIT_S), TaskTimeout)
    with ClusterExecutor.recover(tmp_path / "run.db", nodes="local") as calls:
        assert isinstance(calls.by_key["lost"].exception(0), WorkerLost)
        assert isinstance(calls.by_key["late"].exception(0), TaskTimeout)
    with make(2, durable=tmp_path / "run.db") as executor:
        assert [future.result(WAIT_S) for future in submit(executor, 0.0)] == [2, "in time"]
    with ClusterExecutor.recover(tmp_path / "run.db", nodes="local") as calls:
        assert {name: future.result(0) for name, future in calls.by_key.items()} == {"lost": 2, "late": "in time"}
        assert len(calls) == 2


def test_large_values_and_cancelled_calls(make: Make, tmp_path: Path) -> None:
    """Arrays of megabytes, in arguments and results, come back from the journal; what was cancelled stays so."""
    import numpy

    array = numpy.arange(600_000)
    for _ in range(2):
        with make(1, durable=tmp_path / "run.db") as executor:
            assert (executor.submit(deeds.double, array).result(WAIT_S) == 2 * array).all()
    with make(1, durable=tmp_path / "run.db") as executor:
        held = [executor.submit(deeds.hold, str(tmp_path), word) for word in range(4)]
        waiting = executor.submit(deeds.note_and_return, str(tmp_path), "never")
        assert wait_until(lambda: deeds.notes(tmp_path))
        assert waiting.cancel()
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in held] == list(range(4))
    with ClusterExecutor.recover(tmp_path / "run.db", nodes="local") as calls:
        assert (calls[0].result(0) == 2 * array).all()
        assert calls[-1].cancelled()
        assert [future.result(0) for future in calls[1:5]] == list(range(4))
    assert "never" not in deeds.notes(tmp_path)


def test_a_corrected_module_is_imported_anew(agent: AgentProcess, tmp_path: Path) -> None:
    """A module is corrected between two lives, its node kept the session: new calls run the new code."""
    program = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
import corrected
from distexec import ClusterExecutor
executor = ClusterExecutor(nodes=[{agent.address!r}], secret={agent.secret!r}, durable={str(tmp_path / "run.db")!r})
print(executor.submit(corrected.answer, 1).result({WAIT_S}), flush=True)
os._exit(0)
"""
    said = []
    for word in ("wrong", "corrected"):
        (tmp_path / "corrected.py").write_text(f"def answer(number): return {word!r}\n")
        with subprocess.Popen([sys.executable, "-B", "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}) as process:
            said.append(process.communicate(timeout=90)[0].strip())
    assert said == ["wrong", "corrected"]


def test_what_has_no_stable_key_is_recorded_and_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A call that cannot be told from others: one warning says so, however many there are; each run runs it."""
    class Odd:
        def __reduce__(self) -> tuple[Any, ...]:
            if sys._getframe(1).f_code.co_name == "_pickled":
                raise TypeError("not for keys")
            return str, ("odd",)
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "distexec"), make_local(1, durable=tmp_path / "run.db") as executor:
            for _ in range(3):
                assert executor.submit(deeds.note_and_return, str(tmp_path), Odd()).result(WAIT_S) == "odd"
        assert sum("note_and_return" in record.message and "key=" in record.message for record in caplog.records) == 1
        caplog.clear()
    assert len(deeds.notes(tmp_path)) == 6
    with ClusterExecutor.recover(tmp_path / "run.db", nodes="local") as calls:
        assert [future.result(0) for future in calls] == ["odd"] * 6


def test_changed_code_is_another_call(agent: AgentProcess, tmp_path: Path) -> None:
    """A program whose function was corrected runs it anew, on workers of this life, and keeps the other results."""
    script = tmp_path / "program.py"
    text = """
import os, sys
from distexec import ClusterExecutor
from tests.system import deeds
def helper(x): return x + 1
def work(x):
    deeds.note(sys.argv[2], x)
    return OFFSET * helper(x)
OFFSET = 10
with ClusterExecutor(1, nodes=[sys.argv[3]], durable=sys.argv[1]) as executor:
    print(executor.submit(work, 1).result(), executor.submit(deeds.note_and_return, sys.argv[2], "kept").result(),
          executor.submit(deeds.pid, sys.argv[4]).result(), flush=True)
    os.kill(os.getpid(), 9)
"""
    said = []
    environ = os.environ | {"DISTEXEC_SECRET": agent.secret, "PYTHONPATH": str(ROOT)}
    for number, change in enumerate([("", ""), ("", ""), ("OFFSET * helper(x)", "OFFSET * helper(x) + 5")]):
        text = text.replace(*change) if change[0] else text
        script.write_text(text)
        done = subprocess.run([sys.executable, str(script), str(tmp_path / "run.db"), str(tmp_path), agent.address,
                               str(number)], text=True, env=environ, stdout=subprocess.PIPE, timeout=60)
        assert done.returncode == -signal.SIGKILL
        said.append(done.stdout.split())
    assert [each[:2] for each in said] == [["20", "kept"], ["20", "kept"], ["25", "kept"]]
    assert len({each[2] for each in said}) == 3, "a worker knows what it imported in another life"
    assert deeds.notes(tmp_path) == ["1", "kept", "1"]


# ---- the client dies


@pytest.mark.timeout(120 + 3 * KILLS)
def test_killed_at_random_moments(agent: AgentProcess, tmp_path: Path) -> None:
    """kill -9 at random moments of a run of 2,000 tasks, again and again: all answers are there, no task ran twice."""
    rng = random.Random(20)
    program = Program(agent, tmp_path, TASKS, 0.8 * KILLS / TASKS)
    killed = 0
    for _ in range(KILLS):
        is_recovered = program.journal.exists() and rng.random() < 0.3  # by a program that knows no more than the journal
        with program.start(*["recover"] * is_recovered) as process:
            try:
                assert process.wait(rng.uniform(0.1, 1.2)) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
    print(f"{killed} of {KILLS} killed, {len(deeds.notes(tmp_path))} tasks begun by then")
    assert killed > KILLS / 2
    assert program.finish() == f"all {TASKS}"
    assert program.finish("recover") == f"recovered {TASKS}"
    assert Counter(deeds.notes(tmp_path)) == {str(number): 1 for number in range(TASKS)}


def test_local_workers_die_with_their_client(tmp_path: Path) -> None:
    """kill -9 in local mode: its workers are gone; run again, what had ended is not run again."""
    program = Program(None, tmp_path, 40, 0.05)
    with program.start() as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) > 10, WAIT_S)
        process.kill()
    journal = Journal(tmp_path / "run.db")
    ended = {seq for seq, _, kind in journal.index() if kind is not None}
    journal.close()
    assert program.finish() == "all 40"
    counts = Counter(map(int, deeds.notes(tmp_path)))
    assert set(counts) == set(range(40))
    assert all(counts[seq - 1] == 1 for seq in ended)
    assert sum(counts.values()) <= 40 + 2 * 2


def test_nodes_go_on_without_the_client(agent: AgentProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Client killed → its node finishes what it has and keeps it; `sessions` and `recover` show it; it is fetched."""
    program = Program(agent, tmp_path, 8, 1.0)
    with program.start() as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        process.kill()

    def row() -> list[str]:
        lines = program.shell("sessions", agent.address).stdout.splitlines()
        return re.split(r"  +", lines[1])
    assert wait_until(lambda: row()[4:6] == ["0", "0"], WAIT_S), row()
    node, label, _name, client, _running, _waiting, outcomes, _size, kept = row()
    assert (node, client.split()[0], kept) == ("n1", "away", "24.0 h")
    assert int(outcomes) == len(deeds.notes(tmp_path)) < 8

    shown = program.shell("recover", "run.db", "--show")
    assert shown.returncode == 1
    assert label in shown.stdout
    assert "8 unfinished" in shown.stdout
    assert f"may be held by: {agent.address}" in shown.stdout
    fetched = program.shell("recover", "run.db", "--fetch")
    assert f"{8 - int(outcomes)} unfinished, {outcomes} done" in fetched.stdout.splitlines()[-1] + fetched.stdout, fetched
    assert len(deeds.notes(tmp_path)) == int(outcomes)
    gone_on = program.shell("recover", "run.db")
    assert gone_on.returncode == 0, gone_on
    assert "8 calls: 8 done" in gone_on.stdout
    assert len(deeds.notes(tmp_path)) == 8
    listed = program.shell("recover", "run.db", "--list").stdout.splitlines()
    assert len(listed) == 9
    assert all(" done " in line and " n1 " in line for line in listed[1:])
    assert program.finish() == "all 8"
    assert len(deeds.notes(tmp_path)) == 8
    assert program.shell("sessions", agent.address).stdout.splitlines()[1].split() == ["n1", "none"]


def test_drop(agent: AgentProcess, tmp_path: Path) -> None:
    """`distexec drop` ends the session on its node, running tasks too, if it has its token; the journal stays."""
    program = Program(agent, tmp_path, 2, 60.0)
    with program.start() as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        process.kill()
    journal = Journal(program.journal)
    id, token = journal.get("id"), bytes(16)
    journal.close()
    targets = [(agent.address, resolve(parse_address(agent.address)))]
    assert drop_session(targets, Secret.parse(agent.secret), WAIT_S, id, token) == {agent.address: -1}
    dropped = program.shell("drop", "run.db")
    assert dropped.returncode == 0, dropped
    assert dropped.stdout == f"{agent.address}: dropped 2 calls and outcomes\n"
    assert program.shell("sessions", agent.address).stdout.splitlines()[1].split() == ["n1", "none"]
    again = program.shell("drop", "run.db")
    assert (again.returncode, again.stdout) == (0, "no node holds anything of run.db\n")
    assert "2 unfinished" in program.shell("recover", "run.db", "--show").stdout


def test_drop_asks_the_nodes_that_can_be_found(agent: AgentProcess, tmp_path: Path) -> None:
    """The name of one node is not known any more → said, and the others drop the session all the same."""
    program = Program(agent, tmp_path, 2, 60.0)
    with program.start() as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        process.kill()
    journal = Journal(program.journal)
    journal.set_nodes([NodeRow("nowhere.invalid:9", None, True)])
    journal.close()
    assert program.shell("drop", "run.db", "--timeout", "0").returncode == 2
    dropped = program.shell("drop", "run.db")
    assert dropped.returncode == 1, dropped
    assert f"{agent.address}: dropped 2 calls and outcomes\n" in dropped.stdout
    assert "nowhere.invalid:9: not asked: " in dropped.stdout


def test_a_session_dropped_under_its_client(agent: AgentProcess) -> None:
    """Who has the token drops a session in use → its client hears of it and begins anew, its calls run again."""
    targets = [(agent.address, resolve(parse_address(agent.address)))]
    with ClusterExecutor(nodes=[agent.address], secret=agent.secret) as executor:
        futures = [executor.submit(deeds.nap, 0.5, number) for number in range(4)]
        assert wait_until(lambda: any(future.running() for future in futures), WAIT_S)
        opened = executor._root.session.opened
        (count,) = drop_session(targets, Secret.parse(agent.secret), WAIT_S, opened.id, opened.token).values()
        assert isinstance(count, int)
        assert count >= 0
        assert [future.result(WAIT_S) for future in futures] == list(range(4))


def test_a_node_out_of_reach_at_the_end_can_be_told_later(agent: AgentProcess, tmp_path: Path) -> None:
    """A node is stopped, its call given up, the executor closed → the journal knows that it may hold it: `drop` works."""
    program = Program(agent, tmp_path, 0, 0.0)
    try:
        with ClusterExecutor(nodes=[agent.address], secret=agent.secret, durable=program.journal,
                             node_timeout=2.0) as executor:
            future = executor.submit(deeds.note_and_return, str(tmp_path), 1)
            assert future.result(WAIT_S) == 1
            future = executor.submit(deeds.nap, 60.0, 2)
            assert wait_until(lambda: future.node == "n1", WAIT_S)
            os.kill(agent.process.pid, signal.SIGSTOP)
            assert wait_until(lambda: executor.nodes()[0].state != "up", WAIT_S)
            future.kill()
            assert isinstance(future.exception(WAIT_S), TaskKilled)
    finally:
        os.kill(agent.process.pid, signal.SIGCONT)
    dropped = program.shell("drop", "run.db")
    assert dropped.returncode == 0, dropped
    assert dropped.stdout.startswith(f"{agent.address}: dropped ")


def test_a_node_that_died_meanwhile(agent: AgentProcess, tmp_path: Path) -> None:
    """Client and agent die; recovered elsewhere: the dead one is waited for until that is proven, the rest runs anew."""
    program = Program(agent, tmp_path, 6, 0.3)
    with program.start() as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) >= 3, WAIT_S)
        process.kill()
    agent.process.kill()
    agent.process.wait()
    with ClusterExecutor.recover(program.journal, nodes="local", secret=agent.secret) as calls:
        assert [future.result(WAIT_S) for future in calls] == [number * number for number in range(6)]
    with ClusterExecutor.recover(program.journal, nodes="local") as calls:  # without the secret it would not be asked
        assert len(calls) == 6


# ---- Ctrl-C


@pytest.mark.parametrize("where", ["agent", "local"])
def test_ctrl_c_leaves_the_session_behind(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Ctrl-C → one traceback, the command to go on with, no process left here; then all is there, and ran once."""
    agent = request.getfixturevalue("agent") if where == "agent" else None
    program = Program(agent, tmp_path, 30, 0.1)
    with program.start() as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) >= 5, WAIT_S)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode != 0
    assert err.count("Traceback") == 1, err
    assert "KeyboardInterrupt" in err
    command = re.search(r"go on with: (distexec recover \S+)", err)
    assert command is not None, err
    gone_on = program.shell(*command.group(1).split()[1:])
    assert gone_on.returncode == 0, gone_on
    assert "30 done" in gone_on.stdout
    if agent is not None:
        assert len(deeds.notes(tmp_path)) == 30
    assert program.finish() == "all 30"


def test_ctrl_c_in_a_map_withdraws_nothing(agent: AgentProcess, tmp_path: Path) -> None:
    """Ctrl-C while map waits: what it has not handed out is not cancelled, but left to who goes on."""
    code = f"""
import sys
from distexec import ClusterExecutor
from tests.system import deeds
with ClusterExecutor(nodes=[sys.argv[1]], durable=sys.argv[2]) as executor:
    for number in executor.map(deeds.hold, ["{tmp_path}"] * 20, range(20)):
        pass
"""
    path = tmp_path / "run.db"
    environ = os.environ | {"DISTEXEC_SECRET": agent.secret, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code, agent.address, str(path)], env=environ, text=True,
                          stderr=subprocess.PIPE) as process:
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
    assert f"unfinished calls left in {path}: 20;" in err
    deeds.let_go(tmp_path)
    with ClusterExecutor.recover(path, secret=agent.secret) as calls:
        assert [future.result(WAIT_S) for future in calls] == list(range(20))
    assert len(deeds.notes(tmp_path)) == 20


def test_a_session_left_behind_in_a_block(agent: AgentProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """KeyboardInterrupt leaves the block: futures end with an error that says how to go on; the node keeps its task."""
    path = tmp_path / "run.db"
    executor = ClusterExecutor(nodes=[agent.address], secret=agent.secret, durable=path)
    held = executor.submit(deeds.hold, str(tmp_path), "held")
    assert wait_until(lambda: deeds.notes(tmp_path))
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt
    error = held.exception(WAIT_S)
    assert isinstance(error, DistexecError)
    assert f"distexec recover {path}" in str(error)
    assert f"unfinished calls left in {path}: 1; go on with: distexec recover" in capfd.readouterr().err
    with pytest.raises(DistexecError):
        executor.submit(deeds.double, 1)
    deeds.let_go(tmp_path)
    with ClusterExecutor.recover(path, secret=agent.secret) as calls:
        assert calls[0].result(WAIT_S) == "held"
        assert calls[0].node == "n1"
    assert len(deeds.notes(tmp_path)) == 1


# ---- the journal


def test_the_journal_of_a_live_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In use: by whom is said, here and from a shell; nothing happens to it."""
    path = tmp_path / "run.db"
    with ClusterExecutor(1, nodes="local", durable=path) as executor:
        with pytest.raises(JournalError, match="another executor of this process"):
            ClusterExecutor(1, nodes="local", durable=path)
        code = f"from distexec.cli import main; raise SystemExit(main(['recover', {str(path)!r}]))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 1
        assert f"in use by process {os.getpid()}" in done.stderr
        assert "Traceback" not in done.stderr
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
    assert main(["recover", str(tmp_path / "none.db")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_full_disk_breaks_the_executor_and_loses_nothing(agent: AgentProcess, tmp_path: Path) -> None:
    """The journal cannot grow: JournalError names it and the remedy; with room again, all that was recorded is there."""
    path = tmp_path / "run.db"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ended = []
    with ClusterExecutor(nodes=[agent.address], secret=agent.secret, durable=path) as executor:
        executor.submit(deeds.double, 1).result(WAIT_S)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
        try:
            for number in range(40):
                future = executor.submit(deeds.note_and_return, str(tmp_path), bytes(20_000 + number))
                error = future.exception(WAIT_S)
                if error is not None:
                    break
                ended.append(future)
            assert isinstance(error, JournalError)
            assert str(path) in str(error)
            with pytest.raises(JournalError, match="distexec recover"):
                executor.submit(deeds.double, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with ClusterExecutor.recover(path, secret=agent.secret) as calls:
        assert all(future.result(WAIT_S) is not None for future in calls)
        assert len(calls) > len(ended) > 3
    notes = Counter(deeds.notes(tmp_path))
    assert len(notes) >= len(ended)
    assert max(notes.values()) == 1


def test_arguments_that_cannot_be_meant(tmp_path: Path) -> None:
    """A negative linger, one without a journal, a key for a whole map, a key that is no string: said at once."""
    for arguments, error in (({"linger": 5.0}, ValueError), ({"durable": tmp_path / "a.db", "linger": -1}, ValueError),
                             ({"durable": tmp_path / "a.db", "linger": "x"}, TypeError)):
        with pytest.raises(error):
            ClusterExecutor(1, nodes="local", **arguments)
    with ClusterExecutor(1, nodes="local", durable=tmp_path / "a.db") as executor:
        with pytest.raises(ValueError, match="names one call"):
            executor.options(key="x").map(deeds.double, [1])
        with pytest.raises(TypeError):
            executor.options(key=5)


def test_shutdown_with_cancelled_futures(make: Make, tmp_path: Path) -> None:
    """shutdown(cancel_futures=True) cancels what was not handed out, recorded or not, and waits for the rest."""
    executor = make(1, durable=tmp_path / "run.db")
    futures = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(3000)]
    executor.shutdown(cancel_futures=True)
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) > 0
    done = [future.result(0) for future in futures if not future.cancelled()]
    assert sorted(map(int, deeds.notes(tmp_path))) == sorted(done)
    with ClusterExecutor.recover(tmp_path / "run.db", nodes="local") as calls:
        assert [future.cancelled() for future in calls] == [future.cancelled() for future in futures]


def test_what_is_cancelled_while_nobody_has_a_slot(tmp_path: Path) -> None:
    """Cancelled at once, before it is recorded or after: nothing is left to wait for, though no slot ever comes."""
    with make_local(1, durable=tmp_path / "run.db") as executor:
        executor.set_slots("local", 0)
        futures = [executor.submit(deeds.double, number) for number in range(200)]
        assert all(future.cancel() for future in futures)
    with ClusterExecutor.recover(tmp_path / "run.db") as calls:
        assert all(future.cancelled() for future in calls)
        assert len(calls) == 200


class Journals:
    """The journal thread of an executor, as busy as one pleases."""

    def __init__(self, executor: ClusterExecutor) -> None:
        recorder = executor._root.recorder
        assert recorder is not None
        self.recorder, self._may_go_on = recorder, threading.Event()

    def __enter__(self) -> None:
        self.recorder._put(self._may_go_on.wait, 1)
        assert wait_until(self.recorder._queue.empty, WAIT_S)

    def __exit__(self, *exc_info: object) -> None:
        self._may_go_on.set()


def test_a_large_call_is_cancelled_before_it_is_recorded(tmp_path: Path) -> None:
    """What the journal still has to write stays until it has: the session goes on."""
    with make_local(1, durable=tmp_path / "run.db") as executor:
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
        with Journals(executor):
            future = executor.submit(deeds.double, bytearray(3 << 20))
            assert future.cancel()
            root = executor._root
            assert wait_until(lambda: not (root._is_withdrawing or root._withdrawn), WAIT_S)
        assert executor.submit(deeds.double, 2).result(WAIT_S) == 4
        assert wait_until(lambda: not root.store._blobs, WAIT_S)
    with ClusterExecutor.recover(tmp_path / "run.db", nodes="local") as calls:
        assert calls[1].cancelled()


def test_what_is_cancelled_by_shutdown_stays_so(tmp_path: Path) -> None:
    """shutdown(cancel_futures=True), then shutdown() before the journal was ready: nothing is handed out after all."""
    executor = make_local(1, durable=tmp_path / "run.db")
    assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
    with Journals(executor):
        futures = [executor.submit(deeds.note_and_return, str(tmp_path), number) for number in range(10)]
        executor.shutdown(wait=False, cancel_futures=True)
        executor.shutdown(wait=False)
    executor.shutdown()
    assert all(future.cancelled() for future in futures)
    assert not deeds.notes(tmp_path)


class SlowToPickle:
    """Takes until it may go on to be pickled; what waits for that is told."""

    def __init__(self) -> None:
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()

    def __reduce__(self) -> Any:
        self.is_asked.set()
        assert self.may_go_on.wait(WAIT_S)
        return int, ()


def test_shutdown_while_a_call_is_on_its_way_in(tmp_path: Path) -> None:
    """The executor closes while a call is being named: `submit` raises; no future is left that nobody ends."""
    executor = make_local(1, durable=tmp_path / "run.db")
    assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
    slow = SlowToPickle()

    def close() -> None:
        assert slow.is_asked.wait(WAIT_S)
        executor.shutdown()
        slow.may_go_on.set()
    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(deeds.double, slow)
    closer.join()


def test_no_node_is_added_after_shutdown(make: Make, tmp_path: Path) -> None:
    """add_node raises then, durable or not, and waits for nobody who has gone."""
    for arguments in ({}, {"durable": tmp_path / "run.db"}):
        with make(1, **arguments) as executor:
            assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.add_node("127.0.0.1:9")


def test_a_callback_that_raises_what_ends_threads(make: Make, tmp_path: Path) -> None:
    """KeyboardInterrupt, SystemExit out of a callback: logged, and the futures after it end."""
    def ending(error: BaseException) -> Callable[[object], None]:
        def end(_: object) -> None:
            raise error
        return end
    with make(1, durable=tmp_path / "run.db") as executor:
        assert executor.submit(deeds.double, 0).result(WAIT_S) == 0
        for error in (KeyboardInterrupt(), SystemExit()):
            with Journals(executor):
                future = executor.submit(deeds.double, 1)
                future.add_done_callback(ending(error))
            assert future.result(WAIT_S) == 2
            assert executor.submit(deeds.double, 2).result(WAIT_S) == 4


def test_a_callback_may_submit_and_shut_down(make: Make, tmp_path: Path) -> None:
    """Callbacks run on the thread that concludes futures: they may submit, above max_pending too, and shut down."""
    made: list[Any] = []

    def submit_more(make_more: Callable[[], Any]) -> None:
        made.append(make_more())
    executor = make(1, durable=tmp_path / "run.db", max_pending=1)
    future = executor.submit(deeds.double, 1)
    future.add_done_callback(lambda _: submit_more(lambda: executor.submit(deeds.double, 2)))
    assert wait_until(lambda: made, WAIT_S)
    assert made[0].result(WAIT_S) == 4
    last = executor.submit(deeds.double, 3)
    last.add_done_callback(lambda _: executor.shutdown())
    assert last.result(WAIT_S) == 6
    executor.shutdown()


def test_a_forked_child_leaves_the_session_alone(tmp_path: Path) -> None:
    """fork in the program: the child's executor says that it is its parent's, the parent's goes on, the journal is whole."""
    code = f"""
import os, sys, time
from distexec import ClusterExecutor
executor = ClusterExecutor(1, nodes="local", durable={str(tmp_path / "run.db")!r})
executor.submit(len, "abc").result()
child = os.fork()
if child == 0:
    try:
        executor.submit(len, "abcd")
    except RuntimeError as error:
        print(error, flush=True)
    del executor
    sys.exit(0)
os.waitpid(child, 0)
print(executor.submit(len, "abcde").result())
executor.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, timeout=60)
    assert "belongs to the process that forked" in done.stdout
    assert done.stdout.splitlines()[-1] == "5"
    with ClusterExecutor.recover(tmp_path / "run.db") as calls:
        assert [future.result(0) for future in calls] == [3, 5]


def test_an_executor_that_was_never_used_lets_go_of_its_journal(tmp_path: Path) -> None:
    """Made, and forgotten or left by an error: the journal can be opened again, in the same process too."""
    path = tmp_path / "run.db"
    executor = ClusterExecutor(1, nodes="local", durable=path)
    with pytest.raises(JournalError):
        Journal(path)
    del executor
    assert wait_until(lambda: gc.collect() >= 0 and not _is_locked(path))
    with pytest.raises(ValueError, match="99999"):
        ClusterExecutor(nodes=["localhost:99999"], secret=secrets.token_hex(32), durable=path)
    ClusterExecutor(1, nodes="local", durable=path).shutdown()
    Journal(path).close()


def _is_locked(path: Path) -> bool:
    try:
        Journal(path).close()
    except JournalError:
        return True
    return False


def test_a_broken_initializer_is_said(tmp_path: Path) -> None:
    """The initializer is recorded: who recovers has it run; one that fails breaks the executor as ever."""
    path = tmp_path / "run.db"
    with make_local(1, durable=path, initializer=deeds.note, initargs=(str(tmp_path), "ready")) as executor:
        executor.submit(deeds.double, 1).result(WAIT_S)
        executor.options(retries=0, key="again").submit(deeds.die_first, 1, str(tmp_path / "x")).exception(WAIT_S)
    ready = len(deeds.notes(tmp_path))
    journal = Journal(path)
    journal._db.execute("DELETE FROM outcomes")
    journal.close()
    began = time.monotonic()
    with ClusterExecutor.recover(path) as calls:
        assert calls[0].result(WAIT_S) == 2
    assert len(deeds.notes(tmp_path)) > ready
    assert time.monotonic() - began < WAIT_S
