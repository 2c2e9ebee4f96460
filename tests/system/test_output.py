"""What tasks print is seen at the client, as the children of ProcessPoolExecutor's would be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from distexec import ClusterExecutor, TaskKilled, TaskTimeout, WorkerLost
from distexec.printed import KEPT_BYTES
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.proxy import Proxy

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


# ---- what futures have


def agent_nodes(agent: AgentProcess) -> dict[str, object]:
    """Arguments for an executor."""
    return {"nodes": [agent.address], "secret": agent.secret}


@pytest.fixture(params=["local", "spawn", "agent"])
def captured(request: pytest.FixtureRequest) -> Callable[..., ClusterExecutor]:
    """A constructor of executors that capture: on local workers of either kind, through an agent."""
    if request.param == "agent":
        return partial(ClusterExecutor, **agent_nodes(request.getfixturevalue("shared_agent")), echo=False)
    context = None if request.param == "local" else multiprocessing.get_context("spawn")
    return partial(ClusterExecutor, 2, mp_context=context, nodes="local", capture=True, echo=False)


def test_a_future_has_what_its_task_printed(captured: Callable[..., ClusterExecutor]) -> None:
    """Python's, descriptors', child processes' and C's output, each task's with its own future, when that is done."""
    with captured() as executor:
        futures = [executor.submit(deeds.say, f"{number}", f"oops {number}") for number in range(20)]
        for number, future in enumerate(futures):
            assert future.exception() is None
            assert future.stdout == f"print {number}\nwrite {number}\necho {number}\n"
            assert future.stderr == f"oops {number}\n"
        future = executor.submit(deeds.print_c, "no end of line")
        assert future.exception() is None
        assert (future.stdout, future.stderr) == ("no end of line", "")


def test_a_silent_task_has_printed_nothing(captured: Callable[..., ClusterExecutor]) -> None:
    """"" where output is captured; before it is known where it runs, None."""
    with captured() as executor:
        future = executor.submit(deeds.double, 1)
        assert future.result() == 2
        assert (future.stdout, future.stderr) == ("", "")
        assert future.printed is None


def test_where_nobody_captures(shared_agent: AgentProcess, capfd: pytest.CaptureFixture[str]) -> None:
    """Local workers print where we do, and with capture=False nothing is kept of nodes either: None."""
    with ClusterExecutor(1, nodes="local") as executor:
        future = executor.submit(print, "seen")
        assert future.result() is None
        assert (future.stdout, future.stderr) == (None, None)
    with ClusterExecutor(**agent_nodes(shared_agent), capture=False) as executor:
        future = executor.submit(print, "seen")
        assert future.result() is None
        assert (future.stdout, future.stderr) == (None, None)
    assert capfd.readouterr().out == "seen\nseen\n"


def test_much_output_is_bounded(captured: Callable[..., ClusterExecutor]) -> None:
    """Of ten megabytes a future has the first and the last, and how much is missing."""
    with captured() as executor:
        future = executor.submit(print, "begin" + "x" * 10_000_000 + "end")
        assert future.exception() is None
        text = future.stdout
        assert text is not None
        assert len(text) < 150_000
        assert text.startswith("beginxxx")
        assert text.endswith("xxxend\n")
        assert f"[distexec: {10_000_009 - 2 * KEPT_BYTES:,} bytes are left out here]" in text


