"""What makes a session durable: nothing is handed out, acknowledged or concluded before the journal has it.

    submit ──► queue ──┐ thread "distexec-journal": takes what has collected,      ┌──► dispatcher: handed out
    ended  ──► queue ──┘ commits it in one transaction, and only then lets it go on └──► acknowledged, futures concluded

Rule: what the journal says is true whenever this process is killed: a recorded outcome stays, an unrecorded one is still
kept by its node, and a call that is not recorded was not handed out. The busier it is, the more goes into a transaction; a
lone call waits for nobody.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from . import mainmodule
from .errors import DistexecError, JournalError
from .future import ClusterFuture, Control
from .journal import CANCELLED, LOST, Function, Journal, NodeRow, Result, Submission
from .keys import CallKeys, name_of, named_key
from .ledger import Task
from .messages import BlobRef, Buffers, Define, Evidence, Lost, Options, Outcome, OutcomeKind, Run, SessionSpec
from .recovery import UNHEARD
from .supply import lost_error

if TYPE_CHECKING:
    from .dispatcher import Dispatcher
    from .ledger import Session
    from .nodes import Node
    from .payload import CallPacker
    from .renewal import Ground
    from .scheduler import Scheduler
    from .shipping import BlobStore
    from .transport import Loop

MAX_BATCH = 4096
"""Most calls in one transaction. Larger: the first of them waits longer. Smaller: more commits."""

LINGER_S = 24 * 3600.0
"""How long nodes keep what they hold of a durable session whose client is away, unless `linger=` says otherwise."""

PAGE = 1000  # outcomes read at a time

_REUSABLE = (int(OutcomeKind.VALUE), int(OutcomeKind.ERROR))
"""What the function itself came to; all else was done to it, and a program that is run again tries anew."""

_log = logging.getLogger("distexec")


class Identity(NamedTuple):
    """Whose session a journal is, the same in every life."""

    id: bytes
    token: bytes
    life: int  # how many lives there were before this one


class _Known(NamedTuple):
    """A call of the journal, found by its key."""

    seq: int
    kind: int | None  # of its outcome; None: it has none yet


class _Withdrawn(NamedTuple):
    """A call that was cancelled before it was handed out."""

    task: Task
    is_recorded: bool  # as cancelled
    lets_go: bool  # of its blobs, which until here the journal may still have to write


class _Wanted(NamedTuple):
    """A future that is to have a recorded outcome."""

    seq: int
    future: ClusterFuture[Any]


class Owner(Control, Protocol):
    """Whose calls and outcomes are recorded: the root."""

    loop: Loop
    dispatcher: Dispatcher
    scheduler: Scheduler
    session: Session
    store: BlobStore
    packer: CallPacker

    def make_task(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], future: ClusterFuture[Any],
                  options: Options | None, retries: int | None) -> tuple[Task, Define] | None:
        """Make a task of a call; None if it cannot be pickled, and its future has failed."""

    def conclude(self, ended: list[tuple[Task, Outcome | Lost]]) -> None:
        """End the futures of tasks that have ended."""

    def end_unsent(self, tasks: Sequence[Task]) -> None:
        """End what cannot be handed out any more."""

    def check_open(self) -> None:
        """Raise what `submit` raises if nothing is taken any more."""

    def let_go(self, task: Task) -> None:
        """Let go of a task's blobs and of its place among the pending."""

    def settled(self) -> None:
        """Learn that less is unsettled."""

    def detach(self, error: BaseException) -> int:
        """Leave what is unfinished to the nodes, and end."""


def begin_life(journal: Journal, spec: SessionSpec, name: str, ground: Ground | None = None, *,
               is_uniform: bool = True) -> Identity:
    """Take up the journal's session, or begin one; `spec` is how its workers are prepared, for who recovers it.

    So is `ground`, if that is small, and the same everywhere (`is_uniform`).
    """
    token = journal.get("token")
    if token is None:
        identity = Identity(secrets.token_bytes(16), secrets.token_bytes(16), 0)
        fitted = ground.fit(spec, ()) if ground is not None and is_uniform else None
        told = msgspec.structs.replace(fitted or spec, authkey=b"")
        journal.set(id=identity.id, token=identity.token, life=0, name=name, spec=told,
                    lacks_setup=ground is not None and fitted is None)
    else:
        identity = Identity(journal.get("id"), token, journal.get("life") + 1)
        journal.set(life=identity.life)
    if identity.life:
        mainmodule.begin_life(identity.life)
    return identity


