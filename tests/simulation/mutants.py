"""Bugs planted by hand: each replaces one method by a version that is wrong now and then.

A simulation that finds nothing proves nothing until it has been seen to find something. `caught` plays histories with a
bug in place until an invariant fails, and gives the number of histories it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from distexec import shares
from distexec.downlinks import Downlinks
from distexec.fates import Fates
from distexec.kin import Kin
from distexec.ledger import Lane, Session, Task
from distexec.messages import Lost, Outcome, OutcomeKind, Run
from distexec.placement import Placement
from distexec.queues import Queue
from distexec.recovery import Recovery
from distexec.scheduler import Scheduler
from distexec.uplinks import Uplinks

from .history import SHORT_CUTS, STORM, play

Original = Callable[..., Any]


class Mutant:
    """A method of `owner` replaced by `wrong(original)`; `mood` is that of the histories in which it does most harm."""

    def __init__(
        self,
        owner: Any,
        method: str,
        wrong: Callable[[Original], Original],
        mood: str | None = None,
        nests: bool | None = None,
    ) -> None:
        self.mood, self.nests = mood, nests
        self.name = (wrong.__doc__ or "").rstrip(".")
        self._owner, self._method, self._wrong = owner, method, wrong

    @contextmanager
    def planted(self) -> Any:
        """Have the bug in place for a while."""
        original = (
            self._owner.__dict__[self._method] if isinstance(self._owner, type) else getattr(self._owner, self._method)
        )
        setattr(self._owner, self._method, self._wrong(original))
        try:
            yield
        finally:
            setattr(self._owner, self._method, original)

    def __repr__(self) -> str:
        return self.name


def caught(mutant: Mutant, seeds: Iterable[int]) -> tuple[int, str] | None:
    """Give how many histories it took to catch the bug and what was said; None if it got through all of them."""
    with mutant.planted():
        for count, seed in enumerate(seeds, 1):
            try:
                play(seed, mood=mutant.mood, nests=mutant.nests)
            except Exception as failure:  # any: a wrong scheduler may also trip over its own feet
                return count, f"{type(failure).__name__}: {failure}"
    return None


def _every(number: int) -> Callable[[], bool]:
    calls = 0

    def is_due() -> bool:
        nonlocal calls
        calls += 1
        return calls % number == 0

    return is_due


# ---- the five of the issue


def _drop_an_ack(original: Original) -> Original:
    """Drop an ack."""
    is_due = _every(10)

    def wrong(self: Uplinks, *arguments: Any) -> None:
        if not is_due():
            original(self, *arguments)

    return wrong


def _double_a_lease(original: Original) -> Original:
    """Double a lease."""
    is_due = _every(10)

    def wrong(self: Placement, task: Task, lane: Lane, estimate_s: float | None = None) -> None:
        original(self, task, lane, estimate_s)
        other = next(
            (each for each in task.session.lanes.values() if each is not lane and each.is_worker is lane.is_worker), None
        )
        if other is not None and is_due():
            if task.run.fn in task.session.code:
                self.out.append((other.peer, task.session.code[task.run.fn]))
            self.out.append((other.peer, task.run))

    return wrong


def _leak_a_slot(original: Original) -> Original:
    """Leak a slot."""
    is_due = _every(10)

    def wrong(self: Placement, lane: Lane) -> None:
        original(self, lane)
        if is_due():
            lane.session.free.pop(lane, None)

    return wrong


def _forget_a_requeue(original: Original) -> Original:
    """Forget a requeue."""
    is_due = _every(3)

    def wrong(self: Placement, task: Task) -> None:
        if not is_due():
            original(self, task)
        else:
            task.lane = None

    return wrong


def _accept_a_stale_attempt(original: Original) -> Original:
    """Accept a stale attempt."""

    def wrong(self: Fates, lane: Lane, message: Outcome | Lost) -> None:
        task = lane.session.tasks.get(message.seq)
        if type(message) is Outcome and task is not None and lane.session.is_root and not task.doom:
            if task.lane is not None:
                self._place.unlease(task)
            lane.session.forget(task)
            self.ended.append((task, message))
        else:
            original(self, lane, message)

    return wrong


# ---- more


def _charge_nothing(original: Original) -> Original:
    """Run again for ever, uncharged, what died."""

    def wrong(self: Fates, task: Task, evidence: Any) -> None:
        original(self, task, evidence)
        if task.deaths and task.queued:
            task.deaths -= 1

    return wrong


def _charge_twice(original: Original) -> Original:
    """Charge twice for a node that came back."""

    def wrong(self: Placement, task: Task, lane: Lane) -> None:
        if task.charged:
            task.deaths += 1
        original(self, task, lane)

    return wrong


def _requeue_what_died(original: Original) -> Original:
    """Take a dead worker's running task for unstarted."""

    def wrong(self: Scheduler, worker: Any, session: Session, started: int, evidence: Any, now: float) -> None:
        original(self, worker, session, started + 1, evidence, now)

    return wrong