def test_the_last_attempt_counts(captured: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    """A task that died twice: what its third attempt printed."""
    with captured() as executor:
        future = executor.submit(deeds.print_and_die, str(tmp_path), 2)
        assert future.result() == "try 3"
        assert (future.stdout, future.stderr) == ("try 3\n", "error 3\n")


def test_an_attempt_that_died_counts_if_it_is_the_last(captured: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    """`WorkerLost`: what was printed before."""
    with captured() as executor:
        future = executor.options(retries=0).submit(deeds.print_and_die, str(tmp_path), 1)
        assert isinstance(future.exception(), WorkerLost)
        assert (future.stdout, future.stderr) == ("try 1\n", "error 1\n")


def test_a_silent_attempt_after_one_that_printed(captured: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    """What the first attempt printed is not the second's."""
    with captured() as executor:
        future = executor.submit(deeds.die_first, 1, str(tmp_path))
        assert future.result() == 2
        assert (future.stdout, future.stderr) == ("", "")


@pytest.mark.parametrize("way", ["kill", "timeout"])
def test_output_of_a_task_that_was_ended(captured: Callable[..., ClusterExecutor], tmp_path: Path, way: str) -> None:
    """Killed, or out of time: what it printed until then, the last line without its end too."""
    with captured() as executor:
        view = executor.options(timeout=1.5) if way == "timeout" else executor
        future = view.submit(deeds.print_and_hold, str(tmp_path), "until then")
        if way == "kill":
            assert wait_until(lambda: deeds.notes(tmp_path), 20)
            assert future.kill()
        assert isinstance(future.exception(), TaskTimeout if way == "timeout" else TaskKilled)
        assert (future.stdout, future.stderr) == ("until then", "")


def test_output_of_a_running_task_on_its_future(captured: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    """What it has printed so far, while it runs."""
    with captured() as executor:
        future = executor.submit(deeds.print_and_hold, str(tmp_path), "so far")
        assert wait_until(lambda: future.stdout == "so far", 20)
        assert not future.done()
        deeds.let_go(tmp_path)
        assert future.result() == "so far"


def test_output_printed_before_and_during_a_cut(tmp_path: Path) -> None:
    """A link that is cut while a task prints costs none of it, and nothing is shown twice."""
    with AgentProcess(slots=1, name="one") as agent, Proxy(agent.address) as proxy, ClusterExecutor(
            nodes=[proxy.address], secret=agent.secret, echo=False) as executor:
        future = executor.submit(print_three_times, str(tmp_path))
        assert wait_until(lambda: future.stdout == "before\n", 20)
        proxy.cut()
        deeds.note(str(tmp_path), "cut")
        assert wait_until(lambda: "during" in deeds.notes(tmp_path), 20)
        proxy.heal()
        assert wait_until(lambda: future.stdout == "before\nduring\n", 20)
        deeds.note(str(tmp_path), "restored")
        assert future.result() is None
        assert future.stdout == "before\nduring\nafter\n"
        assert future.attempts == 1


def print_three_times(directory: str) -> None:
    """Print, wait for the cut, print, wait for its end, print."""
    print("before")
    assert wait_until(lambda: "cut" in deeds.notes(directory), 20)
    print("during", flush=True)
    deeds.note(directory, "during")
    assert wait_until(lambda: "restored" in deeds.notes(directory), 20)
    print("after")


# ---- how it is shown


def test_lines_of_different_tasks_are_not_mixed(shared_agent: AgentProcess) -> None:
    """Each line is one task's, however it was written."""
    body = "list(executor.map(deeds.dribble, range(8)))"
    out, _ = run(shared_agent, body)
    assert sorted(out.splitlines()) == sorted(f"{number} " * 50 for number in range(8) for _ in range(5))


def test_a_prefix_says_whose_line_it_is(where: AgentProcess | None) -> None:
    """`echo="prefix"`: node and task before each line, one that is not ended is; local workers are captured for it."""
    out, err = run(where, "list(executor.map(deeds.say, 'ab', ['', 'oops'])); executor.submit(print, 'c', end='').result()",
                   kwargs="echo='prefix'")
    name = "local" if where is None else "shared"
    said = sorted(f"[{name}:{number}] {how} {letter}" for number, letter in ((1, "a"), (2, "b"))
                  for how in ("print", "write", "echo"))
    assert sorted(out.splitlines()) == [*said, f"[{name}:3] c"]
    assert err.splitlines() == [f"[{name}:2] oops"]


def test_a_prompt_is_shown(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """A line that is not ended is shown while its task goes on."""
    body = "executor.submit(deeds.print_and_hold, sys.argv[1], 'dots...')"
    target = f"nodes=[{shared_agent.address!r}], secret={shared_agent.secret!r}"
    script = subprocess.Popen([sys.executable, "-c", SCRIPT.format(kwargs=target, body=body), str(tmp_path)], cwd=ROOT,
                              stdout=subprocess.PIPE)
    assert script.stdout is not None
    try:
        assert script.stdout.read(7) == b"dots..."
    finally:
        deeds.let_go(tmp_path)
        assert script.wait(20) == 0
        script.stdout.close()


@pytest.mark.parametrize("arguments", [{"echo": "loud"}, {"echo": None}, {"capture": "yes"}, {"capture": 1}])
def test_bad_arguments(arguments: dict[str, object]) -> None:
    """They are named."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ClusterExecutor(1, nodes="local", **arguments)  # type: ignore[arg-type]