def recorded_spec(journal: Journal, spec: SessionSpec, ground: Ground | None = None) -> SessionSpec:
    """Prepare workers as the program did that began the journal, though this one may be another; its initializer first.

    ValueError if that cannot be told from the journal.
    """
    first = journal.get_as("spec", SessionSpec)
    assert first is not None, "it was recorded with the identity"
    if journal.get("lacks_setup", False) and ground is None:
        raise ValueError(f"the session's setup is not in {journal.path}, for what it is given is large or differs from node "
                         "to node: recover it in a program that gives setup= and NodeSpec(setup_args=), or run it again")
    own = spec if spec.initializer else first
    path = (*first.path, *(entry for entry in spec.path if entry not in first.path))
    environ = {**spec.environ, **first.env, **spec.env}
    directory = first.directory if os.path.isdir(first.directory) else spec.directory
    return msgspec.structs.replace(
        spec, path=path, directory=directory, argv=first.argv, environ=environ, warnings=first.warnings,
        initializer=own.initializer, initializer_buffers=own.initializer_buffers,
        max_tasks_per_child=spec.max_tasks_per_child or first.max_tasks_per_child, env={**first.env, **spec.env},
        setup=first.setup, setup_buffers=first.setup_buffers, has_cleanup=first.has_cleanup)


