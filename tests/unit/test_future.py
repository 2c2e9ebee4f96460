"""`ClusterFuture`: the standard contract without a Condition until somebody waits."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, TimeoutError, as_completed, wait
from typing import Any

import pytest

from distexec.future import ClusterFuture
from distexec.ledger import Session, Task
from distexec.messages import Open, Run, SessionSpec


class _Executor:
    def __init__(self) -> None:
        self.withdrawn: list[Task] = []
        self.killed: list[Task] = []

    def withdraw(self, task: Task) -> None:
        self.withdrawn.append(task)

    def kill(self, task: Task) -> None:
        self.killed.append(task)


def _bound() -> tuple[ClusterFuture[Any], Task, _Executor]:
    session = Session(Open(0, b"i" * 16, b"t" * 16, 1.0, 0, SessionSpec()), None, 1)
    future: ClusterFuture[Any] = ClusterFuture()
    task = Task(Run(1, 7, 1, 1, b""), session, future, 3)
    executor = _Executor()
    future.bind(task, executor)
    return future, task, executor


def test_it_has_every_attribute_of_its_parent() -> None:
    """A ClusterFuture has all the attributes that the standard constructor makes: its own constructor replaces that."""
    ours, theirs = ClusterFuture(), Future()
    assert {name for name in vars(theirs) if not hasattr(ours, name)} == set()


def test_no_condition_is_made_to_withdraw_what_nobody_watches() -> None:
    """cancel, of a future that nobody waits for: withdrawn once, told to whoever comes later, never claimed."""
    future, task, executor = _bound()
    assert future.cancel()
    assert future._cond is None
    assert executor.withdrawn == [task]
    assert not future.claim()
    seen: list[Any] = []
    future.add_done_callback(seen.append)
    assert seen == [future]
    assert wait([future], 0).done == {future}
    assert future.cancel()
    assert executor.withdrawn == [task]
    with pytest.raises(CancelledError):
        future.result(0)


def test_who_watches_is_told_of_a_withdrawal() -> None:
    """cancel, of a future with a callback and somebody who waits: both hear of it, once."""
    future, task, executor = _bound()
    seen: list[Any] = []
    future.add_done_callback(seen.append)
    assert future.cancel()
    assert future.cancel()
    assert seen == [future]
    assert executor.withdrawn == [task]
    assert next(iter(as_completed([future], 0))) is future


def test_no_condition_is_made_while_nobody_waits() -> None:
    """claim → conclude → result: no Condition comes into being."""
    future, _, _ = _bound()
    assert future.claim()
    future.conclude(5, None, 10)
    assert future.result() == 5
    assert future.done()
    assert future._cond is None


@pytest.mark.parametrize("waiters", [1, 2, 5])
def test_every_waiting_thread_is_woken(waiters: int) -> None:
    """Several threads in result() → conclude → each has the value."""
    future, _, _ = _bound()
    future.claim()
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(future.result(30))) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    future.conclude("value", None, 0)
    for thread in threads:
        thread.join(30)
    assert results == ["value"] * waiters


def test_result_waits_no_longer_than_asked() -> None:
    """A running future → result(0.01) raises TimeoutError; concluded later → the value, also where one waited in vain."""
    future, _, _ = _bound()
    future.claim()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            future.result(0.01)
    future.conclude(None, ValueError("why"), 0)
    with pytest.raises(ValueError, match="why"):
        future.result()


def test_wait_and_as_completed_see_it_end() -> None:
    """Futures that end before, while and after they are waited for are all reported, with values and errors."""
    futures = [_bound()[0] for _ in range(6)]
    for future in futures:
        future.claim()
    futures[0].conclude(0, None, 0)

    def end_the_others() -> None:
        for number, future in enumerate(futures[1:], 1):
            future.conclude(number, ValueError(number) if number % 2 else None, 0)

    thread = threading.Thread(target=end_the_others)
    thread.start()
    assert set(as_completed(futures, 30)) == set(futures)
    thread.join(30)
    assert wait(futures, 30, FIRST_COMPLETED).not_done == set()


def test_a_queued_one_can_be_cancelled_once() -> None:
    """cancel before the first lease → CancelledError at once, its task withdrawn, and claim says no."""
    future, task, executor = _bound()
    assert future.cancel()
    assert future.cancel()
    assert executor.withdrawn == [task]
    assert not future.claim()
    assert wait([future], 30).done == {future}
    with pytest.raises(CancelledError):
        future.result()


def test_a_running_one_is_killed_not_cancelled() -> None:
    """claimed → cancel() is False, kill() asks the executor; ended → kill() is False."""
    future, task, executor = _bound()
    future.claim()
    assert not future.cancel()
    assert future.kill()
    assert executor.killed == [task]
    future.conclude(1, None, 0)
    assert not future.kill()


def test_callbacks_run_once_whenever_they_were_added() -> None:
    """A callback added before and one added after the end both run once, with the future."""
    future, _, _ = _bound()
    seen: list[Any] = []
    future.add_done_callback(seen.append)
    future.claim()
    future.conclude(1, None, 0)
    future.add_done_callback(seen.append)
    assert seen == [future, future]


def test_the_first_end_counts() -> None:
    """conclude twice → the first outcome stays."""
    future, _, _ = _bound()
    future.claim()
    future.conclude(1, None, 0)
    future.conclude(2, None, 0)
    assert future.result() == 1


def test_what_was_known_of_the_task_is_kept() -> None:
    """After the end: task_id, node, attempts and timing, though the task's record is gone."""
    future, task, _ = _bound()
    assert (future.task_id, future.node, future.attempts, future.timing.run_s) == (7, "", 0, None)
    future.claim()
    task.node, task.deaths = "n1", 1
    future.conclude(1, None, 2_000_000_000)
    assert (future.task_id, future.node, future.attempts, future.timing.run_s) == (7, "n1", 2, 2.0)
    assert future.timing.finished_at is not None
    assert "7" in repr(future)
    assert "'n1'" in repr(future)


def test_a_race_of_cancel_and_claim_has_one_winner() -> None:
    """cancel in one thread, claim in another, a thousand times → exactly one of them succeeds."""
    for _ in range(1000):
        future, _, _ = _bound()
        start = threading.Barrier(2)
        won: list[str] = []

        def cancel(future: ClusterFuture[Any] = future, start: threading.Barrier = start, won: list[str] = won) -> None:
            start.wait()
            if future.cancel():
                won.append("cancel")

        thread = threading.Thread(target=cancel)
        thread.start()
        start.wait()
        if future.claim():
            won.append("claim")
        thread.join()
        assert len(won) == 1
