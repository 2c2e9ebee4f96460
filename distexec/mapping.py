"""The machinery of `map`: what was submitted, what is still to be, and in which order results come out.

Rule: an item is the unit of retry and error, also when items travel in chunks; whatever ends the iteration early withdraws
what was not handed out; at most `buffersize` items are submitted whose results were not yielded. Workers import this for
`run_chunk`, so it imports little.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

def run_chunk(fn: Callable[..., Any], chunk: Sequence[tuple[Any, ...]]) -> tuple[list[Any], BaseException | None]:
    """Run the items of a chunk in a worker: the values up to the first error, and that error."""
    values: list[Any] = []
    for args in chunk:
        try:
            values.append(fn(*args))
        except BaseException as error:  # SystemExit too: the client gets what the function raised
            # What the standard pool uses to carry a remote traceback along with an exception.
            from concurrent.futures.process import _ExceptionWithTraceback
            return values, _ExceptionWithTraceback(error, error.__traceback__)  # type: ignore[return-value, arg-type]
    return values, None


class Submissions:
    """The items of one map: what was submitted, and what is still to be."""

    def __init__(self, submit: Callable[..., Future[Any] | None], items: Iterator[tuple[Any, ...]],
                 buffersize: int | None, *, unwrap: bool = False) -> None:
        self._submit = (lambda item: submit(*item)) if unwrap else submit
        self._items = items
        self._has_more = buffersize is not None
        self.pending: deque[Future[Any]] = deque()
        self.sent: dict[Future[Any], Any] = {}  # by future, the items, where chunks may have to be split
        self._keeps = unwrap
        for _ in range(buffersize) if buffersize is not None else itertools.repeat(None):
            if not self.refill():
                break

    def refill(self) -> bool:
        """Submit one more item, if there is one."""
        item = next(self._items, None)
        if item is None:
            self._has_more = False
            return False
        future = self._submit(item)
        if future is None:
            self._has_more = False
            return False
        self.pending.append(future)
        if self._keeps:
            self.sent[future] = item
        return True

    def results(self, deadline: float | None, ordered: bool) -> Generator[Any, None, None]:
        """Yield results until all are out; whatever ends it earlier cancels the rest."""
        return self._in_order(deadline) if ordered else self._as_completed(deadline)

    def _in_order(self, deadline: float | None) -> Generator[Any, None, None]:
        try:
            while self.pending:
                if self._has_more:
                    self.refill()
                # No reference to the future may stay behind: it holds its result.
                if self._keeps:
                    yield self._take_with_items(self.pending.popleft(), deadline)
                elif deadline is None:
                    yield _result_or_cancel(self.pending.popleft())
                else:
                    yield _result_or_cancel(self.pending.popleft(), deadline - time.monotonic())
        finally:
            self.cancel()

    def _as_completed(self, deadline: float | None) -> Generator[Any, None, None]:
        try:
            while self.pending:
                if self._has_more:
                    self.refill()
                left_s = None if deadline is None else deadline - time.monotonic()
                done = wait(self.pending, left_s, "FIRST_COMPLETED").done
                if not done:
                    raise TimeoutError(f"{len(self.pending)} results of map() were not there in time")
                self.pending = deque(future for future in self.pending if future not in done)
                while done:
                    future = done.pop()
                    yield self._take_with_items(future, None) if self._keeps else future.result()
                    del future
        finally:
            self.cancel()

    def _take_with_items(self, future: Future[Any], deadline: float | None) -> tuple[Any, Any]:
        items = self.sent.pop(future)
        from .errors import WorkerLost
        try:
            return items, _result_or_cancel(future, None if deadline is None else deadline - time.monotonic())
        except WorkerLost as lost:
            return items, lost

    def cancel(self) -> None:
        """Withdraw what was not handed out."""
        for future in self.pending:
            future.cancel()


def _result_or_cancel(future: Future[Any], timeout_s: float | None = None) -> Any:
    try:
        try:
            return future.result(timeout_s)
        finally:
            future.cancel()
    finally:
        del future  # break the cycle with the exception's traceback


def spread(submitted: Submissions, results: Generator[Any, None, None],
            again: Callable[[tuple[Any, ...]], Future[Any] | None]) -> Generator[Any, None, None]:
    """Yield the items of chunks one by one; a chunk whose worker died is run again item by item."""
    from .errors import WorkerLost
    try:
        for ((chunk,), outcome) in results:
            if isinstance(outcome, WorkerLost):
                futures = [again(args) for args in chunk]
                for future in futures:
                    if future is None:
                        raise outcome
                    yield future.result()
                continue
            values, error = outcome
            yield from values
            if error is not None:
                raise error
    finally:
        results.close()
