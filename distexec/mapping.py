"""The machinery of `map`: what was submitted, what is still to be, and in which order results come out.

Rule: an item is the unit of retry and error, also when items travel in chunks; whatever ends the iteration early withdraws
what was not handed out; at most `buffersize` items are submitted whose results were not yielded. Workers import this for
`run_chunk`, so it imports little.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

BATCH = 64
"""Items submitted at once where all are. Smaller: more locking. Larger: the first result comes later."""

Call = tuple[Any, ...]
Submit = Callable[[Sequence[Call]], "Sequence[Future[Any]] | None"]
"""Submits calls given by their arguments; None if that is not possible any more."""


def run_chunk(fn: Callable[..., Any], chunk: Sequence[Call]) -> tuple[list[Any], BaseException | None]:
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
    """The calls of one map: those submitted whose results were not taken yet, and those still to come."""

    def __init__(self, submit: Submit, calls: Iterator[Call], buffersize: int | None,
                 *, survives: bool = False) -> None:
        self._submit = submit
        self._calls = calls
        self._pending: deque[Future[Any]] = deque()
        self._ended: SimpleQueue[Future[Any]] | None = None  # those of `_pending` that have, where that is the order wanted
        self._sent: dict[Future[Any], Call] | None = None  # by future, the calls that may have to be made again
        self._waiting = 0  # submitted and not taken
        self._has_more = buffersize is not None  # calls may be left to be submitted later
        self._buffersize = buffersize
        self._survives = survives  # Ctrl-C: the session is durable and goes on without this program

    def _begin(self) -> None:
        if self._buffersize is not None:
            self._add(self._buffersize)
        else:
            while self._add(BATCH):
                pass

    def _add(self, count: int) -> bool:
        """Submit up to `count` more calls; False if there are no more."""
        batch = list(itertools.islice(self._calls, count))
        futures = self._submit(batch) if batch else None
        if futures is None:
            self._has_more = False
            return False
        self._pending.extend(futures)
        self._waiting += len(futures)
        if self._sent is not None:
            self._sent.update(zip(futures, batch, strict=True))
        if self._ended is not None:
            for future in futures:
                future.add_done_callback(self._ended.put)
        return len(batch) == count

    def _refill(self) -> None:
        if self._has_more:
            self._add(1)

    def _next(self, deadline: float | None) -> Future[Any]:
        """Take the future whose result is to be yielded next."""
        self._waiting -= 1
        if self._ended is None:
            return self._pending.popleft()
        if len(self._pending) > 2 * self._waiting + BATCH:
            self._pending = deque(future for future in self._pending if not future.done())
        try:
            return self._ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            raise TimeoutError(f"{self._waiting + 1} results of map() were not there in time") from None

    def results(self, deadline: float | None, ordered: bool) -> Generator[Any, None, None]:
        """Submit, now, and return an iterator over the results."""
        self._ended = None if ordered else SimpleQueue()
        self._begin()
        return self._items(deadline)

    def _items(self, deadline: float | None) -> Generator[Any, None, None]:
        try:
            while self._waiting:
                self._refill()
                # No reference to the future may stay behind: it holds its result.
                if deadline is None:
                    yield self._result(self._next(None))
                else:
                    yield self._result(self._next(deadline), deadline - time.monotonic())
        finally:
            self._cancel()

    def chunk_results(self, deadline: float | None, ordered: bool, again: Submit) -> Generator[Any, None, None]:
        """Submit, now, and return an iterator over the items' results of calls that are `run_chunk`'s.

        A chunk whose worker died is made again item by item, with `again`: the other items do not pay for one's death.
        """
        self._ended = None if ordered else SimpleQueue()
        self._sent = {}
        self._begin()
        return self._chunks(deadline, ordered, again)

    def _chunks(self, deadline: float | None, ordered: bool, again: Submit) -> Generator[Any, None, None]:
        from .errors import WorkerLost
        assert self._sent is not None
        try:
            while self._waiting:
                future = self._next(deadline)
                _fn, chunk = self._sent.pop(future)
                left_s = None if deadline is None else deadline - time.monotonic()
                try:
                    values, error = self._result(future, left_s)
                except WorkerLost:
                    values, error = Submissions(again, iter(chunk), None).results(deadline, ordered), None
                del future
                for number, value in enumerate(values, 1):
                    if number == len(chunk):
                        self._refill()  # with its last item a chunk makes room for another
                    yield value
                if error is not None:
                    raise error
        finally:
            self._cancel()

    def _cancel(self) -> None:
        """Withdraw what was not handed out."""
        if not self._is_left_behind():
            for future in self._pending:
                future.cancel()

    def _is_left_behind(self) -> bool:
        return self._survives and isinstance(sys.exception(), KeyboardInterrupt)

    def _result(self, future: Future[Any], timeout_s: float | None = None) -> Any:
        """Give the result; what ends the wait otherwise withdraws the call."""
        try:
            try:
                return future.result(timeout_s)
            finally:
                if not future.done() and not self._is_left_behind():
                    future.cancel()
        finally:
            del future  # break the cycle with the exception's traceback
