"""Drives one `Scheduler` over real links: lock, clock, timers, blobs.

    any thread ── call(event) ──┐ under the lock: scheduler decides, messages join their peers' outboxes
    I/O thread ── messages ─────┤ after it:       peers flush, pool actions are carried out, ended tasks go to the owner
    timer ─────── tick ─────────┘

Rule: the lock guards the scheduler and nothing else; sockets, user code and futures are touched without it. Messages to one
peer are queued in the order decided, under the lock; only the writing happens after.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .kin import News
from .ledger import EndSession, KillWorker, PoolAction, Revoke, Session, StartWorker, StopWorker, Task
from .messages import Ack, Define, Lost, Message, Outcome, SessionFailed
from .scheduler import Scheduler
from .transport import Loop

TICK_S = 0.005
"""How often running workers are looked at while something could be in their way; OVERDUE_S of the scheduler."""

HOUSEKEEPING_S = 0.5
"""How often slow limits (silent nodes, orphaned sessions, pauses) are looked at."""

STALL_S = 1.0
"""A timer later than this means that this process stood still, and what it did not hear meanwhile is nobody's silence.
Smaller: a busy machine waits longer for what is dead. Larger: who comes back from a debugger gives up what lives."""

REVOKE_SETTLE_S = 0.010
"""How long after a revocation the worker page is read: far longer than any store buffer takes to drain (DESIGN §7)."""


BURST_S = 0.0001
"""Submits closer together than this are written by the I/O thread, many in one frame; a lone one from the caller's thread.
Shorter than any round trip, so that a caller who waits for each result is never made to wait for another thread."""


ACK_S = 0.02
"""How long an acknowledgement waits for company. Longer: outcomes are kept longer below. Shorter: wake-ups for nothing."""


_log = logging.getLogger("distexec")


class PeerPort(Protocol):
    """What the dispatcher needs of the other end of a link: a worker, a node, or an upstream."""

    def queue(self, messages: Sequence[Any]) -> object:
        """Put messages in line; cheap, called with the dispatcher's lock held."""

    def flush(self) -> object:
        """Write what is in line; called without the lock."""


class Gate(Protocol):
    """Who says whether new tasks are taken."""

    @property
    def is_open(self) -> bool:
        """Whether they are."""


class Staff(Protocol):
    """The pool of one session's workers, as the dispatcher uses it."""

    def start_worker(self) -> None:
        """Start one more worker."""

    def stop_worker(self, worker: Any) -> None:
        """Let an idle worker go."""

    def kill_worker(self, worker: Any, reason: str) -> None:
        """End a worker and all it started."""


