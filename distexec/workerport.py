"""A worker process as its pool sees it: a port of the dispatcher.

    dispatcher ── queue, flush ──► Worker.link ──► worker      blobs that the messages refer to are announced first

The rule: what a worker has mapped is held in the store until the worker lets go of it, or is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from distexec.capture import Capture
from distexec.generations import Generation
from distexec.messages import (
    Answer,
    BlobRef,
    Buffers,
    Define,
    Forget,
    Free,
    Keep,
    Message,
    Run,
    Segment,
    SessionFailed,
)
from distexec.shipping import BlobStore
from distexec.starters import Exit
from distexec.transport import Link, Timer
from distexec.worker import WorkerPage

__all__ = ["Worker"]


class Worker:
    """A worker process as its pool sees it.

    Attributes: `number` (from 1, in the pool), `pid` (0 until known), `link`, `page`, `orders` (how many Runs were
    queued: the order of the last), `is_ready`, `is_stopping`.
    """

    def __init__(self, number: int, store: BlobStore, page: WorkerPage, output: Capture | None,
                 on_run: Callable[[], object]) -> None:
        self.number, self.page = number, page
        self.pid = self.orders = 0
        self.is_ready = self.is_stopping = False
        self.link: Link = cast("Link", None)  # set at once by the pool; a link needs us for its callbacks
        self.output = output
        self.session: Any = None  # for the owner's use
        self.generation: Generation = cast("Generation", None)  # set at once by the pool
        self._on_run = on_run  # called after Runs were queued, if output is captured
        self._store = store
        self._arenas: set[int] = set()  # whose descriptors it was given
        self._kept: list[BlobRef] = []  # of its functions and of shared values: mapped there until it says otherwise
        # The pool's, on the I/O thread:
        self.exit: Exit | None = None
        self.is_closed = False
        self.kill_reason = ""
        self.force: Timer | None = None  # its end by force, due
        self.failure: SessionFailed | None = None
        self.unclaimed: dict[bytes, BlobRef] = {}  # blobs it announced, whose outcome has not come yet

    def __repr__(self) -> str:
        state = "gone" if self.exit else "stopping" if self.is_stopping else "ready" if self.is_ready else "starting"
        return f"<Worker {self.number}: pid {self.pid}, {state}, {self.orders} runs, {self.page.started} started>"

    def queue(self, messages: Sequence[Message]) -> None:
        """Put messages in line; blobs that they refer to go ahead. Callers see to it that no two do this at once.

        Raises KeyError if a blob is not in the store, OSError if a descriptor cannot be passed on.
        """
        output, has_runs = self.output, False
        for message in messages:
            kind = type(message)
            if kind is Run:
                has_runs = True
                self.orders += 1
                if output is not None:
                    output.expect(message.seq)  # type: ignore[union-attr]
                if message.buffers:  # type: ignore[union-attr]
                    self._announce(message.buffers)  # type: ignore[union-attr]
            elif kind is Answer and message.buffers:  # type: ignore[union-attr]
                self._announce(message.buffers)  # type: ignore[union-attr]
            elif kind is Define and message.buffers:  # type: ignore[union-attr]
                self._keep(message.buffers)  # type: ignore[union-attr]
        self.link.queue(messages)
        if has_runs and output is not None:
            self._on_run()

    def flush(self) -> None:
        """Send what is queued. Any thread."""
        self.link.flush()

    def _announce(self, buffers: Buffers) -> None:
        for ref in buffers:
            if type(ref) is BlobRef:
                fd, offset, _, arena = self._store.segment(ref)
                fds = () if arena in self._arenas else (fd,)
                self._arenas.add(arena)
                self.link.queue([cast("Any", Segment(ref, arena, offset))], fds)

    def _keep(self, buffers: Buffers) -> None:
        for ref in buffers:
            if type(ref) is BlobRef:
                self._store.retain(ref)
                self._kept.append(ref)
        self._announce(buffers)

    def note(self, keep: Keep) -> None:
        """Hold what it keeps mapped, and let go of what it does not any more."""
        self._kept += [ref for ref in keep.blobs if self._store.retain_if_here(ref)]
        for ref in keep.dropped:
            if ref in self._kept:
                self._kept.remove(ref)
                self._store.release(ref)

    def count_kept(self, ref: BlobRef) -> int:
        """Count the references that are held to a blob because it is mapped there."""
        return self._kept.count(ref)

    def forget(self, arena: int) -> None:
        """Tell it that an arena is gone, if it was told of it."""
        if arena in self._arenas:
            self._arenas.discard(arena)
            self.link.send([cast("Any", Forget(arena))])

    def give_back(self, arena: int, is_reusable: bool) -> None:
        """Tell it what has become of an arena of its own. Any thread."""
        if not self.is_closed:
            self.link.send([cast("Any", Free(arena, is_reusable))])

    def release(self) -> None:
        """Let go of everything that only a living worker needs. I/O thread."""
        for ref in (*self._kept, *self.unclaimed.values()):
            self._store.release(ref)
        self._kept.clear()
        self.unclaimed.clear()
        if self.output is not None:
            self.output.close()
