"""The agent: offers a machine's CPUs to whoever proves the secret.

    executors, hubs ── Uplink ──┐                        ┌── Pool of session 1: template ── workers
    (upstream, TLS)             ├── Dispatcher, Scheduler┤
    `distexec nodes` ── control ┘                        └── Pool of session 2 …

One pool per session, one slot per CPU, lent to the sessions by the scheduler. Rule: a session is its client's alone: it is
opened and taken up only with its token, its workers and blobs end with it, and nobody else is told its id.
"""

from __future__ import annotations

import logging
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from hmac import compare_digest
from types import UnionType
from typing import TYPE_CHECKING, Any

from . import __version__
from .blobcache import BlobCache, share_of_memory
from .control import answer
from .dispatcher import Dispatcher
from .filetransfers import FileTraffic
from .kin import News, Spent
from .ledger import Session
from .memorywatch import MemoryLimit
from .messages import (
    Ack,
    Answer,
    Bye,
    Cleaned,
    CleanUp,
    Define,
    Delivered,
    Evidence,
    Found,
    FromControl,
    FromUpstream,
    Heard,
    Load,
    Lost,
    Message,
    Open,
    Outcome,
    Place,
    Renew,
    Resume,
    Returned,
    Role,
    Run,
    SessionFailed,
    Undefine,
    Unshare,
)
from .opening import unanswered_s
from .scheduler import Scheduler
from .shipping import BlobStore
from .starters import OUR_TERMS, Terms
from .stats import read_load
from .tenancy import Tenancy
from .transfers import Transfers, fetch
from .transport import Link, Loop
from .upkeep import REFETCH_S

if TYPE_CHECKING:
    from .auth import Secret
    from .opening import Listener

LOAD_S = 2.0
"""How often upstream links are told the machine's load."""

ORPHAN_S = 20.0
"""How long a session outlives the connection to its client; with the kernel's notice of a dead one it ends within 30 s."""

UNANSWERED_S = 6.0
"""How long a client's kernel may leave unacknowledged what it was sent. Smaller: a short cut costs a connection. Larger:
slots of a machine that vanished are freed later."""

CLOSE_S = 3.0
"""How long the workers of a finished session get to leave by themselves."""

MAX_SESSIONS = 1024
"""Sessions on one connection: an executor has one, a hub one for each executor above it; each costs a directory."""

_log = logging.getLogger("distexec")


class Uplink:
    """One link to an executor or hub above. A port of the dispatcher."""

    def __init__(self, agent: Agent, link: Link) -> None:
        self.agent, self.link = agent, link
        self.transfers = Transfers(link, agent.store, agent.loop.call_later, agent.files)

    def __repr__(self) -> str:
        return f"<Uplink to {self.link.name}>"

    def queue(self, messages: Sequence[Message]) -> None:
        """Put messages in line."""
        for tenancy in self.agent.tenancies.values():
            if tenancy.held:
                self.agent.release_arguments(self, messages)
                break
        self.link.queue(messages)

    def flush(self) -> None:
        """Write what is in line."""
        self.link.flush()

    def on_messages(self, _link: Link, messages: list[Message]) -> None:
        """Hear what the client says: sessions and blobs are ours, the rest is the scheduler's, in order."""
        batch: list[Message] = []
        for message in messages:
            if type(message) is Run:
                batch.append(message)
            elif isinstance(message, Open):
                self._pass(batch)
                batch = []
                self.agent.open_session(self, message)
            elif isinstance(message, (Renew, CleanUp)):
                self._pass(batch)
                batch = []
                self.agent.state_said(self, message)
            elif isinstance(message, Define) and message.buffers:
                self.agent.expect_code(self, message)
                batch.append(message)
            elif isinstance(message, Bye):
                self._pass(batch)
                batch = []
                self.agent.end_uplink(self, message.reason)
            elif isinstance(message, Answer) and message.buffers:
                self.agent.fetch_answer(self, message)
            elif isinstance(message, (Place, Found, Delivered)):
                self.agent.files_said(self, message)
            elif isinstance(message, (Heard, Unshare)):
                self.agent.values_said(self, message)
            elif not self.transfers.handle(message):
                if isinstance(message, (Ack, Resume)):
                    self.agent.release_results(self, message)
                elif isinstance(message, Undefine):
                    self.agent.forget_code(self, message)
                batch.append(message)
        self._pass(batch)

    def _pass(self, batch: list[Message]) -> None:
        if batch:
            self.agent.dispatcher.receive(self, batch)

    def on_closed(self, _link: Link, reason: str) -> None:
        """Let the sessions of a client that is gone work on for a while."""
        self.transfers.close(reason)
        self.agent.uplink_lost(self, reason)


