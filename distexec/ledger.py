"""The records a `Scheduler` keeps: tasks, queues, run-time estimates, lanes, sessions.

They know where each thing is and how to move it in O(1); what should happen is decided in `scheduler`. Pure: no socket,
thread, clock or random number.

    Session ── queue ──> Task            a task is queued here …
        └───── Lane ── leases ──> Task   … or leased to exactly one peer; a lane is one session's leases on one peer
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import Enum
from typing import Any, NamedTuple

from .messages import Answer, Define, Lost, Open, Outcome, OutcomeKind, Run, SessionFailed, SessionSpec, Submit
from .queues import Brood, Broods, Queue

Peer = Hashable
"""Whatever the caller uses to name the other end of a link; the scheduler only compares and hashes it."""

NOBODY: frozenset[Peer] = frozenset()

ABANDONED = "abandoned"
"""The doom of an attempt that a newer one replaced: nobody is told of its end."""

UNKNOWN = float("inf")
"""The estimate of a function that never ended yet: it may run for ever."""

WORKER_AHEAD_S = 0.002
"""Work queued in a worker behind what runs. Smaller: workers idle between batches. Larger: more to take back."""

NODE_AHEAD_S = 0.020
"""Work queued at a node per slot, at least. Smaller than the round trip: slots idle while an outcome travels."""

MAX_AHEAD = 1024
"""Most tasks leased ahead per slot, however short. Larger: bigger frames and more to lose; smaller: more system calls."""


class Task:
    """One call: its `Run` message ready to be sent, and where it is.

    `lane` is None while it is queued or waiting; `order` counts Runs sent on a worker's link; `estimate_s` is what its
    lane was charged; `deaths` counts attempts that died while they may have been running, `charged` says that the present
    one is among them and may yet turn out to be alive (a lost node comes back); `doom` is how it must end
    (ABANDONED: without a word, a newer attempt took its place); `shuns` names the nodes that are to have it only if no other
    can, changed only while it is in no queue; `kin` is there if it is a nested call or has made some; `owner` is the
    root's, opaque here.
    """

    __slots__ = ("charged", "claimed", "deaths", "doom", "estimate_s", "kin", "lane", "node", "order", "owner", "queued",
                 "renew", "retries", "run", "session", "shuns")

    def __init__(self, run: Run, session: Session, owner: Any = None, retries: int = 0) -> None:
        self.run = run
        self.session = session
        self.owner = owner
        self.retries = retries
        self.deaths = 0
        self.charged = False
        self.lane: Lane | None = None
        self.order = 0
        self.estimate_s = 0.0
        self.node = ""
        self.queued = False
        self.renew = False  # the next lease needs a new attempt number
        self.claimed = False  # the owner said that it may run
        self.doom: OutcomeKind | str | None = None
        self.shuns = NOBODY
        self.kin: Kinship | None = None

    @property
    def priority(self) -> int:
        """Higher runs first within the session."""
        return self.run.options.priority if self.run.options is not None else 0

    @property
    def is_solo(self) -> bool:
        """Whether it may only be leased to a free slot (retries=0)."""
        return self.run.options is not None and self.run.options.solo

    def __repr__(self) -> str:
        where = "queued" if self.queued else f"on {self.lane.peer!r}" if self.lane is not None else "nowhere"
        return f"<Task {self.run.session}.{self.run.seq}.{self.run.attempt} {where}>"


class Kinship:
    """What is known of a task that is a nested call or has made some.

    `parent` is, at the root, who is to outlive it: its caller or, once that has returned, the nearest ancestor that has
    not; `call` its number there, 0 if nobody wants its answer. The rest is the present attempt's: `attempt` is 0 once no
    call of it is taken any more.
    """

    __slots__ = ("answers", "attempt", "call", "calls", "children", "has_borrowed", "has_returned", "is_blocked", "is_held",
                 "is_lent", "is_nested", "last_call", "parent", "submits", "task", "unwanted")

    def __init__(self, task: Task, parent: Kinship | None = None, call: int = 0, *, is_nested: bool = False) -> None:
        self.task, self.parent, self.call = task, parent, call
        self.is_nested = is_nested  # it is a nested call itself
        self.is_lent = False  # the vertex above said that an ancestor waits
        self.has_borrowed = False  # it was leased to a slot that is lent
        self.is_held = False  # at the root: it is to run again once its children have ended
        self.is_blocked = False
        self.has_returned = False
        self.attempt = 0
        self.last_call = 0
        self.submits: dict[int, Submit] = {}  # below the root: not answered
        self.answers: dict[int, Answer] = {}  # not taken
        self.calls: dict[int, Task] = {}  # at the root: not ended, by call
        self.children: dict[int, Task] = {}  # the same and those of children that are gone, by seq
        self.unwanted: set[int] = set()  # calls given up before they were made tasks

    def serve(self, attempt: int) -> None:
        """Begin with an attempt, if that has not been done."""
        if self.attempt != attempt:
            self.attempt, self.last_call, self.has_returned = attempt, 0, False

    def __repr__(self) -> str:
        return f"<Kinship of {self.task}: {len(self.children)} children{', waits' if self.is_blocked else ''}>"


class Estimate:
    """The run time to expect of a function, seconds: the largest of its last 16 to 32, infinite before the first."""

    __slots__ = ("_count", "_older", "_recent", "value_s")

    def __init__(self) -> None:
        self.value_s = UNKNOWN
        self._older = self._recent = 0.0
        self._count = 0

    def saw(self, run_s: float) -> None:
        """Take in one run."""
        self._count += 1
        if self._count & 15 == 0:
            self._older, self._recent = self._recent, run_s
            self.value_s = run_s if run_s > self._older else self._older
        elif run_s > self._recent:
            self._recent = run_s
            if run_s > self.value_s or self._count == 1:
                self.value_s = run_s
        elif self.value_s == UNKNOWN:
            self.value_s = run_s

    def outgrown(self, age_s: float) -> None:
        """Learn that a run is already `age_s` old and not over."""
        if age_s > self._recent:
            self._recent = age_s
        if self.value_s != UNKNOWN and age_s > self.value_s:
            self.value_s = age_s


class LaneState(Enum):
    """Whether a lane may be given tasks."""

    ACTIVE = "active"
    SUSPENDED = "suspended"  # its link is down; it may come back with everything it holds
    DRAINING = "draining"  # it finishes what it has and gets nothing more
    QUARANTINED = "quarantined"  # the same, for a while


class Lane:
    """One session's leases on one downstream peer: a worker (one slot, ordered) or a node (as many as it offers)."""

    __slots__ = ("birth", "defined", "has_failed", "is_stalled", "is_worker", "leases", "lent", "limit", "name", "offered",
                 "paused", "peer", "remaining", "revoke_end", "revoke_range", "revoked_from", "sent", "session", "since",
                 "slots", "spare", "state", "suspended_at", "unknown", "wanted", "window_s", "work_s")

    def __init__(self, peer: Peer, session: Session, name: str, *, is_worker: bool, remaining: int = 0) -> None:
        self.peer, self.session, self.name, self.is_worker = peer, session, name, is_worker
        self.offered = self.slots = 1 if is_worker else 0  # offered by the peer; slots of these that we may use
        self.limit = 1 << 60  # most slots of a node its user wants used
        self.window_s = NODE_AHEAD_S
        self.leases: dict[int, Task] = {}  # by seq, oldest first
        self.work_s = 0.0  # expected run time of the leases whose function is known
        self.unknown = 0  # leases whose function is not
        self.paused = 0  # leases that wait for nested calls
        self.lent = 0  # leases in the slots of those
        self.spare = 0  # at a node: how many more leases than slots leave a slot for everybody
        self.sent = 0  # Runs sent on a worker's link
        self.remaining = remaining  # tasks a worker may still take (max_tasks_per_child); 0: no limit
        self.defined: set[int] = set()
        self.state = LaneState.ACTIVE
        self.suspended_at = 0.0
        self.since = 0.0  # last time an outcome came or an idle peer was given work
        self.birth = 0  # which beginning of the session the node last spoke of
        self.is_stalled = False  # it was asked to give work back, and has ended nothing since
        self.wanted = False  # we told the node that tasks wait
        self.has_failed = False  # the node cannot run the session
        self.revoke_range: tuple[int, int] | None = None  # orders being taken back, until `started` was read
        self.revoked_from = 0  # the first revoked order, and
        self.revoke_end: tuple[int, int] | None = None  # (seq, attempt) of the last, until the worker is past that

    def is_free(self) -> bool:
        """Say whether a slot is free and may be used now."""
        return len(self.leases) < self.slots + self.spare and self.state is LaneState.ACTIVE and self.revoke_end is None

    def has_lent_slot(self) -> bool:
        """Say whether a node may be given one more nested call for the slots of those who wait there.

        What is leased ahead does not count: the node begins nothing of it meanwhile. One that is to get nothing more still
        runs what its tasks wait for.
        """
        if not self.paused or not self.slots or self.is_worker:
            return False
        if self.state is LaneState.DRAINING:  # here they are also given what would be leased like any other task
            return self.lent < self.paused or len(self.leases) - self.paused < self.slots
        return self.lent < self.paused and self.state is LaneState.ACTIVE

    def has_room(self, estimate_s: float, is_solo: bool) -> bool:
        """Say whether one more task expected to run for `estimate_s` may be leased here now."""
        count = len(self.leases) - self.spare
        if count < self.slots:
            return True
        if is_solo or self.is_stalled or not self.slots or count >= MAX_AHEAD * self.slots:
            return False
        if self.is_worker:
            return not self.unknown and self.work_s + estimate_s <= WORKER_AHEAD_S
        if self.slots < self.offered:
            return False  # the node knows nothing of our limit: what is leased ahead it would run at once
        if count <= self.slots:
            return True
        return not self.unknown and self.work_s + estimate_s <= self.window_s * self.slots

    def put(self, task: Task, estimate_s: float) -> None:
        """Record a lease."""
        task.lane = self
        task.estimate_s = estimate_s
        if estimate_s == UNKNOWN:
            self.unknown += 1
        else:
            self.work_s += estimate_s
        self.leases[task.run.seq] = task

    def take(self, task: Task) -> None:
        """End a lease."""
        del self.leases[task.run.seq]
        task.lane = None
        if task.estimate_s == UNKNOWN:
            self.unknown -= 1
        elif self.leases:
            self.work_s -= task.estimate_s
        else:
            self.work_s = 0.0  # so that rounding never adds up

    def __repr__(self) -> str:
        return f"<Lane {self.name or self.peer!r} {self.state.value} {len(self.leases)}/{self.slots}>"


