"""Blobs that nobody needs at the moment, kept in case that somebody does again.

    task ends ──► keep(owner, ref) ──► the same bytes come again: found in the store by their digest, not sent, not copied
                        └── too many, too old, memory scarce, owner gone ──► released, oldest first

The rule: what it holds is one reference each, given to it by whoever had it; so the store is used as by anybody else.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from distexec.messages import BlobRef
from distexec.shipping import BlobStore

__all__ = ["BlobCache", "share_of_memory"]

MEMORY_SHARE = 8
"""Of the machine's memory one part in so many may be held. Smaller: idle memory. Larger: what repeats is sent again."""

SCARCE_SHARE = 16
"""Less free than one part in so many of the machine's memory: all is given up. Smaller: others feel the lack first."""

NEW_BYTES = 128 << 20
"""Of these may have come only once. Larger: a stream of values that are all different fills new memory, which is slow to
get, before it uses again what it had. Smaller: what repeats after many others is sent twice."""

GHOSTS = 4096
"""Digests remembered of what came once and was given up. Smaller: that it comes back is not noticed."""


def share_of_memory() -> int:
    """Give how many bytes may be held on this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_SHARE
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return 256 << 20


class _Kept(NamedTuple):
    ref: BlobRef
    since: float


class BlobCache:
    """The least recently used go first, and those before them that came only once. Any thread may use it.

    Args:
        store: where the blobs are.
        limit_bytes: held at most; a larger blob is not kept.
        new_bytes: of those that came once, though the last of them is kept in any case; 0: none.
    """

    def __init__(self, store: BlobStore, limit_bytes: int, *, new_bytes: int = NEW_BYTES,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._limit_bytes, self._new_limit_bytes, self._clock = store, limit_bytes, new_bytes, clock
        self._lock = threading.Lock()  # guards all below; the store's own is taken after it
        self._new: OrderedDict[tuple[object, bytes], _Kept] = OrderedDict()  # by owner and digest
        self._proven: OrderedDict[tuple[object, bytes], _Kept] = OrderedDict()
        self._new_bytes = self._proven_bytes = 0
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._banned: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<BlobCache: {len(self._new)} new blobs, {len(self._proven)} others, {self.size_bytes:,} bytes>"

    @property
    def size_bytes(self) -> int:
        """How much is held."""
        return self._new_bytes + self._proven_bytes

    def keep(self, owner: object, ref: BlobRef) -> None:
        """Take over a reference: to keep the blob, or to release it."""
        key = owner, ref.digest
        with self._lock:
            gone = [self._pop(key)] if key in self._new or key in self._proven else []
            if ref.size_bytes > self._limit_bytes or ref.digest in self._banned:
                gone.append(ref)
            elif gone or self._ghosts.pop(ref.digest, self) is None:
                self._proven[key] = _Kept(ref, self._clock())
                self._proven_bytes += ref.size_bytes
            elif not self._new_limit_bytes:
                self._remember(ref)
                gone.append(ref)
            else:
                self._new[key] = _Kept(ref, self._clock())
                self._new_bytes += ref.size_bytes
            gone += self._shrink(self._new_limit_bytes, self._limit_bytes, is_last_kept=True)
        self._release(gone)

    def _remember(self, ref: BlobRef) -> None:
        self._ghosts[ref.digest] = None
        if len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)

    def make_room(self, size_bytes: int) -> None:
        """Give up what a new blob would displace anyway, before memory is taken for it: so it gets what is warm."""
        if self._new_bytes + size_bytes > self._new_limit_bytes or self.size_bytes + size_bytes > self._limit_bytes:
            with self._lock:
                gone = self._shrink(max(0, self._new_limit_bytes - size_bytes), max(0, self._limit_bytes - size_bytes))
            self._release(gone)

    def relieve(self, free_bytes: int, total_bytes: int) -> None:
        """Give up everything if the machine has little memory free."""
        if self.size_bytes and free_bytes < total_bytes // SCARCE_SHARE:
            with self._lock:
                gone = self._shrink(0, 0)
            self._release(gone)

    def expire(self, age_s: float) -> None:
        """Give up what was not used for so long."""
        until = self._clock() - age_s
        with self._lock:
            gone = [self._pop(key) for kept in (self._new, self._proven)
                    for key in [key for key, each in kept.items() if each.since <= until]]
        self._release(gone)

    def drop(self, owner: object, refs: Iterable[BlobRef], *, ban: bool = False) -> None:
        """Give up these of an owner's, and keep them no more if `ban`."""
        with self._lock:
            keys = [(owner, ref.digest) for ref in refs]
            gone = [self._pop(key) for key in keys if key in self._new or key in self._proven]
            if ban:
                self._banned.update(digest for _, digest in keys)
        self._release(gone)

    def allow(self, refs: Iterable[BlobRef]) -> None:
        """Take back a ban."""
        with self._lock:
            self._banned.difference_update(ref.digest for ref in refs)

    def end(self, owner: object) -> None:
        """Give up all of an owner's."""
        with self._lock:
            gone = [self._pop(key) for key in [key for key in (*self._new, *self._proven) if key[0] is owner]]
        self._release(gone)

    def _shrink(self, new_limit_bytes: int, limit_bytes: int, *, is_last_kept: bool = False) -> list[BlobRef]:
        gone = []
        while self._new_bytes > new_limit_bytes and len(self._new) > is_last_kept:
            gone.append(self._pop(next(iter(self._new))))
            self._remember(gone[-1])
        while self.size_bytes > limit_bytes:
            gone.append(self._pop(next(iter(self._new or self._proven))))
        return gone

    def _pop(self, key: tuple[object, bytes]) -> BlobRef:
        kept = self._new.pop(key, None)
        if kept is not None:
            self._new_bytes -= kept.ref.size_bytes
        else:
            kept = self._proven.pop(key)
            self._proven_bytes -= kept.ref.size_bytes
        return kept.ref

    def _release(self, refs: Iterable[BlobRef]) -> None:
        for ref in refs:
            self._store.release(ref)
