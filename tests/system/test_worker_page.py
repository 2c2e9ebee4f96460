"""No task waits behind another while a slot is idle, whatever was foretold of their run times."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import wait
from multiprocessing.managers import SyncManager
from pathlib import Path

import pytest

from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make

WAIT_S = 30.0


@pytest.fixture(scope="module")
def manager() -> Iterator[SyncManager]:
    """A manager's process."""
    from tests import leaks

    with multiprocessing.get_context("spawn").Manager() as manager:
        leaks.own(manager._process.pid)  # type: ignore[attr-defined]
        yield manager
    leaks.disown(manager._process.pid)  # type: ignore[attr-defined]


def test_talking_tasks_progress(make: Make, manager: SyncManager) -> None:
    """Two tasks that need each other always progress on two slots, however short such tasks were before."""
    with make(2) as executor:
        list(executor.map(deeds.double, range(2000)))
        for number in range(20):
            one, other = manager.Queue(), manager.Queue()
            futures = [executor.submit(deeds.talk, one, other, "ping"), executor.submit(deeds.talk, other, one, "pong")]
            assert [future.result(WAIT_S) for future in futures] == ["pong", "ping"], number


def test_talking_tasks_that_look_short(make: Make, manager: SyncManager) -> None:
    """The same when the function is known to be very quick, so that tasks are handed out many at a time."""
    with make(2) as executor:
        list(executor.map(hold_or_pass, [None] * 500, [0] * 500))
        for _ in range(10):
            one, other = manager.Queue(), manager.Queue()
            futures = [executor.submit(hold_or_pass, (one, other), "ping"), executor.submit(hold_or_pass, None, 1),
                       executor.submit(hold_or_pass, (other, one), "pong")]
            assert [future.result(WAIT_S) for future in futures] == ["pong", 1, "ping"]


def hold_or_pass(queues: tuple[object, object] | None, word: object) -> object:
    return word if queues is None else deeds.talk(*queues, word)


def test_a_thousand_times_longer(make: Make, tmp_path: Path) -> None:
    """A task a thousand times longer than its kind so far does not hold back those that were behind it."""
    with make(2) as executor:
        list(executor.map(hold_if, [""] * 1000))
        futures = [executor.submit(hold_if, str(tmp_path) if number == 3 else "") for number in range(500)]
        done = wait([future for number, future in enumerate(futures) if number != 3], WAIT_S)
        assert not done.not_done, "they waited behind the long one"
        assert not futures[3].done()
        deeds.let_go(tmp_path)
        assert futures[3].result(WAIT_S) == str(tmp_path)
        assert all(future.attempts == 1 for future in futures)


def hold_if(directory: str) -> str:
    return deeds.hold(directory, directory) if directory else ""  # type: ignore[no-any-return]


def test_every_task_runs_once(make: Make, tmp_path: Path) -> None:
    """Tasks taken back from behind long ones run exactly once, in all that mixing."""
    with make(2) as executor:
        futures = [executor.submit(note_and_nap, str(tmp_path), number) for number in range(3000)]
        assert [future.result(WAIT_S) for future in futures] == list(range(3000))
    assert sorted(map(int, deeds.notes(tmp_path))) == list(range(3000))


def note_and_nap(directory: str, number: int) -> int:
    deeds.note(directory, number)
    if number % 200 == 0:
        time.sleep(0.05)
    return number


def test_both_slots_held(make: Make, tmp_path: Path) -> None:
    """With both slots held by long tasks, the first of them to end lets all the others through."""
    for each in "ab":
        (tmp_path / each).mkdir()
    with make(2) as executor:
        list(executor.map(hold_if, [""] * 200))
        held = [executor.submit(hold_if, str(tmp_path / each)) for each in "ab"]
        quick = [executor.submit(hold_if, "") for _ in range(300)]
        assert wait_until(lambda: all(deeds.notes(tmp_path / each) for each in "ab"), WAIT_S)
        deeds.let_go(tmp_path / "b")
        assert not wait(quick, WAIT_S).not_done
        assert not held[0].done()
        deeds.let_go(tmp_path / "a")
        wait(held, WAIT_S)