class Agent:
    """One machine's agent: a listener, its sessions and their workers.

    Args:
        secret: of the cluster.
        slots: tasks to run at once.
        name: what the node is called everywhere.
        spool: directory for the sessions' files; must exist and be writable.
        on_drained: called once a drain has ended.
        memory_limit: of each worker with what its task started; None: no limit.
        terms: on which processes are started.
    """

    def __init__(self, secret: Secret, slots: int, name: str, spool: str,
                 on_drained: Callable[[], object] | None = None, memory_limit: MemoryLimit | None = None,
                 terms: Terms = OUR_TERMS) -> None:
        from .handshake import Credentials
        self.name, self.slots, self.spool = name, slots, spool
        self.memory_limit, self.terms = memory_limit, terms
        self.loop = Loop("distexec-agent")
        self.store = BlobStore(arena_closed=self._on_arena_closed)
        self.cache = BlobCache(self.store, share_of_memory())
        self.store.make_room = self.cache.make_room
        self.files = FileTraffic(self.loop)
        self.scheduler = Scheduler(slots, name, orphan_s=ORPHAN_S, absent=self._is_absent)
        self.dispatcher = Dispatcher(self.loop, self.scheduler, on_session_end=self._on_session_end, on_kin=self._on_kin)
        self.tenancies: dict[bytes, Tenancy] = {}
        self.listeners: list[Listener] = []
        self.grace_s = CLOSE_S
        self._by_session: dict[Session, Tenancy] = {}
        self._uplinks: set[Uplink] = set()
        self._controls: set[Link] = set()
        self._ending: set[threading.Thread] = set()
        self._on_drained = on_drained
        self._drain_by: float | None = None
        self._is_started = self._is_closing = False
        self.on_last_client_gone: Callable[[], object] | None = None
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self._credentials = Credentials(secret, name, secrets.token_bytes(16), python, __version__,
                                        platform=f"{sys.platform}-{platform.machine()}", slots=slots)

    # ---- life

    def start(self, addresses: Sequence[tuple[str, int]]) -> None:
        """Listen on the addresses. Raises OSError, naming the address and the remedy, if one cannot be had."""
        from .tls import make_server_context
        context = make_server_context()
        for address in addresses:
            self.listeners.append(self.loop.listen(address, self._credentials, context, self._accept))
        self.loop.start()
        self._is_started = True
        self.dispatcher.start()
        self.loop.call_later(LOAD_S, self._tell_load)

    def drain(self, deadline_s: float) -> None:
        """Take nothing more, give back what has not started, wait for what runs, at most `deadline_s`. Any thread."""
        self.loop.call_soon(self._begin_drain, deadline_s)

    def _begin_drain(self, deadline_s: float) -> None:
        if self._drain_by is not None:
            return
        self._drain_by = time.monotonic() + deadline_s
        for listener in self.listeners:
            listener.close()
        self.dispatcher.call(self.scheduler.start_drain)
        self._look_drained()

    def _look_drained(self) -> None:
        with self.dispatcher.lock:
            left = sum(len(session.tasks) + (len(session.unacked) if session.upstream is not None else 0)
                       for session in self.scheduler.sessions)
        assert self._drain_by is not None
        if left and time.monotonic() < self._drain_by:
            self.loop.call_later(0.05, self._look_drained)
        elif self._on_drained is not None:
            self._on_drained()

    def close(self, reason: str = "the agent was stopped") -> None:
        """Say goodbye, end all workers, close everything. Not on the I/O thread."""
        self._is_closing = True
        if self._is_started:
            passed = threading.Event()
            self.loop.call_soon(passed.set)
            passed.wait()  # from here on no session begins, and the end of each is in `_ending`
        for uplink in list(self._uplinks):
            uplink.link.send([Bye(reason)])
        with self.dispatcher.lock:
            is_idle = not any(session.tasks for session in self.scheduler.sessions)
        if not is_idle:
            self.grace_s = 0.0  # whoever asked has waited for what runs, or does not want to
        for session in list(self.scheduler.sessions):
            self.dispatcher.call(self.scheduler.close_session, session)
        self.dispatcher.close()
        while self._ending:
            for thread in list(self._ending):
                thread.join()
        self.loop.stop()
        self.files.close()
        self.store.close()

    # ---- links

    def _accept(self, link: Link) -> tuple[UnionType, Any, Any] | None:
        if link.role is Role.CONTROL:
            self._controls.add(link)
            self.loop.call_soon(link.send, [self._load()])
            return FromControl, partial(answer, self), lambda link, _reason: self._controls.discard(link)
        if link.role is not Role.UPSTREAM or self._drain_by is not None:
            return None
        older_ones = [each for each in self._uplinks if _is_same(each.link, link)]
        uplink = Uplink(self, link)
        self._uplinks.add(uplink)
        for older in older_ones:
            # What is still unread on the older link must not be heard after what the new one says.
            older.link.on_messages = _ignore
            self.uplink_lost(older, "replaced by a newer connection of the same client")
            older.link.close("replaced by a newer connection")
        _log.info("%s connected from %s", link.hello.name if link.hello else "a client", link.name)
        return FromUpstream, uplink.on_messages, uplink.on_closed

    def uplink_lost(self, uplink: Uplink, reason: str, ago_s: float = 0.0) -> None:
        """Keep the sessions of a link lost `ago_s` seconds ago for a while."""
        if uplink not in self._uplinks:
            return
        self._uplinks.discard(uplink)
        _log.info("connection to %s ended: %s", uplink.link.name, reason)
        self.dispatcher.call(lambda now: self.scheduler.upstream_lost(uplink, now - ago_s))
        for tenancy in self.tenancies.values():
            if tenancy.uplink is uplink:
                tenancy.published.client_left()
        self._look_for_clients()

    def _look_for_clients(self) -> None:
        """Tell who wants to know when no client is left, nor any session that one may come back to."""
        if not self._uplinks and not self.tenancies and self.on_last_client_gone is not None:
            self.on_last_client_gone()

    def end_uplink(self, uplink: Uplink, reason: str) -> None:
        """A client leaves on purpose: its sessions end now."""
        _log.info("%s leaves: %s", uplink.link.name, reason)
        for session in [each for each in self.scheduler.sessions if each.upstream is uplink]:
            self.dispatcher.call(self.scheduler.close_session, session)

    def _tell_load(self) -> None:
        """Tell every client how this machine does; one whose kernel does not even acknowledge is out of reach."""
        self.loop.call_later(LOAD_S, self._tell_load)
        load = self._load()
        self.cache.relieve(load.memory_free_bytes, load.memory_total_bytes)
        for uplink in list(self._uplinks):
            silent_s = unanswered_s(uplink.link.sock)
            if silent_s > UNANSWERED_S:
                self.uplink_lost(uplink, f"its machine has acknowledged nothing for {silent_s:.0f} s", silent_s)
                uplink.link.finish("out of reach")
            elif not uplink.link.pending_bytes:  # who does not read needs no second one
                uplink.link.send([load])

    def _load(self) -> Load:
        with self.dispatcher.lock:
            sessions = self.scheduler.sessions
            return read_load(self.scheduler.slots, sum(session.active for session in sessions), len(sessions))

    # ---- sessions

    def open_session(self, uplink: Uplink, opened: Open) -> None:
        """Begin a session, or take it up again for the one who has its token."""
        if self._is_closing:
            return  # the client hears Bye next
        tenancy = self.tenancies.get(opened.id)
        if tenancy is not None and not compare_digest(tenancy.opened.token, opened.token):
            _log.warning("%s named a session without its token; the connection is closed", uplink.link.name)
            uplink.link.close("wrong session token")
            return
        if tenancy is None:
            is_sane = opened.session >= 1 and 0.0 < opened.weight < 1e6 and opened.ceiling >= 0 and opened.linger_s >= 0.0
            if not is_sane:  # all sessions would suffer
                uplink.link.close("a session that cannot be: its number, weight, ceiling or linger")
                return
            if sum(each.uplink is uplink for each in self.tenancies.values()) >= MAX_SESSIONS:
                uplink.link.close(f"more than {MAX_SESSIONS} sessions on one connection")
                return
            try:
                tenancy = self.tenancies[opened.id] = Tenancy(self, opened, uplink)
            except OSError as error:
                reason = f"its directory for a session cannot be made: {error}; see to {self.spool} (--spool)"
                _log.error("session of %s: %s", opened.spec.name, reason)
                uplink.link.send([SessionFailed(opened.session, Evidence(self.name, reason=reason), b"",
                                                       opened.spec.generation)])
                return
            _log.info("session of %s begins", opened.spec.name)
        is_other, tenancy.uplink = not _is_same(tenancy.uplink.link, uplink.link), uplink
        tenancy.pull_again()
        # What workers know of modules, setup and environment is as the client's last life had it, or before it was renewed.
        is_new = tenancy.session is not None and (is_other or opened.spec != tenancy.opened.spec)
        if is_other and is_new:
            tenancy.modules.forsake()
        self.dispatcher.call(self._open, tenancy, opened, uplink, tenancy.renew(opened.spec) if is_new else None)

    def _open(self, tenancy: Tenancy, opened: Open, uplink: Uplink, generation: int | None, now: float) -> None:
        if generation is not None and tenancy.session is not None:
            self.scheduler.renew_workers(tenancy.session, opened.spec, generation, now)
        session = self.scheduler.open_session(opened, uplink, now)
        tenancy.session = session
        self._by_session[session] = tenancy
        self.dispatcher.staff[session] = tenancy

    def _on_session_end(self, session: Session, had_tasks: bool) -> None:
        tenancy = self._by_session.pop(session, None)
        self.dispatcher.staff.pop(session, None)
        if tenancy is None:
            return
        self.tenancies.pop(tenancy.opened.id, None)
        self._look_for_clients()
        _log.info("session of %s ends", tenancy.opened.spec.name)
        grace_s = 0.0 if had_tasks else self.grace_s  # nobody waits for what still runs, and its slots are others' now
        thread = threading.Thread(target=self._end, args=(tenancy, grace_s), name="distexec-session-end")
        self._ending.add(thread)
        thread.start()

    def _end(self, tenancy: Tenancy, grace_s: float) -> None:
        try:
            tenancy.end(grace_s)
        finally:
            self._ending.discard(threading.current_thread())

    # ---- blobs

    def _is_absent(self, run: Run) -> bool:
        tenancy = next((each for each in self.tenancies.values()
                        if each.session is not None and each.session.no == run.session
                        and each.session.tasks.get(run.seq) is not None
                        and each.session.tasks[run.seq].run is run), None)
        return tenancy is not None and tenancy.is_waiting(run)

    def _on_kin(self, news: list[News]) -> None:
        for each in news:
            if isinstance(each, Spent):
                self.store.release_all(each.buffers)

    def fetch_answer(self, uplink: Uplink, answer: Answer) -> None:
        """Fetch the blobs of a nested call's result, and only then hear of it: a lost link's are said again."""
        fetch(uplink.transfers, self.store, answer.buffers, lambda: self.dispatcher.receive(uplink, [answer]),
              lambda reason: self._refetch(uplink, answer, reason))

    def _refetch(self, uplink: Uplink, answer: Answer, reason: str) -> None:
        if uplink.link.is_open and uplink in self._uplinks:
            _log.warning("%s: the result of a nested call could not be fetched: %s", uplink.link.name, reason)
            self.loop.call_later(REFETCH_S, self.fetch_answer, uplink, answer)

    def expect_code(self, uplink: Uplink, definition: Define) -> None:
        """Fetch the blobs of a large function."""
        for tenancy in self.tenancies.values():
            if tenancy.uplink is uplink and tenancy.opened.session == definition.session:
                tenancy.expect(definition)

    def forget_code(self, uplink: Uplink, message: Undefine) -> None:
        """Let go the blobs of functions that are not named any more."""
        tenancy = self._tenancy(uplink, message.session)
        if tenancy is not None:
            for fn in message.fns:
                tenancy.release(-fn)

    def release_arguments(self, uplink: Uplink, messages: Sequence[Message]) -> None:
        """Let go the blobs of tasks lost, given back, or ended without a worker. With the dispatcher's lock held."""
        for message in messages:
            if isinstance(message, (Outcome, Lost, Returned)):
                tenancy = self._tenancy(uplink, message.session)
                if tenancy is not None and tenancy.held:
                    for seq, _ in message.tasks if isinstance(message, Returned) else [(message.seq, 0)]:
                        tenancy.release(seq)

    def state_said(self, uplink: Uplink, message: Renew | CleanUp) -> None:
        """Hear what a client says of how its workers are prepared."""
        tenancy = self._tenancy(uplink, message.session)
        if tenancy is None or tenancy.session is None:
            if isinstance(message, CleanUp):  # it could not begin here, or has ended
                uplink.link.send([Cleaned(message.session, message.generation)])
        elif isinstance(message, CleanUp):
            tenancy.clean_up()
        elif message.spec != tenancy.opened.spec:
            self.dispatcher.call(self.scheduler.renew_workers, tenancy.session, message.spec, tenancy.renew(message.spec))

    def values_said(self, uplink: Uplink, message: Heard | Unshare) -> None:
        """Hear what a client says of partial results and of shared values."""
        tenancy = self._tenancy(uplink, message.session)
        if tenancy is None:
            return
        if isinstance(message, Heard):
            tenancy.published.heard(message)
        else:
            tenancy.pool.unshare(message)
            self.cache.drop(tenancy, message.blobs)

    def files_said(self, uplink: Uplink, message: Place | Found | Delivered) -> None:
        """Hear what a client says of files and modules."""
        tenancy = self._tenancy(uplink, message.session)
        if tenancy is None:
            return
        if isinstance(message, Place):
            tenancy.files.place(message)
        elif isinstance(message, Found):
            tenancy.modules.found(message)
        else:
            tenancy.files.delivered(message)

    def release_results(self, uplink: Uplink, message: Ack | Resume) -> None:
        """Let go the blobs of results that the root has."""
        tenancy = self._tenancy(uplink, message.session)
        if tenancy is not None and isinstance(message, Resume):
            self.loop.call_soon(tenancy.say_again)
        if tenancy is not None and tenancy.output.is_busy:
            tenancy.output_heard(message)
        if tenancy is not None and not tenancy.published.is_empty:
            tenancy.partials_heard(message)
        if tenancy is None or not tenancy.results:
            return
        if isinstance(message, Ack) and message.attempts:
            for seq, attempt in zip(message.seqs, message.attempts, strict=True):
                tenancy.release_result(seq, attempt)
        else:
            for seq in message.seqs if isinstance(message, Ack) else message.ack:
                tenancy.release_result(seq)

    def _tenancy(self, uplink: Uplink, number: int) -> Tenancy | None:
        return next((each for each in self.tenancies.values()
                     if each.uplink is uplink and each.session is not None and each.session.uplink_no == number), None)

    def _on_arena_closed(self, number: int) -> None:
        for tenancy in list(self.tenancies.values()):
            tenancy.pool.forget_arena(number)


def _is_same(older: Link, newer: Link) -> bool:
    return older.hello is not None and newer.hello is not None and older.hello.incarnation == newer.hello.incarnation


def _ignore(_link: Link, _messages: list[Message]) -> None:
    """What a link says that was replaced is not heard any more."""