class Recorder:
    """Records the calls and outcomes of one root. Any thread may submit; the journal is the thread's own once it runs.

    `asks_all`: the unfinished calls of earlier lives all go on; else each when it is submitted again, or a node has it.
    """

    def __init__(self, root: Owner, journal: Journal, life: int, *, asks_all: bool = False) -> None:
        self.path = journal.path
        self._root, self._journal, self._life = root, journal, life
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="distexec-journal", daemon=True)
        self._is_started = False
        self._lock = threading.Lock()  # guards _left, _keys, _known, _live
        self._left = 0  # calls and outcomes that are not settled
        self._keys = CallKeys()
        self._known: dict[bytes, _Known] = {}
        self._live: dict[int, tuple[bytes, Task]] = {}  # unfinished calls that a key may be asked for again
        self._written: set[int] = set()  # functions that the journal has
        self._asks_all = asks_all
        self._error: BaseException | None = None  # why nothing is recorded any more
        self._is_detached = False
        self._has_warned = False
        self.recovered: list[tuple[ClusterFuture[Any], str | None]] = []  # all calls of the journal, if all are asked for
        self.cancels = False  # what was not handed out is not to be

    def __repr__(self) -> str:
        return f"<Recorder of {self._journal!r}, {self._left} unsettled>"

    # ---- life

    def start(self) -> None:
        """Start the thread; once."""
        self._is_started = True
        self._thread.start()
        root = self._root
        # The first thing the I/O thread does: from now on workers can be had.
        root.loop.call_soon(root.dispatcher.call, root.scheduler.recovery.heard, root.session, self)

    def close(self, *, is_over: bool, away: Sequence[str] = ()) -> None:
        """Settle what is left and let go of the journal. `is_over`: only nodes `away` may hold something of the session."""
        if self._is_started:
            self._queue.put(None)
            self._thread.join()
        try:
            if is_over and self._error is None and not self._live:
                self._journal.free_nodes(away)
        except JournalError as error:
            _log.error("distexec: %s", error)
        finally:
            self._journal.close()

    def abandon(self) -> None:
        """Be closed in a forked child."""
        self._error = DistexecError("this journal belongs to the process that forked this one")
        self._left = 0
        self._journal.abandon()

    @property
    def is_busy(self) -> bool:
        """Whether calls or outcomes are under way here."""
        return self._left > 0

    @property
    def is_open(self) -> bool:
        """Whether recorded calls may be handed out, for the dispatcher."""
        return self._error is None and not self._is_detached

    def is_current(self) -> bool:
        """Whether this is the thread that concludes futures."""
        return threading.current_thread() is self._thread

    def detach(self) -> None:
        """Hand out nothing more, but go on recording."""
        self._is_detached = True

    def count_unsent(self) -> int:
        """Count the calls that were submitted and not handed out yet; some of them may have ended, so at most."""
        return self._left

    def use_nodes(self, nodes: Iterable[tuple[str, int | None]]) -> None:
        """Record nodes before anything is given to them. Raises RuntimeError after shutdown."""
        rows = [NodeRow(address, slots, True) for address, slots in nodes]
        self._root.check_open()
        if not self._is_started:
            self._journal.set_nodes(rows)
            return
        done = threading.Event()

        def record() -> None:
            try:
                self._journal.set_nodes(rows)
            except JournalError as error:
                self._fail(error)
            finally:
                done.set()
        if self.is_current():  # a callback: nobody else could do it
            record()
        else:
            with self._lock:
                self._left += 1  # first: from here on the thread stays, or the root was closed before
            try:
                self._root.check_open()
            except BaseException:
                self._settled(1)
                raise
            self._queue.put(record)
            done.wait()

    def how_to_go_on(self) -> str:
        """Say what to type to go on with the session."""
        is_below = self.path.startswith(os.getcwd() + os.sep)
        return f"distexec recover {shlex.quote(os.path.relpath(self.path) if is_below else self.path)}"

    # ---- calls

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options | None,
               retries: int, name: str | None) -> ClusterFuture[Any]:
        """Take in a call, or find it in the journal."""
        call = named_key(name) if name is not None else self._keys.call_of(fn, args, kwargs)
        if call is None:
            self._warn(fn)
        with self._lock:
            key = b"" if call is None else call if name is not None else self._keys.next_of(call)
            # A computed key is asked for once: what is known of it need not be kept.
            known = None if not key else self._known.get(key) if name is not None else self._known.pop(key, None)
            live = self._live.get(known.seq) if known is not None else None
            self._left += 1  # before it is made: whoever closes waits for it
        future: ClusterFuture[Any] = ClusterFuture()
        item: Any = None
        try:
            self._root.check_open()  # again: to name the call may have taken long, and the thread may have ended since
            if live is not None and not live[1].owner.done():  # else it was withdrawn, or ended by what is not recorded
                return self._join(live[1])
            if known is not None and known.kind in _REUSABLE:
                future.restore(known.seq, "", 0)
                item = _Wanted(known.seq, future)
                return future
            made = self._root.make_task(fn, args, kwargs, future, options, retries)
            if made is None:
                return future
            task, definition = made
            if name is not None:
                with self._lock:
                    self._known[key] = _Known(task.run.seq, None)
                    self._live[task.run.seq] = key, task
            item = task, definition, key
            return future
        finally:  # Ctrl-C included: what was counted is put in line, or counted no more
            if item is not None:
                self._queue.put(item)
            else:
                self._settled(1)

    def _warn(self, fn: Callable[..., Any]) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("a call of %s cannot be told from others when the program is run again: it, or an argument, has no "
                         "pickle that stays the same. Such calls are recorded, but run again; options(key=) names them",
                         getattr(fn, "__qualname__", repr(fn)))

    def _join(self, task: Task) -> ClusterFuture[Any]:
        """Give the future of a call that was taken in before, and have it run."""
        root = self._root
        root.dispatcher.call(root.scheduler.recovery.ask, root.session, task)
        future: ClusterFuture[Any] = task.owner
        return future

    def withdrawn(self, task: Task) -> None:
        """Record that a call was cancelled before it was handed out, and let go of it."""
        self._put(_Withdrawn(task, not self._is_detached and self._error is None, True), 1)

    def ended(self, ended: list[tuple[Task, Outcome | Lost]]) -> None:
        """Record outcomes, then conclude their futures."""
        self._put(ended, len(ended))

    def _put(self, item: Any, count: int) -> None:
        with self._lock:
            self._left += count
        self._queue.put(item)

    def _settled(self, count: int) -> None:
        with self._lock:
            self._left -= count
        self._root.settled()

    # ---- the thread

    def _run(self) -> None:
        is_last = False
        while not is_last:
            items = [self._queue.get()]
            try:
                while len(items) < MAX_BATCH:
                    items.append(self._queue.get_nowait())
            except Empty:
                pass  # that is all that has collected
            if None in items:
                is_last = True
                items.remove(None)
            if items:
                try:
                    self._settle(items)
                except BaseException as error:  # a mistake of ours: nobody may wait for ever
                    _log.exception("distexec: the journal's thread failed")
                    self._fail(error)
                    self._root.end_unsent([item[0] for item in items if type(item) is tuple and not item[0].owner.done()])
                finally:
                    self._settled(sum(len(item) if type(item) is list else 1 for item in items))

    def _settle(self, items: list[Any]) -> None:
        """Record a batch, then let it go on."""
        calls: list[tuple[Task, Define, bytes]] = []
        ended: list[tuple[Task, Outcome | Lost]] = []
        results: list[Result] = []
        wanted: list[_Wanted] = []
        others: list[Any] = []
        for item in items:
            if type(item) is tuple:
                calls.append(item)
            elif type(item) is list:
                ended += item
                results += map(_result, item)
            elif type(item) is _Withdrawn:
                if item.is_recorded:
                    results.append(Result(item.task.run.seq, CANCELLED, b"", (), 0, "", 0))
                others.append(item)
            elif type(item) is _Wanted:
                wanted.append(item)
            else:
                others.append(item)
        if self._error is None and (calls or results):
            self._write(calls, results)
        self._note(results)
        if calls:
            self._hand_out(calls)
        if ended:
            self._conclude(ended)
        if wanted:
            self._give(wanted)
        for item in others:
            if type(item) is not _Withdrawn:
                item()
            elif item.lets_go:
                self._root.let_go(item.task)

    def _write(self, calls: list[tuple[Task, Define, bytes]], results: list[Result]) -> None:
        functions = {definition.fn: Function(definition.fn, definition.data, definition.buffers)
                     for _, definition, _ in calls if definition.fn not in self._written}
        rows = [Submission(task.run.seq, task.run.fn, task.run.data, task.run.buffers, task.run.options, task.retries, key)
                for task, _, key in calls]
        try:
            self._journal.write(list(functions.values()), rows, results, self._root.store.view)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._fail(error)
        else:
            self._written.update(functions)

    def _fail(self, error: BaseException) -> None:
        """Nothing can be recorded any more: nodes keep what they have for who recovers it, everybody here is told."""
        self._error = error if isinstance(error, JournalError) else JournalError(
            f"journal {self.path} cannot be written: {type(error).__name__}: {error}")
        self._error.__cause__ = error.__cause__
        self._root.detach(self._error)

    def _note(self, results: list[Result]) -> None:
        """Know the ends of calls that may be asked for by key."""
        if not self._live:
            return
        with self._lock:
            for result in results:
                live = self._live.pop(result.seq, None)
                if live is not None and self._known.get(live[0], live)[0] == result.seq:
                    self._known[live[0]] = _Known(result.seq, result.kind)

    def _hand_out(self, calls: list[tuple[Task, Define, bytes]]) -> None:
        """Give recorded calls to the dispatcher, in order, those of one function together."""
        if self.cancels:
            for task, _, _ in calls:
                if task.owner.cancel():
                    # Now: it may be the last thing that keeps the root from closing.
                    self._put(_Withdrawn(task, True, False), 1)
            return
        dispatcher = self._root.dispatcher
        at = 0
        while at < len(calls):
            definition = calls[at][1]
            end = at + 1
            while end < len(calls) and calls[end][1] is definition:
                end += 1
            # One that was withdrawn before it was handed out is not there to be discarded.
            tasks = [call[0] for call in calls[at:end] if not call[0].owner.cancelled()]
            is_taken = not tasks or (dispatcher.submit(self, tasks[0], definition) if len(tasks) == 1
                                     else dispatcher.submit_many(self, tasks, definition))
            if not is_taken:
                self._root.end_unsent(tasks)
            at = end

    def _conclude(self, ended: list[tuple[Task, Outcome | Lost]]) -> None:
        root = self._root
        if self._error is None and root.session.unacked:
            seqs = [task.run.seq for task, _ in ended]
            root.dispatcher.call(lambda now: root.scheduler.acknowledge(root.session, seqs))
        root.conclude(ended)

    def _give(self, wanted: list[_Wanted]) -> None:
        """Conclude futures as it was recorded."""
        try:
            results = self._journal.results([item.seq for item in wanted])
        except JournalError as error:
            for item in wanted:
                item.future.conclude(None, error)
            return
        for item in wanted:
            try:
                self._restore(item.future, results[item.seq])
            except BaseException:  # SystemExit of a callback: the futures that come after this one must end all the same
                _log.exception("distexec: a callback of %r wanted to end the thread", item.future)

    # ---- earlier lives

    def take_up(self, nodes: Sequence[Node]) -> None:
        """Let the unfinished calls of earlier lives go on; `nodes`: those that may hold some. Before the root starts."""
        root = self._root
        self._known = {key: _Known(seq, kind) for seq, key, kind in self._journal.index() if key}
        tasks, parked = [], set()
        definitions: dict[int, Define] = {}
        for row in self._journal.unfinished():
            if row.key and self._known[row.key].seq != row.seq:
                continue  # the call was made anew since
            if row.fn not in definitions:
                function = self._journal.function(row.fn)
                definitions[row.fn] = Define(root.session.no, row.fn, function.data, self._put_back(function.buffers))
                self._written.add(row.fn)
            task = self._revive(row)
            tasks.append(task)
            if not self._asks_all:
                parked.add(row.seq)

        def recover(now: float) -> None:
            for definition in definitions.values():
                root.scheduler.define(root.session, definition)
            root.scheduler.recovery.recover(root.session, tasks, parked, [*nodes, self], self._life, now)
        root.dispatcher.call(recover)
        if self._asks_all:
            self.recovered = list(self._recover_futures())

    def _revive(self, row: Submission) -> Task:
        root = self._root
        future: ClusterFuture[Any] = ClusterFuture()
        run = Run(root.session.no, row.seq, UNHEARD, row.fn, row.data, self._put_back(row.buffers), row.options)
        task = Task(run, root.session, future, row.retries)
        future.bind(task, root)
        self._live[row.seq] = row.key, task
        return task

    def _put_back(self, buffers: Buffers) -> Buffers:
        """Have a recorded call's large buffers where nodes and workers get them."""
        for ref in buffers:
            if isinstance(ref, BlobRef):
                self._root.store.put(self._journal.blob(ref))
        return buffers

    def _recover_futures(self) -> Iterator[tuple[ClusterFuture[Any], str | None]]:
        """Give every call of the journal as submitted: its future and what the user called it."""
        live = dict(self._live)
        calls = self._journal.calls()
        for at in range(0, len(calls), PAGE):
            page = calls[at:at + PAGE]
            results = self._journal.results([seq for seq, _, kind in page if kind is not None])
            for seq, key, kind in page:
                if seq in live:
                    yield live[seq][1].owner, name_of(key)
                elif kind is not None:
                    future: ClusterFuture[Any] = ClusterFuture()
                    self._restore(future, results[seq])
                    yield future, name_of(key)

    def _restore(self, future: ClusterFuture[Any], result: Result) -> None:
        """Conclude a future as it was recorded."""
        future.restore(result.seq, result.node, result.attempts)
        if result.kind == CANCELLED:
            future.cancel()
            return
        if result.kind == LOST:
            evidence = msgspec.msgpack.decode(result.data, type=Evidence)
            future.conclude(None, lost_error(evidence, evidence.reason, result.attempts), result.run_ns)
            return
        buffers: list[Any] = [self._journal.blob(each) if isinstance(each, BlobRef) else each for each in result.buffers]
        data: Any = result.data
        if not data and buffers:
            data = buffers.pop(0)
        value, error = self._root.packer.unpack_outcome(OutcomeKind(result.kind), data, buffers)
        future.conclude(value, error, result.run_ns)


