"""One session's tenancy on an agent: its workers, its directory, the blobs its tasks wait for, hold and result in.

    Run with BlobRefs ── missing: pulled from above ──► held, until the task has ended
    Outcome with BlobRefs ── results: kept, until the root has acknowledged it

Rule: what a session has here ends with it, and a reference is let go exactly once.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from functools import partial
from typing import Any, Protocol

from msgspec import structs

from .blobcache import BlobCache
from .confinement import own_directory
from .cpus import thread_limits
from .dispatcher import Dispatcher
from .filetransfers import FileTraffic
from .ledger import Session
from .memorywatch import MemoryLimit, trees
from .messages import (
    Ack,
    BlobRef,
    Cleaned,
    Define,
    Delivery,
    Evidence,
    Open,
    Outcome,
    Partial,
    Record,
    Resume,
    Run,
    SessionSpec,
    Stream,
)
from .nodefiles import NodeFiles
from .nodemodules import NodeModules
from .outgoing import Outgoing
from .pool import CLEANUP_S, Pool
from .published import Published
from .scheduler import Scheduler
from .shipping import BlobStore
from .spool import remove_tree
from .starters import Terms, local_spec
from .transfers import Transfers
from .transport import Link, Loop
from .upkeep import REFETCH_S, ROOM_S, Upkeep
from .workerport import Worker

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
    files: FileTraffic
    cache: BlobCache
    memory_limit: MemoryLimit | None
    terms: Terms
    slots: int
    grace_s: float


class Tenancy:
    """One session's workers and blobs here. The owner of its pool."""

    def __init__(self, agent: Landlord, opened: Open, uplink: Way) -> None:
        self.agent, self.opened, self.uplink = agent, opened, uplink
        self.session: Session | None = None
        self.directory = tempfile.mkdtemp(prefix="session-", dir=agent.spool)
        self.files = NodeFiles(agent, self)
        os.mkdir(self.files.work, 0o700)
        self.modules = NodeModules(agent, self)
        self._code = self.modules.begin(opened.spec.generation)  # directory of the present preparation's
        self._is_apart = False  # workers work in a directory of the session's, not in one like the client's
        if agent.terms.user is not None:
            own_directory(agent.terms.user, self.files.work)
            own_directory(agent.terms.user, self.directory)
        self.output = Outgoing(opened.spec)
        self.pool = Pool(agent.loop, self._local(opened.spec), self, store=agent.store, capture=True, node=agent.name,
                         memory_limit=agent.memory_limit, terms=agent.terms)
        self.upkeep = Upkeep(agent, self)
        self.upkeep.prepare(opened.spec)
        self.missing: dict[int, dict[bytes, BlobRef]] = {}  # by task or (negative) function, what is still on its way
        self.held: dict[int, list[BlobRef]] = {}  # references that go with a task or function
        self.failing: dict[int, float] = {}  # of these, since when some of it could not be fetched
        self._refetches: set[int] = set()  # of these, what is to be asked for again
        self._starts = 0  # workers to be started once all vital files are here
        self._has_started = False
        self.published = Published(agent.store, opened.linger_s)
        self.results: dict[int, dict[int, list[BlobRef]]] = {}  # by task and attempt, results not yet acknowledged

    def _local(self, spec: SessionSpec) -> SessionSpec:
        """Make the client's description of itself fit this machine."""
        spec = local_spec(spec, self.files.work, self.directory, may_share=not self._is_apart)
        environ = spec.environ | thread_limits(spec.environ, self.agent.slots)
        return structs.replace(spec, code=self._code, imports=self.modules.address, node=self.agent.name, environ=environ)

    def renew(self, spec: SessionSpec) -> int:
        """Prepare workers so from now on; give the pool's number of that. I/O thread."""
        self.opened = structs.replace(self.opened, spec=spec)
        self.output.suit(spec)
        self._code = self.modules.begin(spec.generation)
        number = self.pool.renew(self._local(spec))
        self.upkeep.prepare(spec)
        return number

    def clean_up(self) -> None:
        """No task will come any more: let the workers leave, and clean up."""
        self.upkeep.clean_up()

    def say_again(self) -> None:
        """Say on a new link, once the two ends agree what is held, what the client may not have heard."""
        self.files.say_again()
        self.modules.say_again()
        self.upkeep.say_again()

    # ---- owner of the pool

    def worker_ready(self, worker: Worker) -> None:
        """Give the new worker work."""
        worker.session = self.session
        ready = partial(self.agent.scheduler.worker_ready, generation=worker.generation.number)
        self.agent.dispatcher.call(ready, worker, self.session)

    def worker_said(self, worker: Worker, messages: list[Any]) -> None:
        """Hear a worker's outcomes: a task's arguments are not needed any more, its result is kept until the root has it."""
        session = self.session
        for message in messages:
            if type(message) is Outcome:
                if self.output.is_busy and session is not None:
                    self.output.finish(session, message.seq)
                if self.held:
                    self.release(message.seq)
                if message.buffers:
                    refs = [buffer for buffer in message.buffers if isinstance(buffer, BlobRef)]
                    if refs:
                        self.results.setdefault(message.seq, {})[message.attempt] = refs
        self.agent.dispatcher.receive(worker, messages)

    def worker_wrote(self, worker: Worker | None, seq: int, stream: Stream, data: bytes) -> None:
        """Pass on what a task printed, before its outcome."""
        if self.session is not None:
            self.output.wrote(self.session, seq, stream, data)

    def output_heard(self, message: Ack | Resume) -> None:
        """Learn which ends the client has, and so what was printed before them; or that another link is there."""
        if isinstance(message, Ack):
            self.output.acknowledged(message.seqs, message.attempts)
        elif self.session is not None:
            self.output.resume(self.session, message)

    def partials_heard(self, message: Ack | Resume) -> None:
        """Learn which ends the client has, and so what was published before them; or that another link is there."""
        if isinstance(message, Ack):
            self.published.acknowledged(message)
        elif self.session is not None:
            self.published.say_again(self.session, message)

    def worker_logged(self, worker: Worker, record: Record) -> None:
        """Pass on what a task logged."""
        if self.session is not None:
            self.output.logged(self.session, record)

    def worker_published(self, worker: Worker, partial: Partial) -> None:
        """Pass on a partial result, and keep it until the client has it."""
        self.published.add(self.session, worker, partial)

    def worker_sends(self, worker: Worker, delivery: Delivery, fd: int, reply_fd: int) -> None:
        """Offer a task's file to the client."""
        self.files.deliver(worker, delivery, fd, reply_fd)

    def worker_gone(self, worker: Worker, evidence: Evidence) -> None:
        """Learn that a worker died."""
        self.files.worker_gone(worker)
        if self.output.is_busy and self.session is not None:
            self.output.finish_all(self.session)
        self.agent.dispatcher.call(self.agent.scheduler.worker_gone, worker, self.session, worker.page.started, evidence)

    def start_failed(self, evidence: Evidence, data: bytes, generation: int) -> None:
        """Learn that a worker never came up."""
        failed = partial(self.agent.scheduler.start_failed, generation=generation)
        self.agent.dispatcher.call(failed, self.session, evidence, data)

    def state_wrote(self, stream: Stream, data: bytes) -> None:
        """Pass on what setup or cleanup printed."""
        self.worker_wrote(None, 0, stream, data)

    def state_cleaned(self, cleaned: Cleaned) -> None:
        """Learn how a cleanup ended."""
        self.upkeep.cleaned(cleaned)

    # ---- staff of the dispatcher

    def start_worker(self) -> None:
        """Start one more worker, once all files are here that it may need from the first."""
        self.agent.loop.run_here(self._start_worker)

    def _start_worker(self) -> None:
        if self.files.lacks_vital or self.modules.lacks_vital:
            self._starts += 1
        else:
            self._has_started = True
            self.pool.start_worker()

    def may_start(self) -> None:
        """Start the workers that had to wait for files."""
        if self.files.lacks_vital or self.modules.lacks_vital:
            return
        starts, self._starts = self._starts, 0
        for _ in range(starts):
            self._start_worker()

    def work_in(self, directory: str) -> None:
        """Have workers work in this directory from now on, whatever the client's own is; those that do not are replaced."""
        session, is_there = self.session, self._local(self.opened.spec).directory == directory
        self._is_apart = True
        if is_there:
            return
        if not self._has_started or session is None:
            self.pool.relocate(self._local(self.opened.spec))
        else:
            self.agent.dispatcher.call(self.agent.scheduler.renew_workers, session, self.opened.spec,
                                       self.renew(self.opened.spec))

    def stop_worker(self, worker: Worker) -> None:
        """Let an idle worker go."""
        self.pool.stop_worker(worker)

    def kill_worker(self, worker: Worker, reason: str) -> None:
        """End a worker and all it started."""
        self.pool.kill_worker(worker, reason)

    def end_worker_of(self, pid: int, reason: str) -> bool:
        """End the worker that a process belongs to; False if there is none."""
        session = self.session
        if session is None:
            return False
        with self.agent.dispatcher.lock:
            workers: list[Any] = [lane.peer for lane in session.lanes.values() if lane.is_worker]
        families = trees([worker.pid for worker in workers])
        found = [worker for worker in workers if pid in families.get(worker.pid, ())]
        for worker in found:
            self.kill_worker(worker, reason)
        return bool(found)

    # ---- blobs

    def is_waiting(self, run: Run) -> bool:
        """Say whether a task must wait for blobs, its own or its function's, or files: fetching begins. Lock held."""
        refs = [buffer for buffer in run.buffers if isinstance(buffer, BlobRef)]
        has_files = run.options is not None and bool(run.options.files)
        if (refs or has_files) and run.seq not in self.held:
            self.held[run.seq] = []
            if has_files:
                self.files.expect(run)
            if refs:
                self.missing[run.seq] = {ref.digest: ref for ref in refs}
                self.agent.loop.call_soon(self._pull, run.seq)
        return self._is_missing(run)

    def _is_missing(self, run: Run) -> bool:
        return bool(self.missing.get(run.seq) or self.missing.get(-run.fn) or self.files.is_missing(run.seq))

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
        self.files.begin_again()
        self.upkeep.fetch()

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
            self.files_arrived()

    def files_arrived(self) -> None:
        """Let the tasks run that have all they need here."""
        session = self.session
        if session is None:
            return
        with self.agent.dispatcher.lock:
            ready = [seq for seq, task in session.waiting.items() if not self._is_missing(task.run)]
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
            self.agent.cache.keep(self, ref)  # the same bytes may come again
        self.missing.pop(key, None)
        self.failing.pop(key, None)
        self.files.release(key)

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
        self.pool.close(grace_s, CLEANUP_S)
        for key in list(self.held):
            self.release(key)
        for seq in list(self.results):
            self.release_result(seq)
        self.published.end()
        self.agent.cache.end(self)
        self.agent.loop.call_soon(self.files.close)
        self.agent.loop.call_soon(self.modules.close)
        remove_tree(self.directory)
