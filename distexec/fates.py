"""What becomes of an attempt that is over: its outcome counts, it is passed upward, it is run again, or it is too late.

    outcome ──> ended (root) or kept and passed up, until acknowledged
    lost    ──> charged and queued again (root), or passed up: only the root retries
    came back unstarted ──> queued again, uncharged

Pure. Rule: every attempt has one fate, and only the root decides that a task is run again.
"""

from __future__ import annotations

from collections.abc import Callable

from .kin import Kin
from .ledger import ABANDONED, KillWorker, Lane, LaneState, Peer, Session, Task
from .messages import Ack, Evidence, Kill, Lost, Outcome, OutcomeKind, SessionFailed
from .placement import Placement


class Fates:
    """Ends attempts; the root's ended tasks collect in `ended`, sessions that cannot be run somewhere in `failures`."""

    def __init__(self, place: Placement, slots: Callable[[], int]) -> None:
        self.kin = Kin(place, self.kill, slots)
        self.ended: list[tuple[Task, Outcome | Lost]] = []
        self.failures: list[tuple[Session, Peer | None, SessionFailed]] = []
        self._place = place

    def come_back(self, task: Task) -> None:
        """A lease ended without the task having started."""
        if task.doom is not None:
            self.finish(task, verdict(task, task.doom))
        elif task.kin is None or not self._is_held(task):
            self._place.requeue(task)

    def _is_held(self, task: Task) -> bool:
        """End what an attempt has called for; say whether it must wait for that before it runs again."""
        self.kin.over(task, has_returned=False)
        return task.session.is_root and self.kin.hold(task)

    def end(self, task: Task, end: Outcome | Lost) -> None:
        """Conclude a task at the root."""
        if task.kin is not None and task.kin.is_nested:
            self.kin.ended(task, end)
        else:
            self.ended.append((task, end))

    def kill(self, task: Task, kind: OutcomeKind = OutcomeKind.KILLED) -> None:
        """End a task wherever it is: with `kind`, or with its outcome if that is faster."""
        session, lane = task.session, task.lane
        if session.tasks.get(task.run.seq) is not task or task.doom is not None:
            return
        if lane is None:
            self.finish(task, verdict(task, kind))
            return
        task.doom = kind
        if lane.is_worker:
            self._place.revoke(lane, task.order)
        elif lane.state is not LaneState.SUSPENDED:
            self._place.out.append((lane.peer, Kill(session.no, task.run.seq, task.run.attempt)))

    def finish(self, task: Task, message: Outcome) -> None:
        """A task that is leased to nobody ends here, by our own verdict."""
        if task.kin is not None:
            self.kin.over(task, has_returned=False)
        if task.doom is ABANDONED:
            return
        if task.session.is_root:
            task.session.forget(task)
            self.end(task, message)
        else:
            self.pass_up(task, message, None)

    def pass_up(self, task: Task, message: Outcome | Lost, lane: Lane | None) -> None:
        """Send an end upward, and keep it until the root has acknowledged it."""
        session = task.session
        session.forget(task)
        if message.session != session.uplink_no:
            message = renumbered(message, session.uplink_no)
        session.unacked[message.seq] = (message, None if lane is None or lane.is_worker else lane)
        if session.upstream is not None and not session.reconciling:
            self._place.out.append((session.upstream, message))

    def died(self, task: Task, evidence: Evidence) -> None:
        """An attempt died while it may have been running; only the root decides whether it is run again."""
        session = task.session
        task.lane = None
        if task.doom is not None:
            self.finish(task, verdict(task, task.doom))
        elif not session.is_root:
            if task.kin is not None:
                self.kin.over(task, has_returned=False)
            self.pass_up(task, Lost(session.uplink_no, task.run.seq, task.run.attempt, evidence), None)
        else:
            task.deaths += 1
            task.charged = True
            if task.deaths > task.retries:
                session.forget(task)
                if task.kin is not None:
                    self.kin.over(task, has_returned=False)
                self.end(task, Lost(0, task.run.seq, task.run.attempt, evidence))
            elif task.kin is None or not self._is_held(task):
                self._place.requeue(task)

    def late(self, lane: Lane, message: Outcome | Lost) -> None:
        """Judge the end of an attempt that is not leased to this lane: an outcome counts if nothing replaced the attempt."""
        session = lane.session
        task = session.tasks.get(message.seq)
        if type(message) is Outcome and task is not None and task.queued and task.run.attempt == message.attempt:
            session.forget(task)
            if not session.is_root:
                self.pass_up(task, message, lane)
                return
            self.end(task, message)
            if session.is_durable and not lane.is_worker:
                session.unacked[message.seq] = (message, lane)
        if self.is_unrecorded(lane, message.seq, message.attempt):
            session.unacked[message.seq] = (message, lane)  # it will be acknowledged where it was said last
        elif not lane.is_worker:
            self._place.out.append((lane.peer, Ack(session.no, [message.seq], [message.attempt])))

    def is_unrecorded(self, lane: Lane, seq: int, attempt: int) -> bool:
        """Say whether this end of a task is here, and is to be acknowledged only when its root has recorded it."""
        entry = lane.session.unacked.get(seq) if lane.session.is_root else None
        return entry is not None and entry[0].attempt == attempt

    def fail(self, session: Session, peer: Peer | None, failure: SessionFailed) -> None:
        """No more workers of the session can be had here: what runs may end, the rest goes back."""
        session.failed = True
        if session.is_root:
            self.failures.append((session, peer, failure))
        else:
            session.failure = failure
            self._place.give_back(session, session.unleased())
            self.tell_failure(session)

    def tell_failure(self, session: Session) -> None:
        """Say upward that the session failed, once nothing of it runs here: what is leased here then counts as unstarted."""
        failure = session.failure
        if failure is not None and session.paused and session.paused == session.busy == len(session.tasks):
            # They wait for calls that cannot run here, and perhaps nowhere: the root shall know, and run them elsewhere.
            reason = f"it waited for nested calls, and no more workers could be had: {failure.evidence.reason}"
            self._place.pool.extend(KillWorker(lane.peer, reason) for lane in session.lanes.values() if lane.paused)
        if failure is None or session.has_confessed or session.tasks:
            return
        if session.upstream is not None and not session.reconciling:
            session.has_confessed = True
            self._place.out.append((session.upstream, SessionFailed(
                session.uplink_no, failure.evidence, failure.data, failure.generation)))


def verdict(task: Task, kind: OutcomeKind | str) -> Outcome:
    """Make the outcome of a task that ends by our decision."""
    return Outcome(task.session.uplink_no, task.run.seq, task.run.attempt,
                   OutcomeKind.KILLED if isinstance(kind, str) else kind, b"", 0)


def renumbered(message: Outcome | Lost, number: int) -> Outcome | Lost:
    """Make the same message for a link on which the session has another number."""
    if isinstance(message, Outcome):
        return Outcome(number, message.seq, message.attempt, message.kind, message.data, message.run_ns, message.buffers,
                       message.pid)
    return Lost(number, message.seq, message.attempt, message.evidence)
