"""Brings the client's own modules to the processes of one session on an agent, when they import them.

    Ask, from a worker ─► known? ─► Told                                    each generation of workers has a directory of
                          else Find ─► Found ─► fetched ─► code-N/ ─► Told  its own, so that no two are mixed

The rule: a module is asked for once, however many processes want it, and whoever asked waits until the client has answered
or its process is ended. Everything runs on the I/O thread, and what may wait for a disk on the disk thread.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import sys
from functools import partial
from typing import Any, Protocol, cast

from .confinement import own_directory
from .depot import refs_of
from .imports import Ask, Told
from .ledger import Session
from .messages import Evidence, Find, Found, Tree
from .nodefiles import NodeFiles
from .scheduler import Scheduler
from .starters import Terms
from .transport import Link, Loop
from .trees import Folder

__all__ = ["NodeModules"]

KNOWN = 10_000
"""Answers that are remembered. Smaller: a program that tries many names asks for them again. Larger: memory."""

WAITING = 1000
"""Connections that wait to be accepted. Smaller: many processes that import at once are refused."""

RETRY_S = 0.1
"""After running out of descriptors, until the next try."""

_log = logging.getLogger("distexec")


class Landlord(Protocol):
    """What this needs of the agent."""

    name: str
    loop: Loop
    files: Any
    scheduler: Scheduler
    dispatcher: Any
    terms: Terms


class Lodger(Protocol):
    """What this needs of the session's tenancy."""

    session: Session | None
    uplink: Any
    directory: str
    files: NodeFiles

    def may_start(self) -> object:
        """Learn that nothing vital is missing any more."""

    def end_worker_of(self, pid: int, reason: str) -> bool:
        """End the worker that a process belongs to; False if there is none."""


class _Code:
    """One generation's directory."""

    def __init__(self, directory: str, generation: int) -> None:
        self.directory, self.generation = directory, generation
        self.told: dict[str, Told] = {}
        self.is_forsaken = False


class _Wanted:
    """A module that is on its way, and who waits for it."""

    def __init__(self, code: _Code, name: str) -> None:
        self.code, self.name = code, name
        self.askers: list[Link] = []
        self.parts: list[Tree] = []
        self.is_coming = False  # all was said of it, and its files are fetched or written


