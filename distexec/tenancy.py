"""One session's tenancy on an agent: its workers, its directory, the blobs its tasks wait for, hold and result in.

    Run with BlobRefs ── missing: pulled from above ──► held, until the task has ended
    Outcome with BlobRefs ── results: kept, until the root has acknowledged it

Rule: what a session has here ends with it, and a reference is let go exactly once.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from functools import partial
from typing import Any, Protocol

from .dispatcher import Dispatcher
from .ledger import Session
from .memorywatch import MemoryLimit
from .messages import BlobRef, Define, Evidence, Open, Outcome, Output, Run, Stream
from .pool import Pool, Worker
from .scheduler import Scheduler
from .shipping import BlobStore
from .starters import local_spec
from .transfers import Transfers
from .transport import Link, Loop

OUTPUT_BACKLOG_BYTES = 32 << 20
"""Unsent to a client above which what its tasks print is dropped, and it is told how much. Larger: one that does not read
keeps more of our memory. Smaller: a burst is lost on a slow way."""

REFETCH_S = 0.2
"""Pause before a blob is asked for again that the other end did not have, or for which there was no room."""

ROOM_S = 10.0
"""How long a task waits for that. Longer: it waits where it cannot run. Shorter: others would have made room in time."""

_log = logging.getLogger("distexec")


class Way(Protocol):
    """The link above on which the session is."""

    link: Link
    transfers: Transfers


class Landlord(Protocol):
    """What a tenancy needs of its agent."""

    name: str
    spool: str
    loop: Loop
    store: BlobStore
    scheduler: Scheduler
    dispatcher: Dispatcher
    memory_limit: MemoryLimit | None


class Tenancy:
    """One session's workers and blobs here. The owner of its pool."""

    def __init__(self, agent: Landlord, opened: Open, uplink: Way) -> None:
        self.agent, self.opened, self.uplink = agent, opened, uplink
        self.session: Session | None = None
        self.directory = tempfile.mkdtemp(prefix="session-", dir=agent.spool)
        spec = local_spec(opened.spec, self.directory)
        self.pool = Pool(agent.loop, spec, self, store=agent.store, capture=True, node=agent.name,
                         memory_limit=agent.memory_limit)
        self.missing: dict[int, dict[bytes, BlobRef]] = {}  # by task or (negative) function, what is still on its way
        self.held: dict[int, list[BlobRef]] = {}  # references that go with a task or function
        self.failing: dict[int, float] = {}  # of these, since when some of it could not be fetched
        self._refetches: set[int] = set()  # of these, what is to be asked for again
        self.unsaid_bytes = 0  # printed and dropped since the client was last told
        self.results: dict[int, dict[int, list[BlobRef]]] = {}  # by task and attempt, results not yet acknowledged

    # ---- owner of the pool

    def worker_ready(self, worker: Worker) -> None:
        """Give the new worker work."""
        worker.session = self.session
        self.agent.dispatcher.call(self.agent.scheduler.worker_ready, worker, self.session)

    def worker_said(self, worker: Worker, messages: list[Any]) -> None:
        """Hear a worker's outcomes: a task's arguments are not needed any more, its result is kept until the root has it."""
        for message in messages:
            if type(message) is Outcome:
                if self.held:
                    self.release(message.seq)
                if message.buffers:
                    refs = [buffer for buffer in message.buffers if isinstance(buffer, BlobRef)]
                    if refs:
                        self.results.setdefault(message.seq, {})[message.attempt] = refs
        self.agent.dispatcher.receive(worker, messages)

    def worker_wrote(self, worker: Worker, seq: int, stream: Stream, data: bytes) -> None:
        """Pass on what a task printed, before its outcome; no more than a client that does not read may keep waiting."""
        session = self.session
        if not self.opened.spec.echo or session is None:
            return
        upstream: Any = session.upstream
        link: Link | None = upstream.link if upstream is not None else None
        if link is None or link.pending_bytes > OUTPUT_BACKLOG_BYTES:
            if link is not None and not self.unsaid_bytes:
                self._say(link, session, seq, "what is printed from here on is dropped: too much waits to be read already")
            self.unsaid_bytes += len(data)
            return
        if self.unsaid_bytes:
            self._say(link, session, seq, f"{self.unsaid_bytes:,} bytes printed there are missing before this line")
            self.unsaid_bytes = 0
        link.queue([Output(session.uplink_no, seq, stream, data)])
        link.flush()

    def _say(self, link: Link, session: Session, seq: int, text: str) -> None:
        line = f"[distexec: node {self.agent.name!r}: {text}]\n"
        link.send([Output(session.uplink_no, seq, Stream.STDERR, line.encode())])

    def worker_gone(self, worker: Worker, evidence: Evidence) -> None:
        """Learn that a worker died."""
        self.agent.dispatcher.call(self.agent.scheduler.worker_gone, worker, self.session, worker.page.started, evidence)

    def start_failed(self, evidence: Evidence, data: bytes) -> None:
        """Learn that a worker never came up."""
        self.agent.dispatcher.call(self.agent.scheduler.start_failed, self.session, evidence, data)

    # ---- blobs

    def is_waiting(self, run: Run) -> bool:
        """Say whether a task must wait for blobs, its own or its function's; fetching begins. With the lock held."""
        refs = [buffer for buffer in run.buffers if isinstance(buffer, BlobRef)]
        if refs and run.seq not in self.held:
            self.held[run.seq] = []
            self.missing[run.seq] = {ref.digest: ref for ref in refs}
            self.agent.loop.call_soon(self._pull, run.seq)
        return bool(self.missing.get(run.seq)) or bool(self.missing.get(-run.fn))

    def expect(self, definition: Define) -> None:
        """Fetch the blobs of a function; once, though it is defined anew on each link."""
        refs = [buffer for buffer in definition.buffers if isinstance(buffer, BlobRef)]
        if refs and -definition.fn not in self.held:
            self.held[-definition.fn] = []
            self.missing[-definition.fn] = {ref.digest: ref for ref in refs}
            self._pull(-definition.fn)

    def pull_again(self) -> None:
        """Fetch what was on its way when the last link broke."""
        for key in list(self.missing):
            self._pull(key)

    def _pull(self, key: int) -> None:
        self._refetches.discard(key)
        for ref in list(self.missing.get(key, {}).values()):
            self.uplink.transfers.pull(ref, lambda got: self._got(key, got),
                                       lambda ref, reason: self._failed(key, ref, reason))

    def _got(self, key: int, ref: BlobRef) -> None:
        held = self.held.get(key)
        if held is None:  # its task ended meanwhile
            self.agent.store.release(ref)
            return
        held.append(ref)
        missing = self.missing.get(key)
        if missing is None:
            return
        missing.pop(ref.digest, None)
        self.failing.pop(key, None)
        if not missing:
            del self.missing[key]
            self._release_waiting()

    def _release_waiting(self) -> None:
        session = self.session
        if session is None:
            return
        with self.agent.dispatcher.lock:
            ready = [seq for seq, task in session.waiting.items()
                     if not self.missing.get(seq) and not self.missing.get(-task.run.fn)]
        for seq in ready:
            self.agent.dispatcher.call(lambda now, seq=seq: self.agent.scheduler.arrived(session, seq))

    def _failed(self, key: int, ref: BlobRef, reason: str) -> None:
        if not self.uplink.link.is_open or key not in self.missing or key in self._refetches:
            return  # without a link the next one fetches it
        now = time.monotonic()
        if key not in self.failing:
            self.failing[key] = now
            _log.warning("session of %s: %d bytes could not be fetched: %s", self.opened.spec.name, ref.size_bytes, reason)
        if now - self.failing[key] > ROOM_S and self.session is not None:
            reason = f"{ref.size_bytes:,} bytes of its arguments or function could not be brought there: {reason}"
            self.agent.dispatcher.call(partial(self.agent.scheduler.cannot_arrive, self.session, key,
                                               Evidence(self.agent.name, reason=reason)))
        if key in self.missing:
            self._refetches.add(key)
            self.agent.loop.call_later(REFETCH_S, self._pull, key)

    def release(self, key: int) -> None:
        """Let go what a task or function held."""
        for ref in self.held.pop(key, ()):
            self.agent.store.release(ref)
        self.missing.pop(key, None)
        self.failing.pop(key, None)

    def release_result(self, seq: int, attempt: int | None = None) -> None:
        """Let go the result of a task that the root has: of one attempt, or of all."""
        attempts = self.results.get(seq, {})
        for known in list(attempts) if attempt is None else [attempt]:
            for ref in attempts.pop(known, ()):
                self.agent.store.release(ref)
        if not attempts:
            self.results.pop(seq, None)

    def end(self, grace_s: float) -> None:
        """Stop the workers, drop the blobs, remove the directory. Own thread: it waits for processes."""
        self.pool.close(grace_s)
        for key in list(self.held):
            self.release(key)
        for seq in list(self.results):
            self.release_result(seq)
        shutil.rmtree(self.directory, ignore_errors=True)
