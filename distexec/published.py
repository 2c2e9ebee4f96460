"""Partial results of one session on an agent: passed upward at once, and kept until the client has heard them.

    worker ── Partial ──► Published ── Partial ──► client ── Heard ──► forgotten, and the worker's page says so

The rule: what a worker's tasks have published and nobody has heard is bounded, because they wait for room (`task`). Where
the client may be away for long they do not; then the oldest are dropped beyond that bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .ledger import Session
from .messages import Ack, Heard, Partial, Resume, partial_bytes
from .shipping import BlobStore
from .workerport import Worker

__all__ = ["Published"]

AWAY_BYTES = 16 << 20
"""Of one attempt, kept for a client that may be away for long."""

LONG_S = 60.0
"""A session that lives so long without its client has tasks that do not wait for it."""


class _Kept:
    """One partial result, and the worker that is to be told."""

    __slots__ = ("partial", "size_bytes", "worker")

    def __init__(self, partial: Partial, worker: Worker, size_bytes: int) -> None:
        self.partial, self.size_bytes = partial, size_bytes
        self.worker: Worker | None = worker  # None: it was told

    def tell(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            with suppress(ValueError):  # unmapped: it is gone
                worker.page.hear(self.size_bytes)


class Published:
    """What the tasks of one session have published here. I/O thread, except `end`."""

    def __init__(self, store: BlobStore, linger_s: float) -> None:
        self._store = store
        self._is_patient = linger_s > LONG_S
        self._kept: dict[int, dict[int, deque[_Kept]]] = {}  # by task and attempt

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._kept

    def add(self, session: Session | None, worker: Worker, partial: Partial) -> None:
        """Take in what a task published; its blobs are ours."""
        kept = _Kept(partial, worker, partial_bytes(partial.data, partial.buffers))
        attempts = self._kept.setdefault(partial.seq, {})
        queue = attempts.setdefault(partial.attempt, deque())
        queue.append(kept)
        link = _link_of(session)
        if link is not None and session is not None:
            link.send([_renumbered(partial, session.uplink_no)])
        elif self._is_patient:
            kept.tell()
            self._bound(queue)

    def _bound(self, queue: deque[_Kept]) -> None:
        size_bytes = sum(each.size_bytes for each in queue)
        while len(queue) > 1 and size_bytes > AWAY_BYTES:
            size_bytes -= queue[0].size_bytes
            self._drop(queue.popleft())

    def client_left(self) -> None:
        """The link is gone. Where that may be for long, nobody waits for it."""
        if self._is_patient:
            for kept in self._all():
                kept.tell()
            for attempts in self._kept.values():
                for queue in attempts.values():
                    self._bound(queue)

    def say_again(self, session: Session, resume: Resume) -> None:
        """Say on a new link what was not heard, before what has ended is said again."""
        for seq in resume.ack:
            self.forget(seq)
        for seq, attempt in resume.drop:
            self.forget(seq, attempt)
        link: Any = session.upstream
        if self._kept and link is not None:
            link.link.send([_renumbered(kept.partial, session.uplink_no) for kept in self._all()])

    def heard(self, message: Heard) -> None:
        """The client has those of an attempt up to a number."""
        attempts = self._kept.get(message.seq, {})
        queue = attempts.get(message.attempt, deque())
        while queue and queue[0].partial.number <= message.number:
            self._drop(queue.popleft())
        if not queue:
            self.forget(message.seq, message.attempt)

    def acknowledged(self, ack: Ack) -> None:
        """The client has these outcomes, and so all that was published before them."""
        if ack.attempts:
            for seq, attempt in zip(ack.seqs, ack.attempts, strict=True):
                self.forget(seq, attempt)
        else:
            for seq in ack.seqs:
                self.forget(seq)

    def forget(self, seq: int, attempt: int | None = None) -> None:
        """Drop what one attempt of a task has published, or all."""
        attempts = self._kept.get(seq)
        if attempts is None:
            return
        for each in list(attempts) if attempt is None else [attempt]:
            for kept in attempts.pop(each, ()):
                self._drop(kept)
        if not attempts:
            del self._kept[seq]

    def end(self) -> None:
        """The session is over."""
        for seq in list(self._kept):
            self.forget(seq)

    def _drop(self, kept: _Kept) -> None:
        kept.tell()
        self._store.release_all(kept.partial.buffers)

    def _all(self) -> Iterator[_Kept]:
        for attempts in self._kept.values():
            for queue in attempts.values():
                yield from queue


def _link_of(session: Session | None) -> Any:
    """Give the link on which the session's news are to be said now; None: they will be said again on the next."""
    if session is None or session.upstream is None or session.reconciling:
        return None
    upstream: Any = session.upstream
    return upstream.link


def _renumbered(partial: Partial, number: int) -> Partial:
    return Partial(number, partial.seq, partial.attempt, partial.number, partial.data, partial.buffers)
