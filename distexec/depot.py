"""The files of one session on one machine, by digest: `files/` in the session's directory.

    fetched from above, or copied from the client's disk ──► files/<digest> ──► linked or copied to where tasks see them

The rule: what is here under a digest is what the digest says, or is not believed: all files here have one time stamp, which
writing to them would change.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress

from distexec.messages import BlobRef, Tree
from distexec.transfers import Transfers
from distexec.trees import STORED_NS, FileWriter, Folder, Placing, place

__all__ = ["Depot", "refs_of"]

MODE = 0o444

IDLE_BYTES = 4 << 30
"""Of files that nobody needs just now and somebody may need again. Smaller: they are fetched again. Larger: a full disk."""

LINK_BYTES = 1 << 20
"""Files from this size on are linked to, and so shared and read-only; smaller ones are copied. Smaller: more tasks meet with
files that they cannot change. Larger: more copies."""


def refs_of(tree: Tree) -> list[BlobRef]:
    """List what a tree refers to, each once."""
    return list({file.content: None for file in tree if isinstance(file.content, BlobRef)})


class Depot:
    """Files by digest. What is pinned is kept; of the rest the oldest go when they are many, or the disk is full.

    `make_writer` and `place` may be called on any thread, the rest on one.
    """

    def __init__(self, home: str) -> None:
        self.home = home
        self._directory = os.path.join(home, "files")
        self._pins: dict[BlobRef, int] = {}
        self._idle: OrderedDict[BlobRef, None] = OrderedDict()
        self._idle_bytes = 0

    def __repr__(self) -> str:
        return f"<Depot {self.home!r}: {len(self._pins)} in use, {len(self._idle)} idle>"

    def path(self, ref: BlobRef) -> str:
        """Say where a file is, or would be."""
        return os.path.join(self._directory, ref.digest.hex())

    def has(self, ref: BlobRef) -> bool:
        """Whether the file is here, as it was put here."""
        try:
            status = os.stat(self.path(ref), follow_symlinks=False)
        except OSError:
            return False
        return status.st_size == ref.size_bytes and status.st_mtime_ns == STORED_NS

    def pin(self, ref: BlobRef) -> None:
        """Keep a file, once it is here, until it is unpinned as often."""
        self._pins[ref] = self._pins.get(ref, 0) + 1
        if ref in self._idle:
            del self._idle[ref]
            self._idle_bytes -= ref.size_bytes

    def unpin(self, ref: BlobRef) -> None:
        """Let go of a file."""
        self._pins[ref] -= 1
        if self._pins[ref]:
            return
        del self._pins[ref]
        self._idle[ref] = None
        self._idle_bytes += ref.size_bytes
        if self._idle_bytes > IDLE_BYTES:
            self.make_room(IDLE_BYTES // 2)

    def make_room(self, keep_bytes: int = 0) -> None:
        """Remove files that nobody needs, the oldest first, until what is left of them has no more than so many bytes."""
        while self._idle and self._idle_bytes > keep_bytes:
            ref, _ = self._idle.popitem(last=False)
            self._idle_bytes -= ref.size_bytes
            with suppress(OSError):  # it is gone, or the end of the session removes it
                os.unlink(self.path(ref))

    def make_writer(self, ref: BlobRef) -> FileWriter:
        """Give a writer for a file that comes in. Raises OSError."""
        with Folder(self._directory, make=True, may_be_link=False) as folder:
            return FileWriter(folder, ref.digest.hex(), MODE, ref, mtime_ns=STORED_NS)

    def fetch(self, transfers: Transfers, refs: Iterable[BlobRef], on_done: Callable[[], object],
              on_failed: Callable[[str], object]) -> None:
        """Have what is not here sent by the other end of a link; then `on_done`, or `on_failed` with the reason, once."""
        missing = {ref for ref in refs if not self.has(ref)}
        reasons: list[str] = []

        def done(ref: BlobRef) -> None:
            missing.discard(ref)
            if not missing and not reasons:
                on_done()

        def failed(_ref: BlobRef, reason: str) -> None:
            reasons.append(reason)
            if len(reasons) == 1:
                on_failed(reason)

        if not missing:
            on_done()
        if missing:
            self.make_room_for(sum(ref.size_bytes for ref in missing))
        for ref in list(missing):
            transfers.pull_file(ref, lambda ref=ref: self.make_writer(ref), done, failed)  # type: ignore[misc]

    def make_room_for(self, size_bytes: int) -> None:
        """Remove files that nobody needs if the disk has no room for so many bytes more."""
        if not self._idle:
            return
        with suppress(OSError, AttributeError):  # whoever writes hears what is wrong
            status = os.statvfs(self.home)
            if status.f_bavail * status.f_frsize < size_bytes:
                self.make_room()

    def place(self, tree: Tree, folder: Folder) -> None:
        """Put files into a folder; what the tree refers to must be here. Raises OSError or ValueError."""
        place(tree, folder, Placing(self.path, LINK_BYTES))
