"""Keeps the worker processes of one session on this machine; runs in the client in local mode, else in an agent.

    owner ── start_worker, stop_worker, kill_worker, worker.queue ──► Pool ── starters ──► processes
          ◄── worker_ready, _said, _wrote, _gone, start_failed ──          ◄── links ──

The rule: for every worker asked for, the owner hears either `start_failed`, or `worker_ready` and in the end exactly
one `worker_gone`, which comes after everything the worker managed to send and with all that is known of its death. The
owner is called on the I/O thread. After `close` no process, descriptor or shared memory of the pool is left.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any, Protocol, cast

from msgspec import structs

from distexec.capture import Capture
from distexec.errors import describe_exit
from distexec.generations import Generations
from distexec.lastwords import shorten
from distexec.memory import shared_file
from distexec.memorywatch import LOOK_S, LOOK_SHARE, MemoryLimit, oom_kills, overusers
from distexec.messages import (
    BlobRef,
    Bye,
    Cleaned,
    Delivery,
    Evidence,
    FromWorker,
    Keep,
    Outcome,
    Partial,
    Ready,
    Record,
    Returned,
    Segment,
    SessionFailed,
    SessionSpec,
    Stream,
    Submit,
    Unshare,
)
from distexec.preparation import Host, PreparedStarter
from distexec.shipping import BlobStore
from distexec.starters import OUR_TERMS, Call, ContextStarter, Exit, Starter, TemplateStarter, Terms, drain
from distexec.transport import Link, Loop
from distexec.worker import PAGE_BYTES, WorkerPage
from distexec.workerport import Worker

FORCE_S = 1.0
"""For a worker that closed its link to end. Longer: a slot is missing so long. Shorter: a core dump may be cut off."""

CLEANUP_S = 10.0
"""For a session's cleanup when nobody waits for it, or all is to end at once. Longer: slots and processes of who is gone
stay. Shorter: what it holds elsewhere is not given back."""

PATIENCE_S = 15.0
"""For the system to end what was killed. Shorter: a busy machine is taken for a broken one."""

TRIALS = 8
"""Worker starts that a dying template may take along before the pool believes that none can be had."""

TRIM_S = 5.0
"""Without large results, after which workers give up the memory kept for them. Longer: idle memory. Shorter: the next
one takes new pages."""

LIVE_S = 0.1
"""Between two looks at what running tasks print."""

_log = logging.getLogger("distexec")
_PLAIN = frozenset({Outcome, Returned})


class Owner(Protocol):
    """Who a pool's events are for. All methods are called on the I/O thread and must not block."""

    def worker_ready(self, worker: Worker) -> object:
        """It passed its initializer and may be sent tasks."""

    def worker_said(self, worker: Worker, messages: list[Any]) -> object:
        """Outcome and Returned messages, in order; their blobs are in the store, one reference each for the owner."""

    def worker_wrote(self, worker: Worker, seq: int, stream: Stream, data: bytes) -> object:
        """Task `seq` printed this; comes before the task's outcome. Only where output is captured.

        Where it is not: the stacks of a worker that crashed (`seq` 0), which it did not print itself.
        """

    def worker_logged(self, worker: Worker, record: Record) -> object:
        """A task, or the initializer (`seq` 0), logged this."""

    def worker_published(self, worker: Worker, partial: Partial) -> object:
        """A task has a partial result; comes before its outcome, blobs as in `worker_said`."""

    def worker_sends(self, worker: Worker, delivery: Delivery, fd: int, reply_fd: int) -> object:
        """A task sends a file to its client, open as `fd`, and waits at the other end of `reply_fd`; the owner's now."""

    def worker_gone(self, worker: Worker, evidence: Evidence) -> object:
        """A worker that was ready has ended, and everything it sent was delivered."""

    def start_failed(self, evidence: Evidence, data: bytes, generation: int) -> object:
        """A worker ended before it was ready; `data`: the packed exception of setup, initializer or start, if any."""

    def state_wrote(self, stream: Stream, data: bytes) -> object:
        """A setup or cleanup printed this. Only where output is captured."""

    def state_cleaned(self, cleaned: Cleaned) -> object:
        """A session's cleanup has ended; comes only where there is one."""


