"""Where the root's slots come from: workers of this machine, and nodes.

It keeps the list of nodes, is told what becomes of them and of the workers, and speaks to the user when there is work and
nobody to do it. Rule: while there is hope the queue waits; when the last node is refused for good, the executor breaks at
once and says why.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .errors import InitializerFailed, WorkerLost
from .logbook import Logbook
from .messages import (
    Cleaned,
    Delivery,
    Evidence,
    OutcomeKind,
    Output,
    Partial,
    Record,
    SessionFailed,
    SessionSpec,
    Stream,
)
from .nodes import Node, NodeState
from .printout import LOCAL as LOCAL
from .printout import Printout
from .report import NodeStatus

if TYPE_CHECKING:
    from .clientfiles import ClientFiles
    from .clientmodules import ClientModules
    from .dispatcher import Dispatcher
    from .handshake import Credentials
    from .ledger import Session
    from .payload import CallPacker
    from .pool import Pool
    from .renewal import Renewals
    from .scheduler import Scheduler
    from .shipping import BlobStore
    from .transport import Loop
    from .values import Values
    from .workerport import Worker

STARVED_S = 5.0
"""How long work may wait without a slot anywhere before the user is told why."""

STARVED_AGAIN_S = 60.0

CUT_S = 1.0
"""How long to wait for the links to be closed; the end of the process closes them as well."""

CHECK_S = 0.5
"""How often that is looked at."""

_log = logging.getLogger("distexec")
_futures_log = logging.getLogger("concurrent.futures")


class Work(Protocol):
    """What is to be done, as its supply of slots sees it: the root."""

    loop: Loop
    dispatcher: Dispatcher
    scheduler: Scheduler
    session: Session
    store: BlobStore
    packer: CallPacker
    spec: SessionSpec
    files: ClientFiles
    modules: ClientModules
    renewals: Renewals
    done: dict[str, int]
    values: Values

    @property
    def is_open(self) -> bool:
        """Whether more is taken."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be done, for good."""

    def break_with(self, error: BaseException) -> None:
        """End everything with this error."""

    def fail_queued(self, text: str) -> None:
        """End what waits for a slot."""


