"""What runs in a worker process: receive, call, send.

    link ── Define, Run, Segment … ──► unpack ─► call ─► pack ──► outbox ── flush ──► link
                                          │ page: started, started_at ▲ revoked (pool)

Under load one frame, one lock and one system call serve a whole batch; `outbox` decides when that is. The rule:
whatever a task does to its process (forking, raising, printing, dying) leaves the stream of frames whole and the tasks
behind it unharmed. Imports little, because every session pays for it before its first result.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from mmap import mmap
from time import monotonic_ns
from typing import Any, Protocol

from distexec import payload
from distexec.lastwords import WORDS_BYTES, LastWords
from distexec.logrecords import forward
from distexec.memory import Mappings, map_segment
from distexec.messages import (
    MAX_INLINE_BYTES,
    BlobRef,
    Buffers,
    Bye,
    Define,
    Evidence,
    Forget,
    Free,
    Keep,
    Outcome,
    OutcomeKind,
    Ready,
    Returned,
    Run,
    Segment,
    SessionFailed,
    ToWorker,
    Undefine,
    Unshare,
)
from distexec.outbox import QUICK_NS, BlockingLink, Outbox, RunTimes, flush_streams
from distexec.resultfiles import ResultFiles

SMALL_BYTES = 4 << 10
"""Pickles up to this are not counted before the next flush. Larger: many of them could overfill a frame."""

MAX_INLINE_TOTAL_BYTES = 4 << 20
"""Of the buffers of one outcome inside its message; the others become blobs. Larger: the frame would be too large."""

CELLS_BYTES = 4096
PAGE_BYTES = CELLS_BYTES + WORDS_BYTES

# Looking up a member of an enum takes as long as making a message does.
_VALUE, _ERROR, _PAYLOAD = OutcomeKind.VALUE, OutcomeKind.ERROR, OutcomeKind.PAYLOAD

# ---- the page shared with the pool


class WorkerPage:
    """The page of memory through which a worker and its pool agree, without a message, which task runs.

    The k-th Run sent on a link has order k, from 1. Aligned 8-byte cells: `started` and `started_at` (monotonic ns), which
    the worker writes, `revoked_from` and `revoked_to`, which the pool writes, `_to` first. (And, for tasks that ask: the
    order that is to end though it runs, and how much of what was published has been heard; the pool writes both.)

    Worker, per task: store `started`, then load `revoked`; if the order is revoked it is not run. Pool: store
    `revoked`, then, 10 ms later, load `started`. Each side stores before it loads, and 10 ms outlast any store buffer,
    so one of them at least sees what the other stored: a revoked order above `started` was not begun and will not be.

    Behind it in the same file are the worker's last words, `words`.
    """

    __slots__ = ("_cells", "_map", "words")

    def __init__(self, fd: int) -> None:
        self._map = mmap(fd, PAGE_BYTES)  # shared; the mapping outlives the descriptor
        self._cells = memoryview(self._map)[:CELLS_BYTES].cast("q")
        self.words = LastWords(memoryview(self._map)[CELLS_BYTES:])

    def begin(self, order: int, now_ns: int) -> bool:
        """Worker: note that the task of this order starts now; False if it was revoked and must not."""
        cells = self._cells
        cells[1] = now_ns
        cells[0] = order
        return not cells[2] or not cells[2] <= order <= cells[3]

    @property
    def started(self) -> int:
        """Pool: the order of the task that was started last, 0 before the first."""
        return self._cells[0]

    @property
    def started_at_ns(self) -> int:
        """Pool: when that was, on the machine's monotonic clock."""
        return self._cells[1]

    def revoke(self, first: int, last: int) -> None:
        """Pool: no order from `first` to `last` is to be started any more. Replaces an earlier revocation.

        The worker may have begun some of them: see `started` 10 ms later.
        """
        cells = self._cells
        if cells[3] != last:
            cells[2] = 0  # nothing is revoked while the two cells do not match
            cells[3] = last
        cells[2] = first  # a wider range with the same end: at no moment is less revoked than before

    def doom(self, order: int) -> None:
        """Pool: the task of this order is to end, running or not."""
        self._cells[4] = order

    @property
    def is_doomed(self) -> bool:
        """Worker: whether the task that runs is to end."""
        return self._cells[4] == self._cells[0]

    def hear(self, size_bytes: int) -> None:
        """Pool: so much more of what its tasks have published is with their client, or not wanted."""
        self._cells[5] += size_bytes

    @property
    def heard_bytes(self) -> int:
        """Worker: how much that was so far."""
        return self._cells[5]

    def close(self) -> None:
        """Unmap it; using it afterwards raises ValueError."""
        self.words.close()
        self._cells.release()
        self._map.close()


