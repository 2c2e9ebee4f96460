"""The upstream end's view of one node: dialling, redialling, believing it dead.

    connecting ──► up ──link lost──► suspended ──same incarnation──► up
        ▲  │                             ├── three refusals, or another incarnation: lost at once (proof)
        │  └──► refused (secret, version)└── silent for node_timeout: lost (the scheduler's clock)

Rule: a node keeps its identity through every reconnect, so that the scheduler can reconcile; what is believed dead is
said once, and dialling goes on, for machines come back.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from .dispatcher import STALL_S, Dispatcher
from .errors import AuthenticationFailed, DistexecError, IncompatibleNode
from .ledger import NODE_AHEAD_S
from .messages import (
    BlobRef,
    Blocked,
    Bye,
    Cleaned,
    Evidence,
    Find,
    FromDownstream,
    Heard,
    Hello,
    Load,
    Lost,
    Message,
    Offer,
    Outcome,
    Output,
    Partial,
    Ping,
    Pong,
    Record,
    Role,
    Submit,
    Took,
)
from .shipping import BlobStore
from .transfers import Transfers, fetch
from .transport import HEARTBEAT_S, Link

if TYPE_CHECKING:
    from .clientfiles import ClientFiles
    from .clientmodules import ClientModules
    from .handshake import Credentials
    from .values import Values

REDIAL_S = 0.1
"""Pause between the dials that prove a node dead; three refusals must fit into half a second (DESIGN §6)."""

REDIAL_MAX_S = 5.0
"""Longest pause between dials of a node that does not answer."""

DIAL_MAX_S = 5.0
"""How long a dial may take."""

RETURN_MAX_S = 1.0
"""The same while it is expected back, and how long such a dial may take if the way is short. Larger: what is left of
`node_timeout` passes before a way that is open again is tried. Smaller: a busy node is hung up on."""

DIAL_RTTS = 10.0
"""Round trips granted to such a dial on a long way: TCP, TLS and the proofs take four."""

BEATS = 6
"""Heartbeats in `node_timeout`, at least. Silence is noticed after three: the other half is for the node to come back."""

SILENT_BEATS = 2.5
"""Heartbeats without a byte after which a node is taken for cut off; looked at twice a beat, so within three."""

REFUSALS_FOR_PROOF = 3

RESOLVE_EVERY = 4
"""After so many dials in vain a name is looked up anew: the machine may have moved."""

SHORT_S = 1.0
"""A link that lived less was not worth having: after the second in a row, dials are paused for. Smaller: two ends that
cannot agree keep each other busy. Larger: who loses a young link waits for the next."""


class NodeState(Enum):
    """How a node stands with us."""

    CONNECTING = "connecting"
    UP = "up"
    SUSPENDED = "suspended"
    REFUSED = "refused"
    LEAVING = "leaving"


class NodeOwner(Protocol):
    """Who is told what a node says or becomes, on the I/O thread."""

    def node_changed(self, node: Node) -> object:
        """Learn that the node's state is another."""

    def twin_of(self, node: Node, incarnation: bytes) -> Node | None:
        """Give another node that is the same process, if there is one."""

    @property
    def files(self) -> ClientFiles:
        """What nodes and calls are given, and what tasks send."""

    @property
    def modules(self) -> ClientModules:
        """The user's own modules."""

    @property
    def values(self) -> Values:
        """What is shared, and where partial results go."""

    def node_cleaned(self, node: Node, cleaned: Cleaned) -> object:
        """Learn how what setup made there was cleaned up."""

    def node_wrote(self, node: Node, output: Output) -> object:
        """Learn what a task of ours printed there."""

    def node_logged(self, node: Node, record: Record) -> object:
        """Learn what a task of ours logged there."""


