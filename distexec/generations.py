"""The preparations of a pool's workers, one after the other: the present one, and older ones that still have some.

    renew ──► a new generation, from which all workers are started from now on
    the last worker of an older one leaves ──► it is cleaned up, and gone

The rule: a worker belongs to the generation it was started from, whose blobs and processes stay until it has left. A
worker that was asked for while nothing is ready comes from whatever is ready first and not older. I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from distexec.messages import BlobRef, Cleaned, Evidence, SessionSpec, Stream
from distexec.preparation import Host, PreparedStarter
from distexec.shipping import BlobStore
from distexec.starters import Starter

MakeStarter = Callable[[SessionSpec, Host], Starter]


class Employer(Protocol):
    """What generations ask of their pool."""

    def start_now(self, count: int) -> object:
        """Start workers that had to wait."""

    def cannot_start(self, count: int, evidence: Evidence, data: bytes) -> object:
        """Workers that had to wait will not come: the setup of the present generation has not succeeded."""

    def state_wrote(self, stream: Stream, data: bytes) -> object:
        """A setup or cleanup printed this."""

    def state_cleaned(self, cleaned: Cleaned) -> object:
        """A cleanup has ended."""


class Generation:
    """One preparation. The host of its starter."""

    def __init__(self, owner: Generations, number: int, spec: SessionSpec) -> None:
        self.number, self.spec = number, spec
        self.waiting = 0  # workers to be started once all is ready
        self.workers: set[int] = set()  # by number
        self._owner = owner
        self.starter = owner.make_starter(spec, self)
        self._refs = [ref for ref in (*spec.initializer_buffers, *spec.setup_buffers) if isinstance(ref, BlobRef)]
        self._kept: list[BlobRef] = []
        self._is_closing = False
        self._has_blobs()  # those that are here now may not be later

    def __repr__(self) -> str:
        return f"<Generation {self.number}: {len(self.workers)} workers, {self.waiting} to come>"

    def relocate(self, spec: SessionSpec) -> None:
        """Prepare what is not prepared yet so."""
        self.spec = spec
        relocate = getattr(self.starter, "relocate", None)
        if relocate is not None:  # a context's processes are where the program is
            relocate(spec)

    def is_ready(self) -> bool:
        """Whether a worker can be started now; else one more will be as soon as that is so."""
        starter = self.starter
        if self._has_blobs() and (not isinstance(starter, PreparedStarter) or starter.is_ready):
            return True
        self.waiting += 1
        self.go_on()
        return False

    def go_on(self) -> None:
        """Do what can be done for those that wait."""
        if not self._has_blobs() or not self.waiting:  # in this order: blobs that are here now may not be later
            return
        if isinstance(self.starter, PreparedStarter):
            self.starter.prepare()
        else:
            self.state_ready()

    def _has_blobs(self) -> bool:
        store = self._owner.store
        while len(self._kept) < len(self._refs):
            if not store.retain_if_here(self._refs[len(self._kept)]):
                return False
            self._kept.append(self._refs[len(self._kept)])
        return True

    # ---- host

    def state_ready(self) -> None:
        """Start the workers that waited for this, unless another generation is to start them."""
        count, self.waiting = self.waiting, 0
        self._owner.pool.start_now(count)

    def state_failed(self, evidence: Evidence, data: bytes) -> None:
        """Say that the workers that waited will not come; of an older generation nobody waits for any."""
        count, self.waiting = self.waiting, 0
        self._owner.pool.cannot_start(count, evidence, data)

    def state_gone(self) -> None:
        """Prepare anew for those that were asked for meanwhile."""
        self.go_on()

    def state_wrote(self, stream: Stream, data: bytes) -> None:
        """Pass on what was printed."""
        self._owner.pool.state_wrote(stream, data)

    def state_cleaned(self, cleaned: Cleaned) -> None:
        """Pass on how it was cleaned up."""
        self._owner.pool.state_cleaned(cleaned)

    # ---- its end

    def close(self, limit_s: float | None) -> None:
        """End it, with at most `limit_s` seconds for the cleanup (None: no limit); no worker is left."""
        if self._is_closing:
            return
        self._is_closing = True
        if isinstance(self.starter, PreparedStarter):
            self.starter.close(self._end, limit_s)
        else:
            self.starter.close(self._end)

    def hurry(self, limit_s: float) -> None:
        """Let the cleanup take no longer than this from now on."""
        if self._is_closing and isinstance(self.starter, PreparedStarter):
            self.starter.hurry(limit_s)

    def _end(self) -> None:
        for ref in self._kept:
            self._owner.store.release(ref)
        self._kept.clear()
        self._refs.clear()
        self._owner.ended(self)


class Generations:
    """All that a pool has; `current` is the one that workers are started from."""

    def __init__(self, pool: Employer, store: BlobStore, spec: SessionSpec, make_starter: MakeStarter) -> None:
        self.pool, self.store, self.make_starter = pool, store, make_starter
        self.current = Generation(self, 0, spec)
        self._all = {self.current}
        self._limit_s: float | None = None
        self._on_end: Callable[[], object] | None = None

    def renew(self, number: int, spec: SessionSpec) -> None:
        """Start workers from a new preparation from now on."""
        older, self.current = self.current, Generation(self, number, spec)
        self._all.add(self.current)
        self.current.waiting, older.waiting = older.waiting, 0
        if not older.workers:
            older.close(self._limit_s)
        self.current.go_on()

    def left(self, generation: Generation, worker: int) -> None:
        """Learn that a worker is no more."""
        generation.workers.discard(worker)
        if not generation.workers and (generation is not self.current or self._on_end is not None):
            generation.close(self._limit_s)

    def close(self, on_end: Callable[[], object], limit_s: float | None) -> None:
        """End each generation once its workers have left, with so long for its cleanup; then call `on_end()`."""
        self._on_end, self._limit_s = on_end, limit_s
        for generation in list(self._all):
            if not generation.workers:
                generation.close(limit_s)

    def hurry(self, limit_s: float) -> None:
        """Let cleanups take no longer than this."""
        self._limit_s = limit_s
        for generation in list(self._all):
            generation.hurry(limit_s)

    @property
    def number(self) -> int:
        """The present generation's."""
        return self.current.number

    @property
    def is_cleaning(self) -> bool:
        """Whether what is left of some may take its time. Any thread."""
        return any(isinstance(generation.starter, PreparedStarter) for generation in list(self._all))

    def ended(self, generation: Generation) -> None:
        """Learn that nothing of a generation is left."""
        self._all.discard(generation)
        if self._on_end is not None and not self._all:
            on_end: Any = self._on_end
            on_end()
