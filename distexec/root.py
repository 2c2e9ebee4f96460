"""The root of the tree: what lives behind a `ClusterExecutor`, and outlives it until its work is done.

    executor ──weakly── Root ── Dispatcher ── Scheduler        submit: pack, put buffers by, lease or queue
    futures ── control ──┘ └── Pool (local), Nodes (remote)    ended:  unpack, conclude the future, let blobs go

Rule: user code (unpickling, callbacks) runs with no lock held. The futures need nothing but the Root, the Root needs no
executor: when the last reference to that goes, submitted work is finished and the Root closes by itself.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from .calls import Code, Room, put_by, take_outcome
from .clientfiles import ClientFiles
from .clientmodules import ClientModules
from .dispatcher import Dispatcher
from .errors import DistexecError, NoNodes, TaskKilled, WorkerLost, raisable, say_where
from .future import ClusterFuture
from .ledger import Task
from .messages import (
    MAX_INLINE_BYTES,
    Buffers,
    Define,
    Lost,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Run,
    SessionSpec,
)
from .offspring import NESTED, NestedCalls
from .payload import CallPacker
from .renewal import Ground, Renewals
from .report import ClusterStatus
from .scheduler import Scheduler
from .sessions import label_of
from .shipping import BlobStore
from .supply import LOCAL, Supply, lost_error
from .transport import Loop
from .usermodules import paths_elsewhere
from .values import Values

if TYPE_CHECKING:
    from .durable import Identity, Recorder
    from .journal import Journal
    from .pool import Pool

RETURN_S = 5.0
"""How much longer than `node_timeout` nodes keep a session whose client is away: whoever is not yet taken for dead goes on.
With the default both come to what a node grants anyway."""

LONG_S = 86_400.0  # a node_timeout above is as good as none; sessions end all the same

CLOSE_S = 5.0
"""How long workers get to leave by themselves before they are ended."""

_VALUE = OutcomeKind.VALUE  # looking up a member of an enum costs as much as a message

INTERRUPTED_S = 1.0
"""After Ctrl-C, how long tasks may take to end in order. Longer: who pressed it waits. Shorter: outcomes are thrown away."""

RECOVERY_CHECK_S = 0.1
"""How often it is looked whether the nodes of an earlier life have spoken, while the executor may be waiting to close."""

_log = logging.getLogger("distexec")
_roots: weakref.WeakSet[Root] = weakref.WeakSet()
_is_exiting = False


class Root:
    """Owns the tasks of one executor. Any thread may call it."""

    def __init__(self, *, name: str, packer: CallPacker, spec: SessionSpec, slots: int, ceiling: int, retries: int,
                 node_timeout_s: float, nodes_timeout_s: float | None, max_pending: int | None,
                 make_pool: Callable[[Root], Pool] | None, journal: Journal | None = None,
                 identity: Identity | None = None, linger_s: float = 0.0, asks_all: bool = False,
                 downloads: str | None = None, ground: Ground | None = None,
                 setup_args: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        self.name = name
        self.retries = retries
        self.loop = Loop("distexec-io")
        self.packer = packer
        self.store = BlobStore(arena_closed=lambda number: self.supply.arena_closed(number), keeps_received=True,
                               wake=self.loop.wake)
        self.scheduler = Scheduler(slots, LOCAL, node_timeout_s=node_timeout_s, claim=_claim)
        self.dispatcher = Dispatcher(self.loop, self.scheduler, on_ended=self._on_ended,
                                     on_failure=lambda _session, peer, failure: self.supply.session_failed(peer, failure),
                                     on_kin=lambda news: self._nested.take(news))
        self.files = ClientFiles(self.loop, self.dispatcher, downloads)
        id, token = identity[:2] if identity is not None else (secrets.token_bytes(16), secrets.token_bytes(16))
        self.label = label_of(id)
        self.spec = spec = structs.replace(spec, label=self.label, node=LOCAL)
        away_s = max(linger_s, min(node_timeout_s, LONG_S) + RETURN_S)
        opened = Open(0, id, token, 1.0, ceiling, for_nodes(spec), away_s)
        self.session = self.scheduler.open_session(opened, None, time.monotonic())
        self.supply: Supply = Supply(self, node_timeout_s, nodes_timeout_s, has_pool=make_pool is not None)
        self.files.serve(self.supply, self.session)
        self.broken: BaseException | None = None
        self._make_pool = make_pool
        self.recorder: Recorder | None = None
        last_seq = last_fn = 0
        if journal is not None and identity is not None:
            from .durable import Recorder
            self.session.is_durable = True
            self.recorder = Recorder(self, journal, identity.life, asks_all=asks_all)
            _roots.add(self)  # before it is started: a forked child must leave the journal alone
            last_seq, last_fn = journal.last()
        self.seqs = itertools.count(last_seq + 1)
        self._last_old_seq = last_seq  # of earlier lives
        self.code = Code(self.session.no, self.store, last_fn, self._forget_functions)
        self._nested: NestedCalls = NestedCalls(self)
        self.values = Values(self)
        self._start_lock = threading.Lock()  # guards _is_started, pool, spec, _closer
        self.renewals = Renewals(self, ground, setup_args or {}, node_timeout_s)
        self.is_stale = False  # modules were imported again: `modules` must look before the next task is taken
        self.modules: ClientModules = ClientModules(self)
        self._is_started = False
        self._closer: threading.Thread | None = None
        self._is_closing = False  # no new tasks; close when the last has ended
        self.owner: weakref.ref[Any] | None = None  # the executor; its callback calls `drop`
        self._is_dropped = False  # set by the finalizer of the executor
        self._withdrawn: deque[Task] = deque()  # cancelled, to be forgotten by the I/O thread
        self._is_withdrawing = False  # it was told
        self._closed = threading.Event()
        self._room = Room(max_pending) if max_pending is not None else None
        self._began_at = time.monotonic()
        self.done: dict[str, int] = {}
        self._failed = self._retried = 0
        self._run_ns = 0

    def __repr__(self) -> str:
        return f"<Root {self.name!r} {self.scheduler.sessions!r}>"

    # ---- life

    def start(self) -> None:
        """Start the I/O thread and the local pool, once."""
        if self._is_started:
            return
        with self._start_lock:
            if self._is_started or self._is_closing:
                return
            self.loop.start()  # first: it fails where no more threads can be had, and then nothing shall be left
            self.loop.idle_hooks += [self._look_for_drop, self.store.reap, self.values.reap]
            if self._make_pool is not None:
                self.spec = structs.replace(self.spec, home=self.files.open())
                self.supply.pool = self.dispatcher.staff[self.session] = self._make_pool(self)
            self.dispatcher.start()
            self.supply.start()
            if self.recorder is not None:
                self.recorder.start()
                self.loop.call_later(RECOVERY_CHECK_S, self._look_recovered)
            self._is_started = True
            _roots.add(self)

    def respec(self, spec: SessionSpec) -> Pool | None:
        """Prepare our own workers so from now on; gives their pool, once there is one."""
        with self._start_lock:
            self.spec = structs.replace(spec, home=self.spec.home)
            return self.supply.pool

    def drop(self) -> None:
        """Learn, from a finalizer, that no executor refers to this any more; takes no lock."""
        self._is_dropped = True
        self.loop.wake()

    def _look_for_drop(self) -> None:
        if self._is_dropped and not self._is_closing:
            self.begin_shutdown()

    def begin_shutdown(self, *, cancel_futures: bool = False) -> None:
        """Take nothing more; close when all that was taken has ended."""
        with self.dispatcher.lock:
            self._is_closing = True
            if self.recorder is not None:
                self.recorder.cancels = self.recorder.cancels or cancel_futures
            queued = [task for task in self.session.tasks.values() if not task.claimed] if cancel_futures else []
        # As with the standard pool's call queue: what the workers under way would have begun with is begun.
        begun = self.supply.count_coming() if len(queued) == len(self.session.tasks) else 0
        for task in queued[begun:]:
            task.owner.cancel()
        self._close_if_done()

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Block until everything is closed; not on a thread that has to do it. False: `timeout` seconds were not enough."""
        if self._may_wait() and threading.current_thread() is not self._closer:
            return self._closed.wait(timeout)
        return self._closed.is_set()

    def _may_wait(self) -> bool:
        """Whether this is not one of our own threads, which others wait for."""
        return not (self.loop.is_current() or (self.recorder is not None and self.recorder.is_current()))

    def break_with(self, error: BaseException) -> None:
        """End every task with `error`, refuse new ones with it, end the workers."""
        with self.dispatcher.lock:
            if self._is_closing and not self._has_work:
                return
            self.broken = self.broken or error
            self._is_closing = True
        left = self.dispatcher.call(self.scheduler.close_session, self.session) if not self.session.closing else []
        if self.supply.pool is not None:
            self.supply.pool.terminate()
        for task in left:
            self._end(task, None, error)
        self._close_if_done()

    def kill_all(self) -> None:
        """Withdraw what is queued and end what runs."""
        self.begin_shutdown(cancel_futures=True)
        for task in list(self.session.tasks.values()):
            if not task.owner.cancelled():
                self.kill(task)

    def interrupt(self) -> None:
        """End at once, as after Ctrl-C: a durable session is left to its journal and its nodes, others are killed."""
        self.supply.drop_output()
        self.renewals.cleanups.limit(INTERRUPTED_S)
        if self.recorder is None or not self._has_work:
            self.kill_all()
            self.loop.call_later(INTERRUPTED_S, self._end_rest)
            return
        command = self.recorder.how_to_go_on()
        unfinished = self.detach(DistexecError(f"the session was left behind; go on with: {command}"))
        if unfinished:
            print(f"distexec: unfinished calls left in {self.recorder.path}: {unfinished}; go on with: {command}",
                  file=sys.stderr, flush=True)

    def _end_rest(self) -> None:
        """End what did not end: Ctrl-C may have come in the middle of handing it out, and then nobody answers for it."""
        if self._has_work:
            self.break_with(TaskKilled("the program was interrupted, and ended this task"))

    def detach(self, error: BaseException) -> int:
        """Leave what is unfinished to the nodes that have it, and end here, futures with `error`. Counts the unfinished."""
        assert self.recorder is not None, "only a durable session can be left"
        with self.dispatcher.lock:
            if self.session.closing:
                return 0
            self.broken = self.broken or error
            self._is_closing = True
        self.recorder.detach()
        self.supply.cut()
        left = self.dispatcher.call(self.scheduler.close_session, self.session)
        if self.supply.pool is not None:
            self.supply.pool.terminate()
        unfinished = len(left) + self.recorder.count_unsent()
        for task in left:
            self._end(task, None, error)
        self._close_if_done()
        return unfinished

    def settled(self) -> None:
        """Learn that nothing is unsettled in the journal, perhaps for good."""
        if self._is_closing:
            self._close_if_done()

    def _look_recovered(self) -> None:
        """Look, until nodes have said what they hold, whether that was the last to wait for."""
        if self.session.awaited and not self.session.closing:
            self.loop.call_later(RECOVERY_CHECK_S, self._look_recovered)
        else:
            self.settled()

    @property
    def _has_work(self) -> bool:
        return bool(self.session.tasks) or (self.recorder is not None and self.recorder.is_busy)

    def _close_if_done(self) -> None:
        if not self._is_closing or self._has_work:
            return
        with self._start_lock:
            if self._closer is not None:
                return
            self._closer = threading.Thread(target=self._close, name="distexec-closer")
            is_started = self._is_started
        if is_started:
            try:
                self._closer.start()
            except RuntimeError:  # no more threads: the processes end with this one's, and nobody shall wait
                self._closed.set()
        else:  # and never will be: there is nothing to wait for, and the interpreter may be past starting threads
            self._close()

    def _close(self) -> None:
        try:
            if not self.session.closing:
                if self._is_started:
                    self.renewals.cleanups.run()
                self.dispatcher.call(self.scheduler.close_session, self.session)
            if self.recorder is not None:
                away = [node.address for node in self.supply.nodes if node.may_hold]
                self.recorder.close(is_over=self.broken is None, away=away)
            self.dispatcher.close()
            if self._is_started:
                self.supply.close(CLOSE_S)
            self.loop.stop()
            self.files.close()
            self.store.close()
        finally:
            _roots.discard(self)
            self._closed.set()
            self.supply.notify()

    def abandon(self) -> None:
        """Be closed in a forked child: threads, links and workers are its parent's."""
        self.broken = RuntimeError("this executor belongs to the process that forked this one; make one of its own here")
        self._is_closing = True
        self._closer = threading.current_thread()
        if self.recorder is not None:
            self.recorder.abandon()
        self.files.abandon()
        # Whoever held these is not here.
        self.dispatcher.lock, self._start_lock, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        self.session.tasks.clear()
        self._closed.set()

    # ---- tasks

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
               options: Options | None = None, retries: int | None = None, key: str | None = None) -> ClusterFuture[Any]:
        """Take in one call. What cannot be pickled makes a future that has failed with the pickling error."""
        self.check_open()
        if not self._is_started:
            self.start()
        if self.is_stale:
            self.modules.look()
        if self.recorder is not None:
            return self.recorder.submit(fn, args, kwargs, options, self.retries if retries is None else retries, key)
        future: ClusterFuture[Any] = ClusterFuture()
        made = self.make_task(fn, args, kwargs, future, options, retries)
        if made is None:
            return future
        task, definition = made
        if not self.dispatcher.submit(self, task, definition):
            self._take_back([task])
        return future

    def submit_many(self, fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], options: Options | None,
                    retries: int | None) -> list[ClusterFuture[Any]]:
        """Take in several calls of one function, given by their arguments, at the price of little more than one."""
        if self._room is not None or self.recorder is not None:  # each must be on its way before the next waits for room
            return [self.submit(fn, args, {}, options, retries) for args in calls]
        self.check_open()
        if not self._is_started:
            self.start()
        if self.is_stale:
            self.modules.look()
        futures: list[ClusterFuture[Any]] = []
        batches: dict[int, tuple[Define, list[Task]]] = {}  # by function number: it may change between two calls
        for args in calls:
            future: ClusterFuture[Any] = ClusterFuture()
            futures.append(future)
            packed = self._pack(fn, args, {}, future)
            if packed is not None:
                task, definition = self._task(packed, future, options, retries)
                batches.setdefault(definition.fn, (definition, []))[1].append(task)
        for definition, tasks in batches.values():
            if not self.dispatcher.submit_many(self, tasks, definition):
                self._take_back(tasks)
        return futures

    def make_task(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], future: ClusterFuture[Any],
                  options: Options | None, retries: int | None) -> tuple[Task, Define] | None:
        """Make a call's task and its function's definition; None, and the future has failed, if it cannot be pickled."""
        packed = self._pack(fn, args, kwargs, future)
        return None if packed is None else self._task(packed, future, options, retries)

    def _pack(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
              future: ClusterFuture[Any]) -> tuple[Define, bytes, Buffers] | None:
        """Pickle a call and put its buffers by; None, and the future has failed, if that cannot be done."""
        if self._room is not None:
            self._room.enter(may_wait=self._may_wait())
        try:
            code, code_buffers, key = self.packer.pack_function(fn)
            data, views = self.packer.pack_call(args, kwargs, key)
            definition = self.code.known.get(key) or self.code.define(key, code, code_buffers)
            if views or len(data) > MAX_INLINE_BYTES:
                return definition, *put_by(self.store, data, views)
        except (Exception, SystemExit) as error:  # what a user's __reduce__ raises is the call's failure, not the program's
            if self._room is not None:
                self._room.leave()
            future.conclude(None, error)
            return None
        return definition, data, ()

    def _task(self, packed: tuple[Define, bytes, Buffers], future: ClusterFuture[Any], options: Options | None,
              retries: int | None) -> tuple[Task, Define]:
        definition, data, buffers = packed
        run = Run(self.session.no, next(self.seqs), 1, definition.fn, data, buffers, options)
        task = Task(run, self.session, future, self.retries if retries is None else retries)
        future.bind(task, self)
        return task, definition

    def _take_back(self, tasks: Sequence[Task]) -> None:
        """The executor was shut down while these were on their way in: raise as if that had come first."""
        for task in tasks:
            self.let_go(task)
        self.check_open()

    @property
    def is_closed(self) -> bool:
        """Whether everything has ended and nothing is left."""
        return self._closed.is_set()

    @property
    def is_idle(self) -> bool:
        """Whether it takes nothing more and nothing is left to be done."""
        return self._is_closing and not self._has_work

    @property
    def is_open(self) -> bool:
        """Whether new tasks are taken; read with the dispatcher's lock held to be sure."""
        return not self._is_closing

    def check_open(self) -> None:
        """Raise what `submit` raises if nothing is taken any more."""
        if self.broken is not None:
            raise raisable(self.broken)
        if self._is_closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _is_exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def _forget_functions(self, functions: dict[bytes, Define]) -> list[Define]:
        """Forget the older half of the functions that no task names, and have nodes forget them; gives what they were."""
        if self.recorder is not None and self.recorder.is_busy:
            return []  # what it has to hand out names some
        with self.dispatcher.lock:
            used = {task.run.fn for task in self.session.tasks.values()}
        idle = [key for key, definition in functions.items() if definition.fn not in used]
        gone = [functions.pop(key) for key in idle[:len(idle) // 2]]
        self.dispatcher.call(lambda now: self.scheduler.undefine(self.session, [each.fn for each in gone]))
        return gone

    def let_go(self, task: Task) -> None:
        """Let go of a task's blobs and of its place among the pending; once, by whoever ended its future."""
        if task.run.buffers:
            self.values.let_go(task.run.buffers)
        if self._room is not None and task.run.seq > self._last_old_seq:  # a recovered task never had a place
            self._room.leave()

    # ---- Control, for futures

    def withdraw(self, task: Task) -> None:
        """Forget a cancelled task that was never handed out. Takes no lock: the finalizers of map's iterators come here."""
        self._withdrawn.append(task)
        if not self._is_withdrawing:
            self._is_withdrawing = True
            self.loop.call_soon(self._withdraw)

    def _withdraw(self) -> None:
        """Forget what was cancelled since the last time: after Ctrl-C that may be a hundred thousand."""
        self._is_withdrawing = False  # first: what is appended from here on may be missed below
        tasks = [self._withdrawn.popleft() for _ in range(len(self._withdrawn))]

        def discard(now: float) -> None:
            for task in tasks:
                # It may have left already: asked for by a free slot, or with the session.
                if self.session.tasks.get(task.run.seq) is task:
                    self.scheduler.discard(task)

        self.dispatcher.call(discard)
        for task in tasks:
            if self.recorder is not None:
                self.recorder.withdrawn(task)
            else:
                self.let_go(task)
        if self._is_closing:
            self._close_if_done()

    def kill(self, task: Task) -> None:
        """End a task wherever it is."""
        self.dispatcher.call(lambda now: self.scheduler.kill(task))

    def captures(self, node: str) -> bool:
        """Whether what tasks print on a node is kept for their futures."""
        return self.supply.output.captures(node)

    # ---- ends

    def _on_ended(self, ended: list[tuple[Task, Outcome | Lost]]) -> None:
        supply = self.supply
        if supply.output.printing:
            supply.output.ended(ended)
        if supply.logs.is_busy:
            supply.logs.catch_up()
        if self.recorder is not None:
            self.recorder.ended(ended)
        else:
            self.conclude(ended)

    def conclude(self, ended: list[tuple[Task, Outcome | Lost]]) -> None:
        """End the futures of tasks that have ended."""
        unpack, done = self.packer.unpack_outcome, self.done
        for task, message in ended:
            run_ns = -1
            if type(message) is Outcome:
                run_ns = message.run_ns
                self._run_ns += run_ns
                if message.kind == 0 and not message.buffers:
                    value, error = unpack(_VALUE, message.data, ())
                else:
                    value, error = take_outcome(self.packer, self.store, task, message)
                    if error is not None and task.node != LOCAL:
                        say_where(error, task.node)
                        self.modules.explain(error, task.node)
            else:
                value, error = None, _worker_lost(task, message)  # type: ignore[arg-type]
            if error is not None:
                self._failed += 1
            done[task.node] = done.get(task.node, 0) + 1
            if task.deaths:
                self._retried += task.deaths - (type(message) is Lost)  # the last loss was not followed by another try
            self._end(task, value, error, run_ns)
        if self._is_closing:
            self._close_if_done()

    def end_unsent(self, tasks: Sequence[Task]) -> None:
        """End with the reason of all ends here what was recorded and cannot be handed out any more."""
        for task in tasks:
            self._end(task, None, self.broken or RuntimeError("cannot schedule new futures after shutdown"))

    def _end(self, task: Task, value: Any, error: BaseException | None, run_ns: int = -1) -> None:
        """End a task's future, unless it was cancelled: then all the rest is `withdraw`'s."""
        if not task.claimed and not task.owner.claim():
            return
        self.let_go(task)
        try:
            task.owner.conclude(value, error, run_ns)
        except BaseException as error:  # of a callback, SystemExit say: the futures that come after this one must end too
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # the user's own; elsewhere a callback has raised it
            _log.exception("distexec: a callback of %r wanted to end the thread", task.owner)

    def fail_queued(self, text: str) -> None:
        """End with `NoNodes(text)` what waits for a slot."""
        def take(now: float) -> list[Task]:
            tasks = [task for task in self.session.tasks.values() if task.queued and task.owner is not NESTED]
            for task in tasks:
                self.session.forget(task)
            return tasks
        for task in self.dispatcher.call(take):
            self._failed += 1
            self.done[""] = self.done.get("", 0) + 1
            self._end(task, None, NoNodes(text))
        if self._is_closing:
            self._close_if_done()

    # ---- what it looks like

    def status(self) -> ClusterStatus:
        """Describe the work and the nodes."""
        rows = tuple(self.supply.rows())
        with self.dispatcher.lock:
            queued = self.session.queued()
            running = len(self.session.tasks) - queued
            slots = self.supply.count_slots()
        return ClusterStatus(rows, slots, queued, running, sum(self.done.values()), self._failed, self._retried,
                             time.monotonic() - self._began_at, self._run_ns / 1e9)


def _claim(task: Task) -> bool:
    return bool(task.owner.claim())


def for_nodes(spec: SessionSpec) -> SessionSpec:
    """Leave out what only this machine's workers should have: the client's environment, and where its own modules lie."""
    return structs.replace(spec, environ={}, path=paths_elsewhere(spec.path))


def _worker_lost(task: Task, message: Lost) -> WorkerLost:
    return lost_error(message.evidence, message.evidence.reason, task.deaths)


def _at_exit() -> None:
    """Finish submitted work before the interpreter goes, as ProcessPoolExecutor does; after Ctrl-C, end it instead."""
    global _is_exiting
    _is_exiting = True
    is_interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    roots = list(_roots)
    for root in roots:
        if is_interrupted:
            root.interrupt()
        else:
            root.begin_shutdown()
    try:
        for root in roots:
            root.wait_closed()
    except KeyboardInterrupt:
        for root in roots:
            root.interrupt()
        for root in roots:
            root.wait_closed()
        raise


# The standard executors register here too: it runs before non-daemon threads are joined, while threads can still start.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]


def _abandon_in_child() -> None:
    for root in list(_roots):
        root.abandon()
    _roots.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
