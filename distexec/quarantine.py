"""What a root learns from deaths on nodes: where a task is not to be tried again at once, and which node to leave alone.

    Lost ──> the task waits for another node, if one could take it ──ran well there──> a strike against the first
    enough strikes, and others do better ──> quarantine: no new leases, what is not begun is taken back
    the pause is over, or nobody else is left ──> used again; fails it again at once, the pause is twice as long

Pure. Rule: a node is judged only by what others did well after it failed, so a task that dies everywhere harms no node, and
tasks that die here and there harm none more than the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .ledger import NOBODY, Lane, LaneState, Peer, Session, Task
from .messages import Message, Outcome, OutcomeKind, Recall
from .placement import Placement

STRIKES = 3
"""Tasks that died on a node and ran well elsewhere before it is left alone. Smaller: chance does it. Larger: more tasks lose
an attempt there."""

SHARE = 5
"""One in so many of its tasks at least must have failed so. Smaller: a node that fails every tenth task is used on."""

WORSE = 2
"""How many times the others' rate of failure its own must be. Smaller: of nodes that are alike, one is taken for worse."""

WINDOW_S = 60.0
"""How far back strikes count, and up to twice that."""

PAUSE_S, PAUSE_MAX_S = 10.0, 600.0
"""How long the first quarantine lasts, and the longest; each that follows is twice the last."""

PATIENCE_S = 5.0
"""How long a task waits for another node than that on which it died. Longer: it waits though a slot is idle. Shorter: where
all others are busy it dies on the same node again."""


