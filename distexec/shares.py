"""How many of a vertex's own slots each session may use.

Shares follow demand and weight: nobody gets more than it can use while another wants more, and what nobody wants is spread
as standing offers, so that a client that comes back need not ask. Pure. Rule: what sessions may use and what they still
run together never exceeds the slots, so an offer is a promise.
"""

from __future__ import annotations

from collections.abc import Sequence

from .ledger import Lane, Session
from .messages import Offer
from .placement import Placement

TURN_S = 0.1
"""How long a slot that cannot be divided stays with one session. Smaller: more tasks are handed back and forth. Larger: with
more sessions than slots, a client waits longer for its turn."""

PEAK_S = 0.1
"""How long a session keeps its share while its client pauses between two tasks. Smaller: a client that makes one call after
the other asks for its slot each time. Larger: an idle client's slots stand still that long."""


class Shares:
    """The sessions of a vertex and its own `slots`, divided among them; what changes is offered upward."""

    def __init__(self, place: Placement, slots: int, sessions: list[Session]) -> None:
        self.slots = slots
        self._place, self._sessions = place, sessions  # the list is the scheduler's

    def divide(self, now: float) -> None:
        """Divide our own slots among the sessions anew."""
        able = [] if self._place.draining else [session for session in self._sessions if not session.failed]
        aims = targets(self.slots, able, now) if able else {}
        grown = regrant(self.slots, self._sessions, aims)
        for session in self._sessions:
            self.offer(session)
        for session in self._sessions:
            if session in grown or session.wary:
                self._place.fill(session)

    def offer(self, session: Session) -> None:
        """Say upward, when it changes, how many slots the session has here and below."""
        if session.is_root or session.upstream is None or session.reconciling:
            return
        slots = 0 if self._place.draining else session.granted + sum(
            lane.slots for lane in session.lanes.values() if not lane.is_worker)
        if slots == session.told:
            return
        session.told = slots
        self._place.out.append((session.upstream, Offer(session.uplink_no, slots, session.birth)))
        if not slots:
            self._place.give_back(session, session.unleased())

    def cap(self, session: Session) -> None:
        """Use no more of the slots nodes offer than the session's ceiling, first on nodes that tasks must go to."""
        nodes = [lane for lane in session.lanes.values() if not lane.is_worker]
        if session.pinned and session.ceiling:
            nodes.sort(key=lambda lane: lane.name not in session.pinned)
        cap(session, nodes)
        for lane in nodes:
            self._place.reindex(lane)
        self.offer(session)
        self._place.fill(session)


def demand(session: Session, slots: int, now: float) -> int:
    """Count the slots a session could use now, or could a moment ago."""
    load = len(session.tasks)
    if load >= session.peak or now - session.peak_at > PEAK_S:
        session.peak, session.peak_at = load, now
    return min(session.ceiling or slots, max(load, session.peak) + session.want)


def targets(slots: int, sessions: Sequence[Session], now: float) -> dict[Session, int]:
    """Divide `slots`: first up to each session's demand, then, if some are left, to its ceiling; by weight, one by one."""
    shares = dict.fromkeys(sessions, 0)
    if len(sessions) == 1:
        only = sessions[0]
        shares[only] = min(slots, _ceiling(only) if only.ceiling else slots)
        return shares
    wanted = {session: demand(session, slots, now) for session in sessions}
    _settle_up(sessions, wanted, now)
    usable = {session: min(session.ceiling or slots, slots) for session in sessions}
    left = slots
    for limits in (wanted, usable):
        while left and (hungry := [s for s in sessions if shares[s] < limits[s]]):
            poorest = min(hungry, key=lambda s: shares[s] / s.weight + s.served // TURN_S)
            shares[poorest] += 1
            left -= 1
    return shares


def _ceiling(session: Session) -> int:
    """Tell how many of our own slots the session may use at most: one less while a task waits for a node below."""
    if session.pinned and any(not lane.is_worker and lane.name in session.pinned for lane in session.lanes.values()):
        return session.ceiling - 1
    return session.ceiling


def _settle_up(sessions: Sequence[Session], wanted: dict[Session, int], now: float) -> None:
    """Note what each session had since the last time. Who wanted little saved nothing up, but for a turn or two."""
    for session in sessions:
        session.served += max(session.granted, session.active) * (now - session.served_at) / session.weight
        session.served_at = now
    most = max(session.served for session in sessions)
    least = min((session.served for session in sessions if wanted[session]), default=0.0)
    for session in sessions:
        session.served = max(session.served, most - 2 * TURN_S if wanted[session] else least)


def cap(session: Session, nodes: Sequence[Lane]) -> None:
    """Use no more of the slots that nodes offer than the ceiling, earlier nodes first; sets `slots` and `capped`."""
    usable = {lane: min(lane.offered, lane.limit) for lane in nodes}
    session.capped = False
    if not session.ceiling:
        for lane in nodes:
            lane.slots = usable[lane]
        return
    left = spare = session.ceiling - max(session.granted, session.active)
    aims = {}
    for lane in nodes:
        aims[lane] = max(0, min(usable[lane], left))
        left -= aims[lane]
        lane.slots = min(lane.slots, aims[lane])
        spare -= _held(lane)
    for lane in nodes:
        held = _held(lane)
        slots = min(aims[lane], held + max(0, spare))
        spare -= max(0, slots - held)
        lane.slots = max(lane.slots, slots)
        session.capped |= lane.slots < aims[lane]


def _held(lane: Lane) -> int:
    """Count the slots of a node that are used, or may be at once.

    Who waits for nested calls uses none, and what is leased behind it cannot begin.
    """
    if not lane.paused:
        return max(lane.slots, min(len(lane.leases), lane.offered))
    kin = [task.kin for task in lane.leases.values() if task.kin is not None]
    borrowing = sum(each.has_borrowed and not each.is_blocked for each in kin)
    occupied = sum(each.is_blocked and not each.has_borrowed for each in kin)
    startable = borrowing + max(0, lane.offered - occupied)
    return max(lane.slots, min(len(lane.leases) - lane.paused, lane.offered, startable))


def regrant(slots: int, sessions: Sequence[Session], aims: dict[Session, int]) -> list[Session]:
    """Move what each session is granted towards its aim: down at once, up as slots come free. Gives those that grew."""
    for session in sessions:
        session.granted = min(session.granted, aims.get(session, 0))
    spare = slots - sum(max(session.granted, session.active) for session in sessions)
    for session in sessions if spare < 0 else ():  # the slots became fewer: nobody begins on one that another still uses
        excess = min(-spare, max(0, session.granted - session.active))
        session.granted -= excess
        spare += excess
    grown = []
    for session in sessions:
        held = max(session.granted, session.active)
        granted = min(aims.get(session, 0), held + max(0, spare))
        if granted > session.granted:
            spare -= max(0, granted - held)
            session.granted = granted
            grown.append(session)
    return grown
