"""The root of the tree: what lives behind a `ClusterExecutor`, and outlives it until its work is done.

    executor ──weakly── Root ── Dispatcher ── Scheduler        submit: pack, put buffers by, lease or queue
    futures ── control ──┘ └── Pool (local), Nodes (remote)    ended:  unpack, conclude the future, let blobs go

Rule: user code (unpickling, callbacks) runs with no lock held. The futures need nothing but the Root, the Root needs no
executor: when the last reference to that goes, submitted work is finished and the Root closes by itself.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .dispatcher import Dispatcher
from .errors import NoNodes, PayloadError, TaskKilled, TaskTimeout, WorkerLost
from .future import ClusterFuture
from .ledger import Task
from .messages import (
    MAX_INLINE_BYTES,
    BlobRef,
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
from .payload import CallPacker
from .report import ClusterStatus
from .scheduler import Scheduler
from .shipping import BlobStore
from .supply import LOCAL, Supply, lost_error
from .transport import Loop

if TYPE_CHECKING:
    from .pool import Pool

MAX_FUNCTIONS = 4096
"""Functions kept known to workers though no task names them. Smaller: code is sent again. Larger: memory everywhere."""

CLOSE_S = 5.0
"""How long workers get to leave by themselves before they are ended."""

_log = logging.getLogger("distexec")
_roots: weakref.WeakSet[Root] = weakref.WeakSet()
_is_exiting = False


class Root:
    """Owns the tasks of one executor. Any thread may call it."""

    def __init__(self, *, name: str, packer: CallPacker, spec: SessionSpec, slots: int, ceiling: int, retries: int,
                 node_timeout_s: float, nodes_timeout_s: float | None, max_pending: int | None,
                 make_pool: Callable[[Root], Pool] | None) -> None:
        self.name = name
        self.retries = retries
        self.loop = Loop("distexec-io")
        self.packer = packer
        self.store = BlobStore(arena_closed=lambda number: self.supply.arena_closed(number), keeps_received=True,
                               wake=self.loop.wake)
        self.scheduler = Scheduler(slots, LOCAL, node_timeout_s=node_timeout_s, claim=_claim)
        self.dispatcher = Dispatcher(self.loop, self.scheduler, on_ended=self._on_ended,
                                     on_failure=lambda _session, peer, failure: self.supply.session_failed(peer, failure))
        self.spec = spec
        opened = Open(0, secrets.token_bytes(16), secrets.token_bytes(16), 1.0, ceiling, _for_nodes(spec))
        self.session = self.scheduler.open_session(opened, None, time.monotonic())
        self.supply = Supply(self, node_timeout_s, nodes_timeout_s, has_pool=make_pool is not None)
        self.broken: BaseException | None = None
        self._make_pool = make_pool
        self._seqs = itertools.count(1)
        self._code_lock = threading.Lock()  # guards _functions, _function_numbers, _functions_limit
        self._functions: dict[bytes, Define] = {}
        self._function_numbers = itertools.count(1)
        self._functions_limit = MAX_FUNCTIONS
        self._start_lock = threading.Lock()  # guards _is_started, pool, _closer
        self._is_started = False
        self._closer: threading.Thread | None = None
        self._is_closing = False  # no new tasks; close when the last has ended
        self.owner: weakref.ref[Any] | None = None  # the executor; its callback calls `drop`
        self._is_dropped = False  # set by the finalizer of the executor
        self._closed = threading.Event()
        self._room = _Room(max_pending) if max_pending is not None else None
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
            if self._make_pool is not None:
                self.supply.pool = self.dispatcher.staff[self.session] = self._make_pool(self)
            self.loop.idle_hooks += [self._look_for_drop, self.store.reap]
            self.loop.start()
            self.dispatcher.start()
            self.supply.start()
            self._is_started = True
            _roots.add(self)

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
            queued = [task for task in self.session.tasks.values() if not task.claimed] if cancel_futures else []
        # As with the standard pool's call queue: what the workers under way would have begun with is begun.
        begun = self.supply.count_coming() if len(queued) == len(self.session.tasks) else 0
        for task in queued[begun:]:
            task.owner.cancel()
        self._close_if_done()

    def wait_closed(self) -> None:
        """Block until everything is closed; not on the I/O thread, which has to do it."""
        if not self.loop.is_current() and threading.current_thread() is not self._closer:
            self._closed.wait()

    def break_with(self, error: BaseException) -> None:
        """End every task with `error`, refuse new ones with it, end the workers."""
        with self.dispatcher.lock:
            if self._is_closing and not self.session.tasks:
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
            self.kill(task)

    def _close_if_done(self) -> None:
        if not self._is_closing or self.session.tasks:
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
                self.dispatcher.call(self.scheduler.close_session, self.session)
            self.dispatcher.close()
            if self._is_started:
                self.supply.close(CLOSE_S)
            self.loop.stop()
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
        # Whoever held these is not here.
        self.dispatcher.lock, self._start_lock, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        self.session.tasks.clear()
        self._closed.set()

    # ---- tasks

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
               options: Options | None = None, retries: int | None = None) -> ClusterFuture[Any]:
        """Take in one call. What cannot be pickled makes a future that has failed with the pickling error."""
        self._check_open()
        if not self._is_started:
            self.start()
        future: ClusterFuture[Any] = ClusterFuture()
        packed = self._pack(fn, args, kwargs, future)
        if packed is None:
            return future
        task, definition = self._task(packed, future, options, retries)
        if not self.dispatcher.submit(self, task, definition):
            self._take_back([task])
        return future

    def submit_many(self, fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], options: Options | None,
                    retries: int | None) -> list[ClusterFuture[Any]]:
        """Take in several calls of one function, given by their arguments, at the price of little more than one."""
        if self._room is not None:  # each must be on its way before the next one waits for room
            return [self.submit(fn, args, {}, options, retries) for args in calls]
        self._check_open()
        if not self._is_started:
            self.start()
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

    def _pack(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
              future: ClusterFuture[Any]) -> tuple[Define, bytes, Buffers] | None:
        """Pickle a call and put its buffers by; None, and the future has failed, if that cannot be done."""
        if self._room is not None:
            self._room.enter(may_wait=not self.loop.is_current())
        try:
            code, code_buffers, key = self.packer.pack_function(fn)
            data, views = self.packer.pack_call(args, kwargs, key)
            definition = self._functions.get(key) or self._define(key, code, code_buffers)
            if views or len(data) > MAX_INLINE_BYTES:
                return definition, *self._put_by(data, views)
        except (Exception, SystemExit) as error:  # what a user's __reduce__ raises is the call's failure, not the program's
            if self._room is not None:
                self._room.leave()
            future.conclude(None, error)
            return None
        return definition, data, ()

    def _task(self, packed: tuple[Define, bytes, Buffers], future: ClusterFuture[Any], options: Options | None,
              retries: int | None) -> tuple[Task, Define]:
        definition, data, buffers = packed
        run = Run(self.session.no, next(self._seqs), 1, definition.fn, data, buffers, options)
        task = Task(run, self.session, future, self.retries if retries is None else retries)
        future.bind(task, self)
        return task, definition

    def _take_back(self, tasks: Sequence[Task]) -> None:
        """The executor was shut down while these were on their way in: raise as if that had come first."""
        for task in tasks:
            self._let_go(task)
        self._check_open()

    @property
    def is_closed(self) -> bool:
        """Whether everything has ended and nothing is left."""
        return self._closed.is_set()

    @property
    def is_idle(self) -> bool:
        """Whether it takes nothing more and nothing is left to be done."""
        return self._is_closing and not self.session.tasks

    @property
    def is_open(self) -> bool:
        """Whether new tasks are taken; read with the dispatcher's lock held to be sure."""
        return not self._is_closing

    def _check_open(self) -> None:
        if self.broken is not None:
            raise _raisable(self.broken)
        if self._is_closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _is_exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def _define(self, key: bytes, code: bytes, views: Sequence[memoryview]) -> Define:
        with self._code_lock:
            known = self._functions.get(key)
            if known is not None:
                return known
            if views or len(code) > MAX_INLINE_BYTES:
                code, buffers = self._put_by(code, views)
            else:
                buffers = ()
            definition = Define(self.session.no, next(self._function_numbers), code, buffers)
            self._functions[key] = definition
            if len(self._functions) > self._functions_limit:
                self._forget_functions()
            return definition

    def _forget_functions(self) -> None:
        """Forget the older half of the functions that no task names; with the code lock held."""
        with self.dispatcher.lock:
            used = {task.run.fn for task in self.session.tasks.values()}
        idle = [key for key, definition in self._functions.items() if definition.fn not in used]
        gone = [self._functions.pop(key) for key in idle[:len(idle) // 2]]
        self._functions_limit = max(MAX_FUNCTIONS, 2 * len(self._functions))
        self.dispatcher.call(lambda now: self.scheduler.undefine(self.session, [each.fn for each in gone]))
        for definition in gone:
            self._release(definition.buffers)

    def _put_by(self, data: bytes, views: Sequence[memoryview]) -> tuple[bytes, Buffers]:
        """Copy buffers once: small ones into the message, large ones (and a large pickle, then first) into the store."""
        kept: list[bytes | BlobRef] = []
        try:
            if len(data) > MAX_INLINE_BYTES:
                kept.append(self.store.put(data))
                data = b""
            inline = MAX_INLINE_BYTES - len(data)
            for view in views:
                if view.nbytes > inline:
                    kept.append(self.store.put(view))
                else:
                    kept.append(bytes(view))
                    inline -= view.nbytes
        except BaseException:  # no memory for one of them: the call fails, and none is kept
            self._release(kept)
            raise
        return data, tuple(kept)

    def _release(self, buffers: Sequence[bytes | BlobRef]) -> None:
        for buffer in buffers:
            if isinstance(buffer, BlobRef):
                self.store.release(buffer)

    def _let_go(self, task: Task) -> None:
        """Let go of a task's blobs and of its place among the pending; once, by whoever ended its future."""
        if task.run.buffers:
            self._release(task.run.buffers)
        if self._room is not None:
            self._room.leave()

    # ---- Control, for futures

    def withdraw(self, task: Task) -> None:
        """Forget a cancelled task that was never handed out. Takes no lock: the finalizers of map's iterators come here."""
        self.loop.call_soon(self._withdraw, task)

    def _withdraw(self, task: Task) -> None:
        # It may have left already: asked for by a free slot, or with the session.
        self.dispatcher.call(lambda now: self.session.tasks.get(task.run.seq) is task and self.scheduler.discard(task))
        self._let_go(task)
        if self._is_closing:
            self._close_if_done()

    def kill(self, task: Task) -> None:
        """End a task wherever it is."""
        self.dispatcher.call(lambda now: self.scheduler.kill(task))

    # ---- ends

    def _on_ended(self, ended: list[tuple[Task, Outcome | Lost]]) -> None:
        unpack, done = self.packer.unpack_outcome, self.done
        for task, message in ended:
            run_ns = -1
            if type(message) is Outcome:
                run_ns = message.run_ns
                self._run_ns += run_ns
                if message.kind == 0 and not message.buffers:
                    value, error = unpack(OutcomeKind.VALUE, message.data, ())
                else:
                    value, error = self._unpack(task, message)
                    if error is not None and task.node != LOCAL:
                        _say_where(error, task.node)
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

    def _end(self, task: Task, value: Any, error: BaseException | None, run_ns: int = -1) -> None:
        """End a task's future, unless it was cancelled: then all the rest is `withdraw`'s."""
        if not task.claimed and not task.owner.claim():
            return
        self._let_go(task)
        try:
            task.owner.conclude(value, error, run_ns)
        except KeyboardInterrupt:
            raise
        except BaseException:  # SystemExit of a callback: the futures that come after this one must end all the same
            _log.exception("distexec: a callback of %r wanted to end the thread", task.owner)

    def _unpack(self, task: Task, message: Outcome) -> tuple[Any, BaseException | None]:
        if message.kind == OutcomeKind.TIMEOUT:
            limit_s = task.run.options.timeout_s if task.run.options is not None else 0.0
            return None, TaskTimeout(f"task {task.run.seq} ran longer than its limit of {limit_s:g} s on node "
                                     f"{task.node!r} and was ended (options(timeout=))")
        if message.kind == OutcomeKind.KILLED:
            where = f" on node {task.node!r}" if task.node else ""
            return None, TaskKilled(f"task {task.run.seq} was ended{where} by future.kill()")
        buffers: list[Any] = []
        try:
            for buffer in message.buffers:
                buffers.append(self.store.take(buffer) if isinstance(buffer, BlobRef) else buffer)
        except (OSError, MemoryError) as error:
            self._release(message.buffers[len(buffers):])
            failure = PayloadError(f"there is no memory here for the result of task {task.run.seq}: {error}")
            failure.__cause__ = error
            return None, failure
        data: Any = message.data
        if not data and buffers:
            data = buffers.pop(0)
        return self.packer.unpack_outcome(OutcomeKind(message.kind), data, buffers)

    def fail_queued(self, text: str) -> None:
        """End with `NoNodes(text)` what waits for a slot."""
        def take(now: float) -> list[Task]:
            tasks = [task for task in self.session.tasks.values() if task.queued]
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


class _Room:
    """Makes `submit` wait while `limit` tasks are pending."""

    def __init__(self, limit: int) -> None:
        self._left = limit  # below 0 by what came in without waiting
        self._changed = threading.Condition()

    def enter(self, *, may_wait: bool) -> None:
        """Take a place, free or not if the caller may not wait: a callback on the I/O thread, which alone can make room."""
        with self._changed:
            if may_wait:
                self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1

    def leave(self) -> None:
        """Give a place back."""
        with self._changed:
            self._left += 1
            self._changed.notify()


def _claim(task: Task) -> bool:
    return bool(task.owner.claim())


def _for_nodes(spec: SessionSpec) -> SessionSpec:
    """Leave out what only this machine's workers should have: the environment of the client."""
    return SessionSpec(spec.path, spec.directory, spec.argv, {}, spec.warnings, spec.authkey, spec.initializer,
                       spec.initializer_buffers, spec.max_tasks_per_child, spec.echo, spec.name, spec.env)


def _say_where(error: BaseException, node: str) -> None:
    """Add to a remote exception the name of the node, which is not in its traceback."""
    try:
        error.add_note(f"(raised on node {node!r})")
    except Exception:
        pass  # an exception that takes no notes; its future knows the node


def _worker_lost(task: Task, message: Lost) -> WorkerLost:
    return lost_error(message.evidence, message.evidence.reason, task.deaths)


def _raisable(error: BaseException) -> BaseException:
    """Make a fresh exception of the same kind, so that tracebacks do not pile up on one object."""
    try:
        fresh = copy.copy(error)
    except TypeError:
        return error
    fresh.__cause__ = error.__cause__
    return fresh


def _at_exit() -> None:
    """Finish submitted work before the interpreter goes, as ProcessPoolExecutor does; after Ctrl-C, end it instead."""
    global _is_exiting
    _is_exiting = True
    is_interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    roots = list(_roots)
    for root in roots:
        if is_interrupted:
            root.kill_all()
        else:
            root.begin_shutdown()
    try:
        for root in roots:
            root.wait_closed()
    except KeyboardInterrupt:
        for root in roots:
            root.kill_all()
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