def _take_back_what_runs(original: Original) -> Original:
    """Take back a task that the worker has begun."""

    def wrong(self: Placement, lane: Lane, started: int) -> list[Task]:
        return original(self, lane, started - 1)  # type: ignore[no-any-return]

    return wrong


def _keep_what_was_dropped(original: Original) -> Original:
    """Go on with leases that the vertex above has given to others."""

    def wrong(self: Uplinks, peer: Any, message: Any, now: float) -> None:
        original(self, peer, type(message)(message.session, [], message.ack), now)

    return wrong


def _revoke_only_once(original: Original) -> Original:
    """Revoke nothing more from a worker that has not passed a revocation."""

    def wrong(self: Placement, lane: Lane, first: int) -> None:
        if lane.revoke_end is None:
            original(self, lane, first)

    return wrong


def _promise_too_much(original: Original) -> Original:
    """Grant more slots than there are."""

    def wrong(slots: int, sessions: Sequence[Session], aims: dict[Session, int]) -> list[Session]:
        for session in sessions:
            session.granted = aims.get(session, 0)
        return list(sessions)

    return wrong


def _ignore_the_window(original: Original) -> Original:
    """Lease ahead without a window."""

    def wrong(self: Lane, estimate_s: float, is_solo: bool) -> bool:
        return bool(self.slots)

    return wrong


def _forget_to_refill(original: Original) -> Original:
    """Forget to refill after a batch."""
    is_due = _every(10)

    def wrong(self: Placement, lane: Lane) -> None:
        if not is_due():
            original(self, lane)

    return wrong


def _count_badly(original: Original) -> Original:
    """Count a discarded task as still queued."""

    def wrong(self: Queue, task: Task) -> None:
        original(self, task)
        self.count += 1

    return wrong


def _forget_a_kill(original: Original) -> Original:
    """Note that a task is to be killed, and tell nobody."""

    def wrong(self: Fates, task: Task, kind: OutcomeKind = OutcomeKind.KILLED) -> None:
        if task.lane is not None and task.doom is None and kind is OutcomeKind.KILLED:
            task.doom = "killed"
        else:
            original(self, task, kind)

    return wrong


def _lose_on_return(original: Original) -> Original:
    """Take a node's unacknowledged outcomes for tasks that never arrived."""

    def wrong(self: Downlinks, peer: Any, message: Any, now: float) -> None:
        original(self, peer, type(message)(message.session, message.leases, []), now)

    return wrong


def _run_a_duplicate(original: Original) -> Original:
    """Run a lease that is already held once more under another worker."""

    def wrong(self: Uplinks, peer: Any, message: Run, now: float) -> None:
        original(self, peer, message, now)
        session = self.session(peer, message.session)
        task = session.tasks.get(message.seq) if session is not None else None
        if session is not None and task is not None and task.queued:
            session.queue_of(task).push(Task(task.run, session))

    return wrong


PLANTED_BY_THE_ISSUE = [
    Mutant(Uplinks, "_on_ack", _drop_an_ack),
    Mutant(Placement, "_lease", _double_a_lease),
    Mutant(Placement, "reindex", _leak_a_slot),
    Mutant(Placement, "requeue", _forget_a_requeue),
    Mutant(Fates, "late", _accept_a_stale_attempt, STORM),
]

def _acknowledge_at_once(original: Original) -> Original:
    """Acknowledge outcomes before they are recorded."""

    def wrong(self: Scheduler, lane: Lane, message: Outcome, acks: Any, now: float) -> None:
        original(self, lane, message, acks, now)
        if lane.session.is_durable:
            self.acknowledge(lane.session, [message.seq])

    return wrong


