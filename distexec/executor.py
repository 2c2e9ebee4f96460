"""`ClusterExecutor`: the public face, a drop-in for `concurrent.futures.ProcessPoolExecutor`.

It checks what the user wrote, says at once what is wrong with it, and hands everything to its `Root`, which does not refer
back. Rule: what ProcessPoolExecutor accepts is accepted and means the same.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .address import parse_address, resolve
from .arguments import (
    NodeSpec,
    check_callables,
    check_child_limit,
    check_env,
    check_linger,
    check_numbers,
    find_credentials,
    left_behind,
    local_slots,
    node_specs,
)
from .clientfiles import Depends
from .errors import DistexecError, WorkerLost
from .future import ClusterFuture
from .mapping import Submissions, run_chunk
from .messages import Options, Tree
from .nested import NO_FILES, homes, rejoin
from .payload import CallPacker
from .poolplan import PoolPlan
from .printout import EchoMode, captures, check_output
from .renewal import args_by_address
from .report import ClusterStatus, NodeStatus
from .root import Root, for_nodes
from .shared import Shared
from .supply import LOCAL
from .taskoptions import Paths, TaskOptions, changed

if TYPE_CHECKING:
    from .durable import Recovered
    from .journal import NodeRow

__all__ = ["ClusterExecutor"]

T = TypeVar("T")

_log = logging.getLogger("distexec")


class Reopening(NamedTuple):
    """How a journal is gone on with by another program than its own."""

    packer: CallPacker
    asks_all: bool = True  # send what no node has


class _Submitter(Executor):
    """What the executor and its views share: submit and map with their own options."""

    _root: Root
    _options: TaskOptions

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> ClusterFuture[T]:
        """Run `fn(*args, **kwargs)` on some node and return its `ClusterFuture`.

        What cannot be pickled fails the future, not this call, as with ProcessPoolExecutor. Blocks while `max_pending`
        tasks are pending. Raises RuntimeError after shutdown, a BrokenExecutor once the executor is broken.
        """
        root = self._root
        retries = self._options.retries
        if retries is None:
            retries = root.retries
        options = self._options
        if options.files:
            return self._submit_with_files(fn, args, kwargs, retries)
        travels = None if options is _DEFAULT and retries else options.for_task(retries)
        return root.submit(fn, args, kwargs, travels, retries, options.key)

    def _submit_with_files(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any],
                           retries: int) -> ClusterFuture[T]:
        files, tree = self._root.files, self._tree()
        try:
            future = self._root.submit(fn, args, kwargs, self._options.for_task(retries, tree), retries, self._options.key)
        except BaseException:
            files.let_go(tree)
            raise
        files.keep(tree, future)
        return future

    def _tree(self) -> Tree:
        if self._root.recorder is not None:
            raise ValueError("options(files=) cannot be had in a durable session, for the files are not in the journal: "
                             "name them in depends=, or give what is in them as an argument")
        self._root.check_open()
        return self._root.files.tree(self._options.files)

    def share(self, value: T) -> Shared[T]:
        """Put a value by once for all tasks, and return the handle to use in calls: tasks get the value in its place.

        It is pickled now, sent once to each node that needs it, and unpickled once by each worker, which keeps it while the
        handle lives: what a task changes of it stays in that worker, for its later tasks too, and is seen nowhere else.
        Large arrays are mapped there: a machine has them once, whatever the number of workers, until they are written to.
        Raises what pickling raises, OSError if there is no memory, RuntimeError after shutdown.
        """
        self._root.check_open()
        return self._root.values.share(value)

    def map(self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
            buffersize: int | None = None, ordered: bool = True) -> Iterator[T]:
        """Run `fn` on the items of the iterables, zipped, and yield the results.

        Args:
            timeout: seconds from this call after which the iterator raises TimeoutError.
            chunksize: items sent together, as a hint; an item stays the unit of retry and error.
            buffersize: at most so many items submitted whose results were not yielded; None: all are submitted at once.
            ordered: False yields results as they come.

        An error, a timeout, or closing the iterator cancels the items that were not handed out.
        Raises ValueError or TypeError for arguments that cannot be meant.
        """
        if isinstance(chunksize, bool) or not isinstance(chunksize, int) or chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        if self._options.key is not None:
            raise ValueError(f"key={self._options.key!r} names one call, and map() makes many; leave it out")
        deadline = None if timeout is None else time.monotonic() + timeout
        items: Iterator[tuple[Any, ...]] = zip(*iterables)  # noqa: B905 - as PPE: the shortest decides
        retries = self._root.retries if self._options.retries is None else self._options.retries
        # What a map is given stays in use until the executor is closed: nobody knows when the last item has come.
        tree = self._tree() if self._options.files else ()
        travels = self._options.for_task(retries, tree)
        survives = self._root.recorder is not None
        if chunksize > 1 and travels is None:
            size = chunksize if buffersize is None else min(chunksize, max(1, buffersize // 2))
            chunks = iter(lambda: tuple(itertools.islice(items, size)), ())
            once = partial(_submit_calls, weakref.ref(self), self._root, run_chunk, Options(solo=True), 0)
            again = partial(_submit_calls, weakref.ref(self), self._root, fn, None, retries)
            ahead = None if buffersize is None else buffersize // size
            calls = Submissions(once, ((fn, chunk) for chunk in chunks), ahead, survives=survives)
            return calls.chunk_results(deadline, ordered, again)
        submit = partial(_submit_calls, weakref.ref(self), self._root, fn, travels, retries)
        return Submissions(submit, items, buffersize, survives=survives).results(deadline, ordered)


def _submit_calls(owner: weakref.ref[_Submitter], root: Root, fn: Callable[..., Any], options: Options | None,
                  retries: int, calls: Sequence[tuple[Any, ...]]) -> list[ClusterFuture[Any]] | None:
    """Submit calls of a map; None once nobody holds its executor any more, as in the standard library."""
    if owner() is None:
        return None
    return root.submit_many(fn, calls, options, retries)


_DEFAULT = TaskOptions()


class _View(_Submitter):
    """The same cluster with other options for the calls made through it; made by `ClusterExecutor.options`."""

    def __init__(self, executor: ClusterExecutor, options: TaskOptions) -> None:
        self._executor = executor  # views hold the executor, so that dropping it alone does not end the cluster
        self._root = executor._root
        self._options = options

    def options(self, **changes: Any) -> _View:
        """Return a view with more options changed."""
        return _View(self._executor, changed(self._options, **changes))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down the executor behind this view."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._options.files:
            raise ValueError(NO_FILES)
        return rejoin, (self._executor.label, tuple(self._options))

    def __repr__(self) -> str:
        return f"<view of {self._executor!r} with {self._options!r}>"


class ClusterExecutor(_Submitter):
    """Runs calls on worker processes of this machine and of any number of others.

    Args:
        max_workers: without nodes, the number of workers (None: the CPUs this process may use); with nodes, the most tasks
            running at once (None: as many as the nodes offer).
        mp_context: a multiprocessing context whose processes the local workers shall be. None: they are forked from a clean
            template process, which starts faster and never imports the program's `__main__`.
        initializer, initargs: called once in each worker before its first task; if it raises on every node, the executor
            breaks with `InitializerFailed`.
        max_tasks_per_child: tasks after which a worker is replaced by a fresh one; None: never. Not with context "fork".
        nodes: None: `$DISTEXEC_NODES` (comma-separated), else this machine. Or "local", or a sequence of "host",
            "host:port", "[v6]:port", "local" and `NodeSpec`.
        secret: the cluster's secret; None: `$DISTEXEC_SECRET`, else the per-user file. Needed for every node but "local".
        cluster, name: names for listings and logs.
        env: variables set for the workers, on top of their machine's.
        echo: print what tasks print where it is captured, line by line; "prefix": each line begins with "[node:task] ".
            More than a stream should be flooded with is left out, which it is told.
        capture: whether futures have what their tasks print, as `stdout` and `stderr`. None: of tasks on nodes they do;
            local workers print where this program does, as ProcessPoolExecutor's, and nobody keeps it,
            unless echo is "prefix".
        retries: how often a task is run again whose worker or node died while it may have been running.
        node_timeout: seconds after which a node that cannot be reached is given up and its tasks run elsewhere.
        nodes_timeout: seconds that queued work waits without a slot anywhere before it fails with `NoNodes`; None: for ever.
            Once the executor is shut down and no node can be reached, it fails so after `node_timeout` in any case.
        max_pending: `submit` blocks while so many tasks are pending, except in a future's callback, where nobody else could
            make room.
        durable: path of a journal, made if there is none. What is submitted and what comes of it is recorded there before
            anything else happens; when this process dies, nodes go on with what they have, and the same program run again
            with the same journal, or `ClusterExecutor.recover(path)`, gets the outcomes: nothing that has ended runs again.
            A power failure may take the last moments from the journal.
        linger: seconds that nodes keep a durable session whose client is away; None: a day.
        setup, cleanup: called once on each machine, before its first worker is forked and after the last has left; what
            setup makes global is shared by all workers there, so that a large array costs its memory once. `cleanup()` is
            called only where setup succeeded, and by `shutdown` waited for as long as it takes; when this program dies or is
            interrupted, nodes give it 10 s. If setup raises on every node, the executor breaks with `InitializerFailed`.
            Threads that setup starts run in its own process only. Not with mp_context.
        depends: files, directories, modules and packages that every node has before the first task: paths, module objects
            or names of modules that can be imported. Tasks find files where `send_file` would put them. They are sent from
            where they lie, and should stay as they are; local workers are sent nothing.
        downloads: the directory that `current_task().send_file` delivers to; None: this program's working directory.

    Raises ValueError or TypeError for arguments that cannot be meant: an address that does not parse or resolve, no secret
    for a remote node, a secret file that others can read, initargs that only inheritance carries beside a remote node.
    JournalError if the journal cannot be used: in use, another's, open to others, damaged, of another version.
    """

    _reopens: Reopening | None = None  # made by `recover`: the journal says what is not given

    def __init__(self, max_workers: int | None = None, mp_context: BaseContext | None = None,
                 initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = (), *,
                 max_tasks_per_child: int | None = None, nodes: str | Sequence[str | NodeSpec] | None = None,
                 secret: str | bytes | None = None, cluster: str = "default", name: str | None = None,
                 env: Mapping[str, str] | None = None, echo: EchoMode = True, retries: int = 3, node_timeout: float = 15.0,
                 nodes_timeout: float | None = None, max_pending: int | None = None,
                 durable: str | os.PathLike[str] | None = None, linger: float | None = None,
                 depends: Depends = (), setup: Callable[..., object] | None = None,
                 cleanup: Callable[[], object] | None = None, downloads: str | os.PathLike[str] | None = None,
                 capture: bool | None = None) -> None:
        check_numbers(max_workers, retries, node_timeout, nodes_timeout, max_pending)
        check_linger(durable, linger)
        check_child_limit(max_tasks_per_child, mp_context)
        check_env(env)
        check_output(echo, capture)
        capture = captures(echo, capture)
        check_callables(initializer=initializer, setup=setup, cleanup=cleanup)
        with ExitStack() as undo:
            journal, rows = None, []
            if durable is not None:
                from .journal import Journal
                journal = Journal(durable, must_exist=self._reopens is not None)
                undo.callback(journal.close)
                rows = journal.nodes()
            if self._reopens is not None and nodes is None and rows:
                nodes = [NodeSpec(row.address, None if row.address == LOCAL and max_workers is not None else row.slots)
                         for row in rows]
            specs = node_specs(nodes)
            self._options = _DEFAULT
            self._name = name or f"{os.path.basename(sys.argv[0]) or 'python'}-{os.getpid()}"
            is_local = any(spec.address == LOCAL for spec in specs)
            remote = [spec for spec in specs if spec.address != LOCAL]
            credentials = find_credentials(secret, self._name, required=bool(remote))
            targets = [(spec, partial(resolve, parse_address(spec.address))) for spec in remote]
            for _, resolve_now in targets:
                resolve_now()
            slots = local_slots(specs, None if remote else max_workers) if is_local else 0
            listed = self._name if cluster == "default" else f"{cluster}/{self._name}"
            packer = CallPacker() if self._reopens is None else self._reopens.packer
            plan = PoolPlan(
                packer, mp_context, initializer, initargs, is_remote_too=bool(remote), capture=capture, setup=setup,
                cleanup=cleanup)
            spec = plan.spec(env, max_tasks_per_child or 0, bool(echo), listed, slots)
            identity = None
            if journal is not None:
                from .durable import LINGER_S, begin_life, recorded_spec
                linger = LINGER_S if linger is None else float(linger)
                is_uniform = not any(each.setup_args for each in specs)
                identity = begin_life(journal, for_nodes(spec), listed, plan.ground, is_uniform=is_uniform)
                spec = recorded_spec(journal, spec, plan.ground) if self._reopens is not None else spec
            self._root = root = Root(
                name=self._name, packer=packer, spec=spec, slots=slots, ceiling=int(max_workers or 0) if remote else 0,
                retries=retries, node_timeout_s=float(node_timeout), nodes_timeout_s=nodes_timeout, max_pending=max_pending,
                make_pool=plan.make_pool if is_local else None, journal=journal, identity=identity,
                linger_s=linger or 0.0, asks_all=self._reopens is not None and self._reopens.asks_all,
                downloads=os.fspath(downloads) if downloads is not None else None, ground=plan.ground,
                setup_args=args_by_address(((each.address, each.setup_args) for each in specs), plan.ground))
            root.files.depend(depends)
            for node_spec in remote:
                root.files.depend(node_spec.depends, node_spec.address)
            root.supply.credentials = credentials
            root.supply.output.configure(echo, capture)
            self._secret = secret
            # Kept by the root: of a weak reference that is garbage together with its object, the callback is not called.
            root.owner = weakref.ref(self, _dropper(root))
            if root.recorder is not None:
                root.recorder.use_nodes([(spec.address, spec.slots if spec.address != LOCAL else slots) for spec in specs])
                targets += self._left_behind(rows, specs)
            held = {row.address for row in rows if row.may_hold}
            nodes_before = [node for spec, resolve_now in targets for node in [
                root.supply.add_node(spec.address, resolve_now, spec.slots, may_hold=spec.address in held)]
                if spec.address in held]
            if root.recorder is not None:
                root.recorder.take_up(nodes_before)
            homes[root.label] = self
            undo.pop_all()
        if targets or self._reopens is not None:
            root.start()

    def _left_behind(self, rows: Sequence[NodeRow], specs: Sequence[NodeSpec]) -> list[tuple[NodeSpec, Any]]:
        """Name the nodes to ask for what they hold of the journal, though they are not used any more."""
        left, supply = left_behind(rows, specs), self._root.supply
        if left and supply.credentials is None:
            try:
                supply.credentials = find_credentials(self._secret, self._name, required=True)
            except ValueError as error:
                _log.warning("distexec: nodes of the journal are not asked what they hold: %s", error)
                return []
        return left

    @classmethod
    def recover(cls, path: str | os.PathLike[str], **arguments: Any) -> Recovered:
        """Go on with the durable session whose journal is at `path`: gives the futures of all its calls.

        They are a sequence in the order of submission, `by_key` finds those named with `options(key=)`, and the whole is a
        context manager that shuts its `executor` down. What has ended is done at once, what nodes hold when it ends, and the
        rest is sent. `arguments` are the constructor's; nodes, and how workers are prepared, are as recorded unless given.

        Raises JournalError if there is no such journal, or it cannot be used, and what the constructor raises; ValueError
        also if the session's setup was too large to be recorded, or differs from node to node, and is not given again.
        """
        from .durable import Recovered
        executor = cls._reopened(path, Reopening(CallPacker()), **arguments)
        assert executor._root.recorder is not None
        return Recovered(executor, executor._root.recorder.recovered)

    @classmethod
    def _reopened(cls, path: str | os.PathLike[str], how: Reopening, **arguments: Any) -> ClusterExecutor:
        executor = cls.__new__(cls)
        executor._reopens = how
        executor.__init__(durable=path, **arguments)  # type: ignore[misc]
        return executor

    # ---- inside tasks

    @property
    def label(self) -> str:
        """What its session is called, in listings and by the tasks that use it. Raises DistexecError if they cannot."""
        if self._root.recorder is not None:
            raise DistexecError("a durable executor cannot be used inside its tasks: calls made there would not be recorded")
        return self._root.label

    def view(self, options: TaskOptions) -> _View:
        """Return a view with exactly these options."""
        return _View(self, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return rejoin, (self.label, tuple(_DEFAULT))

    # ---- the standard interface

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; finish those taken, or cancel the queued ones if `cancel_futures`.

        Args:
            wait: return only when everything has ended and all processes, threads and connections are gone; without
                effect in a future's callback, which runs on the thread that has to do it.
        """
        self._root.begin_shutdown(cancel_futures=cancel_futures)
        if wait:
            self._root.wait_closed()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: Any) -> bool | None:
        """Shut down and wait; after Ctrl-C, end what is queued or running; a durable session is left behind."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._root.interrupt()
        self.shutdown(wait=True)
        return None

    def terminate_workers(self) -> None:
        """End all workers now; running calls fail with `WorkerLost`, queued ones are cancelled, no more are taken."""
        self._end_workers("terminate_workers()")

    def kill_workers(self) -> None:
        """Do as `terminate_workers`: workers are ended by SIGKILL either way, with everything they started."""
        self._end_workers("kill_workers()")

    def _end_workers(self, by: str) -> None:
        self._root.begin_shutdown(cancel_futures=True)
        self._root.break_with(WorkerLost(f"the workers were ended by {by}", attempts=0))

    @property
    def _broken(self) -> bool:
        """Whether the executor is broken; the standard library's tests and joblib look at this name."""
        return self._root.broken is not None

    @property
    def _max_workers(self) -> int:
        """The slots there are; joblib and others read this name of the standard executors."""
        return self._root.supply.slots()

    # ---- more than the standard interface

    def options(self, *, retries: int | None = None, timeout: float | None = None, priority: int = 0,
                node: str = "", key: str | None = None, files: Paths | None = None) -> _View:
        """Return an Executor view of the same cluster whose calls have these options.

        Args:
            retries: instead of the executor's.
            timeout: seconds a task may run, per attempt; then it is ended with all it started: `TaskTimeout`.
            priority: higher runs first among this executor's queued tasks.
            node: the name of the only node that may run it; "local" for this machine's workers.
            key: in a durable session, what the call is found by when the program is run again, whatever the function and its
                arguments are then. None: it is found by these, and by how many such calls came before it.
            files: a path or several, of files or directories, that a task finds in its working directory, which then is one
                of its own, removed when it ends. A relative path below this program's working directory is kept, of others
                the last component is. They are read at each submit, so each call sees them as they were then. Larger ones
                are shared by the tasks of a machine and must not be written to.

        Raises ValueError for a negative number of retries or a timeout that is not positive.
        """
        return _View(self, changed(_DEFAULT, retries=retries, timeout=timeout, priority=priority, node=node, key=key,
                                   files=files))

    def send_file(self, path: str | os.PathLike[str], node: str | None = None, *, name: str | None = None,
                  timeout: float | None = None) -> None:
        """Put a file, or a directory with all in it, into the directory that tasks work in, and return when it is there.

        Args:
            node: the name or address of the only node that gets it; None: every node, those that come later included.
            name: what it is called there, relative and "/"-separated; None: a relative path below this program's working
                directory is kept, of others the last component is.
            timeout: seconds to wait; None: for ever.

        It is read where it lies, so it should stay as it is while nodes may still come. On a node that was given files,
        tasks work in the session's own directory there, even where this program's exists too. Local workers work in this
        program's directory, so nothing is sent to them, but the file must be there by that name: ValueError.
        Raises OSError if it cannot be read here or written there, ValueError for a name that leads elsewhere, TimeoutError.
        """
        self._root.check_open()
        if node is not None and node != LOCAL:
            self._node(node)
        self._root.start()
        self._root.files.send(os.fspath(path), name, node, timeout)

    def resetup(self, node: str | None = None, *args: Any) -> None:
        """Have setup run anew, on one node or on all, for all tasks that are submitted from now on.

        Nothing queued is dropped: running tasks go on in the workers they have, beside which new workers are forked once the
        new setup has run, which it does when the next task comes. Where the last of the old workers has left, cleanup runs.

        Args:
            node: a node's name or address, "local" for this machine's workers; None: all, those that come later included.
            args: what setup is called with; none: what it was called with there before, as these objects are now.

        If it raises, no more tasks run on that node, and the executor breaks when no other is left, as at the first time.
        Raises ValueError if the executor has no setup or no such node, what pickling `args` raises, RuntimeError after
        shutdown.
        """
        self._root.check_open()
        self._root.renewals.resetup(self._node(node) if node is not None and node != LOCAL else node, args)

    def nodes(self) -> tuple[NodeStatus, ...]:
        """Describe every node, reachable or not."""
        return tuple(self._root.supply.rows())

    def status(self) -> ClusterStatus:
        """Describe the work done and under way, and every node; prints as a table."""
        return self._root.status()

    def add_node(self, node: str | NodeSpec) -> None:
        """Use one more node from now on. Raises ValueError as the constructor does, RuntimeError after shutdown."""
        self._root.check_open()
        spec = node if isinstance(node, NodeSpec) else NodeSpec(node)
        if spec.address == LOCAL:
            raise ValueError('this machine\'s own workers cannot be added later; name "local" in nodes=')
        resolve_now = partial(resolve, parse_address(spec.address))
        resolve_now()
        if self._root.supply.credentials is None:
            self._root.supply.credentials = find_credentials(self._secret, self._name, required=True)
        self._root.files.depend(spec.depends, spec.address)
        if spec.setup_args:
            self._root.renewals.add(spec.address, spec.setup_args)
        self._root.start()
        if self._root.recorder is not None:
            self._root.recorder.use_nodes([(spec.address, spec.slots)])
        self._root.supply.add_node(spec.address, resolve_now, spec.slots)

    def remove_node(self, name: str, drain: bool = True) -> None:
        """Use a node, given by name or address, no longer.

        Args:
            drain: let what runs there finish, and run the rest elsewhere; otherwise all of it runs elsewhere at once.

        Raises ValueError if there is no such node.
        """
        self._root.supply.remove_node(self._node(name), drain=drain)

    def set_slots(self, name: str, slots: int) -> None:
        """Use at most so many slots of a node, given by name or address ("local": this machine), from now on.

        Raises ValueError for a negative number or an unknown node.
        """
        if slots < 0:
            raise ValueError(f"slots must be 0 or more, not {slots}")
        root = self._root
        if name == LOCAL and root.supply.has_pool:
            root.dispatcher.call(lambda now: root.scheduler.set_slots(slots, now))
        else:
            node = self._node(name)
            root.dispatcher.call(lambda now: root.scheduler.limit_node(node, slots, now))

    def wait_for_slots(self, slots: int, timeout: float | None = None) -> bool:
        """Block until that many slots can be used; False if `timeout` seconds passed first, or the executor was closed."""
        root = self._root
        root.start()
        with root.supply.changed:
            root.supply.changed.wait_for(lambda: root.is_closed or root.supply.slots() >= slots, timeout)
        return not root.is_closed and root.supply.slots() >= slots

    def _node(self, name: str) -> Any:
        for node in self._root.supply.nodes:
            if name in (node.name, node.address):
                return node
        known = ", ".join(repr(node.name) for node in self._root.supply.nodes) or "none"
        raise ValueError(f"there is no node {name!r}; nodes: {known}")

    def __repr__(self) -> str:
        root = self._root
        status = root.status()
        up = sum(node.state == "up" for node in status.nodes)
        state = "broken" if root.broken is not None else "shut down" if root._is_closing else "open"
        return (f"<ClusterExecutor {self._name!r} {state}: {up}/{len(status.nodes)} nodes, {status.slots} slots, "
                f"{status.running} running, {status.queued} queued, {status.done} done>")


def _dropper(root: Root) -> Callable[[object], None]:
    # The weak reference's callback may run anywhere, in any state: it only sets a flag and wakes the I/O thread.
    return lambda _ref: root.drop()