class Dispatcher:
    """One vertex's scheduler at work.

    Args:
        loop: its I/O thread, for timers.
        scheduler: made by the caller; from now on touched only with this dispatcher's lock.
        on_ended: the root's owner of tasks: gets [(task, Outcome | Lost)], in any thread, without the lock.
        on_failure: gets (session, peer or None, SessionFailed) at the root.
        on_kin: gets what is to be done about nested calls, before the ends that came with it.
        on_session_end: gets the session whose workers are to be stopped, and whether tasks of it were left.
    """

    def __init__(self, loop: Loop, scheduler: Scheduler, *,
                 on_ended: Callable[[list[tuple[Task, Outcome | Lost]]], object] | None = None,
                 on_failure: Callable[[Session, Any, SessionFailed], object] | None = None,
                 on_session_end: Callable[[Session, bool], object] | None = None,
                 on_kin: Callable[[list[News]], object] | None = None) -> None:
        self.loop = loop
        self.scheduler = scheduler
        self.lock = threading.Lock()  # guards `scheduler`, `_is_ticking`, `_submitted_at`, `_burst`, `_late`
        self.staff: dict[Session, Staff] = {}
        self._on_ended, self._on_failure, self._on_session_end = on_ended, on_failure, on_session_end
        self._on_kin = on_kin
        self._is_ticking = False
        self._is_closed = False
        self._submitted_at = 0.0
        self._passed_at = 0.0  # I/O thread
        self._late: dict[PeerPort, None] = {}  # ports with nothing but acknowledgements in line
        self._burst: dict[PeerPort, None] = {}  # ports with something in line that the I/O thread is to flush

    def __repr__(self) -> str:
        return f"<Dispatcher {self.scheduler.sessions!r}>"

    def start(self) -> None:
        """Begin housekeeping."""
        self._passed_at = time.monotonic()
        self.loop.call_later(HOUSEKEEPING_S, self._keep_house)

    def close(self) -> None:
        """Let no timer act any more."""
        self._is_closed = True

    # ---- events

    def call(self, event: Callable[..., Any], *args: Any) -> Any:
        """Let an event happen to the scheduler, with the time as its last argument, and do what follows. Any thread."""
        with self.lock:
            result = event(*args, time.monotonic())
            ports = self._post()
            rest = self._rest()
        for port in ports:
            port.flush()
        if rest is not None:
            self._carry_out(*rest)
        return result

    def submit(self, root: Gate, task: Task, definition: Define) -> bool:
        """Give the scheduler a new task; a free worker gets it from this very thread. False if the gate closed."""
        scheduler, session = self.scheduler, task.session
        with self.lock:
            if not root.is_open:
                return False
            if definition.fn not in session.code:
                scheduler.define(session, definition)
            scheduler.submit(session, task)
            out = scheduler.take()
            has_more = scheduler.has_news
            if not out and not has_more:
                return True
            now = time.monotonic()
            is_burst = now - self._submitted_at < BURST_S
            self._submitted_at = now
            # One task handed to a free slot: nothing else can be due, and its way should be short.
            is_plain = len(out) == 1 and not has_more and not session.limited
            ports = self._put_in_line(out) if out else ()
            rest = None if is_plain else self._rest()
            if rest is not None:
                self.loop.call_soon(self._carry_out, *rest)  # here and not below, where Ctrl-C could come between
            if is_burst and ports:
                has_flusher = bool(self._burst)
                self._burst.update(dict.fromkeys(ports))
        if not is_burst:
            for port in ports:
                port.flush()
        elif ports and not has_flusher:
            self.loop.call_soon(self._flush_burst)
        return True

    def submit_many(self, root: Gate, tasks: Sequence[Task], definition: Define) -> bool:
        """Give the scheduler several calls of one function at once. False, and none taken, if the gate closed."""
        scheduler = self.scheduler
        with self.lock:
            if not root.is_open:
                return False
            for task in tasks:
                if definition.fn not in task.session.code:
                    scheduler.define(task.session, definition)
                scheduler.submit(task.session, task)
            ports = self._post()
            rest = self._rest()
            if rest is not None:
                self.loop.call_soon(self._carry_out, *rest)
        for port in ports:
            port.flush()
        return True

    def _flush_burst(self) -> None:
        with self.lock:
            ports, self._burst = self._burst, {}
        for port in ports:
            port.flush()

    def receive(self, peer: Any, messages: Sequence[Message]) -> None:
        """Let the scheduler hear what a peer said. I/O thread."""
        scheduler = self.scheduler
        with self.lock:
            scheduler.receive(peer, messages, time.monotonic())
            out, ended = scheduler.take(), scheduler.take_ended()
            ports = self._put_in_line(out) if out else ()
            news = scheduler.take_kin() if scheduler.kin.news else None
        for port in ports:
            port.flush()
        if news and self._on_kin is not None:
            self._on_kin(news)  # first: who made a call and then ended shall not be the last
        if ended and self._on_ended is not None:
            self._on_ended(ended)  # before what nobody waits for
        with self.lock:
            rest = self._rest()
        if rest is not None:
            self._carry_out(*rest)

    def _post(self) -> Sequence[PeerPort]:
        """Queue what the scheduler said with its peers, in order; give those that need a flush. With the lock held."""
        out = self.scheduler.take()
        return self._put_in_line(out) if out else ()

    def _put_in_line(self, out: list[tuple[Any, Message]]) -> Sequence[PeerPort]:
        if len(out) == 1:
            port, message = out[0]
            self._queue(port, (message,))
            return (port,) if type(message) is not Ack else self._flush_later(port)
        batches: dict[Any, list[Message]] = {}
        for peer, message in out:
            batch = batches.get(peer)
            if batch is None:
                batches[peer] = [message]
            else:
                batch.append(message)
        for peer, batch in batches.items():
            self._queue(peer, batch)
        return list(batches)

    def _queue(self, port: Any, batch: Sequence[Message]) -> None:
        """Put messages in line. A worker that cannot be told (no descriptor left to lend it) is ended: its tasks move on."""
        try:
            port.queue(batch)
        except Exception as error:  # whatever it is, the other ports' messages must not be lost with these
            _log.exception("distexec: %r could not be told what was decided", port)
            if getattr(port, "session", None) is not None:
                action = KillWorker(port, f"its tasks could not be handed to it: {type(error).__name__}: {error}")
                self.loop.call_soon(self._end_worker, action)

    def _flush_later(self, port: PeerPort) -> Sequence[PeerPort]:
        """Let an acknowledgement wait for something to go along with: it would wake the other end for nothing."""
        if not self._late:
            self.loop.call_later(ACK_S, self._flush_late)
        self._late[port] = None
        return ()

    def _flush_late(self) -> None:
        with self.lock:
            ports, self._late = self._late, {}
        for port in ports:
            port.flush()

    def _rest(self) -> tuple[list[PoolAction], list[Any], list[Any], bool, list[News]] | None:
        """Collect what is left to do without the lock. With the lock held."""
        scheduler = self.scheduler
        arm = not self._is_ticking and scheduler.needs_tick()
        if arm:
            self._is_ticking = True
        elif not scheduler.has_news:
            return None
        actions, ended, failures = scheduler.take_pool(), scheduler.take_ended(), scheduler.take_failures()
        news = scheduler.take_kin()
        return (actions, ended, failures, arm, news) if actions or ended or failures or arm or news else None

    def _carry_out(self, actions: list[PoolAction], ended: list[Any], failures: list[Any], arm: bool,
                   news: list[News]) -> None:
        for action in actions:
            self._act(action)
        if arm:
            self.loop.call_later(TICK_S, self._tick)
        if news and self._on_kin is not None:
            self._on_kin(news)
        if ended and self._on_ended is not None:
            self._on_ended(ended)
        for session, peer, failure in failures:
            if self._on_failure is not None:
                self._on_failure(session, peer, failure)

    # ---- the pool

    def _act(self, action: PoolAction) -> None:
        if isinstance(action, StartWorker):
            staff = self.staff.get(action.session)
            if staff is not None:
                staff.start_worker()
        elif isinstance(action, Revoke):
            worker: Any = action.worker
            worker.page.revoke(action.first, action.last)
            if action.doomed:
                worker.page.doom(action.doomed)
            self.loop.call_later(REVOKE_SETTLE_S, self._read_revoked, worker)
        elif isinstance(action, EndSession):
            if self._on_session_end is not None:
                self._on_session_end(action.session, action.had_tasks)
        else:
            self._end_worker(action)

    def _end_worker(self, action: StopWorker | KillWorker) -> None:
        worker: Any = action.worker
        staff = self.staff.get(worker.session)
        if staff is None:
            return
        if isinstance(action, StopWorker):
            staff.stop_worker(worker)
        else:
            staff.kill_worker(worker, action.reason)

    def _read_revoked(self, worker: Any) -> None:
        try:
            started = worker.page.started
        except ValueError:
            return  # unmapped: the worker is gone, which the scheduler hears of otherwise
        self.call(self.scheduler.revoked, worker, worker.session, started)

    # ---- time

    def _tick(self) -> None:
        self._is_ticking = False
        self._pass_time()

    def _keep_house(self) -> None:
        if not self._is_closed:
            self._pass_time()
            self.loop.call_later(HOUSEKEEPING_S, self._keep_house)

    def _pass_time(self) -> None:
        if self._is_closed:
            return
        passed_at, self._passed_at = self._passed_at, time.monotonic()
        if self._passed_at - passed_at > HOUSEKEEPING_S + STALL_S:
            self.call(self.scheduler.stood_still)
        with self.lock:
            watched: list[tuple[Session, Any]] = self.scheduler.watched()
        now_ns = time.monotonic_ns()
        progress = {}
        for _, worker in watched:
            try:
                started, since_ns = worker.page.started, worker.page.started_at_ns
            except ValueError:
                continue  # unmapped: the worker is gone, which the scheduler hears of otherwise
            if since_ns:
                progress[worker] = (started, (now_ns - since_ns) * 1e-9)
        self.call(lambda now: self.scheduler.tick(now, progress))