# ---- one session's tasks


class _Function:
    """A function as defined, unpickled when first run, and how long it runs."""

    __slots__ = ("buffers", "data", "mappings", "refs", "run_times", "value")

    def __init__(self, data: bytes, buffers: list[Any], mappings: Mappings, refs: tuple[BlobRef, ...]) -> None:
        self.data, self.buffers = data, buffers
        self.mappings, self.refs = mappings, refs  # of the blobs that it is made of
        self.value: Callable[..., object] | None = None
        self.run_times = RunTimes()


class Keeper(Protocol):
    """What keeps the shared values that were loaded."""

    def get(self, name: bytes, references: Sequence[tuple[bytes, int]], parts: Sequence[Any]) -> Any:
        """Give one of them, new or known."""

    def forget(self, names: Sequence[bytes]) -> object:
        """Let go of some."""


class Nest(Protocol):
    """What makes the nested calls of the task that runs."""

    def end_task(self) -> object:
        """The task has ended."""


class Worker:
    """Runs the tasks of one link until its pool says Bye or goes."""

    def __init__(self, link: BlockingLink, page: WorkerPage, unpacker: payload.CallUnpacker,
                 output_fds: tuple[int, ...], label: str = "", home: str = "", node: str = "") -> None:
        self.unpacker = self._unpacker = unpacker
        self.link = self._link = link
        self.page = self._page = page
        self.label, self.home, self.node = label, home, node
        self.directory = ""  # of the task that runs, once it was asked for
        self.at_end: list[Callable[[], object]] = []  # what the task that runs leaves to be done at its end
        self.nest: Nest | None = None  # for nested calls, once the session's executor was unpickled here
        self.keeper: Keeper | None = None  # once a shared value was loaded
        self.mappings = Mappings()  # of what is being loaded, or was last
        self.current: Run | None = None  # the task that runs
        self.backlog: deque[Any] = deque()  # what a nest received meanwhile that is not its own
        self._pid = os.getpid()
        self._order = 0  # of the Run looked at last
        self._functions: dict[int, _Function] = {}
        self._arenas: dict[int, int] = {}  # the pool's: number → descriptor
        self._segments: dict[bytes, Segment] = {}  # where blobs lie: digest → last announcement
        self._skipped: list[tuple[int, int]] = []  # revoked tasks not reported yet, all of one session
        self._skipped_session = 0
        self._is_leaving = False
        self._results = ResultFiles()
        self._output_fds = output_fds  # of the captured streams; not 1 and 2, which a task may close
        self._ends = (0, 0)
        self.outbox = Outbox(link)
        self._acts: dict[type, Callable[[Any], None]] = {
            Run: self._on_run, Define: self._on_define, Undefine: self._on_undefine, Segment: self._on_segment,
            Forget: self._on_forget, Free: self._results.take_back, Bye: self._on_bye, Unshare: self._on_unshare,
        }

    def run(self) -> None:
        """Receive and act until Bye (returns) or until the pool goes (EOFError, OSError)."""
        receive, acts, outbox = self._link.receive, self._acts, self.outbox
        is_lone = False
        while not self._is_leaving:
            if is_lone:
                self._link.look_ahead()
            messages = receive()
            is_lone = len(messages) == 1
            outbox.flushed_ns = monotonic_ns()
            for message in messages:
                acts[type(message)](message)
            while self.backlog:
                message = self.backlog.popleft()
                acts[type(message)](message)
            messages = message = None  # type: ignore[assignment]  # arguments must not outlive their task
            if self._skipped:
                self._hand_back()
            if outbox.messages:
                outbox.flush()

    def prepare_fork(self) -> None:
        """Before a task forks: send what waits, and be single-threaded."""
        self.outbox.flusher.join()
        if not self.outbox.is_sending:  # else a signal handler forks in the middle of a flush, which will go on
            self.outbox.flush()

    def forsake(self) -> None:
        """In a forked child, which has no part in the conversation: close all that belongs to it.

        Should the child come back out of the task, the closed page stops it before it runs another.
        """
        import faulthandler

        if not self._output_fds and faulthandler.is_enabled():
            faulthandler.enable(file=2)  # it tells its own crashes, to whom its parent's output goes
        self.at_end.clear()
        self.current = None
        self._link.close()
        self._page.close()
        while self._arenas:
            os.close(self._arenas.popitem()[1])
        self._results.close()
        for fd in self._output_fds:
            os.close(fd)
        self._output_fds = ()

    # ---- tasks

    def _on_run(self, run: Run) -> None:
        function = self._functions[run.fn]
        outbox, options = self.outbox, run.options
        is_solo = options is not None and options.solo
        is_loaded = function.value is not None
        if outbox.messages:
            if is_solo or not function.run_times.is_quick:
                outbox.flush()
            elif not outbox.flusher.is_armed:
                outbox.flusher.arm()
        self._order += 1
        started_ns = monotonic_ns()
        if not self._page.begin(self._order, started_ns):
            self._skipped_session = run.session
            self._skipped.append((run.seq, run.attempt))
            return
        if self._skipped:
            self._hand_back()
        self.current = run
        if options is not None and options.files and not self._enter_directory(run):
            ended_ns = monotonic_ns()
        elif run.buffers:
            ended_ns = self._call_with_buffers(run, function)
        else:
            ended_ns = self._call(run, function, run.data)
        self.current = None
        if self.nest is not None:
            self.nest.end_task()
        if is_loaded:  # else it took as long as an import or two, which says nothing of the next
            function.run_times.add(ended_ns - started_ns)
        if is_solo or ended_ns - outbox.flushed_ns > QUICK_NS:
            outbox.flush()

    def _call(self, run: Run, function: _Function, data: Any, buffers: list[Any] | None = None,
              mappings: Mappings | None = None) -> int:
        """Run a task and put its outcome in the outbox; return when the function ended."""
        unpacker, kind, began_ns, ended_ns = self._unpacker, _PAYLOAD, 0, 0
        large: Sequence[memoryview] = ()
        args = kwargs = value = None
        try:
            fn = function.value or self._load_function(function)
            if buffers is None:
                args, kwargs = unpacker.load_call(data)
            else:
                args, kwargs = unpacker.load_call(data, buffers)
                buffers.clear()
            kind = _ERROR
            began_ns = monotonic_ns()
            value = fn(*args, **kwargs)
            ended_ns = monotonic_ns()
            data, large = unpacker.pack_value(value)
            kind = _VALUE
        except BaseException as error:  # SystemExit too: the client gets whatever the function raised
            ended_ns = ended_ns or monotonic_ns()
            data = unpacker.pack_error(error, error.__traceback__ and error.__traceback__.tb_next)
        args = kwargs = value = None  # destructors run here, as part of the task
        if self.at_end:
            self.end_task()
        run_ns = ended_ns - began_ns if began_ns else 0
        ends = self._moved_ends() if self._output_fds else None
        if mappings is None and not large and len(data) <= SMALL_BYTES:
            self.outbox.append(Outcome(run.session, run.seq, run.attempt, kind, data, run_ns, (), self._pid, ends))
            return ended_ns
        kind, data, wire, segments = self._share(kind, data, large)
        if mappings is not None:
            # What the task kept of its arguments must be its own before the outcome lets the pool use the memory again.
            large = ()
            mappings.settle()
        self.outbox.append_large(
            Outcome(run.session, run.seq, run.attempt, kind, data, run_ns, wire, self._pid, ends), segments)
        return ended_ns

    def _call_with_buffers(self, run: Run, function: _Function) -> int:
        mappings = self.mappings = Mappings()
        try:
            data, buffers = self.unfold(run.data, run.buffers, mappings.map)
        except (OSError, KeyError) as error:
            failure = self._unpacker.pack_error(error)
            self.outbox.append(Outcome(run.session, run.seq, run.attempt, _PAYLOAD, failure, 0, (), self._pid))
            return monotonic_ns()
        return self._call(run, function, data, buffers, mappings)

    def _enter_directory(self, run: Run) -> bool:
        """Put a task's files into a directory of its own, and go there; False, and its outcome is made, if it fails."""
        from distexec.taskfiles import enter_directory

        try:
            enter_directory(self, run)
        except (OSError, ValueError) as error:
            self.end_task()
            failure = self._unpacker.pack_error(error)
            self.outbox.append(Outcome(run.session, run.seq, run.attempt, _ERROR, failure, 0, (), self._pid))
            return False
        return True

    def end_task(self) -> None:
        """Do what a task left to be done at its end."""
        while self.at_end:
            self.at_end.pop()()

    def _load_function(self, function: _Function) -> Callable[..., object]:
        mappings, self.mappings = self.mappings, function.mappings
        try:
            function.value = self._unpacker.load_function(function.data, function.buffers)
        finally:
            self.mappings = mappings
        function.data, function.buffers = b"", []
        return function.value

    def _moved_ends(self) -> tuple[int, int] | None:
        flush_streams()
        _flush_c_stdout()
        ends = self._stream_ends()
        if ends == self._ends:
            return None
        self._ends = ends
        return ends

    def _stream_ends(self) -> tuple[int, int]:
        out, err = self._output_fds
        return os.lseek(out, 0, os.SEEK_END), os.lseek(err, 0, os.SEEK_END)

    def _hand_back(self) -> None:
        skipped, self._skipped = self._skipped, []
        self.outbox.append(Returned(self._skipped_session, skipped))
        self.outbox.flush()

    # ---- bytes that travel beside the messages

    def act(self, message: Any) -> None:
        """Act on a message at once. The thread that receives."""
        self._acts[type(message)](message)

    def unfold(self, data: bytes, buffers: Buffers, map_blob: MapBlob) -> tuple[Any, list[Any]]:
        """Return a pickle and its buffers with the blobs mapped. Empty `data` stands for the first buffer."""
        if not data:
            return unfold(buffers[0], self._locate, map_segment), [
                unfold(each, self._locate, map_blob) for each in buffers[1:]]
        return data, [unfold(each, self._locate, map_blob) for each in buffers]

    def _locate(self, ref: BlobRef) -> tuple[int, int]:
        segment = self._segments[ref.digest]
        return self._arenas[segment.arena], segment.offset

    def _share(self, kind: OutcomeKind, data: bytes, large: Sequence[memoryview]) -> Shared:
        """Put what is too large for a message into memory that the pool can map."""
        segments: list[tuple[Segment, int]] = []
        parts: list[Any] = list(large)
        if len(data) > MAX_INLINE_BYTES:
            data, parts = b"", [data, *parts]
        wire: list[bytes | BlobRef] = []
        inline_bytes = 0
        try:
            for part in parts:
                if len(part) <= MAX_INLINE_BYTES and inline_bytes + len(part) <= MAX_INLINE_TOTAL_BYTES:
                    inline_bytes += len(part)
                    wire.append(bytes(part))
                else:
                    segments.append(self._results.put(part))
                    wire.append(segments[-1][0].blob)
        except OSError as error:  # no memory, no descriptors: the task's own misfortune, told like an error of its own
            for _, fd in segments:
                os.close(fd)
            size = sum(map(len, parts))
            text = f"no room on this machine for a result of {size:,} bytes: {error}; return less, or write it to a file"
            return _ERROR, self._unpacker.pack_error(OSError(error.errno, text)), (), []
        return kind, data, tuple(wire), segments

    # ---- other messages

    def _on_define(self, define: Define) -> None:
        # Mapped now: the announcement of a blob need not last until the function is first run.
        mappings = Mappings()
        data, buffers = self.unfold(define.data, define.buffers, mappings.map)
        refs = tuple(each for each in define.buffers if type(each) is BlobRef)
        self._functions[define.fn] = _Function(data, buffers, mappings, refs)

    def _on_undefine(self, undefine: Undefine) -> None:
        for fn in undefine.fns:
            function = self._functions.pop(fn, None)
            if function is not None and function.refs:
                mappings, refs = function.mappings, function.refs
                function = None
                mappings.settle()  # what a task kept of it must be its own before the memory is used again
                self.outbox.append(Keep((), refs))

    def _on_unshare(self, unshare: Unshare) -> None:
        if self.keeper is not None:
            self.keeper.forget(unshare.names)

    def _on_segment(self, segment: Segment) -> None:
        if segment.arena not in self._arenas:
            self._arenas[segment.arena] = self._link.received_fds.popleft()
        self._segments[segment.blob.digest] = segment

    def _on_forget(self, forget: Forget) -> None:
        fd = self._arenas.pop(forget.arena, None)
        if fd is not None:
            os.close(fd)
            self._segments = {digest: each for digest, each in self._segments.items() if each.arena != forget.arena}

    def _on_bye(self, _bye: Bye) -> None:
        self._is_leaving = True


