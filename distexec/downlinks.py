"""The nodes below: links that come and go, what is opened and offered on them, and what both ends still hold after a cut.

    joined ──Open──> a lane for each session ──Offer──> slots          lost ──> charged, run elsewhere
      ^                                                                 ^
      └── Held ──> Resume: adopted, dropped, taken for unstarted ── suspended

Pure; the mirror of `uplinks`. Rule: what a node was leased stays its own until it says otherwise, or is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fates import Fates
from .ledger import Lane, LaneState, Peer, Session
from .messages import Evidence, Held, Kill, Offer, Open, Recall, Renew, Resume, SessionFailed, SessionSpec
from .placement import Placement
from .quarantine import Quarantine
from .recovery import Recovery
from .shares import Shares


class Downlinks:
    """The links to nodes; `table` gives the method for each message in which a node speaks of itself.

    `sessions` is the scheduler's list.
    """

    def __init__(self, place: Placement, fates: Fates, shares: Shares, sessions: list[Session], recovery: Recovery,
                 quarantine: Quarantine) -> None:
        self.table: dict[type, Callable[[Peer, Any, float], None]] = {
            Offer: self._on_offer, Held: self._on_held, SessionFailed: self._on_session_failed}
        self.up: dict[Peer, tuple[str, float]] = {}  # name and window of each node whose link is up
        self._limits: dict[Peer, int] = {}  # most slots of a node to use
        self._drained: set[Peer] = set()  # nodes that are to get nothing more
        self._place, self._fates, self._shares, self._sessions = place, fates, shares, sessions
        self._recovery, self._quarantine = recovery, quarantine

    # ---- links that come and go

    def open_all(self, session: Session) -> None:
        """Open a new session on every link that is up."""
        for peer in self.up:
            self._open(session, peer)

    def joined(self, peer: Peer, name: str, window_s: float) -> None:
        """Take up a link, for the first time or again: open every session on it."""
        self.up[peer] = (name, window_s)
        for session in self._sessions:
            self._open(session, peer)

    def _open(self, session: Session, peer: Peer) -> None:
        name, window_s = self.up[peer]
        lane = session.lanes.get(peer)
        if lane is None:
            lane = session.lanes[peer] = Lane(peer, session, name, is_worker=False)
            lane.limit = self._limits.get(peer, lane.limit)
            lane.state = LaneState.DRAINING if peer in self._drained else self._quarantine.state(peer)
            if session.failed and not self._shares.slots:
                session.failed, session.failure, session.has_confessed = False, None, False  # this node may be able to
        lane.window_s, lane.wanted, session.wanted = window_s, False, None
        lane.defined.clear()
        self._place.lanes[peer, session.no] = lane
        opened = session.opened
        self._place.out.append((peer, Open(session.no, opened.id, opened.token, opened.weight, opened.ceiling,
                                           session.spec_for(peer), session.linger_s)))

    def renew(self, session: Session, peer: Peer, spec: SessionSpec) -> None:
        """Have a node prepare the session's workers so from now on."""
        session.specs[peer] = spec
        lane = session.lanes.get(peer)
        if lane is not None:
            lane.has_failed = False
            if peer in self.up:
                self._place.out.append((peer, Renew(session.no, spec)))

    def suspend(self, peer: Peer, now: float) -> None:
        """Let a node whose link is cut keep its leases."""
        self.up.pop(peer, None)
        for session in self._sessions:
            lane = session.lanes.get(peer)
            if lane is not None:
                lane.state, lane.suspended_at = LaneState.SUSPENDED, now
                lane.offered = lane.slots = 0
                self._place.lanes.pop((peer, session.no), None)
                self._shares.cap(session)

    def lose(self, peer: Peer, evidence: Evidence, now: float) -> None:
        """Give a node up: what it had may have been running."""
        self.up.pop(peer, None)
        for session in list(self._sessions):
            lane = session.lanes.get(peer)
            if lane is not None:
                tasks = list(lane.leases.values())
                self._place.drop_lane(lane)
                for task in reversed(tasks):
                    self._fates.died(task, evidence)
                self._shares.cap(session)
            self._recovery.heard(session, peer, now)

    def end_silent(self, session: Session, timeout_s: float, now: float) -> None:
        """Give up nodes of the session that were suspended for longer than `timeout_s`."""
        for lane in list(session.lanes.values()):
            if lane.state is LaneState.SUSPENDED and lane.peer not in self.up and (
                    now - lane.suspended_at > timeout_s):
                self.lose(lane.peer, Evidence(lane.name, reason=f"node {lane.name!r} was out of reach for more than "
                                              f"{timeout_s:g} s (node_timeout)"), now)

    # ---- how much of a node is used

    def limit(self, peer: Peer, slots: int) -> None:
        """Use at most `slots` of a node's slots, now and when it comes back."""
        self._limits[peer] = slots
        for session in self._sessions:
            if peer in session.lanes:
                session.lanes[peer].limit = slots
                self._shares.cap(session)

    def drain(self, peer: Peer) -> None:
        """Give a node nothing more, and ask back what it has not started."""
        self._drained.add(peer)
        for session in self._sessions:
            lane = session.lanes.get(peer)
            if lane is not None and lane.state in (LaneState.ACTIVE, LaneState.QUARANTINED):
                self._resume(lane)
                self._place.fill(session)

    def _resume(self, lane: Lane) -> None:
        """Use a lane again after its link came back, unless its node is to get nothing more."""
        is_drained = lane.peer in self._drained
        lane.session.wanted = None
        lane.state = LaneState.DRAINING if is_drained else self._quarantine.state(lane.peer)
        self._place.reindex(lane)
        if is_drained and lane.leases:
            self._place.out.append((lane.peer, Recall(lane.session.no, len(lane.leases))))

    # ---- messages

    def _on_offer(self, peer: Peer, message: Offer, now: float) -> None:
        lane = self._place.lanes.get((peer, message.session))
        if lane is None:
            return
        lane.offered = message.slots
        lane.has_failed = lane.has_failed and not message.slots
        if lane.state is LaneState.SUSPENDED:  # it comes back without `Held`: it ended the session meanwhile
            self._resume(lane)
            lane.birth = -1
        self._check_birth(lane, message.birth)
        self._recovery.heard(lane.session, peer, now)
        self._shares.cap(lane.session)

    def _check_birth(self, lane: Lane, birth: int) -> None:
        """Give up what a node was leased before it ended the session and began it anew, on this link or one cut at once."""
        if lane.birth != birth:
            lane.birth = birth
            for task in reversed(list(lane.leases.values())):
                self._place.unlease(task)
                self._fates.died(task, Evidence(lane.name, reason="the node ended the session while its link was away"))

    def _on_held(self, peer: Peer, message: Held, now: float) -> None:
        """Reconcile with a node that kept the session while its link was away."""
        lane = self._place.lanes.get((peer, message.session))
        if lane is None:
            return
        self._check_birth(lane, message.birth)
        held = {tuple(key) for key in message.leases} | {tuple(key) for key in message.outcomes}
        for task in reversed(list(lane.leases.values())):
            if (task.run.seq, task.run.attempt) not in held:
                self._place.unlease(task)  # it never arrived: ends and losses are kept below until acknowledged
                self._fates.come_back(task)
        drop = [(seq, attempt) for seq, attempt in message.leases if not self._is_held_for(lane, seq, attempt)]
        ack = [seq for seq, attempt in message.outcomes
               if not (self._is_held_for(lane, seq, attempt) or self._fates.is_unrecorded(lane, seq, attempt))]
        self._place.out.append((peer, Resume(lane.session.no, drop, ack)))
        self._resume(lane)
        self._fates.kin.answer_again(lane)
        self._place.touched[lane.session] = None
        self._recovery.heard(lane.session, peer, now)
        for task in list(lane.leases.values()):
            if task.doom is not None:
                self._place.out.append((peer, Kill(lane.session.no, task.run.seq, task.run.attempt)))

    def _is_held_for(self, lane: Lane, seq: int, attempt: int) -> bool:
        task = lane.session.tasks.get(seq)
        if task is None or (task.run.attempt != attempt and not self._recovery.recognises(lane, task, attempt)):
            return False
        if task.claimed and task.lane is None:
            self._place.adopt(task, lane)
        return task.lane is lane

    def _on_session_failed(self, peer: Peer, message: SessionFailed, now: float) -> None:
        lane = self._place.lanes.get((peer, message.session))
        if lane is None or message.generation != lane.session.spec_for(peer).generation:
            return
        session = lane.session
        lane.has_failed = True  # it stays, for acknowledgements and `Close`
        lane.offered = 0
        for task in reversed(list(lane.leases.values())):
            self._place.unlease(task)
            self._fates.come_back(task)
        if session.is_root:
            self._fates.failures.append((session, peer, message))
            self._recovery.heard(session, peer, now)
        elif all(each.has_failed for each in session.lanes.values()):
            self._fates.fail(session, peer, message)
        self._shares.cap(session)
