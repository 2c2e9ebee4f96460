"""The files of one session on an agent: what its client placed here, what its tasks were given, what they send.

    Place ─────────────────► fetched ─► work/        no worker is started until what is vital is there
    Run with files ────────► fetched ─► files/       the task waits; the worker puts them into the task's directory
    Delivery, from a task ─► said upward until it is answered; the client fetches the file straight from the task's

Rule: what a cut link interrupts is begun again on the next; what cannot be had here is the misfortune of the one task, or
call, that wanted it. Everything runs on the I/O thread, and what may wait for a disk on the disk thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from msgspec import structs

from .depot import Depot, refs_of
from .dispatcher import Dispatcher
from .filetransfers import FileTraffic
from .ledger import Session
from .messages import BlobRef, Delivered, Delivery, Evidence, Message, Place, Placed, Run
from .scheduler import Scheduler
from .starters import Terms
from .taskfiles import pack_reply, remove_left, tasks_directory
from .transfers import Transfers
from .transport import Link
from .trees import Folder

__all__ = ["NodeFiles"]

_log = logging.getLogger("distexec")


class Way(Protocol):
    """The link above on which the session is."""

    link: Link
    transfers: Transfers


class Landlord(Protocol):
    """What this needs of the agent."""

    name: str
    files: FileTraffic
    scheduler: Scheduler
    dispatcher: Dispatcher
    terms: Terms


class Lodger(Protocol):
    """What this needs of the session's tenancy."""

    session: Session | None
    uplink: Any
    directory: str

    def work_in(self, directory: str) -> object:
        """Have workers work in this directory from now on."""

    def files_arrived(self) -> object:
        """Learn that a task has all its files here."""

    def may_start(self) -> object:
        """Learn that nothing vital is missing any more."""


class _Outgoing(NamedTuple):
    """A file that a task sends: what is said of it, whence it is read, where the task waits for the answer."""

    delivery: Delivery
    fd: int
    reply_fd: int
    opener: Callable[[], int]
    worker: Any