class NodeModules:
    """All that is said above."""

    def __init__(self, agent: Landlord, tenancy: Lodger) -> None:
        self._agent, self._tenancy = agent, tenancy
        self._codes: dict[str, _Code] = {}
        self._wanted: dict[int, _Wanted] = {}  # by the number of the question
        self._vital: dict[str, _Wanted] = {}  # what comes unasked, by name
        self._numbers = 0
        self._links: dict[Link, int] = {}  # whose process is at the other end
        self.address, self._sock = _listen(tenancy.directory)
        self._users = {os.geteuid(), *([agent.terms.user.uid] if agent.terms.user is not None else ())}
        agent.loop.watch(self._sock, self._accept)

    # ---- generations

    def begin(self, generation: int) -> str:
        """Give the directory for the workers of a new preparation."""
        directory = os.path.join(self._tenancy.directory, f"code-{len(self._codes)}")
        os.mkdir(directory, 0o755)
        if self._agent.terms.user is not None:
            own_directory(self._agent.terms.user, directory)
        self._codes[directory] = _Code(directory, generation)
        return directory

    def forsake(self) -> None:
        """Bring nothing more to what there is so far: another life of the program has taken up the session.

        Its modules may be others. Whoever asks is ended instead, so that its task runs again from the beginning.
        """
        for code in self._codes.values():
            code.is_forsaken = True
        for number, wanted in list(self._wanted.items()):
            del self._wanted[number]
            for link in wanted.askers:
                self._end_asker(link, wanted.name)

    def _end_asker(self, link: Link, name: str) -> None:
        reason = (f"it began for an earlier life of the program, and imports {name!r} only now, when that may be another "
                  "module than it was")
        if link in self._links and not self._tenancy.end_worker_of(self._links[link], reason):
            link.send([cast("Any", Told(True, reason))])

    # ---- questions

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("processes that import modules have to wait: %s; raise the limit of open files (ulimit -n)", error)
            self._agent.loop.unwatch(self._sock)
            self._agent.loop.call_later(RETRY_S, self._watch_again)
            return
        pid, uid = _peer(sock)
        if uid not in self._users:
            sock.close()
            return
        self._links[self._agent.loop.adopt(sock, Ask, self._on_messages, self._on_closed)] = pid

    def _watch_again(self) -> None:
        if self._sock.fileno() >= 0:
            self._agent.loop.watch(self._sock, self._accept)

    def _on_closed(self, link: Link, _reason: str) -> None:
        self._links.pop(link, None)

    def _on_messages(self, link: Link, messages: list[Any]) -> None:
        for message in messages:
            self._asked(link, message)

    def _asked(self, link: Link, ask: Ask) -> None:
        code = self._codes.get(ask.directory)
        told = code.told.get(ask.name) if code is not None else Told(True, "its session is not here")
        if told is not None:
            link.send([cast("Any", told)])
            return
        assert code is not None, "else there was an answer"
        if code.is_forsaken:
            self._end_asker(link, ask.name)
            return
        for wanted in (*self._wanted.values(), *self._vital.values()):
            if wanted.code is code and wanted.name == ask.name:
                wanted.askers.append(link)
                return
        self._numbers += 1
        wanted = self._wanted[self._numbers] = _Wanted(code, ask.name)
        wanted.askers.append(link)
        self._find(self._numbers)

    def _find(self, number: int) -> None:
        session, link, wanted = self._tenancy.session, self._tenancy.uplink.link, self._wanted[number]
        if session is not None and session.upstream is not None and link.is_open:
            link.send([Find(session.uplink_no, number, wanted.name, wanted.code.generation, sys.executable)])

    def say_again(self) -> None:
        """Ask again on a new link what was not answered on the last."""
        for number, wanted in self._wanted.items():
            wanted.parts, wanted.is_coming = [], False
            self._find(number)

    # ---- answers

    @property
    def lacks_vital(self) -> bool:
        """Whether no worker may be started yet."""
        return bool(self._vital)

    def found(self, message: Found) -> None:
        """Hear a part of what the client has to say of a module."""
        wanted = self._wanted.get(message.number) if message.number else self._unasked(message)
        if wanted is None or wanted.is_coming:
            return
        wanted.parts.append(message.tree)
        if not message.is_last:
            return
        if not message.is_own or message.problem:
            self._end(message.number, wanted, Told(message.is_own, message.problem))
            return
        wanted.is_coming = True
        tree = tuple(file for part in wanted.parts for file in part)
        refs = refs_of(tree)
        files = self._tenancy.files
        for ref in refs:
            files.depot.pin(ref)

        def unpin() -> None:
            for ref in refs:
                files.depot.unpin(ref)

        def write() -> None:
            if self._is_wanted(message.number, wanted):
                self._agent.files.disk.run(partial(self._write, wanted, tree), written)
            else:
                unpin()

        def written(problem: Any) -> None:
            unpin()
            told = Told(True, f"its files could not be written: {problem}" if isinstance(problem, Exception) else "")
            self._end(message.number, wanted, told)

        def failed(reason: str) -> None:
            unpin()
            self._end(message.number, wanted, Told(True, reason))

        files.fetch(refs, write, failed)

    def _unasked(self, message: Found) -> _Wanted | None:
        """Give the place for what comes unasked, unless it is there already. A new link begins it again."""
        code = next(reversed(self._codes.values()))
        if message.name in code.told:
            return None
        if not message.is_last and not message.tree:
            older = self._vital.get(message.name)
            self._vital[message.name] = _Wanted(code, message.name)
            if older is not None:
                self._vital[message.name].askers = older.askers
        return self._vital.get(message.name)

    def _write(self, wanted: _Wanted, tree: Tree) -> None:
        user = self._agent.terms.user
        with Folder(wanted.code.directory, owner=(user.uid, user.gid) if user is not None else None) as folder:
            self._tenancy.files.depot.place(tree, folder)

    def _is_wanted(self, number: int, wanted: _Wanted) -> bool:
        return (self._wanted.get(number) if number else self._vital.get(wanted.name)) is wanted

    def _end(self, number: int, wanted: _Wanted, told: Told) -> None:
        if not self._is_wanted(number, wanted):
            return
        if number:
            del self._wanted[number]
        else:
            del self._vital[wanted.name]
        if not told.is_own or not told.problem:  # trouble may be over when it is asked for again
            if len(wanted.code.told) >= KNOWN:
                wanted.code.told.clear()
            wanted.code.told[wanted.name] = told
        self._tell(wanted, told)
        if not number:
            self._vital_ended(wanted.name, told)

    def _vital_ended(self, name: str, told: Told) -> None:
        session = self._tenancy.session
        if told.is_own and not told.problem:
            self._tenancy.may_start()
        elif session is not None:
            reason = (f"module {name!r} (depends=) could not be brought to node {self._agent.name!r}: "
                      f"{told.problem or 'it has no files'}")
            self._agent.dispatcher.call(self._agent.scheduler.start_failed, session,
                                        Evidence(self._agent.name, reason=reason), b"")

    def _tell(self, wanted: _Wanted, told: Told) -> None:
        for link in wanted.askers:
            if link in self._links:
                link.send([cast("Any", told)])

    def close(self) -> None:
        """Answer nothing any more. I/O thread."""
        self._agent.loop.unwatch(self._sock)
        self._sock.close()
        self._wanted.clear()
        self._vital.clear()
        for link in list(self._links):
            link.close("the session is over")


def _listen(directory: str) -> tuple[str, socket.socket]:
    """Make a socket to be asked on. On Linux it is no file, so its name may be of any length, and nothing is left of it."""
    if sys.platform == "linux":
        address = f"\0distexec-{secrets.token_hex(16)}"
    else:
        address = os.path.join(directory, "imports")
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(address)
        sock.listen(WAITING)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return address, sock


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Say which process is at the other end of a Unix socket, 0 if that is unknown, and whose it is."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return pid, uid
    return 0, os.geteuid()  # the socket is a file in a directory that is nobody else's


