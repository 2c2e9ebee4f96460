"""The machinery of `map`, with calls that end when the test says so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from distexec.errors import WorkerLost
from distexec.mapping import Submissions, run_chunk


class _Cluster:
    """Ends each call at once with its first argument doubled, unless told otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ends: dict[Any, BaseException] = {}
        self.held: dict[Any, Future[Any]] = {}
        self.hold: set[Any] = set()

    def submit(self, calls: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
        return [self._call(call) for call in calls]

    def _call(self, call: tuple[Any, ...]) -> Future[Any]:
        self.calls.append(call)
        future: Future[Any] = Future()
        if call[0] in self.hold:
            self.held[call[0]] = future
        elif call[0] in self.ends:
            future.set_exception(self.ends[call[0]])
        else:
            future.set_result(2 * call[0])
        return future

    def submit_chunk(self, calls: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
        futures = []
        for fn, chunk in calls:
            self.calls.extend(chunk)
            future: Future[Any] = Future()
            if any(args[0] in self.ends for args in chunk):
                future.set_exception(WorkerLost("gone"))
            else:
                future.set_result(run_chunk(fn, chunk))
            futures.append(future)
        return futures


def _items(count: int) -> Any:
    return zip(range(count))


def test_all_are_submitted_at_once_and_yielded_in_order() -> None:
    """Without buffersize every item is submitted before the first result is taken."""
    cluster = _Cluster()
    results = Submissions(cluster.submit, _items(200), None).results(None, True)
    assert len(cluster.calls) == 200
    assert list(results) == [2 * number for number in range(200)]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("buffersize", [1, 2, 7])
def test_buffersize_is_exact(buffersize: int, ordered: bool) -> None:
    """After n results taken of an endless input, n + buffersize items were taken from it: never more, never fewer."""
    cluster = _Cluster()
    results = Submissions(cluster.submit, zip(itertools.count()), buffersize).results(None, ordered)
    assert len(cluster.calls) == buffersize
    for taken in range(1, 50):
        next(results)
        assert len(cluster.calls) == taken + buffersize
    results.close()


def test_an_error_withdraws_the_rest() -> None:
    """The second of four items fails, the rest are held → the error is raised and the held ones are cancelled."""
    cluster = _Cluster()
    cluster.ends[1] = ValueError("bad")
    cluster.hold = {2, 3}
    results = Submissions(cluster.submit, _items(4), None).results(None, True)
    assert next(results) == 0
    with pytest.raises(ValueError, match="bad"):
        next(results)
    assert all(future.cancelled() for future in cluster.held.values())


def test_closing_withdraws_the_rest() -> None:
    """The iterator is closed after one result → what is still held is cancelled."""
    cluster = _Cluster()
    cluster.hold = {1}
    results = Submissions(cluster.submit, _items(2), None).results(None, True)
    next(results)
    results.close()
    assert cluster.held[1].cancelled()


def test_unordered_results_come_as_they_are_ready() -> None:
    """The first item is held → the others are yielded before it."""
    cluster = _Cluster()
    cluster.hold = {0}
    results = Submissions(cluster.submit, _items(5), None).results(None, False)
    assert sorted(next(results) for _ in range(4)) == [2, 4, 6, 8]
    cluster.held[0].set_result("late")
    assert list(results) == ["late"]


def test_a_deadline_that_passed_raises() -> None:
    """A held item and a deadline in the past → TimeoutError, ordered or not."""
    for ordered in (True, False):
        cluster = _Cluster()
        cluster.hold = {0}
        with pytest.raises(TimeoutError):
            next(Submissions(cluster.submit, _items(1), None).results(0.0, ordered))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_lost_chunk_is_run_item_by_item(ordered: bool) -> None:
    """The worker of the second chunk dies → its items are submitted again one by one; all results are there."""
    cluster, again = _Cluster(), _Cluster()
    cluster.ends[4] = ValueError("its worker dies")
    chunks = [tuple((number,) for number in range(first, first + 3)) for first in (0, 3, 6)]
    calls = ((lambda number: 2 * number, chunk) for chunk in chunks)
    results = list(Submissions(cluster.submit_chunk, calls, None).chunk_results(None, ordered, again.submit))
    assert sorted(results) == [2 * number for number in range(9)]
    assert again.calls == [(3,), (4,), (5,)]
    if ordered:
        assert results == sorted(results)


def test_a_chunk_gives_its_values_up_to_the_error() -> None:
    """run_chunk over an item that raises → the values before it, and the error with its traceback."""
    values, error = run_chunk(lambda number: 10 // number, [(5,), (2,), (0,), (1,)])
    assert values == [2, 5]
    assert error is not None
