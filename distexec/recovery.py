"""A root that comes back from its journal: which of its tasks nodes still hold, and which are to be handed out again.

    recover ──> waiting ──Held names it──> leased to that node, with the attempt number it has there
                   └──every node was heard, is dead, or late──> queued (or forgotten, while nobody has asked for it)

Pure. Rule: nothing that a node may hold is handed out before that node was heard or given up. What is handed out then gets
an attempt number that no earlier life can have used; until then every attempt that a node reports is taken for the task's.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from .ledger import Lane, LaneState, Peer, Session, Task
from .messages import Kill, Run
from .placement import Placement

UNHEARD = 0
"""The attempt number of a recovered task until a node reports one, or it is handed out."""

ATTEMPTS_PER_LIFE = 1 << 16
"""Attempt numbers set apart for each life of the root: more than a task can be lost and run again in one."""


class Recovery:
    """Moves recovered tasks out of `Session.waiting`."""

    def __init__(self, place: Placement) -> None:
        self._place = place

    def recover(self, session: Session, tasks: Iterable[Task], parked: Set[int], awaited: Iterable[Peer], life: int,
                now: float) -> None:
        """Take up tasks that earlier lives of this root submitted, and may have handed out.

        Args:
            parked: numbers of those that go on if a node has them, and else wait for `ask`.
            awaited: nodes that may hold some, and whatever else is to be `heard` before any of `tasks` is handed out.
            life: how many lives there were before.
        """
        session.first_attempt = max(1, life * ATTEMPTS_PER_LIFE)
        session.recovering_since = now
        session.parked = set(parked)
        session.awaited = set(awaited)
        for task in tasks:
            task.renew = True
            session.tasks[task.run.seq] = session.waiting[task.run.seq] = task
            if task.run.options is not None and task.run.options.timeout_s:
                session.limited = True
        if not session.awaited:
            self._release(session)

    def ask(self, session: Session, task: Task, now: float) -> None:
        """Learn that the owner wants a parked task after all."""
        seq = task.run.seq
        if seq in session.parked:
            session.parked.discard(seq)
            if session.tasks.get(seq) is not task:  # it was released, and nobody wanted it then
                session.tasks[seq] = task
                self._place.submit(session, task)

    def heard(self, session: Session, peer: Peer, now: float) -> None:
        """Learn that a node has said what it holds of the session, or never will."""
        if peer in session.awaited:
            session.awaited.discard(peer)
            if not session.awaited:
                self._release(session)

    def give_up_late(self, session: Session, patience_s: float, now: float) -> None:
        """Wait no longer for nodes that have not come back."""
        if session.awaited and now - session.recovering_since > patience_s:
            session.awaited.clear()
            self._release(session)

    def _release(self, session: Session) -> None:
        """Queue what no node has; what nobody has asked for leaves, and may be submitted later."""
        for seq, task in sorted(session.waiting.items()):
            if seq in session.parked:
                session.forget(task)
            else:
                del session.waiting[seq]
                session.queue_of(task).push(task)
        self._place.fill(session)

    def recognises(self, lane: Lane, task: Task, attempt: int) -> bool:
        """Say whether an attempt that a node holds, other than the one known here, is of an earlier life and counts.

        The task then has that attempt's number, and is queued or waiting. Of two such attempts the later counts: it was
        handed out because the other was taken for lost.
        """
        session = task.session
        if not session.is_root or attempt >= session.first_attempt or attempt < task.run.attempt:
            return False
        if task.run.attempt == UNHEARD:
            if not task.claimed and not self._place.is_wanted(task):
                return False
        elif task.lane is None:
            return False  # it was run here since
        else:
            self._supersede(task, task.lane)
        run = task.run
        task.run = Run(run.session, run.seq, attempt, run.fn, run.data, run.buffers, run.options)
        session.parked.discard(run.seq)
        return True

    def _supersede(self, task: Task, lane: Lane) -> None:
        session = task.session
        self._place.unlease(task)
        if lane.state is not LaneState.SUSPENDED:
            self._place.out.append((lane.peer, Kill(session.no, task.run.seq, task.run.attempt)))
        session.waiting[task.run.seq] = task