class Quarantine:
    """The deaths at one root. `sessions` is the scheduler's list; `notices` collects what the user should know."""

    def __init__(self, place: Placement, sessions: list[Session]) -> None:
        self.notices: list[str] = []
        self._place, self._sessions = place, sessions
        self._records: dict[Peer, _Record] = {}  # since the first death, until nothing happened for a while
        self._suspects: dict[Task, _Suspect] = {}  # tasks that died on nodes and have not ended
        self._turned_at = 0.0

    @property
    def is_watching(self) -> bool:
        """Whether outcomes matter."""
        return bool(self._records)

    def problem(self, peer: Peer, now: float) -> str:
        """Say why a node is left alone; "" if it is not."""
        record = self._records.get(peer)
        if record is None or not record.is_out:
            return ""
        return f"quarantined for another {max(0.0, record.until - now):.0f} s: {record.reason}"

    def state(self, peer: Peer) -> LaneState:
        """Give the state of a lane that could be used otherwise."""
        record = self._records.get(peer)
        return LaneState.QUARANTINED if record is not None and record.is_out else LaneState.ACTIVE

    def forget(self, peer: Peer) -> None:
        """Forget a node that will not come back."""
        self._records.pop(peer, None)

    # ---- what happens

    def saw(self, peer: Peer, lanes: Mapping[tuple[Peer, int], Lane], messages: Sequence[Message]) -> None:
        """Count what somebody did well; `lanes` gives who that is, by the session's number."""
        done = [message for message in messages if type(message) is Outcome and message.kind <= OutcomeKind.ERROR]
        lane = lanes.get((peer, done[0].session)) if done else None
        if lane is not None:
            self._record(None if lane.is_worker else peer).done += len(done)

    def saw_death(self, task: Task, lane: Lane, reason: str, now: float) -> None:
        """Learn that a task is about to be charged with a death on a node: another is to have it next."""
        if not self._records:
            self._turned_at = now
        self._record(lane.peer).reason = reason
        suspect = self._suspects.get(task)
        died_on = {lane.peer: reason} if suspect is None else {**suspect.died_on, lane.peer: reason}
        self._suspects[task] = _Suspect(died_on, now)
        if not (task.run.options is not None and task.run.options.node):
            task.session.shun(task, frozenset(died_on))

    def saw_end(self, task: Task, lane: Lane, outcome: Outcome, now: float) -> None:
        """Learn that a task with deaths has ended; if well, that is held against the nodes where it died."""
        suspect = self._suspects.pop(task, None)
        if suspect is None or outcome.kind > OutcomeKind.ERROR or lane.peer in suspect.died_on:
            return
        for peer, reason in suspect.died_on.items():
            record = self._record(peer)
            record.strikes += 1
            record.reason = reason
            self._judge(peer, record, now)

    def _record(self, peer: Peer) -> _Record:
        known = self._records.get(peer)
        if known is None:
            known = self._records[peer] = _Record()
        return known

    def _judge(self, peer: Peer, record: _Record, now: float) -> None:
        strikes, done = record.strikes + record.older_strikes, record.done + record.older_done
        others = [each for key, each in self._records.items() if key != peer]
        their_strikes = sum(each.strikes + each.older_strikes for each in others)
        their_done = sum(each.done + each.older_done for each in others)
        is_enough = strikes >= (1 if record.pause_s else STRIKES) and strikes * SHARE >= strikes + done
        is_worse = strikes * (their_strikes + their_done + 1) >= WORSE * (their_strikes + 1) * (strikes + done)
        lanes = [session.lanes[peer] for session in self._sessions if peer in session.lanes]
        if record.is_out or not (is_enough and is_worse) or not lanes:
            return
        if not all(lane.session.can_do_without(frozenset((peer,))) for lane in lanes):
            return
        record.pause_s = min(PAUSE_MAX_S, 2 * record.pause_s or PAUSE_S)
        record.until, record.is_out = now + record.pause_s, True
        record.clear()
        self.notices.append(
            f"node {lanes[0].name!r} gets no tasks for {record.pause_s:g} s: of those that died there, {strikes} then ran "
            f"well elsewhere (last: {record.reason})")
        for lane in lanes:
            self._set_out(lane)

    def _set_out(self, lane: Lane) -> None:
        if lane.state is LaneState.ACTIVE:
            lane.state = LaneState.QUARANTINED
            self._place.reindex(lane)
            if lane.leases:
                self._place.out.append((lane.peer, Recall(lane.session.no, len(lane.leases))))
        self._place.touched[lane.session] = None

    # ---- time

    def tick(self, session: Session, now: float) -> None:
        """Let time pass for a session: pauses end, patience too, and what is long past counts no more."""
        if self._records:
            for peer, record in self._records.items():
                if record.is_out and (now >= record.until or not session.can_do_without(frozenset((peer,)))):
                    record.is_out = False
                    self._let_in(session, peer)
            self._turn(now)
        if self._suspects:
            self._end_patience(session, now)

    def _let_in(self, session: Session, peer: Peer) -> None:
        lane = session.lanes.get(peer)
        if lane is not None and lane.state is LaneState.QUARANTINED:
            lane.state, session.wanted = LaneState.ACTIVE, None
            self._place.reindex(lane)
            self._place.fill(session)

    def _end_patience(self, session: Session, now: float) -> None:
        impatient = []
        for task, suspect in list(self._suspects.items()):
            if session.tasks.get(task.run.seq) is not task:
                del self._suspects[task]  # it ended without an outcome of its own
            elif task.shuns and task.queued and now - suspect.since > PATIENCE_S:
                impatient.append(task)
        for task in impatient:
            session.queue_of(task).discard(task)
            session.shun(task, NOBODY)
            session.queue_of(task).push_front(task)
        if impatient:
            self._place.fill(session)

    def _turn(self, now: float) -> None:
        if now - self._turned_at < WINDOW_S:
            return
        self._turned_at = now
        for record in self._records.values():
            record.older_strikes, record.older_done = record.strikes, record.done
            record.strikes = record.done = 0
            if not (record.is_out or record.older_strikes or now - record.until < PAUSE_MAX_S):
                record.pause_s = 0.0
        if not self._suspects and not any(
                each.is_out or each.older_strikes or each.pause_s for each in self._records.values()):
            self._records.clear()


class _Record:
    """How a node did lately: in this window and the one before."""

    __slots__ = ("done", "is_out", "older_done", "older_strikes", "pause_s", "reason", "strikes", "until")

    def __init__(self) -> None:
        self.pause_s = self.until = 0.0  # of its last quarantine; 0: none that still matters
        self.is_out = False
        self.reason = ""
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.strikes = self.done = self.older_strikes = self.older_done = 0


class _Suspect:
    """A task that died: on which nodes and of what, and when last."""

    __slots__ = ("died_on", "since")

    def __init__(self, died_on: dict[Peer, str], since: float) -> None:
        self.died_on, self.since = died_on, since
