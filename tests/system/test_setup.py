"""Laws of prepared state: setup once per machine, shared by its workers, renewed without loss, cleaned up in the end."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy
import psutil
import pytest

from distexec import ClusterExecutor, InitializerFailed, NodeSpec, WorkerLost
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds, states
from tests.system.conftest import Make, make_local
from tests.system.proxy import Proxy
from tests.system.test_faults import is_gone

WAIT_S = 30.0
MIB = 128


# ---- a good life


def test_setup_once_cleanup_once(make: Make, tmp_path: Path) -> None:
    """All workers are forked from the one process in which setup ran; cleanup runs there after the last task, before
    shutdown returns."""
    setup, cleanup = functools.partial(states.build, str(tmp_path)), functools.partial(states.take_down, str(tmp_path))
    with make(2, setup=setup, cleanup=cleanup) as executor:
        found = set(executor.map(states.look, range(50)))
        assert deeds.notes(tmp_path) == ["setup built"]
    assert found == {("built", deeds.pids(tmp_path)[0])}
    assert deeds.notes(tmp_path) == ["setup built", "cleanup built"]
    assert len(set(deeds.pids(tmp_path))) == 1


def test_cleanup_without_setup(make: Make, tmp_path: Path) -> None:
    """Cleanup may come alone."""
    with make(1, cleanup=functools.partial(states.take_down, str(tmp_path))) as executor:
        assert executor.submit(states.look).result(WAIT_S)[0] is None
    assert deeds.notes(tmp_path) == ["cleanup None"]


def test_nothing_is_set_up_for_nobody(make: Make, tmp_path: Path) -> None:
    """Without a task there is no setup, and so nothing to clean up."""
    make(1, setup=functools.partial(states.build, str(tmp_path)),
         cleanup=functools.partial(states.take_down, str(tmp_path))).shutdown()
    assert deeds.notes(tmp_path) == []


def test_initializer_finds_the_state(make: Make, tmp_path: Path) -> None:
    """Each worker's initializer runs after setup and sees what that made."""
    with make(1, setup=functools.partial(states.build, str(tmp_path), "s"),
              initializer=states.take_down, initargs=(str(tmp_path),)) as executor:
        assert executor.submit(states.look).result(WAIT_S)[0] == "s"
    assert deeds.notes(tmp_path) == ["setup s", "cleanup s"]


PROGRAM = """
import os, sys
from distexec import ClusterExecutor, NodeSpec
model = None
def load(scale):
    global model
    model = [scale * number for number in range(5)]
def close():
    print("closed", model, flush=True)
def use(number):
    return model[number]
with ClusterExecutor(nodes=[NodeSpec(sys.argv[1], setup_args=(7,))], setup=load, cleanup=close) as executor:
    print(list(executor.map(use, range(5))))
    executor.resetup(None, 2)
    print(list(executor.map(use, range(5))))
print("end", model)
"""


@pytest.mark.parametrize("where", ["local", "agent"])
def test_globals_of_a_program(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What setup sets in the program's own `__main__` is found there by its tasks and its cleanup, not by the program."""
    environ, address = os.environ | {"PYTHONPATH": str(ROOT)}, "local"
    if where == "agent":
        agent: AgentProcess = request.getfixturevalue("shared_agent")
        environ, address = environ | {"DISTEXEC_SECRET": agent.secret}, agent.address
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(script), address], env=environ, text=True, capture_output=True, timeout=60)
    lines = Counter(done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "")
    assert lines == Counter(["[0, 7, 14, 21, 28]", "closed [0, 7, 14, 21, 28]", "[0, 2, 4, 6, 8]", "closed [0, 2, 4, 6, 8]",
                             "end None"])


# ---- memory


def check_memory(executor: ClusterExecutor, directory: Path) -> None:
    futures = [executor.submit(states.memory_when_met, str(directory), 2) for _ in range(2)]
    results = [future.result(WAIT_S) for future in futures]
    assert [total for total, _ in results] == [MIB << 20] * 2
    # Each of two workers that read all of it has a third: the process they were forked from has one too.
    assert max(cost for _, cost in results) < 0.6 * MIB, results


