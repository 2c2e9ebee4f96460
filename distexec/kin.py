"""Nested calls: who called whom, who waits for whom, and whose slot is lent meanwhile.

    task ── Submit ──upward──► root: an ordinary task, with its ancestors    ◄── Answer ──downward── its end
         ── Blocked ─────────► its slot is lent, here and above; lent slots run descendants of who waits, deepest first
         ── Took ────────────► the answer has arrived, nobody keeps it any more

Pure; on the scheduler's records. Rule: an attempt that ends in any other way than by returning a value takes its calls with
it, and it is not run again before the last of them has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec import structs

from .ledger import ABANDONED, Kinship, Lane, LaneState, Peer, Session, Task
from .messages import Answer, Blocked, Buffers, Evidence, Lend, Lost, Outcome, OutcomeKind, Refuse, Run, Submit, Took
from .placement import Placement

LEAST_PAUSED = 32
PAUSED_PER_SLOT = 8
"""Tasks of a session that may wait on one machine, whatever its slots, and per slot. Smaller: recursion ends sooner. Larger:
more processes, each with what its task holds."""


class Called(NamedTuple):
    """At the root: a task made this call, which is to become a task."""

    parent: Task
    submit: Submit


class Spent(NamedTuple):
    """Nobody needs these buffers any more."""

    buffers: Buffers


class Ended(NamedTuple):
    """At the root: this nested call has ended, and its caller was answered."""

    task: Task


News = Called | Spent | Ended


class Kin:
    """The nested calls of one vertex; `news` is for whoever has the buffers and makes the root's tasks.

    Args:
        kill: ends a task.
        slots: how many tasks the vertex's own workers may run at once.
    """

    def __init__(self, place: Placement, kill: Callable[[Task], object], slots: Callable[[], int]) -> None:
        self.news: list[News] = []
        self._place, self._kill, self._slots = place, kill, slots
        self.table: dict[type, Callable[[Peer, Any, float], None]] = {
            Submit: self._on_submit, Blocked: self._on_blocked, Took: self._on_took}

    # ---- what tasks say, from below

    def _leased(self, peer: Peer, message: Submit | Blocked | Took) -> tuple[Task, Lane] | None:
        lane = self._place.lanes.get((peer, message.session))
        task = lane.leases.get(message.seq) if lane is not None else None
        if lane is None or task is None or task.run.attempt != message.attempt:
            return None
        return task, lane

    def _on_submit(self, peer: Peer, message: Submit, now: float) -> None:
        leased = self._leased(peer, message)
        if leased is None or leased[0].doom is not None:
            self.spend(message)
            return
        task = leased[0]
        kin, session = _kin_of(task), task.session
        kin.serve(message.attempt)
        if message.call <= kin.last_call:  # said again after a link was cut
            self.spend(message)
            return
        kin.last_call = message.call
        if session.is_root:
            self.news.append(Called(task, message))
        else:
            kin.submits[message.call] = message
            self._say(session, message)

    def _on_blocked(self, peer: Peer, message: Blocked, now: float) -> None:
        leased = self._leased(peer, message)
        if leased is None:
            return
        task, lane = leased
        kin, session = _kin_of(task), task.session
        kin.serve(message.attempt)
        if kin.is_blocked is message.is_blocked:
            return
        if not message.is_blocked:
            self._place.resume(task, lane)
        else:
            limit = max(LEAST_PAUSED, PAUSED_PER_SLOT * self._slots())
            if lane.is_worker and session.paused >= limit:
                self._place.out.append((peer, Refuse(session.no, message.seq, message.attempt, limit, message.wait)))
                return
            self._place.pause(task, lane)
            self._lend_below(task)
        self._say(session, message)
        self._place.touched[session] = None

    def _lend_below(self, waiting: Task) -> None:
        """Let the descendants of a task that waits, at whatever node they are leased, use slots that are lent there."""
        session, seq = waiting.session, waiting.run.seq
        if len(session.lanes) == session.workers:
            return
        for lane in session.lanes.values():
            for task in () if lane.is_worker or lane.state is LaneState.SUSPENDED else lane.leases.values():
                if task.run.options is not None and seq in task.run.options.ancestors:
                    self._place.out.append((lane.peer, Lend(session.no, task.run.seq, task.run.attempt)))

    def _on_took(self, peer: Peer, message: Took, now: float) -> None:
        leased = self._leased(peer, message)
        if leased is None or leased[0].kin is None:
            return
        task = leased[0]
        kin = task.kin
        assert kin is not None, "just looked at"
        for call in message.calls:
            for kept in (kin.answers.pop(call, None), kin.submits.pop(call, None)):
                if kept is not None:
                    self.spend(kept)
            if task.session.is_root and call not in kin.answers:
                self._give_up(kin, call)
        self._say(task.session, message)

    def _give_up(self, kin: Kinship, call: int) -> None:
        child = kin.calls.pop(call, None)
        if child is None or child.kin is None:
            if call > kin.last_call:
                return
            kin.unwanted.add(call)
            return
        child.kin.call = 0
        if child.lane is None and child.deaths == 0:
            self._kill(child)

    def _say(self, session: Session, message: Submit | Blocked | Took) -> None:
        if session.upstream is not None and not session.reconciling and not session.is_root:
            self._place.out.append((session.upstream, _renumbered(message, session.uplink_no)))

    # ---- what the vertex above says

    def answered(self, session: Session, message: Answer) -> None:
        """Pass an answer on to the task, and keep it until that has it."""
        task = session.tasks.get(message.seq)
        kin = task.kin if task is not None else None
        if task is None or kin is None or kin.attempt != message.attempt or task.lane is None:
            self.spend(message)
            return
        submit, older = kin.submits.pop(message.call, None), kin.answers.get(message.call)
        for spent in (submit, older):
            if spent is not None:
                self.spend(spent)
        kin.answers[message.call] = message = _renumbered(message, session.no)
        if task.lane.state is not LaneState.SUSPENDED:
            self._place.out.append((task.lane.peer, message))

    def lent(self, session: Session, message: Lend) -> None:
        """Let a task use slots that are lent, here or below."""
        task = session.tasks.get(message.seq)
        if task is None or task.kin is None or task.run.attempt != message.attempt:
            return
        task.kin.is_lent = True
        if task.queued:
            self._place.touched[session] = None
        elif task.lane is not None and not task.lane.is_worker and task.lane.state is not LaneState.SUSPENDED:
            self._place.out.append((task.lane.peer, Lend(session.no, message.seq, message.attempt)))

    # ---- links that return

    def say_again(self, session: Session) -> None:
        """Say to the vertex above how things stand, before it hears what has ended."""
        for kin in session.left.values():
            for submit in kin.submits.values():
                self._say(session, submit)
        for task in session.tasks.values():
            kin_ = task.kin
            if kin_ is not None and kin_.attempt == task.run.attempt and task.lane is not None:
                for submit in kin_.submits.values():
                    self._say(session, submit)
                self._say(session, Blocked(session.uplink_no, task.run.seq, task.run.attempt, kin_.is_blocked))

    def answer_again(self, lane: Lane) -> None:
        """Say to a node whose link is back what it may not have heard."""
        for task in lane.leases.values():
            kin = task.kin
            if kin is not None:
                self._place.out.extend((lane.peer, answer) for answer in kin.answers.values())
                self._place.tell_lent(task, lane)

    # ---- ends

    def over(self, task: Task, *, has_returned: bool) -> None:
        """An attempt has ended: its calls go on if it returned a value, and nobody waits for them; else they end too."""
        kin = task.kin
        if kin is None or (not kin.attempt and not kin.children):
            return
        session = task.session
        for answer in kin.answers.values():
            self.spend(answer)
        kin.answers.clear()
        kin.calls.clear()
        kin.unwanted.clear()
        kin.has_returned = has_returned
        if not has_returned:
            kin.attempt = 0
            for child in list(kin.children.values()):
                assert child.kin is not None, "a child knows its parent"
                child.kin.call = 0
                self._kill(child)
        if has_returned and kin.submits and task.doom is not ABANDONED:
            self.acknowledged(session, task.run.seq)  # what an older attempt left
            session.left[task.run.seq] = kin
        else:
            self._drop_submits(kin)

    def acknowledged(self, session: Session, seq: int) -> None:
        """The root has an outcome, and so all that its task called for."""
        kin = session.left.pop(seq, None)
        if kin is not None:
            self._drop_submits(kin)

    def _drop_submits(self, kin: Kinship) -> None:
        for submit in kin.submits.values():
            self.spend(submit)
        kin.submits.clear()

    def hold(self, task: Task) -> bool:
        """At the root: give a lost attempt with calls of its own no way back; True if it is to wait for their end."""
        kin = task.kin
        if kin is None or not kin.last_call:
            return False
        run, session = task.run, task.session
        attempt = max(run.attempt + 1, session.first_attempt)
        task.run = Run(run.session, run.seq, attempt, run.fn, run.data, run.buffers, run.options)
        task.charged = False
        kin.last_call = 0
        if not kin.children:
            return False
        kin.is_held = True
        session.waiting[run.seq] = task
        return True

    def ended(self, task: Task, end: Outcome | Lost) -> None:
        """At the root: a nested call has ended; answer who made it, if that still waits."""
        kin = task.kin
        assert kin is not None, "only nested calls end here"
        parent, seq = kin.parent, task.run.seq
        for child in kin.children.values():
            assert child.kin is not None, "a child knows its parent"
            child.kin.parent, child.kin.call = parent, 0
            if parent is not None:
                parent.children[child.run.seq] = child
        kin.children = {}
        self.news.append(Ended(task))
        if parent is not None:
            parent.children.pop(seq, None)
            self._answer(parent, task, kin.call, end)
            if parent.is_held and not parent.children:
                parent.is_held = False
                self._run_again(parent.task)
        elif isinstance(end, Outcome):
            self.spend(end)

    def _answer(self, parent: Kinship, task: Task, call: int, end: Outcome | Lost) -> None:
        caller = parent.task
        is_wanted = call and parent.attempt == caller.run.attempt and caller.lane is not None
        if not is_wanted or caller.lane is None:
            if isinstance(end, Outcome):
                self.spend(end)
            return
        parent.calls.pop(call, None)
        session, run = caller.session, caller.run
        if isinstance(end, Outcome):
            answer = Answer(session.no, run.seq, run.attempt, call, end.kind, end.data, end.buffers, task.node)
        else:
            answer = Answer(session.no, run.seq, run.attempt, call, OutcomeKind.KILLED, b"", (), task.node, end.evidence,
                            task.deaths)
        parent.answers[call] = answer
        if caller.lane.state is not LaneState.SUSPENDED:
            self._place.out.append((caller.lane.peer, answer))

    def refuse(self, parent: Task, submit: Submit, evidence: Evidence) -> None:
        """At the root: answer a call that could not be made a task."""
        kin, lane = parent.kin, parent.lane
        if kin is None or lane is None or not kin.attempt == submit.attempt == parent.run.attempt:
            return
        answer = Answer(parent.session.no, submit.seq, submit.attempt, submit.call, OutcomeKind.KILLED, b"",
                        evidence=evidence)
        kin.answers[submit.call] = answer
        if lane.state is not LaneState.SUSPENDED:
            self._place.out.append((lane.peer, answer))

    def _run_again(self, task: Task) -> None:
        session = task.session
        if session.waiting.pop(task.run.seq, None) is task:
            self._place.requeue(task)
            self._place.fill(session)

    def adopt(self, parent: Task, submit: Submit, task: Task) -> bool:
        """At the root: make a call a task, with its ancestors; False if nobody wants that any more."""
        kin, session = parent.kin, parent.session
        if kin is None or kin.attempt != submit.attempt or session.closing or submit.call in kin.unwanted:
            return False
        call = 0 if kin.has_returned else submit.call
        guardian: Kinship | None = kin
        while guardian is not None and guardian.has_returned:
            guardian = guardian.parent
        task.kin = Kinship(task, guardian, call, is_nested=True)
        if guardian is not None:
            guardian.children[task.run.seq] = task
        if call:
            kin.calls[call] = task
        task.claimed = True  # nobody can cancel it before it begins
        return True

    def close(self, session: Session) -> None:
        """The session ends: nothing of it is kept."""
        for task in session.tasks.values():
            if task.kin is not None:
                for answer in task.kin.answers.values():
                    self.spend(answer)
                task.kin.answers.clear()
                task.kin.attempt = 0
                self._drop_submits(task.kin)
        for kin in session.left.values():
            self._drop_submits(kin)
        session.left.clear()
        session.blocked.clear()

    def spend(self, message: Submit | Answer | Outcome) -> None:
        """Say that nobody needs the buffers of a message any more."""
        if message.buffers:
            self.news.append(Spent(message.buffers))
        if isinstance(message, Submit) and message.function_buffers:
            self.news.append(Spent(message.function_buffers))


def ancestors_of(parent: Task) -> tuple[int, ...]:
    """Name the tasks that a call made by `parent` is a descendant of, outermost first: those that have not ended."""
    tasks = parent.session.tasks
    known = (*(parent.run.options.ancestors if parent.run.options is not None else ()), parent.run.seq)
    return tuple(seq for seq in known if seq in tasks)


def _kin_of(task: Task) -> Kinship:
    if task.kin is None:
        task.kin = Kinship(task)
    return task.kin


def _renumbered(message: Any, number: int) -> Any:
    return message if message.session == number else structs.replace(message, session=number)
