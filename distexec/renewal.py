"""The prepared state of a session, as its client sees it: what setup is given where, how it is renewed, how it ends.

    setup, its arguments ──► SessionSpec of each node and of our own pool ──► resetup: the next generation's
    all tasks have ended ──► CleanUp ──► nodes ──► Cleaned; our own pool cleans up at the same time

Rule: a generation's number is given once. Who waits for cleanups waits as long as they take, but only for nodes that can
still answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msgspec import structs

from .calls import put_by
from .messages import MAX_INLINE_BYTES, BlobRef, Cleaned, CleanUp, OutcomeKind, SessionSpec
from .nodes import Node, NodeState
from .printout import LOCAL

if TYPE_CHECKING:
    from .dispatcher import Dispatcher
    from .ledger import Session
    from .payload import CallPacker
    from .scheduler import Scheduler
    from .shipping import BlobStore
    from .transport import Loop

LOOK_S = 0.5
"""How often it is looked whether nodes that are to clean up have gone for good."""

LEAVE_S = 5.0
"""How long our own workers get to leave by themselves before their cleanup."""

_log = logging.getLogger("distexec")

Packed = tuple[bytes, list[memoryview]]


class Ground(NamedTuple):
    """What a session's workers are to find when they begin: `setup` was called with arguments; `cleanup` is, in the end."""

    packer: CallPacker
    setup: Callable[..., object] | None
    cleanup: Callable[[], object] | None

    def pack(self, args: tuple[Any, ...]) -> Packed:
        """Pickle it; raises what pickling raises."""
        return self.packer.pack_call((self.setup, args, self.cleanup), {})

    def fit(self, spec: SessionSpec, args: tuple[Any, ...]) -> SessionSpec | None:
        """Put it into a spec that can be written down as it is; None if it is too large for that."""
        data, views = self.pack(args)
        if len(data) + sum(view.nbytes for view in views) > MAX_INLINE_BYTES:
            return None
        buffers = tuple(bytes(view) for view in views)
        return structs.replace(spec, setup=data, setup_buffers=buffers, has_cleanup=self.cleanup is not None)


def args_by_address(given: Iterable[tuple[str, object]], ground: Ground | None) -> dict[str, tuple[Any, ...]]:
    """Check the arguments that setup is given at some nodes; TypeError or ValueError if that cannot be meant."""
    args: dict[str, tuple[Any, ...]] = {}
    for address, each in given:
        if not isinstance(each, tuple):
            raise TypeError(f"setup_args of node {address!r} must be a tuple of arguments, not {each!r}")
        if each and (ground is None or ground.setup is None):
            raise ValueError(f"node {address!r} has setup_args, and there is no setup= to be called with them")
        if each:
            args[address] = each
    return args


class Work(Protocol):
    """What this needs of the root."""

    loop: Loop
    dispatcher: Dispatcher
    scheduler: Scheduler
    session: Session
    store: BlobStore
    packer: CallPacker
    spec: SessionSpec

    @property
    def supply(self) -> Any:
        """Its nodes and its pool."""

    def respec(self, spec: SessionSpec) -> Any:
        """Prepare our own workers so from now on; gives their pool, once there is one."""