def _result(end: tuple[Task, Outcome | Lost]) -> Result:
    task, message = end
    if type(message) is Outcome:
        return Result(message.seq, message.kind, message.data, message.buffers, message.run_ns, task.node, task.deaths + 1)
    evidence: Any = message.evidence  # type: ignore[union-attr]
    return Result(message.seq, LOST, msgspec.msgpack.encode(evidence), (), -1, task.node, task.deaths)


class Recovered(Sequence[ClusterFuture[Any]]):
    """The futures of every call of a journal, in the order of submission; a context manager that shuts `executor` down.

    `by_key` finds those that were named with `options(key=)`.
    """

    def __init__(self, executor: Any, calls: Iterable[tuple[ClusterFuture[Any], str | None]]) -> None:
        self.executor = executor
        self._futures: list[ClusterFuture[Any]] = []
        self.by_key: dict[str, ClusterFuture[Any]] = {}
        for future, name in calls:
            self._futures.append(future)
            if name is not None:
                self.by_key[name] = future

    def __len__(self) -> int:
        return len(self._futures)

    def __getitem__(self, at: Any) -> Any:
        return self._futures[at]

    def __enter__(self) -> Recovered:
        return self

    def __exit__(self, *exc_info: Any) -> bool | None:
        result: bool | None = self.executor.__exit__(*exc_info)
        return result

    def __repr__(self) -> str:
        done = sum(future.done() for future in self._futures)
        return f"<Recovered: {len(self)} calls, {done} done>"
