"""The large values of one executor: what repeats, what is shared, what tasks publish.

    submit ──► blobs ── task ends ──► cache: kept if they came before        share ──► handles ── gone ──► Unshare to all
    worker, node ── Partial ──► future                                ◄── Heard

The rule: nothing here is needed for a result to be right; it spares bytes that were sent, copied or kept before.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from .blobcache import BlobCache, share_of_memory
from .calls import Code
from .messages import BlobRef, Buffers, Message, Partial, Unshare, partial_bytes
from .partials import hear
from .shared import Shared, Shares
from .shipping import BlobStore

if TYPE_CHECKING:
    from .dispatcher import Dispatcher
    from .ledger import Session
    from .payload import CallPacker
    from .pool import Pool
    from .scheduler import Scheduler
    from .transport import Link, Loop
    from .workerport import Worker

__all__ = ["Values"]

IDLE_S = 60.0
"""How long a large argument that repeats is kept though no call has it. Longer: idle memory. Shorter: it is copied again."""

LOOK_S = 5.0
"""Between two looks whether memory is scarce."""

FREED = 1024
"""Values not shared any more, of which nodes are told whose link was away. Smaller: some keep more than they need."""


_log = logging.getLogger("distexec")


class Node(Protocol):
    """A node, as it is seen from here."""

    link: Link | None

    def queue(self, messages: Sequence[Message], /) -> None:
        """Put messages in line, while it can be reached."""

    def flush(self) -> None:
        """Write what is in line."""


class Supply(Protocol):
    """Where the executor's slots come from, as it is seen from here."""

    pool: Pool | None

    @property
    def nodes(self) -> Sequence[Node]:
        """All of them."""


class Root(Protocol):
    """The executor's, as it is seen from here."""

    code: Code
    dispatcher: Dispatcher
    loop: Loop
    packer: CallPacker
    scheduler: Scheduler
    session: Session
    store: BlobStore

    @property
    def supply(self) -> Supply:
        """Where its slots come from."""


class Values:
    """The large values of one root."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self.store, self.packer = root.store, root.packer
        self.cache = BlobCache(root.store, share_of_memory(), new_bytes=0)  # what comes once is made here
        root.store.make_room = self.cache.make_room
        self._shares = Shares(self)
        self._freed: deque[Unshare] = deque(maxlen=FREED)
        self._looked_at = 0.0

    def let_go(self, buffers: Buffers) -> None:
        """Let go of what a task was given."""
        for buffer in buffers:
            if isinstance(buffer, BlobRef):
                self.cache.keep(self, buffer)

    def keep_house(self) -> None:
        """Give up what is idle, or everything if memory is scarce. I/O thread, now and then."""
        if not self.cache.size_bytes:
            return
        self.cache.expire(IDLE_S)
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            import psutil

            self._looked_at = now
            memory = psutil.virtual_memory()
            self.cache.relieve(memory.available, memory.total)

    # ---- shared values

    def share(self, value: Any) -> Shared[Any]:
        """Put a value by for all tasks."""
        return self._shares.share(value)

    def reap(self) -> None:
        """Look whether handles went. I/O thread."""
        self._shares.reap()

    def later(self, seconds: float, function: Callable[[], object]) -> object:
        """Call a function on the I/O thread."""
        return self._root.loop.call_later(seconds, function)

    def wake(self) -> None:
        """Have `reap` called soon."""
        self._root.loop.wake()

    def forget_code(self, refs: Sequence[BlobRef]) -> None:
        """Forget functions that were made of these, unless some task is to run them."""
        root = self._root
        if not root.code.uses(refs):
            return
        with root.dispatcher.lock:
            used = {task.run.fn for task in root.session.tasks.values()}
        gone = root.code.drop(refs, used)
        if gone:
            root.dispatcher.call(lambda now: root.scheduler.undefine(root.session, [each.fn for each in gone]))
        for each in gone:
            root.store.release_all(each.buffers)

    def count_kept(self, ref: BlobRef) -> int:
        """Count the references to a blob that are held for workers of this machine."""
        pool = self._root.supply.pool
        return pool.count_kept(ref) if pool is not None else 0

    def unshare(self, name: bytes, refs: Sequence[BlobRef]) -> None:
        """Tell all workers that nobody uses this value any more. I/O thread."""
        root, message = self._root, Unshare(self._root.session.no, [name], tuple(refs))
        self._freed.append(message)
        if root.supply.pool is not None:
            root.supply.pool.unshare(message)
        nodes = list(root.supply.nodes)
        with root.dispatcher.lock:
            for node in nodes:
                node.queue([message])
        for node in nodes:
            node.flush()

    def node_opened(self, node: Node) -> None:
        """Tell a node whose link was away what it may have missed. I/O thread."""
        missed = [each for each in self._freed if not self._shares.is_shared(each.names[0])]
        if missed and node.link is not None:
            node.link.send(missed)

    # ---- partial results

    @property
    def session(self) -> Session:
        """Whose tasks publish."""
        return self._root.session

    def worker_published(self, worker: Worker, partial: Partial) -> None:
        """Hear a task of our own workers. I/O thread."""
        hear(self, worker, partial)
        with suppress(ValueError):  # unmapped: the worker is gone
            worker.page.hear(partial_bytes(partial.data, partial.buffers))

    def partial_lost(self, partial: Partial, reason: str) -> None:
        """Say that one cannot be had; its task goes on."""
        _log.error("distexec: partial result %d of task %d cannot be had here: %s", partial.number, partial.seq, reason)

    def node_published(self, node: Node, partial: Partial) -> None:
        """Hear a task on a node. I/O thread."""
        hear(self, node, partial)