class Session:
    """One executor's tenancy at one vertex."""

    __slots__ = ("ahead", "awaited", "birth", "blocked", "broods", "busy", "capped", "ceiling", "closing", "code",
                 "estimates", "failed", "failure", "first_attempt", "free", "generation", "granted", "has_confessed",
                 "id", "is_durable", "lanes", "left", "lent", "limited", "linger_s", "no", "opened", "orphaned_at",
                 "owed", "parked", "paused", "peak", "peak_at", "pinned", "queue", "reconciling", "recovering_since",
                 "served", "served_at", "spare", "specs", "starting", "tasks", "told", "unacked", "uplink_no",
                 "upstream", "waiting", "want", "wanted", "wary", "weight", "workers")

    def __init__(self, opened: Open, upstream: Peer | None, number: int, birth: int = 0) -> None:
        self.opened = opened
        self.id = opened.id
        self.upstream = upstream  # None at the root, and while an orphan
        self.uplink_no = opened.session  # the session's number on the link above
        self.birth = birth  # which session of this vertex's life it is
        self.no = number  # and on the links below
        self.weight = opened.weight
        self.ceiling = opened.ceiling  # most slots it may use; 0: all
        self.queue: Queue[Task] = Queue()
        self.pinned: dict[str | frozenset[Peer], Queue[Task]] = {}  # tasks for one node only, or rather not for some
        self.wary: set[frozenset[Peer]] = set()  # the latter's keys
        self.waiting: dict[int, Task] = {}  # tasks whose blobs are still on their way; at the root, that a node may hold,
        # or whose nested calls of the last attempt have not ended
        self.broods: Broods[Task] | None = None  # queued nested calls, once there were any
        self.blocked: dict[int, Task] = {}  # tasks here and below that wait for nested calls, by seq
        self.left: dict[int, Kinship] = {}  # what ended tasks have called for in vain, until their outcome is acknowledged
        self.tasks: dict[int, Task] = {}  # all of them, by seq
        self.unacked: dict[int, tuple[Outcome | Lost, Lane | None]] = {}  # ended here, not yet known to the root; or, at the
        # root of a durable session, not yet in its journal
        self.code: dict[int, Define] = {}
        self.estimates: dict[int, Estimate] = {}
        self.lanes: dict[Peer, Lane] = {}
        self.free: OrderedDict[Lane, None] = OrderedDict()  # lanes with a free slot
        self.ahead: Lane | None = None  # the lane that took a task into its window last; the next finds room there too
        self.granted = 0  # of our own slots, how many it may use
        self.told = -1  # what was last offered upstream
        self.busy = 0  # worker lanes with a lease
        self.workers = 0  # worker lanes
        self.paused = 0  # of the busy ones, those whose task waits for nested calls: their slots are lent
        self.lent = 0  # of the busy ones, those in the slots of these
        self.spare = 0  # the smaller of the two: how many more than granted may be busy before a slot is nobody's
        self.starting = 0  # workers asked for and not yet ready
        self.owed = 0  # tasks the vertex above recalled that nodes below are asked for
        self.want = 0  # tasks waiting above for a slot here
        self.wanted: bool | None = None  # what every node was told of tasks waiting here; None: not every one
        self.peak = 0  # most tasks here at once, lately; keeps the share of a client that pauses for breath
        self.peak_at = 0.0
        self.served = 0.0  # slot-seconds it had, by weight; who had least gets the slot that cannot be divided
        self.served_at = 0.0
        self.reconciling = False  # `Held` was said; outcomes and offers wait for `Resume`
        self.orphaned_at: float | None = None
        self.linger_s = opened.linger_s
        self.is_durable = False  # at the root: outcomes are acknowledged by the owner, once they are recorded
        self.awaited: set[Peer] = set()  # at the root: nodes that may hold tasks since an earlier life of its own
        self.recovering_since = 0.0
        self.parked: set[int] = set()  # at the root: tasks of an earlier life that nobody has asked for in this one
        self.first_attempt = 1  # at the root: no earlier life has used this number or a higher one
        self.closing = False
        self.capped = False  # a node may be used more as soon as others are used less
        self.limited = False  # some task of it has had a time limit
        self.failed = False  # no more workers can be had here
        self.generation = 0  # the pool's number of the preparation that workers are to have
        self.specs: dict[Peer, SessionSpec] = {}  # at the root: how nodes prepare it that do so in a way of their own
        self.has_confessed = False  # the vertex above was told
        self.failure: SessionFailed | None = None  # why; said upward once nothing runs here any more

    def spec_for(self, peer: Peer) -> SessionSpec:
        """Tell how a node is to prepare its workers."""
        return self.specs.get(peer, self.opened.spec)

    @property
    def is_root(self) -> bool:
        """Whether this vertex owns the session's futures."""
        return self.uplink_no == 0

    @property
    def is_calm(self) -> bool:
        """Whether a slot that becomes free is nobody's business: no task waits, and every node knows that."""
        return not (self.queue.count or self.pinned or self.broods or self.failed) and (
            self.wanted is False or len(self.lanes) == self.workers)

    @property
    def active(self) -> int:
        """How many of its workers here run something, and do not wait."""
        return self.busy - self.paused

    def queued(self) -> int:
        """Count the tasks that could be leased if there were a slot."""
        nested = self.broods.count if self.broods is not None else 0
        return self.queue.count + nested + (sum(queue.count for queue in self.pinned.values()) if self.pinned else 0)

    def unleased(self) -> list[Task]:
        """Name the tasks that are leased to nobody."""
        tasks = list(self.queue)
        for queue in self.pinned.values():
            tasks += queue
        for brood in self.broods or ():
            tasks += brood
        tasks += self.waiting.values()
        return tasks

    def queue_of(self, task: Task) -> Queue[Task]:
        """Give the queue that the task belongs in."""
        if task.run.options is not None and task.run.options.ancestors:
            if self.broods is None:
                self.broods = Broods()
            return self.broods.of(task)
        if task.shuns:
            self.wary.add(task.shuns)
            return self.pinned.setdefault(task.shuns, Queue())
        if task.run.options is None or not task.run.options.node:
            return self.queue
        return self.pinned.setdefault(task.run.options.node, Queue())

    def shun(self, task: Task, nodes: frozenset[Peer]) -> None:
        """Have a task that is in no queue put into that of those which had rather not run on these nodes."""
        for queue in (self.queue, *self.pinned.values(), *(self.broods or ())):
            queue.purge()
        task.shuns = nodes

    def next_for(self, lane: Lane) -> Task | None:
        """Show the first task that the lane may run."""
        task = self.queue.peek() if self.queue.count else None
        if self.pinned:
            keys = [each for each in self.wary if lane.peer not in each or not self.can_do_without(each)]
            queues = [self.pinned[key] for key in keys]
            if lane.name in self.pinned:
                queues.append(self.pinned[lane.name])
            for queue in queues:
                rival = queue.peek()
                if rival is not None and (task is None or (-rival.priority, rival.run.seq) < (-task.priority, task.run.seq)):
                    task = rival
        if self.broods is not None and self.broods.count:
            brood = self.broods.first(lambda each: self.may_run(each, lane))
            rival = brood.peek() if brood is not None else None
            if rival is not None and (task is None or rival.priority >= task.priority):
                task = rival  # what others wait for goes first
        return task

    def may_run(self, brood: Brood[Task], lane: Lane) -> bool:
        """Say whether a lane is one of those that a brood's tasks may run on."""
        place = brood.place
        if isinstance(place, frozenset):
            return not place or lane.peer not in place or not self.can_do_without(place)
        return not place or place == lane.name

    def may_borrow(self, brood: Brood[Task]) -> bool:
        """Say whether a brood's next task may use slots that were lent."""
        task = brood.peek()
        return any(each in self.blocked for each in brood.ancestors) or (
            task is not None and task.kin is not None and task.kin.is_lent)

    def can_do_without(self, nodes: frozenset[Peer]) -> bool:
        """Say whether anybody else may run tasks: another node with slots, or our own workers."""
        return (self.granted > 0 and not self.failed) or any(
            lane.slots and not lane.is_worker and lane.state is LaneState.ACTIVE and lane.peer not in nodes
            for lane in self.lanes.values())

    def forget(self, task: Task) -> None:
        """Remove a task that is leased to nobody (any more), wherever it waits."""
        seq = task.run.seq
        if self.tasks.get(seq) is task:
            del self.tasks[seq]
        if task.queued:
            self.queue_of(task).discard(task)
        elif self.waiting and self.waiting.get(seq) is task:
            del self.waiting[seq]

    def estimate_of(self, fn: int) -> Estimate:
        """Give the function's estimate, a new one if need be."""
        known = self.estimates.get(fn)
        if known is None:
            known = self.estimates[fn] = Estimate()
        return known

    def __repr__(self) -> str:
        return f"<Session {self.no} queued={self.queued()} lanes={list(self.lanes.values())!r}>"


# ---- what a scheduler asks of the pool beneath it; decided like messages, carried out by the shell


class StartWorker(NamedTuple):
    """Start one more worker for the session; answered by `worker_ready` or `start_failed`."""

    session: Session


class StopWorker(NamedTuple):
    """The worker is idle and not needed any more."""

    worker: Peer


class KillWorker(NamedTuple):
    """End the worker with everything it started; answered by `worker_gone`."""

    worker: Peer
    reason: str


class Revoke(NamedTuple):
    """Write the orders `first` to `last` as revoked; 10 ms later answer with `revoked(worker, started)`."""

    worker: Peer
    first: int
    last: int
    doomed: int = 0  # the order of the first task that is to end even if it runs; 0: none


class EndSession(NamedTuple):
    """Stop the session's workers, at once if tasks were left, and delete what it left on this machine."""

    session: Session
    had_tasks: bool


PoolAction = StartWorker | StopWorker | KillWorker | Revoke | EndSession
