"""The worker's end of its link, and when what it has to say is sent.

    task thread ─ append ─► Outbox ─ flush ─► BlockingLink ─► pool
                               ▲ flusher thread, only while outcomes wait behind a task

The rule: an outcome waits only behind tasks expected to be quick, and for about a millisecond at most; `_Flusher` sees
to that when one of them is not quick after all. Frames never interleave, and no thread is left when a task forks.
"""

from __future__ import annotations

import _thread
import array
import os
import select
import socket
import sys
from collections import deque
from collections.abc import Sequence
from time import monotonic_ns
from types import UnionType
from typing import Any, cast

from distexec.messages import Keep, Message, Outcome, Partial, Segment, Submit
from distexec.protocol import FrameDecoder, pack

QUICK_NS = 1_000_000
"""Expected run time up to which outcomes may wait behind a task, and the longest they wait. Larger: the scheduler
upstream learns late that a slot is free. Smaller: a system call for nearly every task."""

LARGE_OUTBOX_BYTES = 1 << 20
"""Outcomes are flushed above this, so that their frame stays small. Larger: the pool starts later on them."""

RECEIVE_BYTES = 256 << 10

SPIN_NS = 200_000
"""How long a worker whose last frame was a single task's looks for the next before it sleeps, if that was worth it lately.
Longer: processor time. Shorter: a program that calls, waits and calls again pays for waking it up, a fifth of the call."""

MAX_SKIPPED = 63
"""How many such frames in a row are followed by sleep at once while looking is never worth it."""

FDS_PER_FRAME = 16
"""The pool's transport makes room for as many descriptors with one frame."""

_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_FRAME * array.array("i").itemsize)
_CMSG_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


# ---- the link, blocking


class BlockingLink:
    """The far end of a pool's link, for a process that has nothing to do but wait for it.

    `received_fds` holds the descriptors that came with frames, oldest first; who pops one owns it.
    """

    def __init__(self, sock: socket.socket, says: object) -> None:
        self.received_fds: deque[int] = deque()
        self._sock = sock
        self._decoder = FrameDecoder(cast("UnionType", says))
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN)
        self._poll = poller.poll
        self._skipped = self._to_skip = 0  # frames after which it slept at once since it last looked; how many that may be

    def fileno(self) -> int:
        """The socket's descriptor, to select on."""
        return self._sock.fileno()

    def look_ahead(self) -> None:
        """Stay awake for a moment if the next frame is likely to come in it: caches stay warm, and nobody has to wake us."""
        if self._skipped < self._to_skip:
            self._skipped += 1
            return
        self._skipped = 0
        until_ns = monotonic_ns() + SPIN_NS
        poll, give_way = self._poll, os.sched_yield
        while not poll(0):
            if monotonic_ns() >= until_ns:
                self._to_skip = min(2 * self._to_skip + 1, MAX_SKIPPED)
                return
            give_way()
        self._to_skip = 0

    def receive(self) -> list[Any]:
        """Wait for more bytes; return the messages they complete, perhaps none. Raises EOFError when the pool went."""
        space = self._decoder.space()
        target = self._buffer if space is None else space
        size, ancillary, _flags, _address = self._sock.recvmsg_into([target], _ANCILLARY_BYTES, _CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content)
                self.received_fds.extend(fds)
        if not size:
            raise EOFError("the pool closed the link")
        return self._decoder.feed(target[:size]) if space is None else self._decoder.grew(size)

    def send(self, messages: Sequence[Any], fds: Sequence[int] = ()) -> None:
        """Send the messages, and descriptors with the first frame of them. Raises OSError when the pool went."""
        frames = pack(messages)
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sent = self._sock.sendmsg([frames[0]], rights)
            frames[0] = frames[0][sent:]
        for frame in frames:
            self._sock.sendall(frame)

    def close(self) -> None:
        """Close the socket and the descriptors nobody took."""
        self._sock.close()
        while self.received_fds:
            os.close(self.received_fds.popleft())


# ---- when outcomes are sent


class RunTimes:
    """The run times of one function as far as they matter here: is the next task expected to be quick?

    The estimate is the largest of the last 32, kept as the largest of two buckets of 16, of which the older is dropped
    when the younger is full (so it spans 16 to 32). Unknown, hence not quick, before the first.
    """

    __slots__ = ("_count", "_older", "_recent", "is_quick")

    def __init__(self) -> None:
        self._count = self._recent = self._older = 0
        self.is_quick = False

    def add(self, run_ns: int) -> None:
        """Take in one more run time."""
        if run_ns > self._recent:
            self._recent = run_ns
        self._count += 1
        if self._count == 16:
            self._older, self._recent, self._count = self._recent, 0, 0
        self.is_quick = self._recent <= QUICK_NS and self._older <= QUICK_NS


