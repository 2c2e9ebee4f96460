"""One connection: messages in at one end, in batches out at the other. Here without TLS; with it in `tls`.

    any thread   queue(messages) ─► outbox ─ flush() ─► frames ─► socket      (directly, if nothing is pending)
    I/O thread   socket ─► decoder ─► on_messages(link, batch), at last on_closed(link, reason)
                 rests of frames, when the socket takes more

Rules: the write side belongs to whoever holds the link's lock, and nobody waits for it: who finds it taken leaves the
messages to the holder, which looks again after letting go. All else happens on the I/O thread. Nothing received is
dropped because the connection then broke.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .errors import ProtocolError
from .iothread import LINGER_S, STOPPED, IoThread
from .messages import Hello, Message, Ping, Pong, Role
from .protocol import FrameDecoder, PlaceChunk, pack

__all__ = ["HEARTBEAT_S", "FdLink", "Link", "OnClosed", "OnMessages"]

OnMessages = Callable[[Any, list[Message]], object]
"""Called with the link and a batch."""

OnClosed = Callable[[Any, str], object]
"""Called with the link and a sentence, once."""

HEARTBEAT_S = 5.0
"""A TLS link silent for this long is asked for a sign of life. Smaller: chatter. Larger: `node_timeout` sees less."""

READ_BUDGET_BYTES = 1 << 20
"""How much is read from one link before the others get their turn."""

FLUSH_COUNT = 1024
"""The most messages encoded at once, so that what one flush allocates stays bounded."""

FLUSH_ROUNDS = 16
"""How often one flush looks again for what other threads queued meanwhile; then it is the I/O thread's turn."""

DRAIN_ROUNDS = 64
"""How many read budgets a broken link is drained of: more than any socket buffer holds, yet an end."""

GATHER_COUNT = 64
"""The most frames that one system call takes over when a socket becomes writable again; far below IOV_MAX."""

MAX_FDS = 16
"""Descriptors that go with one frame; the kernel's own limit is 253."""

_log = logging.getLogger("distexec")
_PROBES = frozenset({Ping, Pong})
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
# Plain integers: an operation on the enum costs microseconds on each read.
_CMSG_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_CTRUNC = int(socket.MSG_CTRUNC)


