"""What the links above say of their sessions: tasks handed down and taken back, ends acknowledged, links that return.

    Run ──> queue, or waiting for blobs      Recall, Kill ──> taken back, ended
    Open again ──> Held ──upward             Resume ──> dropped, acknowledged; kept ends and the offer said anew

The mirror of what the `Scheduler` hears from below, on the same records. Pure. Rule: a link is heard only about sessions
it holds; what names another, or an attempt that is over, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fates import Fates, renumbered
from .ledger import Kinship, Lane, LaneState, Peer, Session, Task
from .messages import Ack, Answer, Define, Held, Kill, Lend, Open, Recall, Resume, Run, Undefine, Want
from .placement import Placement
from .shares import Shares


class Uplinks:
    """The links above and their sessions; `table` gives the method for each message of theirs but `Close`.

    `absent(run)` says whether blobs the task needs are missing here.
    """

    def __init__(self, place: Placement, fates: Fates, shares: Shares, absent: Callable[[Run], bool] | None) -> None:
        self.table: dict[type, Callable[[Peer, Any, float], None]] = {
            Run: self._on_run, Define: self._on_define, Undefine: self._on_undefine, Recall: self._on_recall,
            Kill: self._on_kill, Ack: self._on_ack, Want: self._on_want, Resume: self._on_resume,
            Answer: self._on_answer, Lend: self._on_lend}
        self._sessions: dict[tuple[Peer, int], Session] = {}  # by the link and the session's number there
        self._place, self._fates, self._shares = place, fates, shares
        self._absent = absent

    # ---- which session is on which link

    def session(self, peer: Peer, number: int) -> Session | None:
        """Find the session that a link means by `number`."""
        return self._sessions.get((peer, number))

    def attach(self, session: Session) -> None:
        """Hear the session's link about it from now on."""
        if session.upstream is not None:
            self._sessions[session.upstream, session.uplink_no] = session

    def detach(self, session: Session) -> None:
        """Hear no link about the session any more."""
        self._sessions.pop((session.upstream, session.uplink_no), None)

    def take_up(self, session: Session, opened: Open, upstream: Peer) -> None:
        """Go on with a session on a new link: say what is held, and keep the rest until `Resume`."""
        self.detach(session)
        session.upstream, session.uplink_no, session.orphaned_at = upstream, opened.session, None
        session.linger_s = opened.linger_s
        self.attach(session)
        session.reconciling, session.has_confessed = True, False
        leases = [(task.run.seq, task.run.attempt) for task in session.tasks.values()]
        ended = [(message.seq, message.attempt) for message, _ in session.unacked.values()]
        self._place.out.append((upstream, Held(opened.session, leases, ended, session.birth)))

    # ---- messages

    def _on_run(self, peer: Peer, message: Run, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is None:
            return
        seq = message.seq
        older = session.tasks.get(seq)
        if older is not None:
            if older.run.attempt >= message.attempt:
                return
            self._abandon(older)
        if session.no != message.session:
            message = Run(session.no, seq, message.attempt, message.fn, message.data, message.buffers, message.options)
        task = session.tasks[seq] = Task(message, session)
        if message.options is not None:
            if message.options.timeout_s:
                session.limited = True
            if message.options.ancestors:
                task.kin = Kinship(task, is_nested=True)
        if session.failed or self._place.draining or not session.told:
            self._place.give_back(session, [task])
        elif self._absent is not None and _may_be_absent(session, message) and self._absent(message):
            session.waiting[seq] = task
        else:
            session.queue_of(task).push(task)
            self._place.touched[session] = None

    def _abandon(self, task: Task) -> None:
        lane = task.lane
        if task.kin is not None:
            self._fates.kin.over(task, has_returned=False)
        if lane is not None and not lane.is_worker:
            self._place.unlease(task)
            if lane.state is not LaneState.SUSPENDED:
                self._place.out.append((lane.peer, Kill(task.session.no, task.run.seq, task.run.attempt)))
        self._place.abandon(task)

    def _on_define(self, peer: Peer, message: Define, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is not None:
            if session.no != message.session:
                message = Define(session.no, message.fn, message.data, message.buffers)
            session.code[message.fn] = message

    def _on_undefine(self, peer: Peer, message: Undefine, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is not None:
            self._place.undefine(session, message.fns)

    def _on_recall(self, peer: Peer, message: Recall, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is None:
            return
        returned = [session.queue.pop_youngest() for _ in range(min(message.count, session.queue.count))]
        for brood in session.broods or ():
            while brood.count and len(returned) < message.count:
                returned.append(brood.pop_youngest())
        self._place.give_back(session, returned[::-1])
        session.owed = missing = message.count - len(returned)
        for lane in session.lanes.values():
            if missing > 0 and not lane.is_worker and len(lane.leases) > lane.slots:
                self._place.out.append((lane.peer, Recall(session.no, missing)))
                missing -= len(lane.leases) - lane.slots

    def _on_kill(self, peer: Peer, message: Kill, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        task = session.tasks.get(message.seq) if session is not None else None
        if task is not None and task.run.attempt == message.attempt:
            self._fates.kill(task)

    def _on_ack(self, peer: Peer, message: Ack, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is not None:
            self.acknowledge(session, message.seqs, message.attempts)

    def acknowledge(self, session: Session, seqs: list[int], attempts: list[int] | None = None) -> None:
        """Forget these outcomes, if `attempts` are given only of those, and let the nodes below forget them."""
        below: dict[Lane, list[int]] = {}
        for position, seq in enumerate(seqs):
            entry = session.unacked.get(seq)
            if entry is None or (attempts and attempts[position] != entry[0].attempt):
                continue
            del session.unacked[seq]
            if session.left:
                self._fates.kin.acknowledged(session, seq)
            if entry[1] is not None:
                below.setdefault(entry[1], []).append(seq)
        for lane, ended in below.items():
            if session.lanes.get(lane.peer) is lane and lane.state is not LaneState.SUSPENDED:
                self._place.out.append((lane.peer, Ack(session.no, ended)))

    def _on_want(self, peer: Peer, message: Want, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is not None:
            session.want = message.count
            self._place.tell_want(session)
            self._shares.divide(now)

    def _on_answer(self, peer: Peer, message: Answer, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is not None:
            self._fates.kin.answered(session, message)
        else:
            self._fates.kin.spend(message)

    def _on_lend(self, peer: Peer, message: Lend, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is not None:
            self._fates.kin.lent(session, message)

    def _on_resume(self, peer: Peer, message: Resume, now: float) -> None:
        session = self._sessions.get((peer, message.session))
        if session is None:
            return
        for seq, attempt in message.drop:
            task = session.tasks.get(seq)
            if task is not None and task.run.attempt == attempt:
                self._abandon(task)
        self._on_ack(peer, Ack(message.session, message.ack), now)
        session.reconciling = False
        self._fates.kin.say_again(session)
        for seq, (end, lane) in session.unacked.items():
            session.unacked[seq] = (renumbered(end, session.uplink_no), lane)
            self._place.out.append((peer, session.unacked[seq][0]))
        session.told = -1
        self._shares.offer(session)
        self._fates.tell_failure(session)


def _may_be_absent(session: Session, run: Run) -> bool:
    definition = session.code.get(run.fn)
    has_files = run.options is not None and bool(run.options.files)
    return bool(run.buffers) or has_files or definition is None or bool(definition.buffers)