def _no_descriptors(error: OSError) -> str:
    return f"no descriptors for another worker: {error}; raise the limit of open files (ulimit -n)"


def _ignore(*_: object) -> None:
    """Take the place of a gone worker's callbacks, or it and its link would keep each other for a while."""


class Pool:
    """The workers of one session on this machine.

    Args:
        loop: whose I/O thread does everything here.
        spec: what the workers are prepared with.
        owner: who is told.
        store: the blobs that Run and Define messages refer to, and where workers' large results go. When it closes an
            arena, `forget_arena` must be called.
        capture: whether what tasks print is read and handed to the owner; else workers print where this process does.
        node: this machine's name, for evidence.
        context: a multiprocessing context whose processes the workers shall be; None: forked by a template.
        initializer: with a context, the function and arguments that multiprocessing hands to each worker, in place of
            the spec's.
        memory_limit: of each worker with what its task started; what uses more is killed. None: no limit.
        terms: on which processes are started.
    """

    def __init__(self, loop: Loop, spec: SessionSpec, owner: Owner, *, store: BlobStore, capture: bool, node: str,
                 context: BaseContext | None = None, initializer: Call | None = None,
                 memory_limit: MemoryLimit | None = None, terms: Terms = OUR_TERMS) -> None:
        self._loop, self._spec, self._owner, self._store = loop, spec, owner, store
        self._captures, self._node = capture, node
        self._memory_limit = memory_limit
        self._oom_kills = oom_kills()
        self._workers: dict[int, Worker] = {}  # I/O thread; others read copies
        self._numbers = 0
        self._trials = 0  # how many workers may yet be started anew after the template was killed; some once one was ready
        self._is_live_armed = self._is_look_armed = False
        self._has_adopted = self._is_trim_armed = False  # large results; since `_trim` looked last
        self._is_closing = False
        self._is_closed = threading.Event()
        self._context, self._initializer, self._terms = context, initializer, terms
        self._number = 0  # of the last generation asked for
        self._generations = Generations(self, store, spec, self._make_starter)
        self.on_end: Callable[[], object] | None = None  # called once nothing is left

    def _make_starter(self, spec: SessionSpec, host: Host) -> Starter:
        if self._context is not None:
            return ContextStarter(
                self._loop, spec, self._store, self._context, self._initializer, self._on_born, self._on_died)
        if spec.setup or spec.setup_buffers or self._terms.init is not None:
            return PreparedStarter(self._loop, spec, self._store, self._on_born, self._on_died, self._terms, host,
                                   captures=self._captures)
        return TemplateStarter(self._loop, spec, self._store, self._on_born, self._on_died, self._terms)

    def __repr__(self) -> str:
        return f"<Pool {self._spec.name!r}: {len(self._workers)} workers{', closing' if self._is_closing else ''}>"

    # ---- any thread

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that live, as far as they are known yet."""
        return [worker.pid for worker in list(self._workers.values()) if worker.pid and worker.exit is None]

    def start_worker(self) -> None:
        """Start one more worker; `worker_ready` or `start_failed` follows. Nothing happens once the pool is closing."""
        self._loop.run_here(self._start_worker)

    def relocate(self, spec: SessionSpec) -> None:
        """Prepare workers so from now on. I/O thread."""
        self._spec = spec
        self._generations.current.relocate(spec)

    def renew(self, spec: SessionSpec) -> int:
        """Start workers from a new preparation from now on; give its number. Who has older ones may go on with them.

        Callers see to it that no two do this at once. If blobs of the spec are not here, `blobs_came` is to follow.
        """
        self._number += 1
        self._loop.run_here(self._renew, self._number, spec)
        return self._number

    def _renew(self, number: int, spec: SessionSpec) -> None:
        if not self._is_closing:
            self._spec = spec
            self._generations.renew(number, spec)

    def blobs_came(self) -> None:
        """Learn that blobs are here that the present generation may have waited for. I/O thread."""
        if not self._is_closing:
            self._generations.current.go_on()

    def stop_worker(self, worker: Worker) -> None:
        """Let it finish what it was sent, then end; `worker_gone` follows. Nothing may be queued for it afterwards."""
        worker.is_stopping = True
        worker.link.send([Bye("stopped")])

    def kill_worker(self, worker: Worker, reason: str) -> None:
        """Kill it and everything its tasks started; `worker_gone` follows, with this reason in its evidence."""
        self._loop.run_here(self._kill, worker, reason)

    def unshare(self, message: Unshare) -> None:
        """Tell every worker that nobody uses some shared values any more. I/O thread."""
        for worker in self._workers.values():
            if not worker.is_stopping and not worker.is_closed:
                worker.link.send([message])

    def count_kept(self, ref: BlobRef) -> int:
        """Count the references that are held to a blob because workers have it mapped. I/O thread."""
        return sum(worker.count_kept(ref) for worker in self._workers.values())

    def forget_arena(self, arena: int) -> None:
        """Say that the store closed an arena; workers then close their descriptor of it."""
        for worker in list(self._workers.values()):
            worker.forget(arena)

    def close(self, timeout_s: float = 5.0, cleanup_s: float | None = None) -> None:
        """Let every worker finish what it was sent, for `timeout_s` seconds; then kill what is left, clean up, and go.

        Returns when nothing is left, unless called on the I/O thread, where it only begins. `cleanup_s` is for the session's
        cleanup; None: as long as it takes. Again, with less time, while it is under way: the less counts.
        """
        self._loop.run_here(self._begin_close, timeout_s, cleanup_s)
        if self._loop.is_current():
            return
        while not self._is_closed.wait(timeout_s + PATIENCE_S):
            if not self._generations.is_cleaning:
                _log.warning("distexec: %r could not be closed in time: a process that not even SIGKILL ends?", self)
                break

    def terminate(self) -> None:
        """Kill every worker now, and go; as `close` otherwise."""
        self.close(0.0, CLEANUP_S)

    @property
    def is_closed(self) -> bool:
        """Whether nothing of the pool is left."""
        return self._is_closed.is_set()

    # ---- I/O thread: birth

    def _start_worker(self) -> None:
        generation = self._generations.current
        if self._is_closing or not generation.is_ready():
            return
        self._numbers += 1
        number = self._numbers
        with ExitStack() as at_end, ExitStack() as on_error:
            try:
                page_fd = shared_file()
                at_end.callback(os.close, page_fd)
                os.ftruncate(page_fd, PAGE_BYTES)
                page = WorkerPage(page_fd)
                output = Capture() if self._captures else None
                if output is not None:
                    on_error.callback(output.close)
                ours, theirs = socket.socketpair()
            except OSError as error:
                self._owner.start_failed(Evidence(self._node, reason=_no_descriptors(error)), b"", generation.number)
                return
            on_error.pop_all()
            at_end.enter_context(theirs)
            worker = self._workers[number] = Worker(number, self._store, page, output, self._watch_output)
            worker.link = self._loop.adopt(
                ours, cast("Any", FromWorker), partial(self._on_messages, worker),
                lambda _, reason: self._on_closed(worker), fds=True)
            worker.generation = generation
            generation.workers.add(number)
            try:
                generation.starter.start(number, theirs, page_fd, output.fds if output else None)
            except OSError as error:
                self._on_died(number, Exit(reason=_no_descriptors(error)))

    def _on_born(self, number: int, pid: int) -> None:
        self._workers[number].pid = pid
        if self._memory_limit is not None and not self._is_look_armed:
            self._is_look_armed = True
            self._loop.call_later(LOOK_S, self._look_at_memory)

    # ---- life

    def _on_messages(self, worker: Worker, _link: Link, messages: list[Any]) -> None:
        output = worker.output
        if worker.unclaimed or not _PLAIN.issuperset(map(type, messages)):
            messages = [message for message in messages if self._is_for_owner(worker, message)]
        elif output is not None:
            for message in messages:
                pieces = output.answered(message)
                if pieces:
                    self._hand_output(worker, pieces)
        if messages:
            self._owner.worker_said(worker, messages)

    def _is_for_owner(self, worker: Worker, message: Any) -> bool:
        match message:
            case Outcome():
                for ref in message.buffers:
                    if isinstance(ref, BlobRef):
                        worker.unclaimed.pop(ref.digest, None)
                self._hand_output(worker, worker.output.answered(message) if worker.output else ())
            case Submit():
                for ref in (*message.function_buffers, *message.buffers):
                    if isinstance(ref, BlobRef):
                        worker.unclaimed.pop(ref.digest, None)
            case Returned():
                self._hand_output(worker, worker.output.answered(message) if worker.output else ())
            case Segment(blob, arena, _):
                self._adopt(worker, blob, arena)
                return False
            case Delivery():
                fd, reply_fd = self._take_fds(worker, 2, "a file that it sends")
                self._owner.worker_sends(worker, message, fd, reply_fd)
                return False
            case Record():
                self._owner.worker_logged(worker, message)
                return False
            case Partial():
                for ref in message.buffers:
                    if isinstance(ref, BlobRef):
                        worker.unclaimed.pop(ref.digest, None)
                self._owner.worker_published(worker, message)
                return False
            case Keep():
                worker.note(message)
                return False
            case Ready(pid):
                worker.pid, worker.is_ready = pid, True
                self._trials = TRIALS
                self._owner.worker_ready(worker)
                return False
            case SessionFailed():
                worker.failure = message
                return False
        return True

    def _adopt(self, worker: Worker, blob: BlobRef, arena: int) -> None:
        """Make a result's shared memory a blob."""
        returned = partial(worker.give_back, arena) if arena else None
        (fd,) = self._take_fds(worker, 1, "its result")
        self._store.adopt(fd, blob.size_bytes, blob.digest, returned)
        worker.unclaimed[blob.digest] = blob
        self._has_adopted = True
        if not self._is_trim_armed:
            self._is_trim_armed = True
            self._loop.call_later(TRIM_S, self._trim)

    def _take_fds(self, worker: Worker, count: int, what: str) -> list[int]:
        """Take the descriptors that came with a message. If we are out of them they have not: then the link breaks."""
        if len(worker.link.received_fds) < count:
            self._kill(worker, f"{what} could not be received: raise the limit of open files (ulimit -n)")
            raise OSError("a worker's descriptor did not arrive: too many open files")
        return [worker.link.received_fds.popleft() for _ in range(count)]

    def _trim(self) -> None:
        """Have workers give back the memory kept for large results, once there were none for a while."""
        self._is_trim_armed = self._has_adopted and not self._is_closing
        if self._is_trim_armed:
            self._loop.call_later(TRIM_S, self._trim)
        else:
            for worker in self._workers.values():
                worker.give_back(0, False)
        self._has_adopted = False

    def _hand_output(self, worker: Worker, pieces: Any) -> None:
        for seq, stream, data in pieces:
            self._owner.worker_wrote(worker, seq, stream, data)

    def _watch_output(self) -> None:
        """Look at what running tasks print, until none runs. Any thread."""
        if not self._is_live_armed:
            self._is_live_armed = True
            self._loop.call_later(LIVE_S, self._read_live)

    def _read_live(self) -> None:
        self._is_live_armed = False
        for worker in list(self._workers.values()):
            if worker.output is not None and worker.output.is_expecting:
                self._hand_output(worker, worker.output.live(worker.page))
                self._watch_output()

    def _look_at_memory(self) -> None:
        """Kill the workers that use more memory than they may, as long as there are any."""
        limit = self._memory_limit
        workers = {worker.pid: worker for worker in self._workers.values() if worker.pid and worker.exit is None}
        self._is_look_armed = bool(workers) and limit is not None
        if limit is None or not workers:
            return
        began = time.monotonic()
        for pid, used in overusers([pid for pid, worker in workers.items() if not worker.kill_reason], limit.size_bytes):
            self._kill(workers[pid], limit.explain(used))
        self._loop.call_later(max(LOOK_S, LOOK_SHARE * (time.monotonic() - began)), self._look_at_memory)

    # ---- death

    def _kill(self, worker: Worker, reason: str) -> None:
        if worker.exit is None:
            worker.kill_reason = worker.kill_reason or reason
            worker.generation.starter.end(worker.number)

    def _on_closed(self, worker: Worker) -> None:
        worker.is_closed = True
        if worker.exit is None:
            worker.force = self._loop.call_later(
                FORCE_S, self._kill, worker, "it closed its link to the pool and did not end")
        self._finish(worker)

    def _on_died(self, number: int, how: Exit) -> None:
        worker = self._workers[number]
        worker.exit = how
        drain(worker.link)
        self._finish(worker)

    def _finish(self, worker: Worker) -> None:
        """Report a worker gone once both its exit is known and its link is read to the end."""
        if worker.exit is None or not worker.is_closed or self._workers.pop(worker.number, None) is None:
            return
        evidence = self._evidence(worker, worker.exit)
        if worker.output is not None:
            self._hand_output(worker, worker.output.rest())
        elif worker.page.words.stacks:  # what it could not print itself any more
            self._owner.worker_wrote(worker, 0, Stream.STDERR, worker.page.words.stacks.encode())
        worker.release()
        worker.link.on_messages = worker.link.on_closed = _ignore
        if worker.force is not None:
            worker.force.cancel()
        if worker.is_ready:
            self._owner.worker_gone(worker, evidence)
        elif self._may_try_again(worker.exit):
            self._start_worker()
        else:
            data = worker.failure.data if worker.failure else worker.exit.failure
            self._owner.start_failed(evidence, data, worker.generation.number)
        self._generations.left(worker.generation, worker.number)

    def _may_try_again(self, how: Exit) -> bool:
        """Whether a start failed for no reason of its own: somebody killed a template that had worked before."""
        if not how.is_bystander or self._trials == 0 or self._is_closing:
            return False
        self._trials -= 1
        return True

    def _evidence(self, worker: Worker, how: Exit) -> Evidence:
        reason = worker.kill_reason or how.reason
        if not reason and worker.failure is not None:
            reason = worker.failure.evidence.reason
        if not reason:
            reason = f"it {describe_exit(how.exitcode, how.signal)}" + (" as asked" if worker.is_stopping else "")
            if how.signal == signal.SIGKILL:
                reason += self._oom_kills.explain(how.peak_bytes)
        words = worker.page.words
        tail = worker.output.tail() if worker.output else shorten(words.printed + words.stacks)
        return Evidence(self._node, worker.pid, how.exitcode, how.signal, reason, tail)

    def _begin_close(self, timeout_s: float, cleanup_s: float | None) -> None:
        if not self._is_closing:
            self._is_closing = True
            if timeout_s > 0:
                for worker in list(self._workers.values()):
                    self.stop_worker(worker)
            self._generations.close(self._end, cleanup_s)
        elif cleanup_s is not None:
            self._generations.hurry(cleanup_s)
        self._loop.call_later(timeout_s, self._force)

    def _force(self) -> None:
        for worker in list(self._workers.values()):
            self._kill(worker, "the pool was closed")

    def _end(self) -> None:
        self._is_closed.set()
        if self.on_end is not None:
            self.on_end()

    # ---- employer of the generations

    def start_now(self, count: int) -> None:
        """Start workers that had to wait."""
        for _ in range(count):
            self._start_worker()

    def cannot_start(self, count: int, evidence: Evidence, data: bytes) -> None:
        """Say of each worker that waited for the setup of the present generation that it will not come."""
        for _ in range(count):
            self._owner.start_failed(structs.replace(evidence, node=self._node), data, self._generations.number)

    def state_wrote(self, stream: Stream, data: bytes) -> None:
        """Pass on what a setup or cleanup printed."""
        self._owner.state_wrote(stream, data)

    def state_cleaned(self, cleaned: Cleaned) -> None:
        """Pass on how a cleanup ended."""
        if cleaned.evidence is not None:
            cleaned = structs.replace(cleaned, evidence=structs.replace(cleaned.evidence, node=self._node))
        self._owner.state_cleaned(cleaned)
