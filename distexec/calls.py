"""What a root's calls are made of and come to: functions by number, buffers put by, room for so many, outcomes.

Rule: a function that goes by the same bytes has one number for as long as it is known; large buffers are copied once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .errors import PayloadError, TaskKilled, TaskTimeout
from .ledger import Task
from .mainmodule import digest_known
from .messages import MAX_INLINE_BYTES, BlobRef, Buffers, Define, Outcome, OutcomeKind
from .payload import CallPacker
from .shipping import BlobStore

MAX_FUNCTIONS = 4096
"""Functions kept known to workers though no task names them. Smaller: code is sent again. Larger: memory everywhere."""


class Code:
    """The functions of a session by the key of their pickle; `forget` is called when they have become too many.

    It takes from what it is given those that no task names, and gives them back.
    """

    def __init__(self, session: int, store: BlobStore, last_number: int,
                 forget: Callable[[dict[bytes, Define]], list[Define]]) -> None:
        self.known: dict[bytes, Define] = {}
        self._session, self._store, self._forget = session, store, forget
        self._numbers = itertools.count(last_number + 1)
        self._limit = MAX_FUNCTIONS
        self._lock = threading.Lock()  # guards all of these; reading `known` needs none

    def define(self, key: bytes, code: bytes, views: Sequence[memoryview]) -> Define:
        """Give the definition of a function, a new one if need be. Raises OSError if there is no memory for its buffers."""
        with self._lock:
            known = self.known.get(key)
            if known is not None:
                return known
            if views or len(code) > MAX_INLINE_BYTES:
                code, buffers = put_by(self._store, code, views)
            else:
                buffers = ()
            return self._add(key, Define(self._session, next(self._numbers), code, buffers))


    def take_over(self, key: bytes, code: bytes, buffers: Buffers) -> Define:
        """Give the definition of a function as it came from elsewhere, its buffers, for a new one, being in the store."""
        with self._lock:
            known = self.known.get(key)
            if known is None:
                return self._add(key, Define(self._session, next(self._numbers), code, buffers))
        self._store.release_all(buffers)
        return known

    def uses(self, refs: Sequence[BlobRef]) -> bool:
        """Whether some function is made of one of these blobs."""
        wanted = set(refs)
        return any(each.buffers and not wanted.isdisjoint(each.buffers) for each in list(self.known.values()))

    def drop(self, refs: Sequence[BlobRef], used: set[int]) -> list[Define]:
        """Forget the functions made of these blobs, except those `used`; their buffers become the caller's."""
        wanted = set(refs)
        with self._lock:
            keys = [key for key, each in self.known.items()
                    if each.fn not in used and each.buffers and not wanted.isdisjoint(each.buffers)]
            return [self.known.pop(key) for key in keys]

    def _add(self, key: bytes, definition: Define) -> Define:
        self.known[key] = definition
        if len(self.known) > self._limit:
            gone = self._forget(self.known)
            self._limit = max(MAX_FUNCTIONS, 2 * len(self.known))
            for each in gone:
                self._store.release_all(each.buffers)
        return definition


def put_by(store: BlobStore, data: bytes, views: Sequence[memoryview]) -> tuple[bytes, Buffers]:
    """Copy buffers once: small ones into the message, large ones (and a large pickle, then first) into the store."""
    kept: list[bytes | BlobRef] = []
    try:
        if len(data) > MAX_INLINE_BYTES:
            kept.append(store.put(data))
            data = b""
        inline = MAX_INLINE_BYTES - len(data)
        for view in views:
            if (known := digest_known(view)) and store.retain_if_here(ref := BlobRef(known, view.nbytes)):
                kept.append(ref)
            elif view.nbytes > inline:
                kept.append(store.put(view))
            else:
                kept.append(bytes(view))
                inline -= view.nbytes
    except BaseException:  # no memory for one of them: the call fails, and none is kept
        store.release_all(kept)
        raise
    return data, tuple(kept)


class Room:
    """Makes `submit` wait while `limit` tasks are pending."""

    def __init__(self, limit: int) -> None:
        self._left = limit  # below 0 by what came in without waiting
        self._changed = threading.Condition()

    def enter(self, *, may_wait: bool) -> None:
        """Take a place, free or not if the caller may not wait: a callback on the I/O thread, which alone can make room."""
        with self._changed:
            if may_wait:
                self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1

    def leave(self) -> None:
        """Give a place back."""
        with self._changed:
            self._left += 1
            self._changed.notify()


def take_outcome(packer: CallPacker, store: BlobStore, task: Task, outcome: Outcome) -> tuple[Any, BaseException | None]:
    """Give the value or the error that a task came to; its blobs are let go of, or mapped for as long as the value lives."""
    if outcome.kind == OutcomeKind.TIMEOUT:
        limit_s = task.run.options.timeout_s if task.run.options is not None else 0.0
        return None, TaskTimeout(f"task {task.run.seq} ran longer than its limit of {limit_s:g} s on node "
                                 f"{task.node!r} and was ended (options(timeout=))")
    if outcome.kind == OutcomeKind.KILLED:
        where = f" on node {task.node!r}" if task.node else ""
        return None, TaskKilled(f"task {task.run.seq} was ended{where} by future.kill()")
    try:
        data, buffers = store.take_all(outcome.data, outcome.buffers)
    except (OSError, MemoryError) as error:
        failure = PayloadError(f"there is no memory here for the result of task {task.run.seq}: {error}")
        failure.__cause__ = error
        return None, failure
    return packer.unpack_outcome(OutcomeKind(outcome.kind), data, buffers)