def test_what_setup_builds_is_shared(make: Make, tmp_path: Path) -> None:
    """A large array costs a node its memory once, however many workers read it."""
    with make(2, setup=functools.partial(states.build_arrays, MIB)) as executor:
        check_memory(executor, tmp_path)


def test_large_arguments_of_setup_are_shared(make: Make, tmp_path: Path) -> None:
    """So does one that setup is given, which reaches a node once."""
    array = numpy.ones(MIB << 20, dtype="u1")
    with make(2, setup=states.keep) as executor:
        executor.resetup(None, array)
        check_memory(executor, tmp_path)


# ---- workers come and go


def test_replaced_worker_comes_from_the_same_state(make: Make, tmp_path: Path) -> None:
    """A worker that was killed, or had its share of tasks, is replaced without another setup."""
    with make(1, setup=functools.partial(states.build, str(tmp_path)), max_tasks_per_child=2, retries=1) as executor:
        before = executor.submit(states.look).result(WAIT_S)
        assert executor.submit(deeds.die_first, 1, str(tmp_path)).result(WAIT_S) >= 2
        assert [executor.submit(states.look).result(WAIT_S) for _ in range(5)] == [before] * 5
    assert deeds.notes(tmp_path).count("setup built") == 1


def test_dead_prepared_process_is_replaced(make: Make, tmp_path: Path) -> None:
    """The process with the state is killed → its workers end, their tasks run again in those of a new one."""
    with make(2, setup=functools.partial(states.build, str(tmp_path)), retries=1) as executor:
        futures = [executor.submit(states.hold_state, str(tmp_path)) for _ in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 3)
        old = deeds.pids(tmp_path)
        os.kill(old[0], signal.SIGKILL)
        assert wait_until(lambda: all(map(is_gone, old)))
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in futures] == ["built"] * 2
    assert Counter(deeds.notes(tmp_path))["setup built"] == 2


def test_dead_prepared_process_takes_all_along(make: Make, tmp_path: Path) -> None:
    """With it go its workers and what their tasks have started, at once and not with the session."""
    with make(1, setup=functools.partial(states.build, str(tmp_path)), retries=0) as executor:
        future = executor.submit(states.start_and_hold, str(tmp_path))
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2)
        os.kill(deeds.pids(tmp_path)[0], signal.SIGKILL)
        assert isinstance(future.exception(WAIT_S), WorkerLost)
        assert wait_until(lambda: is_gone(int(deeds.notes(tmp_path)[1])))
        assert executor.submit(states.look).result(WAIT_S)[0] == "built"


def test_what_setup_starts_is_its_own(make: Make, tmp_path: Path) -> None:
    """Threads, children and exit functions of setup are not its workers'; all end with the session."""
    with make(2, setup=functools.partial(states.start_things, str(tmp_path)), max_tasks_per_child=1) as executor:
        for _ in range(4):  # each worker leaves after one, and calls what is to be called at its end
            assert executor.submit(states.is_there).result(WAIT_S)
        sleeper = int(deeds.notes(tmp_path)[0])
        assert not is_gone(sleeper)
        assert len(deeds.notes(tmp_path)) == 1
        directory = executor.submit(states.look).result(WAIT_S)[0]
    assert wait_until(lambda: is_gone(sleeper))
    assert deeds.notes(tmp_path)[1:] == ["exit"]
    assert wait_until(lambda: not os.path.exists(directory))


def test_setup_that_forks_is_taken_for_one(make: Make, tmp_path: Path) -> None:
    """A child that comes back out of setup ends there."""
    with make(1, setup=functools.partial(states.fork_and_return, str(tmp_path))) as executor:
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
        assert wait_until(lambda: deeds.notes(tmp_path))
        assert wait_until(lambda: is_gone(deeds.pids(tmp_path)[0]), 5)


# ---- when it fails