class Link:
    """One connection, here without TLS. Made by `Loop.adopt`; safe to send on from any thread.

    Attributes: `name` (for logs), `address` (the peer's, TLS links), `hello` (what the peer said it is, TLS links),
    `role` (what the end that dialled is), `bytes_in`, `bytes_out`, `last_heard` (monotonic, of the last byte
    received), `rtt_s` (None until measured; TLS links), `received_fds` (descriptors that came, oldest first; who pops
    one owns it).
    """

    _has_probes = True  # whether the peer may ask for signs of life

    def __init__(self, loop: IoThread, sock: socket.socket, decoder: FrameDecoder, on_messages: OnMessages,
                 on_closed: OnClosed) -> None:
        self.loop = loop
        self.sock = sock
        self.name = f"fd {sock.fileno()}"
        self.address: tuple[Any, ...] | None = None
        self.hello: Hello | None = None
        self.role: Role | None = None
        self.bytes_in = self.bytes_out = 0
        self.rtt_s: float | None = None
        self.last_heard = time.monotonic()
        self.received_fds: deque[int] = deque()
        self.decoder = decoder
        self.place_chunk: PlaceChunk | None = None
        self.on_messages, self.on_closed = on_messages, on_closed
        self.pending_bytes = 0
        self._outbox: deque[Any] = deque()
        self._lock = threading.Lock()  # guards the write side: order of frames, _pending, pending_bytes, bytes_out
        self._pending: deque[memoryview] = deque()  # what the socket did not take yet
        self._broken = ""  # why nothing more can be written
        self._space: memoryview | None = None  # where the last receive went; None: the loop's buffer
        self._closing: str | None = None  # this end closes, for this reason, once nothing is pending
        self._is_ended = False
        self._end = ""  # why nothing more can be made of what is received
        sock.setblocking(False)

    def __repr__(self) -> str:
        state = "closed" if self._is_ended else "closing" if self._closing is not None else "open"
        return f"<{type(self).__name__} {self.name}: {state}, {self.bytes_in} in, {self.bytes_out} out>"

    @property
    def is_open(self) -> bool:
        """Whether what is sent has a chance to arrive."""
        return not (self._is_ended or self._broken or self._closing is not None)

    # ---- any thread

    def queue(self, messages: Iterable[Message], fds: Sequence[int] = ()) -> None:
        """Put messages in line for the next `flush`; after the link closed they are dropped."""
        if fds:
            raise ValueError(f"{self!r} cannot carry descriptors")
        self._outbox.extend(messages)

    def flush(self) -> None:
        """Send what is queued, as one frame; what the socket does not take now, the I/O thread sends when it can."""
        rounds = 0
        while self._outbox and self._lock.acquire(blocking=False):
            try:
                self._write_outbox()
            finally:
                self._lock.release()
            rounds += 1
            if rounds == FLUSH_ROUNDS:
                self.loop.call_soon(self.flush)
                return
        # The lock was taken: its holder comes back to the condition above after letting go, and sees our messages.

    def send(self, messages: Iterable[Message]) -> None:
        """Queue and flush."""
        self.queue(messages)
        self.flush()

    def place_chunks(self, place: PlaceChunk) -> None:
        """Have the data of chunks received where `place` says; see `FrameDecoder`. I/O thread."""
        self.place_chunk = self.decoder.place_chunk = place

    def displace_chunk(self, digest: bytes) -> None:
        """Drop the chunk being received where `place_chunks` said, if it is of this blob. I/O thread."""
        self.decoder.displace_chunk(digest)

    def close(self, reason: str = "closed here") -> None:
        """Send what is queued, then close; at most `LINGER_S` later. `on_closed` follows, with this reason."""
        self.flush()
        self.loop.run_here(self._begin_close, reason)

    # ---- writing, lock held

    def _write_outbox(self) -> None:
        outbox = self._outbox
        count = len(outbox)
        messages = [outbox.popleft()] if count == 1 else [outbox.popleft() for _ in range(min(count, FLUSH_COUNT))]
        try:
            self._write_messages(messages)
        except (ProtocolError, TypeError, OverflowError) as error:  # our own mistake; the peer must not miss a part
            _log.exception("distexec: %r cannot send", self)
            self._break(f"this end could not encode a message: {error}")

    def _write_messages(self, messages: list[Message]) -> None:
        if not self._broken:
            for frame in pack(messages):
                self._write(frame)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        """Hand bytes to the socket, or put them behind what is pending."""
        if self._broken:
            return
        size = len(data)
        sent = 0
        if not self._pending:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._break(describe(error))
                return
        self.bytes_out += sent
        if sent < size:
            self._pend(memoryview(data)[sent:])

    def _pend(self, rest: memoryview) -> None:
        self._pending.append(rest)
        self.pending_bytes += len(rest)
        if len(self._pending) == 1:
            self.loop.run_here(self._watch)

    def _write_pending(self) -> None:
        while self._pending:
            try:
                sent = self._send_pending()
            except BlockingIOError:
                return
            except OSError as error:
                self._break(describe(error))
                return
            self.bytes_out += sent
            self.pending_bytes -= sent
            while self._pending and sent >= len(self._pending[0]):
                sent -= len(self._pending.popleft())
            if sent:
                self._pending[0] = self._pending[0][sent:]

    def _send_pending(self) -> int:
        if len(self._pending) == 1:
            return self.sock.send(self._pending[0])
        return self.sock.sendmsg(itertools.islice(self._pending, GATHER_COUNT))

    def _break(self, reason: str) -> None:
        """Write no more; the I/O thread delivers what was received, then closes."""
        if not self._broken:
            self._broken = reason
            self._pending.clear()
            self.pending_bytes = 0
            self.loop.call_soon(self._drain_and_finish)

    # ---- I/O thread

    def begin(self) -> None:
        """Start to read. For the loop."""
        if self._is_ended:
            return
        self.loop.tenants.add(self)
        if self.loop.is_stopping:
            self.close(STOPPED)
        else:
            self._watch()

    def _watch(self) -> None:
        if self._is_ended or self not in self.loop.tenants:
            return
        events = _READ if self._closing is None else 0
        if self._pending:
            events |= _WRITE
        if events:
            self.loop.select(self.sock, events, self._on_ready)
        else:
            self.loop.unselect(self.sock)

    def _on_ready(self, events: int) -> None:
        if events & _WRITE:
            self._on_writable()
        if events & _READ and not self._is_ended and self._closing is None:
            self._on_readable()

    def _on_writable(self) -> None:
        with self._lock:  # held elsewhere only for a write that does not block
            self._write_pending()
            is_clear = not self._pending
        self.flush()
        if is_clear and not self._is_ended:
            if self._closing is not None:
                self.finish(self._closing)
            else:
                self._watch()

    def _on_readable(self) -> None:
        budget = READ_BUDGET_BYTES
        while budget > 0 and not self._is_ended and self._closing is None:
            try:
                size, is_drained = self._receive()
            except BlockingIOError:
                return
            except OSError as error:
                self.finish(describe(error))
                return
            if not size:
                is_whole = self.decoder.is_between_frames
                self.finish("closed by the other end" if is_whole else "cut in the middle of a frame")
                return
            self.bytes_in += size
            self.last_heard = time.monotonic()
            self._take(size)
            if is_drained:
                return  # if more came since, the selector says so
            budget -= size

    def _take(self, size: int) -> None:
        try:
            messages = self._decode(size)
        except ProtocolError as error:
            _log.warning("distexec: %r broke the protocol and was closed: %s", self, error)
            self.finish(f"broke the protocol: {error}")
            return
        if messages and self._has_probes and not _PROBES.isdisjoint(map(type, messages)):
            messages = self._answer_probes(messages)
        if messages:
            try:
                self.on_messages(self, messages)
            except BaseException:  # a batch half taken in: only a new connection makes the two ends agree again
                self.loop.log_unexpected()
                self.finish("this end failed on a message; see its log")
        if self._end:
            self.finish(self._end)

    def _receive(self) -> tuple[int, bool]:
        """Receive once; return how many bytes came, 0 at the end, and whether nothing is left."""
        self._space = self.decoder.space()
        target = self.loop.scratch if self._space is None else self._space
        size = self.sock.recv_into(target)
        return size, size < len(target)

    def _decode(self, size: int) -> list[Message]:
        if self._space is None:
            return self.decoder.feed(self.loop.scratch[:size])
        return self.decoder.grew(size)

    def _answer_probes(self, messages: list[Message]) -> list[Message]:
        others: list[Message] = []
        for message in messages:
            if isinstance(message, Ping):
                self.queue([Pong(message.sent_ns)])
            elif isinstance(message, Pong):
                self.rtt_s = max(0, time.monotonic_ns() - message.sent_ns) / 1e9
            else:
                others.append(message)
        self.flush()
        return others

    def _drain_and_finish(self) -> None:
        """Deliver all that was received before the break, so that nothing the peer achieved is called lost."""
        received = -1
        for _ in range(DRAIN_ROUNDS):
            if self._is_ended or received == self.bytes_in:
                break
            received = self.bytes_in
            self._on_readable()
        self.finish(self._closing or self._broken)

    def _begin_close(self, reason: str) -> None:
        if self._is_ended or self._closing is not None:
            return
        self.loop.tenants.add(self)
        self.flush()
        self._closing = reason
        with self._lock:
            self._say_farewell()
            is_clear = not self._pending
        if is_clear:
            self.finish(reason)
        else:
            self._watch()
            self.loop.call_later(LINGER_S, self.finish, reason)

    def _say_farewell(self) -> None:
        """Write what the transport itself says last. Lock held."""

    def finish(self, reason: str) -> None:
        """Close at once and call `on_closed`, the first time. I/O thread; others use `close`."""
        if self._is_ended:
            return
        self._is_ended = True
        self.loop.tenants.discard(self)
        self.loop.unselect(self.sock)
        with self._lock:  # nobody writes to a descriptor whose number may belong to another by then
            self._broken = self._broken or reason
            self._pending.clear()
            self.pending_bytes = 0
            self._discard_outbox()
            self._discard_input()
            self.sock.close()
        self.loop.guard(self.on_closed, self, reason)
        while self.received_fds:
            os.close(self.received_fds.popleft())

    def abandon(self) -> None:
        """Close the descriptor in a forked child."""
        self._is_ended = True
        self._broken = "in a forked child"
        self.sock.close()

    def _discard_outbox(self) -> None:
        self._outbox.clear()

    def _discard_input(self) -> None:
        """Empty the receive queue: closing over unread bytes makes TCP drop what the peer has not read yet."""
        with contextlib.suppress(OSError):  # empty, or broken already
            self.sock.shutdown(socket.SHUT_WR)
            for _ in range(4):
                if not self.sock.recv_into(self.loop.scratch):
                    break