class Outbox:
    """What the worker has to say and has not sent. The task thread adds; it or the flusher sends."""

    def __init__(self, link: BlockingLink) -> None:
        self._link = link
        self._lock = _thread.allocate_lock()  # held while sending, so that frames never interleave; and for _fds
        self.messages: list[Message | Segment | Keep] = []  # appended to without the lock, so never replaced by another list
        self._fds: list[int] = []
        self._large_bytes = 0
        self.append = self.messages.append
        self.flushed_ns = 0
        self.flusher = _Flusher(self)

    @property
    def is_sending(self) -> bool:
        """Whether some thread is in the middle of a flush."""
        return self._lock.locked()

    def append_large(self, outcome: Outcome | Submit | Partial, segments: list[tuple[Segment, int]]) -> None:
        """Add an outcome with much in it, and the segments, with their descriptors, that must go before it."""
        for segment, fd in segments:
            with self._lock:
                self.messages.append(segment)
                self._fds.append(fd)
            if len(self._fds) >= FDS_PER_FRAME:
                self.flush()
        self.messages.append(outcome)
        if isinstance(outcome, Submit):
            inline = (each for each in outcome.function_buffers if isinstance(each, bytes))
            self._large_bytes += len(outcome.function) + sum(map(len, inline))
        self._large_bytes += len(outcome.data) + sum(len(each) for each in outcome.buffers if isinstance(each, bytes))
        if self._large_bytes > LARGE_OUTBOX_BYTES:
            self.flush()

    def send_with_fds(self, message: Message, fds: list[int]) -> None:
        """Send a message, and what is in line, now; the descriptors, duplicated, go with it. Any thread."""
        copies = [os.dup(fd) for fd in fds]
        while True:
            with self._lock:
                if len(self._fds) + len(copies) <= FDS_PER_FRAME:
                    self.messages.append(message)
                    self._fds.extend(copies)
                    break
            self.flush()
        self.flush()

    def flush_soon(self) -> None:
        """Flush now, or within a millisecond along with what follows. Any thread of the task."""
        if monotonic_ns() - self.flushed_ns > QUICK_NS:
            self.flush()
        elif not self.flusher.is_armed:
            self.flusher.arm()

    def flush_old(self) -> None:
        """Flush if the oldest message may have waited for long enough."""
        if self.messages and monotonic_ns() - self.flushed_ns >= QUICK_NS:
            self.flush()

    def flush(self) -> None:
        """Send everything, after what tasks have printed so far: nobody should see a result before its output."""
        flush_streams()
        with self._lock:
            messages = self.messages[:]
            if messages:
                del self.messages[:len(messages)]
                fds, self._fds = self._fds, []
                self._large_bytes = 0
                try:
                    self._link.send(messages, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        self.flushed_ns = monotonic_ns()


class _Flusher:
    """A thread that flushes the outbox when the task in front of it takes longer than expected.

    It is started when first needed and blocked unless outcomes wait. Before a task forks it is joined, because a fork
    of a process with threads is unsafe and, from Python 3.12, warned about; it is started again when next needed.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.is_armed = False
        self._reset()

    def _reset(self) -> None:
        self._thread_id: int | None = None
        self._is_ending = False
        self._gate = _thread.allocate_lock()  # open (released) while it should watch the outbox
        self._pause = _thread.allocate_lock()  # waited for with a timeout; released to end the wait
        self._gate.acquire()
        self._pause.acquire()
        self.is_armed = False

    def arm(self) -> None:
        """Watch the outbox until it is empty. Called by the task thread when `is_armed` is false."""
        self.is_armed = True
        if self._thread_id is None:
            self._start()
        _open(self._gate)

    def _start(self) -> None:
        has_started = _thread.allocate_lock()
        has_started.acquire()
        try:
            _thread.start_new_thread(self._run, (has_started,))
        except RuntimeError:
            return  # no more threads for this user: outcomes wait for the end of the task in front of them
        has_started.acquire()

    def _run(self, has_started: _thread.LockType) -> None:
        self._thread_id = _thread.get_native_id()
        has_started.release()
        try:
            while not self._is_ending:
                self._gate.acquire()
                while not self._is_ending:
                    self._pause.acquire(True, QUICK_NS / 1e9)
                    if not self._is_ending:
                        self._outbox.flush_old()
                    # In this order: who adds to the outbox after we looked finds us disarmed and opens the gate.
                    self.is_armed = False
                    if not self._outbox.messages:
                        break
                    self.is_armed = True
        except OSError:
            pass  # the pool went; the task thread notices at its own next send or receive

    def join(self) -> None:
        """End the thread and wait until the system has no trace of it."""
        thread_id = self._thread_id
        if thread_id is None:
            return
        self._is_ending = True
        _open(self._gate)
        _open(self._pause)
        wait_thread_gone(thread_id)
        self._reset()


def _open(lock: _thread.LockType) -> None:
    try:
        lock.release()
    except RuntimeError:
        pass  # open already


def wait_thread_gone(thread_id: int) -> None:
    """Wait until the system has no trace of a thread of ours that has ended: a fork would be counted as one with threads."""
    entry = f"/proc/self/task/{thread_id}"
    while _is_there(entry):
        os.sched_yield()


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def flush_streams() -> None:
    """Write out what was printed, whatever the task has made of sys.stdout and sys.stderr."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        pass  # closed or replaced by the task, which must then do without
