"""What tasks send to their client: into one directory, never outside it, each file at once when it is whole.

    Delivery from a node ────► fetched by digest ──┐
    a local worker's open file ──► copied ─────────┴─► downloads/name ──► Delivered, or its text: what went wrong

Rule: a file takes its place only if it is what its digest says. What was answered is remembered, for a node whose link was
cut before it heard asks again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from .filetransfers import FileTraffic
from .messages import Delivered, Delivery
from .taskfiles import pack_reply
from .transfers import Transfers
from .transport import Link
from .trees import PIECE_BYTES, FileWriter, Folder

__all__ = ["Downloads"]

ANSWERS = 4096
"""Remembered. Smaller: after a cut link a file may be written a second time. Larger: memory."""

PIECES = 8
"""Copied before others get their turn on the disk thread."""


class Sender(Protocol):
    """A node whose task sends a file."""

    link: Link | None


class _Local:
    """A local worker's file on its way."""

    def __init__(self, delivery: Delivery, fd: int, reply_fd: int, worker: Any) -> None:
        self.delivery, self.fd, self.reply_fd, self.worker = delivery, fd, reply_fd, worker
        self.writer: FileWriter | None = None  # disk thread
        self.is_dropped = False


class Downloads:
    """The directory for them, and those under way. Everything runs on the I/O thread.

    Args:
        directory: absolute; made when the first file comes, if it does not exist.
        is_wanted: says whether a node's attempt still counts.
    """

    def __init__(self, directory: str, files: FileTraffic, is_wanted: Callable[[Any, Delivery], bool]) -> None:
        self.directory = directory
        self._files, self._is_wanted = files, is_wanted
        self._answers: OrderedDict[tuple[int, int, int], Delivered] = OrderedDict()
        self._coming: set[tuple[int, int, int]] = set()
        self._local: set[_Local] = set()

    def __repr__(self) -> str:
        return f"<Downloads to {self.directory!r}: {len(self._coming) + len(self._local)} under way>"

    # ---- from nodes

    def take(self, node: Sender, delivery: Delivery, transfers: Transfers) -> None:
        """Fetch a file that a node's task sends."""
        key = (delivery.seq, delivery.attempt, delivery.number)
        answer = self._answers.get(key)
        if answer is None and not self._is_wanted(node, delivery):
            answer = _answer(delivery, "", "the task is not expected to run there any more")
        if answer is not None:
            _tell(node, answer)
            return
        if key in self._coming:
            return
        self._coming.add(key)
        link = node.link
        transfers.pull_file(delivery.blob, partial(self._make_writer, delivery),
                            lambda _ref: self._end(node, link, delivery, ""),
                            lambda _ref, reason: self._end(node, link, delivery, reason))

    def _make_writer(self, delivery: Delivery) -> FileWriter:
        with Folder(self.directory, make=True) as folder:
            return FileWriter(folder, delivery.name, delivery.mode, delivery.blob)

    def _end(self, node: Sender, link: Link | None, delivery: Delivery, error: str) -> None:
        key = (delivery.seq, delivery.attempt, delivery.number)
        self._coming.discard(key)
        if error and node.link is not link:
            return  # the link was cut: the node says it again on the next
        answer = _answer(delivery, self._path(delivery), error)
        self._answers[key] = answer
        if len(self._answers) > ANSWERS:
            self._answers.popitem(last=False)
        _tell(node, answer)

    def _path(self, delivery: Delivery) -> str:
        return os.path.join(self.directory, *delivery.name.split("/"))

    # ---- from local workers

    def take_local(self, worker: Any, delivery: Delivery, fd: int, reply_fd: int) -> None:
        """Copy a file that a local worker's task sends. The descriptors are ours from now on."""
        copy = _Local(delivery, fd, reply_fd, worker)
        self._local.add(copy)
        self._go_on(copy)

    def _go_on(self, copy: _Local) -> None:
        self._files.disk.run(partial(self._copy_some, copy), partial(self._copied, copy))

    def _copy_some(self, copy: _Local) -> bool:
        """Copy a few pieces; say whether that was all."""
        if copy.is_dropped:
            return True
        writer = copy.writer = copy.writer or self._make_writer(copy.delivery)
        for _ in range(PIECES):
            piece = os.pread(copy.fd, PIECE_BYTES, writer.written_bytes)
            if not piece or writer.is_complete:
                writer.finish()
                return True
            writer.write(writer.written_bytes, piece)
        return False

    def _copied(self, copy: _Local, is_whole: Any) -> None:
        if is_whole is False:
            self._go_on(copy)
        else:
            error = (str(is_whole) or type(is_whole).__name__) if isinstance(is_whole, Exception) else ""
            number = is_whole.errno or 0 if isinstance(is_whole, OSError) else 0
            self._end_local(copy, _answer(copy.delivery, self._path(copy.delivery), error, number))

    def worker_gone(self, worker: Any) -> None:
        """Drop what a local worker was sending that is gone."""
        for copy in self._local:
            if copy.worker is worker:
                copy.is_dropped = True

    def _end_local(self, copy: _Local, answer: Delivered) -> None:
        self._local.discard(copy)
        with suppress(OSError):  # the task has gone
            os.write(copy.reply_fd, pack_reply(answer))
        os.close(copy.reply_fd)
        os.close(copy.fd)
        if copy.writer is not None:
            self._files.disk.run(copy.writer.abandon)


def _answer(delivery: Delivery, path: str, error: str, number: int = 0) -> Delivered:
    return Delivered(delivery.session, delivery.seq, delivery.attempt, delivery.number, "" if error else path, error, number)


def _tell(node: Sender, answer: Delivered) -> None:
    if node.link is not None:
        node.link.send([answer])