class Renewals:
    """How the workers of one root are prepared, everywhere. Any thread."""

    def __init__(self, root: Work, ground: Ground | None, args: Mapping[str, tuple[Any, ...]],
                 node_timeout_s: float) -> None:
        self._root, self._ground = root, ground
        self._lock = threading.RLock()  # guards all below; taken before any other, and while callbacks may run
        self._args = dict(args)  # of setup, by address where they differ
        self._generation = 0
        self._refs: dict[str, list[BlobRef]] = {}  # of the arguments that are in use, by address; "": everywhere else
        self.cleanups = Cleanups(root, node_timeout_s)
        if ground is not None:
            session = root.session
            opened = self._filled(session.opened.spec, "", ())
            session.opened = structs.replace(session.opened, spec=opened)
            if LOCAL in self._args:
                root.respec(self._filled(root.spec, LOCAL, self._args[LOCAL]))
            else:
                root.respec(_like(root.spec, opened))

    def add(self, address: str, args: tuple[Any, ...]) -> None:
        """Say what setup is given on a node, before it is used."""
        with self._lock:
            self._args[address] = args

    def joining(self, node: Node) -> None:
        """Learn of a node before it is dialled."""
        with self._lock:
            if self._ground is not None and node.address in self._args:
                spec = self._filled(self._root.session.opened.spec, node.address, self._args[node.address])
                self._root.dispatcher.call(self._root.scheduler.renew_node, self._root.session, node, spec)

    def resetup(self, where: Node | str | None, args: tuple[Any, ...]) -> None:
        """Have setup run anew on a node, "local" or (None) everywhere; without arguments with those of the last time.

        Raises ValueError if there is no setup, what pickling raises, OSError if there is no memory for the arguments.
        """
        if self._ground is None:
            raise ValueError("resetup() runs the executor's setup anew, and it has none: give setup= to ClusterExecutor")
        with self._lock:
            self._generation += 1
            if where is None:
                self._resetup_all(args)
            elif where == LOCAL:
                self._args[LOCAL] = args or self._args_of(LOCAL)
                self._renew_local(self._filled(self._root.spec, LOCAL, self._args[LOCAL]))
            else:
                assert isinstance(where, Node), "the caller found it"
                self._args[where.address] = args or self._args_of(where.address)
                self._renew_node(where, self._filled(self._root.session.opened.spec, where.address,
                                                     self._args[where.address]))

    def _resetup_all(self, args: tuple[Any, ...]) -> None:
        if args:
            self._args = {"": args}
        root = self._root
        spec = self._filled(root.session.opened.spec, "", self._args_of(""))
        root.session.opened = structs.replace(root.session.opened, spec=spec)
        for node in list(root.supply.nodes):
            own = self._args.get(node.address)
            self._renew_node(node, spec if own is None else self._filled(spec, node.address, own))
        own = self._args.get(LOCAL)
        self._renew_local(_like(root.spec, spec) if own is None else self._filled(root.spec, LOCAL, own))

    def renew_all(self) -> int:
        """Have new workers everywhere, prepared as those before: what these have imported is not what it was.

        Gives the generation that they are.
        """
        with self._lock:
            self._generation += 1
            root, generation = self._root, self._generation
            opened = structs.replace(root.session.opened.spec, generation=generation)
            root.session.opened = structs.replace(root.session.opened, spec=opened)
            for node in list(root.supply.nodes):
                self._renew_node(node, structs.replace(root.session.spec_for(node), generation=generation))
            self._renew_local(structs.replace(root.spec, generation=generation))
            return generation

    def _renew_node(self, node: Node, spec: SessionSpec) -> None:
        node.problem = ""
        self._root.dispatcher.call(self._root.scheduler.renew_node, self._root.session, node, spec)

    def _renew_local(self, spec: SessionSpec) -> None:
        root = self._root
        pool = root.respec(spec)
        if pool is not None:
            generation = pool.renew(spec)
            root.dispatcher.call(root.scheduler.renew_workers, root.session, root.session.opened.spec, generation)

    def _args_of(self, address: str) -> tuple[Any, ...]:
        return self._args.get(address, self._args.get("", ()))

    def _filled(self, spec: SessionSpec, address: str, args: tuple[Any, ...]) -> SessionSpec:
        """Put setup and arguments into a spec; what is large into the store, where it stays while this is in use."""
        assert self._ground is not None, "the caller looked"
        data, buffers = put_by(self._root.store, *self._ground.pack(args))
        older, self._refs[address] = self._refs.get(address, []), [ref for ref in buffers if isinstance(ref, BlobRef)]
        self._root.store.release_all(older)
        return structs.replace(spec, setup=data, setup_buffers=buffers, has_cleanup=self._ground.cleanup is not None,
                               generation=self._generation)