class FdLink(Link):
    """A link over a Unix socket on which descriptors travel with frames."""

    _has_probes = False

    def __init__(self, loop: IoThread, sock: socket.socket, decoder: FrameDecoder, on_messages: OnMessages,
                 on_closed: OnClosed) -> None:
        super().__init__(loop, sock, decoder, on_messages, on_closed)
        self._has_parcels = False  # set for good by the first: until then flush need not look for them
        self._pending_fds: dict[int, list[int]] = {}  # id of a pending piece: what goes with its first byte; write lock
        self._ancillary_bytes = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)

    def queue(self, messages: Iterable[Message], fds: Sequence[int] = ()) -> None:
        """Put messages in line; descriptors are duplicated, and arrive no later than these messages."""
        if not fds:
            self._outbox.extend(messages)
            return
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors; at most {MAX_FDS} go with one frame")
        self._has_parcels = True  # before the append: who pops a parcel then sees it
        self._outbox.append(_Parcel(list(messages), _duplicated(fds)))

    def _write_messages(self, messages: list[Message]) -> None:
        if self._broken:
            if self._has_parcels:
                self._discard(messages)
            return
        if not self._has_parcels:
            for frame in pack(messages):
                self._write(frame)
            return
        try:
            for is_parcel, group in itertools.groupby(messages, _Parcel.is_instance):
                if is_parcel:
                    for parcel in group:
                        self._write_parcel(parcel)  # type: ignore[arg-type]
                else:
                    super()._write_messages(list(group))
        except Exception:
            self._discard(messages)
            raise

    def _write_parcel(self, parcel: _Parcel) -> None:
        first, *others = pack(parcel.messages)
        fds, parcel.fds = parcel.fds, []
        self._write_with_fds(first, fds)
        for frame in others:
            self._write(frame)

    def _write_with_fds(self, frame: bytes | memoryview, fds: list[int]) -> None:
        if self._broken:
            _close_all(fds)
            return
        sent = 0
        if not self._pending:
            try:
                sent = self._send_with_fds(frame, fds)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._break(describe(error))
        if self._broken or sent:
            _close_all(fds)
        if self._broken:
            return
        self.bytes_out += sent
        if sent < len(frame):
            rest = memoryview(frame)[sent:]
            if not sent:
                self._pending_fds[id(rest)] = fds
            self._pend(rest)

    def _send_with_fds(self, data: bytes | bytearray | memoryview, fds: list[int]) -> int:
        return self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])

    def _send_pending(self) -> int:
        if not self._pending_fds:
            return super()._send_pending()
        piece = self._pending[0]
        fds = self._pending_fds.get(id(piece))
        if fds is None:
            return self.sock.send(piece)
        sent = self._send_with_fds(piece, fds)
        del self._pending_fds[id(piece)]
        _close_all(fds)
        return sent

    def _receive(self) -> tuple[int, bool]:
        self._space = self.decoder.space()
        target = self.loop.scratch if self._space is None else self._space
        size, ancillary, flags, _address = self.sock.recvmsg_into([target], self._ancillary_bytes, _CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[:len(content) - len(content) % fds.itemsize])
                self.received_fds.extend(fds)
        if flags & _CTRUNC:
            raise OSError(errno.EMFILE, "a descriptor that came could not be taken: raise `ulimit -n`")
        return size, size < len(target)

    def finish(self, reason: str) -> None:
        """Close at once, and with it the descriptors that could not be sent."""
        super().finish(reason)
        while self._pending_fds:
            _close_all(self._pending_fds.popitem()[1])

    def _discard_outbox(self) -> None:
        self._discard([self._outbox.popleft() for _ in range(len(self._outbox))])

    @staticmethod
    def _discard(messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, _Parcel):
                _close_all(message.fds)


class _Parcel:
    """Messages and the descriptors that go with them."""

    __slots__ = ("fds", "messages")

    def __init__(self, messages: list[Message], fds: list[int]) -> None:
        self.messages, self.fds = messages, fds

    @classmethod
    def is_instance(cls, entry: object) -> bool:
        return isinstance(entry, cls)


def _duplicated(fds: Iterable[int]) -> list[int]:
    duplicates: list[int] = []
    try:
        for fd in fds:
            duplicates.append(os.dup(fd))
    except OSError:
        _close_all(duplicates)
        raise
    return duplicates


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def describe(error: OSError) -> str:
    """Say in words why a connection is gone."""
    return f"connection lost: {error.strerror or error}"
