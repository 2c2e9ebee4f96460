"""What tasks print is seen at the client, as the children of ProcessPoolExecutor's would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds

SCRIPT = """
import sys
from tests.system import deeds
from distexec import ClusterExecutor
with ClusterExecutor({kwargs}) as executor:
    {body}
"""


def run(agent: AgentProcess | None, body: str, *arguments: str, kwargs: str = "") -> tuple[str, str]:
    """Run a script with an executor; give what it wrote to its two streams."""
    where = "2, nodes='local'" if agent is None else f"nodes=[{agent.address!r}], secret={agent.secret!r}"
    script = SCRIPT.format(kwargs=f"{where}, {kwargs}", body=body)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # it would tear lines
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True,
                          timeout=30, check=True)
    return done.stdout, done.stderr


@pytest.fixture(params=["local", "agent"])
def where(request: pytest.FixtureRequest) -> AgentProcess | None:
    """Local mode, or an agent."""
    return request.getfixturevalue("shared_agent") if request.param == "agent" else None


def test_everything_printed_arrives(where: AgentProcess | None) -> None:
    """Lines from Python, from descriptors and from child processes arrive, each once, on the right stream."""
    out, err = run(where, "list(executor.map(deeds.say, map(str, range(40)), ['oops'] * 40))")
    expected = [f"{how} {number}" for number in range(40) for how in ("print", "write", "echo")]
    assert sorted(out.splitlines()) == sorted(expected)
    assert err.splitlines() == ["oops"] * 40


def test_order_within_a_task(where: AgentProcess | None) -> None:
    """What one task prints comes in order, before its result is there."""
    out, _ = run(where, "executor.submit(deeds.say, 'a').result(); print('then', flush=True); "
                        "executor.submit(deeds.say, 'b').result()")
    assert out.splitlines() == ["print a", "write a", "echo a", "then", "print b", "write b", "echo b"]


def test_large_output(where: AgentProcess | None) -> None:
    """Megabytes of output arrive whole."""
    out, _ = run(where, "executor.submit(print, 'x' * 5_000_000).result(); executor.submit(print, 'é' * 100_000).result()")
    first, second = out.splitlines()
    assert first == "x" * 5_000_000
    assert second == "é" * 100_000


def test_last_words(where: AgentProcess | None) -> None:
    """What a task printed before its worker died is seen too."""
    _, err = run(where, "print(executor.options(retries=0).submit(deeds.die, 'SIGKILL').exception())")
    assert err.count("last words") == 1


def test_output_of_running_tasks(where: AgentProcess | None, tmp_path: Path) -> None:
    """A running task's output is seen while it runs."""
    target = "2, nodes='local'" if where is None else f"nodes=[{where.address!r}], secret={where.secret!r}"
    body = "executor.submit(lambda directory: (print(1, flush=True), deeds.hold(directory)), sys.argv[1])"
    script = subprocess.Popen([sys.executable, "-c", SCRIPT.format(kwargs=target, body=body), str(tmp_path)], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    assert script.stdout is not None
    assert script.stdout.readline() == "1\n"
    assert wait_until(lambda: deeds.notes(tmp_path), 10)
    deeds.let_go(tmp_path)
    assert script.wait(20) == 0
    script.stdout.close()


def test_no_echo(shared_agent: AgentProcess) -> None:
    """With echo=False nothing that tasks print on nodes is printed here."""
    out, err = run(shared_agent, "list(executor.map(deeds.say, 'ab', 'cd')); print('own')", kwargs="echo=False")
    assert (out, err) == ("own\n", "")


def test_client_without_streams(where: AgentProcess | None) -> None:
    """A program that closed its own streams works on."""
    out, err = run(where, "sys.stdout.close(); executor.submit(deeds.say, 'a').result(); sys.stdout = None; "
                          "executor.submit(deeds.say, 'b').result(); sys.stderr.write('end')")
    assert err == "end"
    assert where is None or out == ""


def test_redirected_streams(shared_agent: AgentProcess) -> None:
    """What tasks print on nodes goes where sys.stdout of the client points, as its own prints do."""
    out, _ = run(shared_agent, "import io; sys.stdout = box = io.StringIO(); executor.submit(deeds.say, 'a').result(); "
                               "sys.stdout = sys.__stdout__; print(repr(box.getvalue()))")
    assert out == repr("print a\nwrite a\necho a\n") + "\n"


READERLESS = """
import sys
from tests.system import deeds
from distexec import ClusterExecutor
with ClusterExecutor(nodes=[{address!r}], secret={secret!r}) as executor:
    assert executor.submit(print, "x" * 1_000_000).result() is None
    assert list(executor.map(deeds.double, range(100))) == [2 * number for number in range(100)]
    deeds.note(sys.argv[1], "all results are here")
deeds.note(sys.argv[1], "left the block")
"""


def start_readerless(agent: AgentProcess, directory: Path) -> subprocess.Popen[bytes]:
    """Start a program that prints a megabyte into a pipe that nobody reads; all its results are there when this returns."""
    code = READERLESS.format(address=agent.address, secret=agent.secret)
    program = subprocess.Popen([sys.executable, "-c", code, str(directory)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: deeds.notes(directory), 20), "no result without a reader"
    except BaseException:
        program.kill()
        program.communicate()
        raise
    return program


def test_a_reader_that_waits_keeps_no_result(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """Nobody reads the program's output → all results come all the same; who reads at last gets every byte."""
    program = start_readerless(shared_agent, tmp_path)
    assert not wait_until(lambda: len(deeds.notes(tmp_path)) > 1, 0.5), "it did not wait for its reader"
    out, _ = program.communicate(timeout=30)
    assert out == b"x" * 1_000_000 + b"\n"
    assert program.returncode == 0


def test_ctrl_c_does_not_wait_for_the_reader(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """Ctrl-C while the program waits for who reads its output → it ends."""
    program = start_readerless(shared_agent, tmp_path)
    try:
        program.send_signal(signal.SIGINT)
        assert program.wait(20) != 0
    finally:
        program.kill()
        program.communicate()