class Node:
    """One node named by the user, and the link to it. A port of the dispatcher."""

    def __init__(self, address: str, resolve: Callable[[], Sequence[tuple[Any, ...]]], dispatcher: Dispatcher,
                 credentials: Credentials, store: BlobStore, owner: NodeOwner, node_timeout_s: float) -> None:
        self.address = address
        self.state = NodeState.CONNECTING
        self.hello: Hello | None = None
        self.load: Load | None = None
        self.error: Exception | None = None  # why the last dial failed
        self.began_at = time.monotonic()  # since when it is not up, though it should be
        self.is_told = False  # the user was told that it takes no part
        self.problem = ""  # why it cannot run our session though it is up
        self.link: Link | None = None
        self._resolve, self._dispatcher, self._credentials, self._store = resolve, dispatcher, credentials, store
        self._owner = owner
        self._loop = dispatcher.loop
        self._node_timeout_s = node_timeout_s
        self._beat_s = min(HEARTBEAT_S, node_timeout_s / BEATS)
        self._watched_at = 0.0
        self._quiet_since = 0.0  # silence before this does not count: we did not listen
        self._window_s = NODE_AHEAD_S
        self._rtt_s = 0.0  # of the last link, when it was last measured
        self._dial: Any = None
        self._transfers: Transfers | None = None
        self._behind: dict[tuple[int, int, int], list[Message]] = {}  # by task: what it said after a call still on its way
        self._is_known = False  # the scheduler has (or may have) a lane for it
        self._failures = 0
        self._refusals = 0
        self._opened_at = 0.0
        self._shorts = 0  # links in a row that lived less than SHORT_S
        self._has_said_bye = False
        self._has_left = False
        self._addresses = resolve()
        self._is_named = all(sockaddr[0] not in address for sockaddr in self._addresses)  # not written as a number
        self._is_resolving = False

    @property
    def name(self) -> str:
        """The name the node gave itself; its address until then."""
        return self.hello.name if self.hello is not None else self.address

    @property
    def is_up(self) -> bool:
        """Whether it can be told something."""
        return self.state is NodeState.UP

    @property
    def may_hold(self) -> bool:
        """Whether it may hold something of our session that it cannot be told to end now."""
        return self._is_known and self.state is not NodeState.UP

    def __repr__(self) -> str:
        return f"<Node {self.name!r} at {self.address}: {self.state.value}>"

    # ---- port of the dispatcher

    def queue(self, messages: Sequence[Message]) -> None:
        """Put messages in line; while the link is down they are dropped, and reconciled when it returns."""
        link = self.link
        if link is not None:
            link.queue(messages)

    def flush(self) -> None:
        """Write what is in line."""
        link = self.link
        if link is not None:
            link.flush()

    # ---- life

    def start(self) -> None:
        """Begin to dial, and to watch for silence."""
        self._watched_at = time.monotonic()
        self._loop.run_here(self._redial)
        self._loop.call_later(self._beat_s / 2, self._watch)

    def leave(self, reason: str) -> None:
        """Say goodbye and dial no more. I/O thread."""
        self._has_left = True
        if self.state is not NodeState.REFUSED:  # why it was never used stays to be seen
            self.state = NodeState.LEAVING
        if self._dial is not None:
            self._dial.cancel()
        if self.link is not None:
            self.link.send([Bye(reason)])
            self.link.close(reason)

    def cut(self) -> None:
        """Close the link without a word and dial no more: the node keeps what it has of us. I/O thread."""
        self._has_left = True
        if self._dial is not None:
            self._dial.cancel()
        link, self.link = self.link, None
        if link is not None:
            link.close("left behind")

    def expect(self) -> None:
        """Say, before `start`, that it may hold tasks of an earlier life of ours: then it can be lost before it was met."""
        self._is_known = True

    def _redial(self) -> None:
        if self._has_left or self.state is NodeState.UP:
            return
        timeout_s = min(DIAL_MAX_S, max(RETURN_MAX_S, DIAL_RTTS * self._rtt_s)) if self._is_expected else DIAL_MAX_S
        self._dial = self._loop.dial(self._addresses, Role.UPSTREAM, self._credentials, FromDownstream, self._on_open,
                                     self._on_failed, self._on_messages, self._on_closed, timeout_s)

    @property
    def _is_expected(self) -> bool:
        """Whether it may yet come back in time to go on with what it holds."""
        return self._is_known and time.monotonic() - self.began_at < self._node_timeout_s

    def _resolve_again(self) -> None:
        """Look the name up anew, off the I/O thread: the resolver may take its time, and the machine may have moved."""
        try:
            self._addresses = self._resolve()
        except ValueError as error:
            self.error = error  # the last known addresses are dialled on
        finally:
            self._is_resolving = False

    def _on_open(self, link: Link) -> None:
        hello = link.hello
        assert hello is not None, "a link opens after both Hellos"
        if self._has_left:
            link.close("not needed any more")
            return
        twin = self._owner.twin_of(self, hello.incarnation)
        if twin is not None:
            # The agent took this link for a newer one of the same client and closed the twin's, which will dial again.
            self.error = DistexecError(f"this is {hello.name!r}, in use already as {twin.address}; name a node once")
            self._has_left = True
            link.close("this node is in use already under another address")
            self._set(NodeState.REFUSED)
            return
        if self._is_known and self.hello is not None and self.hello.incarnation != hello.incarnation:
            self._lose("it came back as a new process; what it ran before is gone")
        self.hello, self.link, self.error, self.problem = hello, link, None, ""
        self._failures = self._refusals = 0
        self._opened_at = time.monotonic()
        self._has_said_bye = False
        self._transfers = Transfers(link, self._store, self._loop.call_later, self._owner.files.traffic)
        self.is_told = False
        self._set(NodeState.UP)
        self._is_known = True
        self._dispatcher.call(lambda now: self._dispatcher.scheduler.node_joined(self, hello.name, self._window_s))
        self._owner.files.node_opened(self)
        self._owner.modules.node_opened(self)
        self._owner.values.node_opened(self)

    def _on_failed(self, error: Exception) -> None:
        if self._has_left:
            return
        self.error = error
        self._failures += 1
        if isinstance(error, (AuthenticationFailed, IncompatibleNode)):
            if self._is_known:
                self._lose(f"it refuses us now: {error}")
            self._set(NodeState.REFUSED)
        elif self.state is NodeState.REFUSED:
            self._set(NodeState.CONNECTING)
        self._refusals = self._refusals + 1 if isinstance(error, ConnectionRefusedError) else 0
        if self._is_known and self._refusals >= REFUSALS_FOR_PROOF:
            self._lose("its process is gone: the machine answers, but nobody listens there any more")
        if self._is_named and not self._is_expected and not self._is_resolving and self._failures % RESOLVE_EVERY == 0:
            self._is_resolving = True
            threading.Thread(target=self._resolve_again, name="distexec-resolve", daemon=True).start()
        self._owner.node_changed(self)
        self._loop.call_later(self._pause_s(), self._redial)

    def _pause_s(self) -> float:
        if self._is_known and self._refusals:  # the proof needs three of them soon
            return REDIAL_S
        longest_s = RETURN_MAX_S if self._is_expected else REDIAL_MAX_S
        return float(min(longest_s, 0.2 * 1.6 ** min(self._failures, 12)) * random.uniform(0.7, 1.0))

    def _on_closed(self, link: Link, reason: str) -> None:
        if link is not self.link:
            return
        self.link = None
        self._behind.clear()
        if self._transfers is not None:
            self._transfers.close(reason)
        if self._has_left:
            return
        if self._has_said_bye:
            self._lose("it was stopped")
        else:
            heard_at = max(link.last_heard, self._quiet_since)
            self._dispatcher.call(lambda now: self._dispatcher.scheduler.node_suspended(self, heard_at))
        self._set(NodeState.SUSPENDED if self._is_known else NodeState.CONNECTING)
        self._refusals = 0
        self.began_at = time.monotonic()
        self._shorts = self._shorts + 1 if time.monotonic() - self._opened_at < SHORT_S else 0
        if self._shorts > 1:
            self._loop.call_later(min(REDIAL_MAX_S, REDIAL_S * 2.0 ** min(self._shorts, 8)), self._redial)
        else:
            self._redial()

    def _lose(self, reason: str) -> None:
        self._is_known = False
        self.began_at = time.monotonic()
        evidence = Evidence(self.name, reason=f"node {self.name!r}: {reason}")
        self._dispatcher.call(lambda now: self._dispatcher.scheduler.node_lost(self, evidence, now))
        if self.state is NodeState.SUSPENDED:
            self._set(NodeState.CONNECTING)

    def _set(self, state: NodeState) -> None:
        if state is not self.state:
            self.state = state
            self._owner.node_changed(self)

    def _watch(self) -> None:
        """Ask a quiet node for a sign of life; take one that gives none for three heartbeats for cut off."""
        if self._has_left:
            return
        now = time.monotonic()
        if now - self._watched_at > self._beat_s / 2 + min(STALL_S, self._beat_s):
            self._quiet_since = now
        self._watched_at = now
        self._loop.call_later(self._beat_s / 2, self._watch)
        link = self.link
        if link is None:
            return
        silent_s = now - max(link.last_heard, self._quiet_since)
        if silent_s >= SILENT_BEATS * self._beat_s:
            link.finish(f"node {self.name!r} was silent for {silent_s:.1f} s")
        elif silent_s >= 0.8 * self._beat_s:
            link.send([Ping(time.monotonic_ns())])
        if link.rtt_s is not None:
            self._measured(link.rtt_s)

    def _measured(self, rtt_s: float) -> None:
        """Keep as much work at the node as a round trip needs; one that a standstill made long is not believed alone."""
        if rtt_s == self._rtt_s:
            return
        shorter_s, self._rtt_s = min(rtt_s, self._rtt_s), rtt_s
        window_s = max(NODE_AHEAD_S, 2 * shorter_s)
        if window_s != self._window_s:
            self._window_s = window_s
            self._dispatcher.call(lambda now: self._dispatcher.scheduler.set_window(self, window_s))

    # ---- what it says

    def _on_messages(self, link: Link, messages: list[Message]) -> None:
        if link is not self.link:
            return
        passed: list[Message] = []
        has_offer = False
        for message in messages:
            if self._behind and self._waits_behind(message):
                continue
            if type(message) is Outcome:
                if not message.buffers or not self._fetch(message):
                    passed.append(message)
            elif type(message) is Submit and _has_blobs(message):
                if passed:
                    self._dispatcher.receive(self, passed)
                    passed = []
                self._fetch_call(message)
            elif type(message) is Partial:
                self._on_partial(link, message)
            elif not self._keep(message):
                has_offer = has_offer or isinstance(message, Offer)
                passed.append(message)
        if passed:
            self._dispatcher.receive(self, passed)
        if has_offer:
            self._owner.node_changed(self)

    def _keep(self, message: Message) -> bool:
        """Take what is not the scheduler's."""
        if isinstance(message, Output):
            self._owner.node_wrote(self, message)
        elif isinstance(message, Record):
            self._owner.node_logged(self, message)
        elif isinstance(message, Load):
            self.load = message
        elif isinstance(message, Bye):
            self._has_said_bye = True
        elif isinstance(message, Cleaned):
            self._owner.node_cleaned(self, message)
        elif isinstance(message, Find):
            self._owner.modules.find(self, message)
        elif self._transfers is None or not (self._transfers.handle(message)
                                             or self._owner.files.node_said(self, message, self._transfers)):
            return isinstance(message, (Ping, Pong, Hello))
        return True

    # A call with blobs is heard once they are here; what its task says after it comes after it.

    def _waits_behind(self, message: Message) -> bool:
        if not isinstance(message, (Submit, Outcome, Blocked, Took, Partial)):
            return False
        behind = self._behind.get((message.session, message.seq, message.attempt))
        if behind is None:
            return False
        behind.append(message)
        return True

    def _on_partial(self, link: Link, partial: Partial) -> None:
        """Hear a partial result once its blobs are here; a link that is cut meanwhile says it again when it is back."""
        assert self._transfers is not None, "it was just heard"
        key = partial.session, partial.seq, partial.attempt
        if not _has_blobs(partial):
            self._owner.values.node_published(self, partial)
            link.send([Heard(*key, partial.number)])
            return
        self._behind[key] = []

        def here() -> None:
            self._owner.values.node_published(self, partial)
            go_on()

        def failed(reason: str) -> None:
            if link is self.link:
                self._owner.values.partial_lost(partial, reason)
                go_on()

        def go_on() -> None:
            link.send([Heard(*key, partial.number)])
            if link is self.link:
                behind = self._behind.pop(key, [])
                if behind:
                    self._on_messages(link, behind)

        fetch(self._transfers, self._store, partial.buffers, here, failed)

    def _fetch_call(self, call: Submit) -> None:
        link = self.link
        assert self._transfers is not None, "it was just heard"
        assert link is not None, "as above"
        self._behind[call.session, call.seq, call.attempt] = []
        fetch(self._transfers, self._store, (*call.function_buffers, *call.buffers), lambda: self._call_is_here(link, call),
              lambda reason: self._call_is_lost(link, call, reason))

    def _call_is_here(self, link: Link, call: Submit) -> None:
        behind = self._behind.pop((call.session, call.seq, call.attempt), [])
        self._dispatcher.receive(self, [call])
        if behind and link is self.link:
            self._on_messages(link, behind)

    def _call_is_lost(self, link: Link, call: Submit, reason: str) -> None:
        if link is self.link:  # else the call is said again once the link is back
            link.finish(f"what a nested call was given could not be fetched: {reason}")

    def _receive_whole(self, outcome: Outcome, refs: list[BlobRef]) -> None:
        """Pass on an outcome whose blobs are here; let them go again if it comes too late to count."""
        with self._dispatcher.lock:
            is_wanted = self._dispatcher.scheduler.expects(self, outcome)
            is_nested = is_wanted and self._dispatcher.scheduler.is_nested(self, outcome)
        if is_nested:
            try:
                for ref in refs:
                    self._store.share(ref)  # whoever made the call may be a local worker
            except OSError:
                pass  # then it cannot be handed to it, which the dispatcher sees to
        self._dispatcher.receive(self, [outcome])
        for ref in () if is_wanted else refs:
            self._store.release(ref)

    def _fetch(self, outcome: Outcome) -> bool:
        """Pull an outcome's blobs before the scheduler hears of it: until then the node still holds the lease."""
        refs = [ref for ref in outcome.buffers if isinstance(ref, BlobRef)]
        if not refs or self._transfers is None:
            return False
        got: list[BlobRef] = []
        has_failed = False

        def on_done(ref: BlobRef) -> None:
            got.append(ref)
            if has_failed:
                self._store.release(ref)
            elif len(got) == len(refs):
                self._receive_whole(outcome, refs)

        def on_failed(ref: BlobRef, reason: str) -> None:
            nonlocal has_failed
            if has_failed:
                return
            has_failed = True
            for each in got:
                self._store.release(each)
            if self.link is not None:  # else the outcome is said again once the link is back
                evidence = Evidence(self.name, reason=f"its result ({ref.size_bytes} bytes) could not be fetched: {reason}")
                self._dispatcher.receive(self, [Lost(outcome.session, outcome.seq, outcome.attempt, evidence)])

        for ref in refs:
            self._transfers.pull(ref, on_done, on_failed)
        return True


def _has_blobs(call: Submit | Partial) -> bool:
    buffers = (*call.function_buffers, *call.buffers) if isinstance(call, Submit) else call.buffers
    return any(isinstance(buffer, BlobRef) for buffer in buffers)