def test_setup_that_raises(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The executor breaks with what it raised, and where; nothing hangs."""
    with make(2, setup=functools.partial(deeds.fail, ValueError("no model"))) as executor:
        futures = [executor.submit(deeds.double, number) for number in range(4)]
        for future in futures:
            error = future.exception(WAIT_S)
            assert isinstance(error, InitializerFailed)
            assert "setup raised ValueError: no model" in str(error)
            assert isinstance(error.__cause__, ValueError)
            assert "deeds.py" in str(error.__cause__.__cause__)
        with pytest.raises(InitializerFailed, match="no model"):
            executor.submit(deeds.double, 1)
    assert "Exception in setup" in caplog.text


@pytest.mark.parametrize(("way", "how"), [("exit3", "code 3"), ("segfault", "SIGSEGV"), ("SIGKILL", "SIGKILL"),
                                          ("close", "link")])
def test_setup_that_dies(make: Make, way: str, how: str) -> None:
    """Its end is evidence: how, where, and its last words, as far as they were captured."""
    with make(1, setup=functools.partial(deeds.die, way)) as executor:
        error = executor.submit(deeds.double, 1).exception(WAIT_S)
    assert isinstance(error, WorkerLost)
    assert "setup did not end" in str(error)
    if way != "close":
        assert how in str(error)
    if error.node != "local" and way != "close":
        assert "last words" in error.stderr_tail


def test_setup_that_cannot_be_unpickled(make: Make) -> None:
    """So is what cannot be rebuilt there."""
    with make(1, setup=Stubborn()) as executor:
        error = executor.submit(deeds.double, 1).exception(WAIT_S)
    assert isinstance(error, InitializerFailed)
    assert "stubborn" in str(error)


class Stubborn:
    """Can be pickled, and not be unpickled."""

    def __call__(self) -> None:
        """Never called."""

    def __reduce__(self) -> tuple[object, ...]:
        return deeds.fail, (ValueError("stubborn"),)


def test_setup_that_hangs_is_ended_with_the_session(make: Make, tmp_path: Path) -> None:
    """Nobody waits for a setup that is not wanted any more."""
    executor = make(1, setup=functools.partial(states.hang, str(tmp_path)))
    future = executor.submit(deeds.double, 1)
    assert wait_until(lambda: deeds.notes(tmp_path))
    executor.kill_workers()
    executor.shutdown()
    assert future.exception(WAIT_S) is not None or future.cancelled()
    assert wait_until(lambda: is_gone(deeds.pids(tmp_path)[0]))


@pytest.mark.parametrize("victim", ["client", "guardian"])
def test_kill_during_setup_leaves_nothing(tmp_path: Path, victim: str) -> None:
    """The client, or the guardian above the process in which setup runs, is killed → that process goes with it."""
    code = ("import functools, sys; from distexec import ClusterExecutor; from tests.system import deeds, states\n"
            "executor = ClusterExecutor(1, nodes='local', setup=functools.partial(states.hang, sys.argv[1]))\n"
            "print(type(executor.submit(deeds.double, 1).exception()).__name__)\nexecutor.shutdown()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL) as client:
        assert wait_until(lambda: deeds.notes(tmp_path), WAIT_S)
        setup = psutil.Process(deeds.pids(tmp_path)[0])
        if victim == "client":
            client.kill()
        else:
            psutil.Process(setup.ppid()).kill()
            assert client.communicate(timeout=WAIT_S)[0] == "WorkerLost\n"
        client.wait(WAIT_S)
    assert wait_until(lambda: is_gone(setup.pid))


def test_cleanup_that_raises_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Its error, with the remote traceback, is in the client's log; results are not touched."""
    with make(1, cleanup=functools.partial(deeds.fail, ValueError("stuck"))) as executor:
        assert executor.submit(deeds.double, 2).result(WAIT_S) == 4
    record, = [each for each in caplog.records if "cleaned up" in each.message]
    assert (record.levelno, record.name) == (logging.ERROR, "distexec")
    assert "cleanup raised ValueError: stuck" in record.message
    assert record.exc_info is not None
    assert "deeds.py" in caplog.text


def test_cleanup_that_dies_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """So is its process's end."""
    with make(1, cleanup=functools.partial(deeds.die, "exit3")) as executor:
        assert executor.submit(deeds.double, 2).result(WAIT_S) == 4
    assert "cleanup did not end" in caplog.text
    assert "code 3" in caplog.text


def test_shutdown_waits_for_cleanup(make: Make, tmp_path: Path) -> None:
    """As long as it takes."""
    executor = make(1, cleanup=functools.partial(states.hang, str(tmp_path)))
    assert executor.submit(deeds.double, 2).result(WAIT_S) == 4
    closer = threading.Thread(target=executor.shutdown)
    closer.start()
    assert wait_until(lambda: deeds.notes(tmp_path))
    assert not executor._root.is_closed
    deeds.let_go(tmp_path)
    closer.join(WAIT_S)
    assert not closer.is_alive()


def test_interrupt_does_not_wait_for_cleanup(make: Make, tmp_path: Path) -> None:
    """After Ctrl-C a cleanup has a moment, not more."""
    executor = make(1, cleanup=functools.partial(states.hang_for_ever, str(tmp_path)))
    assert executor.submit(deeds.double, 2).result(WAIT_S) == 4
    executor.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert executor._root.is_closed
    assert wait_until(lambda: not deeds.pids(tmp_path) or is_gone(deeds.pids(tmp_path)[0]), WAIT_S)


def test_client_that_dies_is_cleaned_up_after(tmp_path: Path) -> None:
    """An agent runs the cleanup of a client that never comes back."""
    with AgentProcess(slots=1) as agent:
        code = ("import functools, sys, os; from distexec import ClusterExecutor; from tests.system import deeds, states\n"
                "executor = ClusterExecutor(nodes=[sys.argv[2]], cleanup=functools.partial(states.take_down, sys.argv[1]))\n"
                "executor.submit(deeds.double, 1).result()\nos._exit(0)")
        subprocess.run([sys.executable, "-c", code, str(tmp_path), agent.address], cwd=ROOT, check=True,
                       env=os.environ | {"DISTEXEC_SECRET": agent.secret}, timeout=60)
        agent.process.terminate()  # nobody waits for the client's return then
        agent.process.wait(WAIT_S)
    assert deeds.notes(tmp_path) == ["cleanup None"]


# ---- what it prints


@pytest.mark.parametrize("where", ["local", "agent"])
def test_output_of_setup_and_cleanup(where: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> None:
    """It is printed at the client."""
    make: Make = make_local
    if where == "agent":
        agent: AgentProcess = request.getfixturevalue("shared_agent")
        make = lambda *args, **kwargs: ClusterExecutor(nodes=[agent.address], secret=agent.secret, **kwargs)  # noqa: E731
    with make(1, setup=functools.partial(states.greet, "hello"), cleanup=functools.partial(states.greet, "bye")) as executor:
        executor.submit(deeds.double, 1).result(WAIT_S)
    out, err = capfd.readouterr()
    assert out.split() == ["hello", "bye"]
    assert [word for word in err.split() if word.isupper()] == ["HELLO", "BYE"]


# ---- renewal


def test_resetup_swaps_without_loss(make: Make, tmp_path: Path) -> None:
    """Running tasks end in the old state, queued ones run, new ones see the new state; the old one is then cleaned up."""
    setup, cleanup = functools.partial(states.build, str(tmp_path)), functools.partial(states.take_down, str(tmp_path))
    with make(2, setup=setup, cleanup=cleanup) as executor:
        executor.resetup(None, "old")
        running = [executor.submit(states.hold_state, str(tmp_path)) for _ in range(2)]
        queued = [executor.submit(deeds.double, number) for number in range(100)]
        assert wait_until(lambda: deeds.notes(tmp_path).count("") == 2)
        executor.resetup(None, "new")
        later = [executor.submit(states.look) for _ in range(10)]
        deeds.let_go(tmp_path)
        assert [future.result(WAIT_S) for future in running] == ["old"] * 2
        assert [future.result(WAIT_S) for future in queued] == [2 * number for number in range(100)]
        assert {future.result(WAIT_S)[0] for future in later} == {"new"}
        assert wait_until(lambda: "cleanup old" in deeds.notes(tmp_path))
    assert [note for note in deeds.notes(tmp_path) if note] == ["setup old", "cleanup old", "setup new", "cleanup new"] or [
        note for note in deeds.notes(tmp_path) if note] == ["setup old", "setup new", "cleanup old", "cleanup new"]


def test_resetup_replaces_a_setup_that_hangs(make: Make, tmp_path: Path) -> None:
    """What waits for a setup that does not end is done by workers of the next."""
    with make(1, setup=functools.partial(states.build_or_hang, str(tmp_path))) as executor:
        executor.resetup(None, None)
        future = executor.submit(states.look)
        assert wait_until(lambda: deeds.notes(tmp_path) == ["hangs"])
        executor.resetup(None, "better")
        assert future.result(WAIT_S)[0] == "better"
        assert wait_until(lambda: is_gone(deeds.pids(tmp_path)[0]))


def test_resetup_again_and_again(make: Make, tmp_path: Path) -> None:
    """Ten states in a row, idle or under load: who asks afterwards sees the last."""
    with make(2, setup=functools.partial(states.build, str(tmp_path))) as executor:
        for number in range(10):
            executor.resetup(None, number)
            busy = [executor.submit(deeds.nap, 0.001) for _ in range(number * 5)]
            assert executor.submit(states.look).result(WAIT_S)[0] == number
            assert [future.result(WAIT_S) for future in busy] == [None] * len(busy)
    assert deeds.notes(tmp_path)[-1] == "setup 9"


def test_resetup_without_arguments_sees_them_as_they_are(make: Make, tmp_path: Path) -> None:
    """What setup was called with is pickled anew."""
    values = [1]
    with make(1, setup=functools.partial(states.build, str(tmp_path))) as executor:
        executor.resetup(None, values)
        assert executor.submit(states.look).result(WAIT_S)[0] == [1]
        values.append(2)
        executor.resetup()
        assert executor.submit(states.look).result(WAIT_S)[0] == [1, 2]


def test_each_node_has_its_own(shared_agent: AgentProcess, tmp_path: Path) -> None:
    """setup_args of a node are for that node; resetup of one leaves the other's state alone."""
    nodes = [NodeSpec(shared_agent.address, setup_args=("there",)), NodeSpec("local", 1, setup_args=("here",))]
    with ClusterExecutor(nodes=nodes, secret=shared_agent.secret,
                         setup=functools.partial(states.build, str(tmp_path))) as executor:
        there, here = executor.options(node="shared"), executor.options(node="local")
        first = there.submit(states.look).result(WAIT_S), here.submit(states.look).result(WAIT_S)
        assert [value for value, _ in first] == ["there", "here"]
        executor.resetup("shared", "elsewhere")
        assert there.submit(states.look).result(WAIT_S)[0] == "elsewhere"
        assert here.submit(states.look).result(WAIT_S) == first[1]
        executor.resetup("local", "now")
        assert here.submit(states.look).result(WAIT_S)[0] == "now"
        executor.resetup(None, "all")
        assert {each.submit(states.look).result(WAIT_S)[0] for each in (there, here)} == {"all"}


def test_resetup_mends_a_node(shared_agent: AgentProcess) -> None:
    """A node whose setup failed takes part again once it succeeds; the work that waited for it is done."""
    nodes = [NodeSpec(shared_agent.address, setup_args=(2,)), NodeSpec("local", 1, setup_args=(1,))]
    with ClusterExecutor(nodes=nodes, secret=shared_agent.secret, setup=functools.partial(deeds.fail_at, bad=2)) as executor:
        waiting = executor.options(node="shared").submit(deeds.double, 2)
        assert wait_until(lambda: any("bad 2" in node.problem for node in executor.nodes()))
        assert executor.options(node="local").submit(deeds.double, 1).result(WAIT_S) == 2
        executor.resetup("shared", 3)
        assert waiting.result(WAIT_S) == 4


def test_resetup_while_the_link_is_cut(tmp_path: Path, shared_agent: AgentProcess) -> None:
    """A node that could not be told learns it when the link is back, before it gets another task."""
    with Proxy(shared_agent.address) as proxy, ClusterExecutor(
            nodes=[proxy.address], secret=shared_agent.secret, setup=functools.partial(states.build, str(tmp_path)),
            cleanup=functools.partial(states.take_down, str(tmp_path))) as executor:
        executor.resetup(None, "old")
        assert executor.submit(states.look).result(WAIT_S)[0] == "old"
        proxy.cut()
        assert wait_until(lambda: executor.nodes()[0].state != "up")
        executor.resetup(None, "new")
        later = executor.submit(states.look)
        proxy.heal()
        assert later.result(WAIT_S)[0] == "new"
    assert deeds.notes(tmp_path)[-1] == "cleanup new"


def test_cleanup_is_heard_over_a_new_link(tmp_path: Path, shared_agent: AgentProcess,
                                          caplog: pytest.LogCaptureFixture) -> None:
    """The link is cut while a node cleans up → the client asks again, waits, and hears how it ended, once."""
    with Proxy(shared_agent.address) as proxy:
        executor = ClusterExecutor(nodes=[proxy.address], secret=shared_agent.secret,
                                   cleanup=functools.partial(states.hang, str(tmp_path)))
        executor.submit(deeds.double, 1).result(WAIT_S)
        closer = threading.Thread(target=executor.shutdown)
        closer.start()
        assert wait_until(lambda: deeds.notes(tmp_path))
        proxy.cut()
        assert wait_until(lambda: executor._root.supply.nodes[0].state.value != "up")
        deeds.let_go(tmp_path)
        assert wait_until(lambda: is_gone(deeds.pids(tmp_path)[0]))
        assert closer.is_alive()
        proxy.heal()
        closer.join(WAIT_S)
        assert not closer.is_alive()
    assert "cleaned up" not in caplog.text


def test_cleanup_is_asked_for_over_a_new_link(tmp_path: Path, shared_agent: AgentProcess) -> None:
    """The link is away when the executor is shut down → the node is asked once it is back, and waited for."""
    with Proxy(shared_agent.address) as proxy:
        executor = ClusterExecutor(nodes=[proxy.address], secret=shared_agent.secret, node_timeout=60,
                                   cleanup=functools.partial(states.take_down, str(tmp_path)))
        executor.submit(deeds.double, 1).result(WAIT_S)
        proxy.cut()
        assert wait_until(lambda: executor._root.supply.nodes[0].state.value != "up")
        closer = threading.Thread(target=executor.shutdown)
        closer.start()
        assert wait_until(lambda: executor._root.renewals.cleanups._pending)
        proxy.heal()
        closer.join(WAIT_S)
        assert not closer.is_alive()
        assert deeds.notes(tmp_path) == ["cleanup None"]


def test_next_life_brings_its_own(tmp_path: Path) -> None:
    """A durable session taken up again by another program runs in that one's environment, initializer and setup."""
    code = """
import functools, os, sys
from distexec import ClusterExecutor
from tests.system import deeds, states
with ClusterExecutor(nodes=[sys.argv[2]], durable=sys.argv[1] + "/run.db", env={"LIFE": sys.argv[3]},
                     setup=functools.partial(states.build, sys.argv[1], sys.argv[3])) as executor:
    print(executor.options(key=sys.argv[3]).submit(states.look).result()[0],
          executor.options(key=sys.argv[3] + "env").submit(os.getenv, "LIFE").result(), flush=True)
    if sys.argv[3] == "1":
        os._exit(0)
"""
    with AgentProcess(slots=1) as agent:
        for life in ("1", "2"):
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path), agent.address, life], cwd=ROOT, timeout=60,
                                  env=os.environ | {"DISTEXEC_SECRET": agent.secret}, capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (0, f"{life} {life}\n"), done.stderr


# ---- what cannot be


def test_refusals() -> None:
    """What cannot work is refused at once, with the reason."""
    with pytest.raises(ValueError, match=r"setup=.*mp_context"):
        make_local(1, setup=states.greet, mp_context=multiprocessing.get_context("spawn"))
    with pytest.raises(ValueError, match=r"setup=.*inheritance"):
        make_local(1, setup=states.greet, initializer=print, initargs=(multiprocessing.get_context().Lock(),))
    with pytest.raises(TypeError, match="setup must be a callable"):
        make_local(1, setup="greet")
    with pytest.raises(TypeError, match="tuple"):
        ClusterExecutor(nodes=[NodeSpec("local", setup_args=[1])], setup=print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no setup="):
        ClusterExecutor(nodes=[NodeSpec("local", setup_args=(1,))])
    with pytest.raises(TypeError, match="pickle"):
        make_local(1, setup=functools.partial(print, threading.Lock()))
    with make_local(1) as executor, pytest.raises(ValueError, match="give setup="):
        executor.resetup()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.resetup()
    with make_local(1, setup=states.keep) as executor, pytest.raises(ValueError, match="no node 'far'"):
        executor.resetup("far")