this_worker: Worker | None = None
"""The one that this process is, if it is one."""

MapBlob = Callable[[int, int, int], memoryview]
Shared = tuple[OutcomeKind, bytes, Buffers, list[tuple[Segment, int]]]


def unfold(buffer: bytes | BlobRef, locate: Callable[[BlobRef], tuple[int, int]], map_blob: MapBlob) -> Any:
    """Return the bytes of a buffer: itself, or the mapped blob it refers to, which lies where `locate` says."""
    if type(buffer) is not BlobRef:
        return buffer
    return map_blob(*locate(buffer), buffer.size_bytes)


# ---- a worker's life


def serve(link_fd: int, page_fd: int, *, unpacker: payload.CallUnpacker | None = None,
          initializer: Initializer | None = None, outputs: tuple[int, int] | None = None, label: str = "",
          home: str = "", node: str = "", log_levels: dict[str, int] | None = None) -> int:
    """Be a worker on a link and a page until the pool says Bye or goes; return the exit code to end with.

    Args:
        unpacker: forked along from the template; None: a new one.
        initializer: called before Ready is said; None: none. What it raises ends the worker.
        outputs: files that descriptors 1 and 2 become, if the output is captured; else the page has its last words.
        label: of the session, by which its executor is known when it is unpickled in a task.
        home: the session's directory on this machine, which may not exist yet; "": none can be made.
        node: what this machine is called.
        log_levels: of the client's loggers.
    """
    global this_worker
    page = WorkerPage(page_fd)
    if outputs:
        import faulthandler

        redirect(outputs)
        faulthandler.enable(file=2)
        os.close(page_fd)
    else:
        page.words.listen(page_fd, CELLS_BYTES)
    link = BlockingLink(socket.socket(fileno=link_fd), ToWorker)
    worker = this_worker = Worker(link, page, unpacker or payload.CallUnpacker(), outputs or (), label, home, node)
    forward(worker, log_levels or {})
    os.register_at_fork(before=worker.prepare_fork, after_in_child=worker.forsake)
    try:
        if initializer is not None and not _initialize(worker, initializer):
            return 1
        link.send([Ready(os.getpid())])
        worker.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the pool's process is gone, and with it everybody who would want what we do
    return 0


