"""Bytes to messages and back, with every length limited. No socket, thread or clock.

A frame is a 4-byte big-endian length and a msgpack array of that many bytes: a batch of messages, so that under load
the cost of a frame is shared. Decoders are built from the unions of `messages`, so what a peer may not say is not
decodable.

    messages ──pack──► frames ──socket──► FrameDecoder.feed / .space + .grew ──► messages

The hot path of the package: one encoder call and one decoder call a frame, nothing a message. Imported by workers,
hence nothing heavy here; the handshake is in `handshake`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from struct import Struct
from types import UnionType
from typing import TYPE_CHECKING, Any

import msgspec

from .messages import Chunk, Message

if TYPE_CHECKING:
    from .errors import ProtocolError

__all__ = ["FRAME_TARGET_BYTES", "HEADER_BYTES", "MAX_FRAME_BYTES", "FrameDecoder", "encode", "pack"]

MAX_FRAME_BYTES = (8 << 20) + 4096
"""The largest frame body. Smaller: a task with several inline buffers does not fit. Larger: a peer can make us hold
more."""

FRAME_TARGET_BYTES = 1 << 20
"""A batch above this is sent as several frames. Smaller: more calls. Larger: the receiver starts later on the batch."""

SPARE_BYTES = 512 << 10
"""The largest frame buffer kept for the next frame. Smaller than a chunk: every chunk takes fresh memory."""

HEADER_BYTES = 4

_header = Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_BAD_BYTES = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)
"""All that hostile bytes can make the decoder raise: wrong types, bad UTF-8, deep nesting, sizes that cannot be had."""


def encode(messages: Sequence[Message]) -> bytes | bytearray:
    """Make one frame of the messages. Raises ProtocolError when it would exceed `MAX_FRAME_BYTES`."""
    if len(messages) == 1 and type(messages[0]) is Chunk:
        return _encode_in_place(messages)
    body = _encoder.encode(messages)
    return _header.pack(_checked(len(body), messages)) + body


def pack(messages: Sequence[Message]) -> list[bytes | bytearray]:
    """Make frames of the messages, in order: one, or several of about `FRAME_TARGET_BYTES` if they are many and
    large."""
    if len(messages) == 1:
        return [encode(messages)]
    body = _encoder.encode(messages)
    if len(body) <= FRAME_TARGET_BYTES:
        return [_header.pack(len(body)) + body]
    count = len(messages)
    step = max(1, count * FRAME_TARGET_BYTES // len(body))
    return [frame for start in range(0, count, step) for frame in pack(messages[start:start + step])]


def _encode_in_place(messages: Sequence[Message]) -> bytearray:
    """Encode behind the room for the header: for large messages cheaper than joining the two, for small ones dearer."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(messages, frame, HEADER_BYTES)
    _header.pack_into(frame, 0, _checked(len(frame) - HEADER_BYTES, messages))
    return frame


def _checked(size_bytes: int, messages: Sequence[Message]) -> int:
    if size_bytes > MAX_FRAME_BYTES:
        names = ", ".join(sorted({type(message).__name__ for message in messages}))
        raise _violation(f"a frame of {size_bytes} bytes ({names}) is above the limit of {MAX_FRAME_BYTES}; "
                            "large bytes must travel as blobs")
    return size_bytes


def _violation(text: str) -> ProtocolError:
    from .errors import ProtocolError  # late: it brings in multiprocessing, 20 ms of a worker's start
    return ProtocolError(text)


@cache
def _decoder(says: UnionType | type) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(list[says])  # type: ignore[valid-type]


class FrameDecoder:
    """Turns the bytes of one peer into its messages.

    Args:
        says: the message type, or union of them, that the peer may utter.
        max_frame_bytes: larger frames are refused before a byte of them is kept.

    A reader that owns its buffer calls `feed`. One that wants to save a copy asks `space` where the rest of a frame
    begun belongs, receives into it and calls `grew`; `space` is None between frames. After a ProtocolError it is of
    no more use.
    """

    __slots__ = ("_decode", "_filled", "_frame", "_head", "_max_frame_bytes", "_spare")

    def __init__(self, says: UnionType | type, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decode = _decoder(says).decode
        self._max_frame_bytes = max_frame_bytes
        self._frame: bytearray | None = None  # a frame begun, at its full length
        self._spare = bytearray()  # of the frame before: chunks of a blob have one size, and fresh memory costs a third
        self._filled = 0  # how much of it is here
        self._head = b""  # less than a header

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here."""
        return self._frame is None and not self._head

    def space(self) -> memoryview | None:
        """Return where the rest of the frame begun must be received, or None if none is begun."""
        return None if self._frame is None else memoryview(self._frame)[self._filled:]

    def grew(self, size_bytes: int) -> list[Message]:
        """Note that so many bytes were received into `space`, and return the messages that completes, if it does."""
        frame = self._frame
        assert frame is not None, "grew() without space()"
        self._filled += size_bytes
        if self._filled < len(frame):
            return []
        self._frame = None
        messages = self._messages(frame)
        if len(frame) <= SPARE_BYTES:
            self._spare = frame  # decoding copied all of it
        return messages

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Take the next bytes of the stream; return all messages of the frames they complete, in order."""
        messages: list[Message] = []
        view = memoryview(data)
        position = 0
        if self._frame is not None:
            position = min(len(view), len(self._frame) - self._filled)
            self._frame[self._filled:self._filled + position] = view[:position]
            messages = self.grew(position)
        elif self._head:
            view = memoryview(self._head + bytes(view))
            self._head = b""
        end = len(view)
        while end - position >= HEADER_BYTES:
            (size,) = _header.unpack_from(view, position)
            if size > self._max_frame_bytes:
                raise _violation(f"a frame of {size} bytes, where {self._max_frame_bytes} are allowed")
            position += HEADER_BYTES
            if end - position < size:
                self._begin(size, view[position:])
                return messages
            batch = self._messages(view[position:position + size])
            messages = messages + batch if messages else batch
            position += size
        self._head = bytes(view[position:])
        return messages

    def _begin(self, size: int, start: memoryview) -> None:
        self._frame = self._spare if len(self._spare) == size else bytearray(size)
        self._spare = bytearray()
        self._filled = len(start)
        self._frame[:self._filled] = start

    def _messages(self, body: memoryview | bytearray) -> list[Message]:
        try:
            return self._decode(body)  # type: ignore[no-any-return]
        except _BAD_BYTES as error:
            raise _violation(f"a malformed frame, or a message out of role: {error}") from None
