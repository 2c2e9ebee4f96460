"""What holds the root together when things coincide: callbacks that submit, ends that meet, descriptors that run out,
forks, Ctrl-C at the interpreter's end; and what errors and counts say of it."""

from __future__ import annotations

import errno
import os
import signal
import socket
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy
import pytest

from distexec import ClusterExecutor, NoNodes, TaskKilled, WorkerLost, link
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make, make_local
from tests.system.rig import is_alive
from tests.system.test_executor import start_script

WAIT_S = 30.0
HANG_S = 60
"""After so long a forked child that hangs is ended."""


# ---- coincidences


def test_interrupted_in_the_middle_of_a_decision(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C loses what the scheduler had decided → leaving the block ends everything all the same."""
    executor = make(1)
    running = executor.submit(deeds.hold, str(tmp_path))
    assert wait_until(lambda: deeds.notes(tmp_path))
    dispatcher = executor._root.dispatcher
    monkeypatch.setattr(dispatcher, "_act", lambda action: None)  # what a decision asked of the pool
    monkeypatch.setattr(dispatcher, "_queue", lambda port, batch: None)  # and of nodes
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt
    assert isinstance(running.exception(0), TaskKilled)


def test_a_callback_may_submit_though_there_is_no_room(make: Make, tmp_path: Path) -> None:
    """A callback on the I/O thread, which alone makes room, is let in above max_pending; the places are given back."""
    with make(1, max_pending=1) as executor:
        room = executor._root._room
        assert room is not None
        later: SimpleQueue[Future[Any]] = SimpleQueue()

        def go_on(future: Future[Any]) -> None:
            for number in range(3):
                later.put(executor.submit(deeds.double, number))

        first = executor.submit(deeds.hold, str(tmp_path))
        first.add_done_callback(go_on)
        deeds.let_go(tmp_path)
        assert [later.get(timeout=WAIT_S).result(WAIT_S) for _ in range(3)] == [0, 2, 4]
        assert executor.submit(deeds.double, 3).result(WAIT_S) == 6
        assert room._left == 1


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_cancelled_while_the_executor_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture, when: str) -> None:
    """What is cancelled as the executor breaks ends once, cancelled, and lets go what it held once; the others break."""
    executor = make_local(1, max_pending=100)
    root, room = executor._root, executor._root._room
    assert room is not None
    running = executor.submit(deeds.hold, str(tmp_path))
    assert wait_until(lambda: deeds.notes(tmp_path))
    queued = [executor.submit(deeds.ends, numpy.full(1 << 18, number)) for number in range(20)]
    withdrawn = queued[::2]
    ended: SimpleQueue[Future[Any]] = SimpleQueue()
    for future in (running, *queued):
        future.add_done_callback(ended.put)
    withdraw = root.withdraw
    late: list[Any] = []
    if when == "before":
        monkeypatch.setattr(root, "withdraw", late.append)
        assert all(future.cancel() for future in withdrawn)
        running.add_done_callback(lambda _: [withdraw(task) for task in late])  # the first to end
    else:
        running.add_done_callback(lambda _: [future.cancel() for future in withdrawn])
    root.break_with(WorkerLost("broken on purpose", attempts=0))
    assert wait([running, *queued], WAIT_S).not_done == set()
    executor.shutdown()
    assert [future for future in queued if future.cancelled()] == withdrawn
    for future in (running, *queued[1::2]):
        with pytest.raises(WorkerLost, match="broken on purpose"):
            future.result(0)
    assert sorted(map(id, [ended.get() for _ in range(ended.qsize())])) == sorted(map(id, [running, *queued]))
    assert room._left <= 100
    assert not [record for record in caplog.records if record.exc_info]


def test_a_worker_that_cannot_be_told_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    """With no descriptor left to lend a worker, it is ended, and what it was to do is done elsewhere, uncharged."""
    with make_local(2) as executor:
        held = [executor.submit(deeds.hold, str(tmp_path)) for _ in range(2)]
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S)
        workers = deeds.pids(tmp_path)
        failures = [OSError(errno.EMFILE, "no descriptor")]
        duplicated = link._duplicated

        def fail_once(fds: list[int]) -> list[int]:
            if failures:
                raise failures.pop()
            return duplicated(fds)

        monkeypatch.setattr(link, "_duplicated", fail_once)
        deeds.let_go(tmp_path)
        wait(held, WAIT_S)
        large = executor.submit(deeds.ends, numpy.arange(1 << 18))
        small = [executor.submit(deeds.double, number) for number in range(100)]
        assert large.result(WAIT_S) == (0, (1 << 18) - 1)
        assert [future.result(WAIT_S) for future in small] == [2 * number for number in range(100)]
        assert not failures
        assert large.attempts == 1
        assert executor.status().retried == 0
        assert wait_until(lambda: sum(map(is_alive, workers)) == 1)
        assert executor.wait_for_slots(2, WAIT_S)
    assert [record.message for record in caplog.records if "could not be told" in record.message]


# ---- forks


def in_child(look: Any) -> str:
    """Fork, and return what `look()` returns or raises in the child."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(HANG_S)
        try:
            try:
                said = repr(look())
            except BaseException as error:
                said = repr(error)
            os.write(tell, said.encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return said


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_the_executor_stays_with_the_process_that_made_it(make: Make, tmp_path: Path) -> None:
    """In a forked child the parent's executor refuses work, says why, and closes at once, whatever the parent was at."""
    with make(1) as executor:
        held = executor.submit(deeds.hold, str(tmp_path), "held")
        queued = executor.submit(deeds.double, 1)
        assert wait_until(lambda: deeds.notes(tmp_path))
        with executor._root.dispatcher.lock:  # as if another thread were in the middle of a decision
            said = in_child(lambda: executor.submit(deeds.double, 2))
            assert "RuntimeError('this executor belongs to the process that forked this one" in said
            assert in_child(lambda: executor.shutdown()) == "None"
            assert in_child(lambda: executor.__exit__(None, None, None)) == "None"
            assert "is_waiting=False" in in_child(lambda: f"is_waiting={executor.wait_for_slots(1, WAIT_S)}")
        assert not held.done()
        deeds.let_go(tmp_path)
        assert (held.result(WAIT_S), queued.result(WAIT_S)) == ("held", 2)
        assert executor.submit(deeds.double, 2).result(WAIT_S) == 4


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_an_executor_not_used_yet_works_in_both_processes() -> None:
    """What is made before a fork and used only after it belongs to either process."""
    with make_local(1) as executor:
        assert in_child(lambda: executor.submit(deeds.double, 4).result(WAIT_S)) == "8"
        assert executor.submit(deeds.double, 2).result(WAIT_S) == 4


# ---- the end of the interpreter

AT_EXIT = """
import distexec.root
wait_closed = distexec.root.Root.wait_closed
def wait_aloud(root):
    print("waiting", flush=True)
    wait_closed(root)
distexec.root.Root.wait_closed = wait_aloud
for _ in range(10):
    executor.submit(deeds.start_children, directory)
"""


@pytest.mark.parametrize("where", ["local", "agent"])
def test_interrupt_at_exit_ends_what_runs(request: pytest.FixtureRequest, tmp_path: Path, where: str) -> None:
    """Ctrl-C while a program that has ended waits for its work ends tasks that would run for ever, and what they started."""
    agent: AgentProcess | None = request.getfixturevalue("shared_agent") if where == "agent" else None
    script = start_script(AT_EXIT, tmp_path, agent)
    try:
        assert script.stdout is not None
        assert script.stdout.readline() == "waiting\n"
        assert wait_until(lambda: len(deeds.notes(tmp_path)) == 2, WAIT_S), agent and agent.log()
        script.send_signal(signal.SIGINT)
        _, err = script.communicate(timeout=WAIT_S)
    finally:
        script.kill()
    assert "KeyboardInterrupt" in err
    assert len(deeds.notes(tmp_path)) == 2
    children = [int(pid) for note in deeds.notes(tmp_path) for pid in note.split()]
    assert wait_until(lambda: not any(map(is_alive, [*deeds.pids(tmp_path), *children])))


# ---- what is said


@pytest.mark.parametrize("end", ["terminate_workers", "kill_workers"])
def test_who_ended_the_workers(make: Make, tmp_path: Path, end: str) -> None:
    """The error of a task whose workers the program ended says who did it, names no node, and says that all is over."""
    executor = make(1)
    running = executor.submit(deeds.hold, str(tmp_path))
    assert wait_until(lambda: deeds.notes(tmp_path))
    getattr(executor, end)()
    text = f"the workers were ended by {end}(); the executor cannot be used any more"
    error = running.exception(WAIT_S)
    assert isinstance(error, BrokenProcessPool)
    assert str(error) == text
    with pytest.raises(WorkerLost) as caught:
        executor.submit(deeds.double, 1)
    assert str(caught.value) == text
    executor.shutdown()


class NotelessError(Exception):
    """Takes no notes."""

    def add_note(self, note: str) -> None:
        """Refuse."""
        raise TypeError("no notes here")


def test_where_it_was_raised(make: Make, request: pytest.FixtureRequest) -> None:
    """An exception from another node has a note with its name; from here it has none, and none is forced on it."""
    is_remote = "agent" in request.node.callspec.id
    with make(1) as executor:
        error = executor.submit(deeds.fail, ValueError("no")).exception(WAIT_S)
        noteless = executor.submit(deeds.fail, NotelessError("no")).exception(WAIT_S)
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
    assert getattr(error, "__notes__", []) == (["(raised on node 'shared')"] if is_remote else [])
    assert isinstance(noteless, NotelessError)
    assert not hasattr(noteless, "__notes__")


@pytest.mark.parametrize("retries", [0, 2])
def test_the_last_loss_is_no_retry(make: Make, tmp_path: Path, retries: int) -> None:
    """Of a task that was lost as often as it could be, only the attempts that followed a loss count as retries."""
    with make(1, retries=retries) as executor:
        with pytest.raises(WorkerLost) as caught:
            executor.submit(deeds.die, "SIGKILL", str(tmp_path)).result(WAIT_S)
        assert caught.value.attempts == len(deeds.notes(tmp_path)) == retries + 1
        status = executor.status()
        assert (status.done, status.failed, status.retried) == (1, 1, retries)


def test_tasks_without_a_node_are_failures() -> None:
    """What no node took in time has ended, with an error, and is counted so; nothing of it was retried."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and never listens: nobody else can either
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with ClusterExecutor(nodes=[address], secret=os.urandom(32).hex(), nodes_timeout=0.1) as executor:
            for future in [executor.submit(deeds.double, number) for number in range(3)]:
                with pytest.raises(NoNodes, match="nodes_timeout"):
                    future.result(WAIT_S)
            status = executor.status()
            assert (status.done, status.failed, status.retried, status.queued, status.running) == (3, 3, 0, 0, 0)