def leave() -> None:
    """Do what an interpreter does at its end: wait for threads, call what was registered with atexit, flush."""
    import atexit

    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    atexit._run_exitfuncs()
    flush_streams()
    _flush_c_stdout()


def _initialize(worker: Worker, initializer: Initializer) -> bool:
    """Run the initializer; if it raises, tell the pool and return False."""
    try:
        initializer(worker.unpacker)
    except BaseException as error:  # SystemExit too: whatever it is, there will be no worker, and the client hears why
        _log_failure()
        evidence = Evidence("", os.getpid(), reason=f"the initializer raised {type(error).__name__}: {error}")
        traceback = error.__traceback__ and error.__traceback__.tb_next
        worker.outbox.append(SessionFailed(0, evidence, worker.unpacker.pack_error(error, traceback)))
        worker.outbox.flush()
        return False
    flush_streams()
    return True


def _log_failure() -> None:
    """Log what is being handled as the standard pool's workers do, if the initializer set up a place for it.

    The client logs it in any case; here only handlers matter that exist nowhere else, such as one that feeds a queue.
    """
    logging = sys.modules.get("logging")
    if logging is None or not logging.getLogger("concurrent.futures").hasHandlers():
        return
    logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._run_finalizers()  # queues send what their threads still hold


def redirect(outputs: tuple[int, int]) -> None:
    """Have this process, C code included, print to these files, line by line."""
    for fd, number in zip(outputs, (1, 2), strict=True):
        os.dup2(fd, number)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # so that the pool can show what a running task prints
    _buffer_c_lines()


def _flush_c_stdout() -> object:
    """Write out what C code printed. Replaced where output is captured and C's stream can be found."""


def _buffer_c_lines() -> None:
    """Have what C code prints written line by line, and the rest by `_flush_c_stdout`; to a file it would be kept back."""
    global _flush_c_stdout
    try:
        import ctypes

        libc = ctypes.PyDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
        libc.setvbuf(stdout, None, _LINE_BUFFERED, 0)
        libc.fflush.argtypes = (ctypes.c_void_p,)
        fflush, pointer = libc.fflush, stdout.value
    except (ImportError, OSError, ValueError, AttributeError):
        return  # C code's output comes when its buffer is full
    _flush_c_stdout = lambda: fflush(pointer)  # noqa: E731


_LINE_BUFFERED = 1  # _IOLBF of stdio.h

Initializer = Callable[[payload.CallUnpacker], object]