class NodeFiles:
    """All that is said above."""

    def __init__(self, agent: Landlord, tenancy: Lodger) -> None:
        self._agent, self._tenancy = agent, tenancy
        self.depot = Depot(tenancy.directory)
        self.work = os.path.join(tenancy.directory, "work")
        self._missing: dict[int, list[BlobRef]] = {}  # by task, while some of its files are on their way
        self._pinned: dict[int, list[BlobRef]] = {}  # by task
        self._placing: dict[int, Place] = {}
        self._placed: dict[int, Place] = {}
        self._outgoing: dict[tuple[int, int, int], _Outgoing] = {}
        self._is_closed = False

    # ---- files of tasks

    def expect(self, run: Run) -> None:
        """Begin to fetch a task's files. With the dispatcher's lock held."""
        assert run.options is not None, "that is where they are named"
        refs = refs_of(run.options.files)
        self._pinned[run.seq] = refs
        for ref in refs:
            self.depot.pin(ref)
        if not all(map(self.depot.has, refs)):
            self._missing[run.seq] = refs
            self._agent.dispatcher.loop.call_soon(self._fetch, run.seq)

    def is_missing(self, seq: int) -> bool:
        """Whether some of a task's files are on their way."""
        return seq in self._missing

    def release(self, seq: int) -> None:
        """Learn that a task has ended."""
        self._missing.pop(seq, None)
        for ref in self._pinned.pop(seq, ()):
            self.depot.unpin(ref)

    def _fetch(self, seq: int) -> None:
        refs = self._missing.get(seq)
        if refs is not None:
            self.fetch(refs, partial(self._fetched, seq), partial(self._failed, seq))

    def _fetched(self, seq: int) -> None:
        if self._missing.pop(seq, None) is not None:
            self._tenancy.files_arrived()

    def _failed(self, seq: int, reason: str) -> None:
        session = self._tenancy.session
        if seq not in self._missing or session is None:
            return
        reason = f"its files could not be brought to node {self._agent.name!r}: {reason}"
        evidence = Evidence(self._agent.name, reason=reason)
        self._agent.dispatcher.call(self._agent.scheduler.cannot_arrive, session, seq, evidence)

    def fetch(self, refs: Iterable[BlobRef], on_done: Callable[[], object], on_failed: Callable[[str], object]) -> None:
        """Have files sent from above into the depot; what a cut link interrupts is said by neither, but begun again."""
        way: Way = self._tenancy.uplink

        def failed(reason: str) -> None:
            if way.link.is_open and not self._is_closed:
                on_failed(reason)

        self.depot.fetch(way.transfers, refs, on_done, failed)

    # ---- files for all

    @property
    def lacks_vital(self) -> bool:
        """Whether no worker may be started yet."""
        return any(place.is_vital for place in self._placing.values())

    def place(self, message: Place) -> None:
        """Put files into the session's working directory."""
        if self._placed.get(message.number) == message:
            self._say(Placed(0, message.number))
            return
        if not self._placed and not self._placing:
            self._tenancy.work_in(self.work)
        self._placing[message.number] = message
        for ref in refs_of(message.tree):
            self.depot.pin(ref)
        self.fetch(refs_of(message.tree), partial(self._put, message), partial(self._end_place, message))

    def _put(self, message: Place) -> None:
        if self._placing.get(message.number) is message:
            self._agent.files.disk.run(partial(self._write, message), partial(self._on_written, message))

    def _write(self, message: Place) -> None:
        user = self._agent.terms.user
        owner = (user.uid, user.gid) if user is not None else None
        with Folder(self.work, make=True, may_be_link=False, owner=owner) as folder:
            self.depot.place(message.tree, folder)

    def _on_written(self, message: Place, problem: Any) -> None:
        self._end_place(message, str(problem) if isinstance(problem, Exception) else "")

    def _end_place(self, message: Place, error: str) -> None:
        if self._placing.get(message.number) is not message:
            return  # it was said again on another link
        del self._placing[message.number]
        session = self._tenancy.session
        self._say(Placed(0, message.number, error))
        if not error:
            self._placed[message.number] = message
            if not self.lacks_vital:
                self._tenancy.may_start()
            return
        _log.warning("files could not be placed: %s", error)
        if message.is_vital and session is not None:
            reason = f"its files (depends=) could not be brought to node {self._agent.name!r}: {error}"
            self._agent.dispatcher.call(self._agent.scheduler.start_failed, session,
                                        Evidence(self._agent.name, reason=reason), b"")

    # ---- files that tasks send

    def deliver(self, worker: Any, delivery: Delivery, fd: int, reply_fd: int) -> None:
        """Offer a task's file to the client. The descriptors are ours from now on."""
        def opener() -> int:
            return os.dup(fd)

        key = (delivery.seq, delivery.attempt, delivery.number)
        self._agent.files.register(delivery.blob, opener)
        self._outgoing[key] = _Outgoing(delivery, fd, reply_fd, opener, worker)
        self._say(delivery)

    def delivered(self, message: Delivered) -> None:
        """Hear the client's answer."""
        self._answer((message.seq, message.attempt, message.number), message)

    def worker_gone(self, worker: Any) -> None:
        """Drop what a worker was sending that is gone, and its task's directory."""
        if os.path.isdir(tasks_directory(self.depot.home)):
            self._agent.files.disk.run(partial(remove_left, self.depot.home, worker.pid))
        for key in [key for key, outgoing in self._outgoing.items() if outgoing.worker is worker]:
            self._answer(key, None)

    def _answer(self, key: tuple[int, int, int], answer: Delivered | None) -> None:
        outgoing = self._outgoing.pop(key, None)
        if outgoing is None:
            return
        self._agent.files.forget(outgoing.delivery.blob, outgoing.opener)
        if answer is not None:
            with suppress(OSError):  # the task has gone
                os.write(outgoing.reply_fd, pack_reply(answer))
        os.close(outgoing.reply_fd)
        self._agent.files.disk.run(partial(os.close, outgoing.fd))  # behind what is still being opened or read

    # ---- links

    def begin_again(self) -> None:
        """Go on, on a new link, with what the end of the last interrupted."""
        for seq in list(self._missing):
            self._fetch(seq)

    def say_again(self) -> None:
        """Say on a new link, once the two ends agree what is held, what the client may not have heard."""
        for outgoing in self._outgoing.values():
            self._say(outgoing.delivery)

    def _say(self, message: Message) -> None:
        session, link = self._tenancy.session, self._tenancy.uplink.link
        if session is not None and session.upstream is not None and link.is_open:
            link.send([structs.replace(message, session=session.uplink_no)])

    def close(self) -> None:
        """Let go of everything. I/O thread."""
        self._is_closed = True
        for key in list(self._outgoing):
            self._answer(key, None)
        self._placing.clear()
        self._missing.clear()