def _wait_for_nobody(original: Original) -> Original:
    """Hand recovered tasks out before nodes have said what they hold."""

    def wrong(self: Recovery, session: Session, tasks: Any, parked: Any, awaited: Any, *more: Any) -> None:
        original(self, session, tasks, parked, [], *more)

    return wrong


def _recognise_nothing(original: Original) -> Original:
    """Drop what nodes hold since an earlier life."""
    return lambda self, lane, task, attempt: False


# ---- nested calls


def _lend_to_strangers(original: Original) -> Original:
    """Let a slot that was lent run whoever comes first."""
    return lambda self, brood: True


def _spare_the_children(original: Original) -> Original:
    """Leave the calls of a lost attempt running."""

    def wrong(self: Kin, task: Task, *, has_returned: bool) -> None:
        original(self, task, has_returned=True)

    return wrong


def _run_again_at_once(original: Original) -> Original:
    """Run a lost parent again before its calls have ended."""

    def wrong(self: Kin, task: Task) -> bool:
        if original(self, task):
            self._run_again(task)
            if task.kin is not None:
                task.kin.is_held = False
        return False

    return wrong


def _say_nothing_again(original: Original) -> Original:
    """Keep calls to oneself that were made while the link was cut."""
    return lambda self, session: None


def _answer_only_once(original: Original) -> Original:
    """Forget answers that a cut swallowed."""
    return lambda self, lane: None


def _make_calls_twice(original: Original) -> Original:
    """Take a call that is said again for another one."""

    def wrong(self: Kin, peer: Any, message: Any, now: float) -> None:
        leased = self._leased(peer, message)
        if leased is not None and leased[0].kin is not None:
            leased[0].kin.last_call = 0
        original(self, peer, message, now)

    return wrong


def _stay_paused(original: Original) -> Original:
    """Lend the slot of a task that ended while it waited for ever."""

    def wrong(self: Placement, task: Task, lane: Lane) -> None:
        if task.kin is not None and not task.kin.is_blocked:
            original(self, task, lane)

    return wrong


def _lend_nothing(original: Original) -> Original:
    """Do not tell nodes that a task of theirs may use what is lent."""
    return lambda self, task, lane: None


NESTED = [
    Mutant(Session, "may_borrow", _lend_to_strangers, nests=True),
    Mutant(Kin, "over", _spare_the_children, nests=True),
    Mutant(Kin, "hold", _run_again_at_once, nests=True),
    Mutant(Kin, "say_again", _say_nothing_again, SHORT_CUTS, nests=True),
    Mutant(Kin, "answer_again", _answer_only_once, SHORT_CUTS, nests=True),
    Mutant(Kin, "_on_submit", _make_calls_twice, SHORT_CUTS, nests=True),
    Mutant(Placement, "_leave_slot", _stay_paused, nests=True),
    Mutant(Placement, "tell_lent", _lend_nothing, nests=True),
]

MORE = [
    Mutant(Scheduler, "_on_outcome", _acknowledge_at_once, SHORT_CUTS),
    Mutant(Recovery, "recover", _wait_for_nobody, SHORT_CUTS),
    Mutant(Recovery, "recognises", _recognise_nothing, SHORT_CUTS),
    Mutant(Fates, "died", _charge_nothing),
    Mutant(Placement, "adopt", _charge_twice, STORM),
    Mutant(Scheduler, "worker_gone", _requeue_what_died),
    Mutant(Placement, "taken_back", _take_back_what_runs),
    Mutant(Uplinks, "_on_resume", _keep_what_was_dropped, STORM),
    Mutant(Placement, "revoke", _revoke_only_once),
    Mutant(shares, "regrant", _promise_too_much),
    Mutant(Lane, "has_room", _ignore_the_window),
    Mutant(Placement, "touch", _forget_to_refill),
    Mutant(Queue, "discard", _count_badly),
    Mutant(Fates, "kill", _forget_a_kill),
    Mutant(Downlinks, "_on_held", _lose_on_return),
    Mutant(Uplinks, "_on_run", _run_a_duplicate),
]