class Supply:
    """The nodes and the pool of one root. An owner of both; any thread may call what the executor calls."""

    def __init__(self, root: Work, node_timeout_s: float, nodes_timeout_s: float | None, *, has_pool: bool) -> None:
        self._root = root
        self.has_pool = has_pool
        self.pool: Pool | None = None  # once the root was started
        self.nodes: list[Node] = []
        self.credentials: Credentials | None = None
        self.changed = threading.Condition()  # notified when nodes or slots may have changed
        self.output = Printout(root)
        self.logs = Logbook()
        self._node_timeout_s, self._nodes_timeout_s = node_timeout_s, nodes_timeout_s
        self._starved_since: float | None = None
        self._next_warning_at = 0.0
        self._seen_done = 0  # tasks that had ended when it was last looked

    def start(self) -> None:
        """Begin to look whether work waits in vain."""
        self._root.loop.call_later(CHECK_S, self._check)

    def close(self, timeout_s: float) -> None:
        """End the pool, by force after `timeout_s`, and leave the nodes. Not on the I/O thread."""
        if self.pool is not None:
            self.pool.close(timeout_s, self._root.renewals.cleanups.left_s)
        for node in self.nodes:
            self._root.loop.call_soon(node.leave, "the executor was shut down")
        self.output.close()
        self.logs.close()

    def drop_output(self) -> None:
        """Wait no more for who reads what the tasks printed."""
        self.output.give_up()
        self.logs.give_up()

    def cut(self) -> None:
        """Close every link without a word, so that nodes keep what they have for who comes back; dial no more."""
        done = threading.Event()

        def cut_all() -> None:
            for node in self.nodes:
                node.cut()
            done.set()
        self._root.loop.call_soon(cut_all)
        if not self._root.loop.is_current():
            done.wait(CUT_S)

    def notify(self) -> None:
        """Wake those who wait for slots."""
        with self.changed:
            self.changed.notify_all()

    def session_failed(self, peer: Any, failure: SessionFailed) -> None:
        """A node (None: our own pool) cannot run the session; break when no other can."""
        cause: BaseException | None = None
        if failure.data:
            _, cause = self._root.packer.unpack_outcome(OutcomeKind.ERROR, failure.data, ())
        where = failure.evidence.node or LOCAL
        if cause is not None:
            what = "initializer" if "initializer" in failure.evidence.reason else "setup"
            _futures_log.critical("Exception in %s on node %r:", what, where,
                                  exc_info=(type(cause), cause, cause.__traceback__))
        else:
            _log.error("node %r cannot run this session: %s", where, failure.evidence.reason)
        if peer is not None:
            peer.problem = failure.evidence.reason or "its initializer failed"
        if self._has_hope():
            return
        error: BaseException
        if cause is not None:
            error = InitializerFailed(f"{failure.evidence.reason} on node {where!r}, and no other node passed it; the "
                                      "executor cannot be used any more")
            error.__cause__ = cause
        else:
            error = lost_error(failure.evidence, f"no worker could be started: {failure.evidence.reason}", 0)
        self._root.break_with(error)

    def _has_hope(self) -> bool:
        if self.has_pool and not self._root.session.failed:
            return True
        return any(not node.problem and node.state is not NodeState.REFUSED for node in self.nodes)

    # ---- nodes

    def add_node(self, address: str, resolve: Callable[[], Sequence[tuple[Any, ...]]], slots: int | None,
                 *, may_hold: bool = False) -> Node:
        """Begin to use a node; `may_hold`: it may have tasks of an earlier life of the session."""
        assert self.credentials is not None, "the executor checks that there is a secret"
        node = Node(address, resolve, self._root.dispatcher, self.credentials, self._root.store, self, self._node_timeout_s)
        self.nodes.append(node)
        if slots is not None:
            self._root.dispatcher.call(lambda now: self._root.scheduler.limit_node(node, slots, now))
        if may_hold:
            node.expect()
        self._root.renewals.joining(node)
        node.start()
        return node

    def remove_node(self, node: Node, *, drain: bool) -> None:
        """Stop using a node, after what runs there has ended if `drain`."""
        if drain:
            self._root.dispatcher.call(lambda now: self._root.scheduler.drain_node(node))
            self._root.loop.run_here(self._leave_when_drained, node)
        else:
            self._root.loop.run_here(self._leave, node)

    def _leave_when_drained(self, node: Node) -> None:
        with self._root.dispatcher.lock:
            left = self._root.scheduler.leases_of(node)
        if left and node.state is NodeState.UP:
            self._root.loop.call_later(0.05, self._leave_when_drained, node)
        else:
            self._leave(node)

    def _leave(self, node: Node) -> None:
        node.leave("the executor does not need this node any more")
        evidence = Evidence(node.name, reason=f"node {node.name!r} was removed (remove_node)")
        self._root.dispatcher.call(lambda now: self._root.scheduler.node_lost(node, evidence, now))
        if node in self.nodes:
            self.nodes.remove(node)
        self.node_changed(node)

    def node_changed(self, node: Node) -> None:
        """Look whether all hope is gone, and wake those who wait for slots."""
        self.notify()
        self._root.renewals.cleanups.node_changed(node)
        if node.state is NodeState.REFUSED and node.error is not None and not self._has_hope() and self._root.is_open:
            self._root.break_with(node.error)

    @property
    def files(self) -> ClientFiles:
        """The client's files, for nodes."""
        return self._root.files

    @property
    def modules(self) -> ClientModules:
        """The user's own modules, for nodes."""
        return self._root.modules

    def node_cleaned(self, node: Node, cleaned: Cleaned) -> None:
        """Learn how a node has cleaned up what setup made there."""
        self._root.renewals.cleanups.heard(node, cleaned)

    def node_wrote(self, node: Node, output: Output) -> None:
        """Keep and show what a task printed on a node."""
        self.output.take(node.name, output.seq, output.stream, output.data, output.attempt, output.offset)

    def node_logged(self, node: Node, record: Record) -> None:
        """Have the record of a task on a node handled."""
        self.logs.take(node.name, record)

    def _check(self) -> None:
        """Tell the user when work waits and no slot is anywhere; give up when `nodes_timeout` says so."""
        if self._root.is_idle:
            return
        self._root.loop.call_later(CHECK_S, self._check)
        self._root.values.keep_house()
        now = time.monotonic()
        self._tell_missing(now)
        with self._root.dispatcher.lock:
            notices = self._root.scheduler.take_notices()
            waits = self._root.session.queued() > 0
            slots = sum(lane.slots for lane in self._root.session.lanes.values()) + self._root.session.starting
        for notice in notices:
            _log.warning("%s", notice)
        done = sum(self._root.done.values())
        if not waits or slots or done != self._seen_done:
            self._starved_since, self._seen_done = None, done
            return
        if self._starved_since is None:
            self._starved_since, self._next_warning_at = now, now + STARVED_S - CHECK_S
        since = self._starved_since
        is_alone = not self.has_pool and all(node.state is not NodeState.UP for node in self.nodes)
        if not self._root.is_open and is_alone and now - since >= max(STARVED_S, self._node_timeout_s):
            self._root.fail_queued(f"the executor was shut down, and no node offers a slot: {self.describe_missing()}")
        elif self._nodes_timeout_s is not None and now - since >= self._nodes_timeout_s:
            self._root.fail_queued(f"no node offered a slot within {self._nodes_timeout_s:g} s (nodes_timeout): "
                              f"{self.describe_missing()}")
        elif now >= self._next_warning_at:
            self._next_warning_at = now + STARVED_AGAIN_S
            _log.warning("work is queued but no node offers a slot, still waiting (nodes_timeout= sets a limit): %s",
                         self.describe_missing())

    @property
    def values(self) -> Values:
        """The large values of the executor."""
        return self._root.values

    def _tell_missing(self, now: float) -> None:
        """Say once of each node that takes no part, while others do, why: at once if it refuses, else when it is late."""
        if not self._has_hope():
            return  # the executor breaks with the reason
        for node in self.nodes:
            is_late = node.state in (NodeState.CONNECTING, NodeState.SUSPENDED) and now - node.began_at >= STARVED_S
            if not node.is_told and node.error is not None and (node.state is NodeState.REFUSED or is_late):
                node.is_told = True
                _log.warning("a node takes no part: %s", _why(node))

    def twin_of(self, node: Node, incarnation: bytes) -> Node | None:
        """Give another node that is the same process, if there is one."""
        return next((each for each in self.nodes if each is not node and each.hello is not None
                     and each.hello.incarnation == incarnation), None)

    def count_coming(self) -> int:
        """Count the tasks that slots on their way are for: workers being started, nodes not yet heard of."""
        new = any(node.state is NodeState.CONNECTING and node.error is None for node in self.nodes)
        return self._root.session.starting or int(new)

    def describe_missing(self) -> str:
        """Say of each node why it gives no slot, and what to do."""
        if not self.nodes:
            return "there is no node; name some with nodes=, $DISTEXEC_NODES or add_node()"
        return "; ".join(_why(node) for node in self.nodes)

    # ---- the pool's owner

    def worker_ready(self, worker: Worker) -> None:
        """Give the new worker work."""
        worker.session = self._root.session
        ready = partial(self._root.scheduler.worker_ready, generation=worker.generation.number)
        self._root.dispatcher.call(ready, worker, self._root.session)
        self.notify()

    def worker_said(self, worker: Worker, messages: list[Any]) -> None:
        """Hear a worker's outcomes."""
        self._root.dispatcher.receive(worker, messages)

    def worker_wrote(self, worker: Worker, seq: int, stream: Stream, data: bytes) -> None:
        """Take what a task printed, or, where local workers print for themselves, the stacks of a crash."""
        self.output.take(LOCAL, seq, stream, data)

    def worker_logged(self, worker: Worker, record: Record) -> None:
        """Have a task's log record handled."""
        self.logs.take(LOCAL, record)

    def worker_published(self, worker: Worker, partial: Partial) -> None:
        """Hear a partial result."""
        self._root.values.worker_published(worker, partial)

    def worker_sends(self, worker: Worker, delivery: Delivery, fd: int, reply_fd: int) -> None:
        """Take a file of a task's."""
        self._root.files.downloads.take_local(worker, delivery, fd, reply_fd)

    def worker_gone(self, worker: Worker, evidence: Evidence) -> None:
        """Learn that a worker died."""
        root = self._root
        root.files.worker_gone(worker)
        root.dispatcher.call(root.scheduler.worker_gone, worker, root.session, worker.page.started, evidence)

    def start_failed(self, evidence: Evidence, data: bytes, generation: int) -> None:
        """Learn that a worker never came up."""
        failed = partial(self._root.scheduler.start_failed, generation=generation)
        self._root.dispatcher.call(failed, self._root.session, evidence, data)

    def state_wrote(self, stream: Stream, data: bytes) -> None:
        """Print what setup or cleanup printed, where it does not print for itself."""
        self.output.take(LOCAL, 0, stream, data)

    def state_cleaned(self, cleaned: Cleaned) -> None:
        """Learn how our own pool has cleaned up."""
        self._root.renewals.cleanups.heard(None, cleaned)

    def arena_closed(self, number: int) -> None:
        """Let workers forget shared memory that holds nothing any more."""
        if self.pool is not None:
            self.pool.forget_arena(number)

    # ---- what it looks like

    def slots(self) -> int:
        """Count the slots that can be used now."""
        with self._root.dispatcher.lock:
            return self.count_slots()

    def count_slots(self) -> int:
        """Do as `slots`, with the dispatcher's lock held."""
        session = self._root.session
        return session.granted + sum(lane.slots for lane in session.lanes.values() if not lane.is_worker)

    def rows(self) -> list[NodeStatus]:
        """Describe each node, our own workers first."""
        rows = []
        with self._root.dispatcher.lock:
            lanes = dict(self._root.session.lanes)
            local = sum(len(lane.leases) for lane in lanes.values() if lane.is_worker)
            granted = self._root.session.granted
            held = {peer: len(lane.leases) for peer, lane in lanes.items()}
            now = time.monotonic()
            quarantines = {node: self._root.scheduler.quarantine_of(node, now) for node in self.nodes}
        if self.has_pool:
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            rows.append(NodeStatus(LOCAL, "", "refused" if self._root.session.failed else "up", granted, local,
                                   self._root.done.get(LOCAL, 0), None, None, python, self._root.spec.name, ""))
        for node in self.nodes:
            lane, load, hello = lanes.get(node), node.load, node.hello
            is_up, quarantine = node.state is NodeState.UP, quarantines.get(node, "")
            rows.append(NodeStatus(
                node.name, node.address, "quarantined" if is_up and quarantine else node.state.value,
                lane.slots if lane is not None else 0, held.get(node, 0),
                self._root.done.get(node.name, 0), load.cpu_percent if load is not None else None,
                load.memory_free_bytes if load is not None else None, hello.python if hello is not None else "",
                hello.version if hello is not None else "",
                _why(node) if node.problem or not is_up else quarantine))
        return rows


def _why(node: Node) -> str:
    if node.problem:
        return f"{node.address}: {node.problem}"
    if node.state is NodeState.UP:
        return f"{node.address}: up, but all its slots are taken by other sessions"
    text = str(node.error or "no answer yet")
    return text if node.address in text else f"{node.address}: {text}"


def lost_error(evidence: Evidence, reason: str, attempts: int) -> WorkerLost:
    """Make the error of a death out of what is known of it."""
    return WorkerLost(reason, node=evidence.node, pid=evidence.pid, exitcode=evidence.exitcode, signal=evidence.signal,
                      attempts=attempts, stderr_tail=evidence.stderr_tail)