def _like(spec: SessionSpec, other: SessionSpec) -> SessionSpec:
    """Make a spec prepare as another does."""
    return structs.replace(spec, setup=other.setup, setup_buffers=other.setup_buffers, has_cleanup=other.has_cleanup,
                           generation=other.generation)


class Cleanups:
    """Has everybody clean up, and hears how it went."""

    def __init__(self, root: Work, node_timeout_s: float) -> None:
        self._root, self._node_timeout_s = root, node_timeout_s
        self._changed = threading.Condition()  # guards all below
        self._pending: set[Node] = set()
        self._told: set[tuple[str, int]] = set()  # failures that were logged: node and generation
        self._deadline: float | None = None
        self._is_running = False

    def run(self) -> None:
        """Have nodes and our own pool clean up, and wait for the nodes. Not on the I/O thread."""
        root = self._root
        if not root.session.opened.spec.has_cleanup and not root.spec.has_cleanup:
            return
        with self._changed:
            self._is_running = True
            self._pending = {node for node in root.supply.nodes if node.is_up or node.may_hold}
            if root.supply.pool is not None:
                root.loop.call_soon(root.supply.pool.close, LEAVE_S, self._left_s())
            for node in self._pending:
                root.loop.call_soon(self._ask, node)
            while self._pending:
                left_s = self._left_s()
                if left_s is not None and left_s <= 0:
                    return
                self._changed.wait(LOOK_S if left_s is None else min(LOOK_S, left_s))
                self._pending = {node for node in self._pending if self._may_answer(node)}

    def _left_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _may_answer(self, node: Node) -> bool:
        if node.state in (NodeState.LEAVING, NodeState.REFUSED):
            return False
        return node.is_up or (node.may_hold and time.monotonic() - node.began_at < self._node_timeout_s)

    def limit(self, limit_s: float) -> None:
        """Wait no longer than this from now on, nor let our own cleanup take longer."""
        with self._changed:
            self._deadline = time.monotonic() + limit_s
            self._changed.notify_all()
        pool = self._root.supply.pool
        if self._is_running and pool is not None:
            self._root.loop.call_soon(pool.close, limit_s, limit_s)

    @property
    def left_s(self) -> float | None:
        """How long cleanups may take from now on; None: as long as they take."""
        return self._left_s()

    # ---- I/O thread

    def node_changed(self, node: Node) -> None:
        """Ask a node that comes back again."""
        if self._is_running and node.is_up and node in self._pending:
            self._root.loop.call_soon(self._ask, node)  # behind `Open`

    def _ask(self, node: Node) -> None:
        node.queue([CleanUp(self._root.session.no, self._root.session.spec_for(node).generation)])
        node.flush()

    def heard(self, node: Node | None, cleaned: Cleaned) -> None:
        """Learn how a node (None: our own pool) has cleaned up."""
        name = LOCAL if node is None else node.name
        with self._changed:
            is_news = cleaned.evidence is not None and (name, cleaned.generation) not in self._told
            self._told.add((name, cleaned.generation))
            if node is not None and cleaned.generation == self._root.session.spec_for(node).generation:
                self._pending.discard(node)
                self._changed.notify_all()
        if is_news:
            self._log(name, cleaned)

    def _log(self, name: str, cleaned: Cleaned) -> None:
        assert cleaned.evidence is not None, "else there is nothing to be told"
        error = None
        if cleaned.data:
            _, error = self._root.packer.unpack_outcome(OutcomeKind.ERROR, cleaned.data, ())
        tail = f"\n{cleaned.evidence.stderr_tail}" if cleaned.evidence.stderr_tail else ""
        _log.error("the session's state on node %r was not cleaned up: %s%s", name, cleaned.evidence.reason, tail,
                   exc_info=(type(error), error, error.__traceback__) if error is not None else None)
