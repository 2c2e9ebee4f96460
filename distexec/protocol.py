"""Bytes to messages and back, with every length limited. No socket, thread or clock.

A frame is a 4-byte big-endian length and a msgpack array of that many bytes: a batch of messages, so that under load
the cost of a frame is shared. Decoders are built from the unions of `messages`, so what a peer may not say is not
decodable.

    messages ──pack──► frames ──socket──► FrameDecoder.feed / .space + .grew ──► messages

The hot path of the package: one encoder call and one decoder call a frame, nothing a message. Imported by workers,
hence nothing heavy here; the handshake is in `handshake`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from struct import Struct
from types import UnionType
from typing import TYPE_CHECKING, Any, cast

import msgspec

from .messages import Chunk, Message

if TYPE_CHECKING:
    from .errors import ProtocolError

__all__ = ["FRAME_TARGET_BYTES", "HEADER_BYTES", "MAX_FRAME_BYTES", "FrameDecoder", "PlaceChunk", "encode",
           "pack"]

MAX_FRAME_BYTES = (8 << 20) + 4096
"""The largest frame body. Smaller: a task with several inline buffers does not fit. Larger: a peer can make us hold
more."""

FRAME_TARGET_BYTES = 1 << 20
"""A batch above this is sent as several frames. Smaller: more calls. Larger: the receiver starts later on the batch."""

HEADER_BYTES = 4

PLACED_BYTES = 64 << 10
"""Frames from here on are looked at for a chunk to be received in place. Smaller: more looking than copying."""

PlaceChunk = Callable[[bytes, int, int], "memoryview | None"]
"""Says where the data of a chunk shall go, by digest, offset and length; None: nowhere in particular."""

_header = Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_encode, _pack_header, _unpack_header = _encoder.encode, _header.pack, _header.unpack_from
_BIN32 = b"\xc6"
_CHUNK_START = _encoder.encode((Chunk(bytes(16), 0, b""),))[:-19]  # up to the digest: an offset and no data follow it
_OFFSET_AT = len(_CHUNK_START) + 16
_WIDTHS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}  # of unsigned integers in msgpack
_BAD_BYTES = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)
"""All that hostile bytes can make the decoder raise: wrong types, bad UTF-8, deep nesting, sizes that cannot be had."""


def encode(messages: Sequence[Message]) -> bytes:
    """Make one frame of the messages. Raises ProtocolError when it would exceed `MAX_FRAME_BYTES`."""
    body = _encoder.encode(messages)
    return _header.pack(_checked(len(body), messages)) + body


def pack(messages: Sequence[Message]) -> list[bytes | memoryview]:
    """Make frames of the messages, in order: one, or several of about `FRAME_TARGET_BYTES` if they are many and large.

    The pieces returned are to be sent one after the other; a chunk's data is a piece by itself, which saves a copy.
    """
    count = len(messages)
    if count == 1 and type(messages[0]) is Chunk:
        return _pack_chunk(messages[0])
    body = _encode(messages)
    size = len(body)
    if size <= FRAME_TARGET_BYTES:
        return [_pack_header(size) + body]
    if count == 1:
        return [_pack_header(_checked(size, messages)) + body]
    step = max(1, count * FRAME_TARGET_BYTES // len(body))
    return [frame for start in range(0, count, step) for frame in pack(messages[start:start + step])]


def _pack_chunk(chunk: Chunk) -> list[bytes | memoryview]:
    """Encode without the data, and put the length of the data where the encoder put that of none."""
    size = len(chunk.data)
    start = _encoder.encode((Chunk(chunk.digest, chunk.offset, b""),))[:-2] + _BIN32 + _header.pack(size)
    return [_header.pack(_checked(len(start) + size, (chunk,))) + start, memoryview(chunk.data)]


def _checked(size_bytes: int, messages: Sequence[Message]) -> int:
    if size_bytes > MAX_FRAME_BYTES:
        names = ", ".join(sorted({type(message).__name__ for message in messages}))
        raise _violation(f"a frame of {size_bytes} bytes ({names}) is above the limit of {MAX_FRAME_BYTES}; "
                            "large bytes must travel as blobs")
    return size_bytes


def _read_chunk(size: int, start: memoryview) -> tuple[int, bytes, int, int] | None:
    """Read what precedes the data in a frame of one Chunk as `_pack_chunk` makes it: its length, digest, offset, length
    of the data; None if it is anything else, or not all there."""
    if len(start) < _OFFSET_AT + 1 or start[:len(_CHUNK_START)] != _CHUNK_START:
        return None
    width = _WIDTHS.get(start[_OFFSET_AT], 0)
    at = _OFFSET_AT + 1 + width
    offset = int.from_bytes(start[at - width:at], "big") if width else start[_OFFSET_AT]
    if (not width and offset > 0x7F) or len(start) < at + 5 or start[at:at + 1] != _BIN32:
        return None
    (length,) = _header.unpack_from(start, at + 1)
    if at + 5 + length != size:
        return None
    return at + 5, bytes(start[len(_CHUNK_START):_OFFSET_AT]), offset, length


def _violation(text: str) -> ProtocolError:
    from .errors import ProtocolError  # late: it brings in multiprocessing, 20 ms of a worker's start
    return ProtocolError(text)


def _malformed(error: BaseException) -> ProtocolError:
    return _violation(f"a malformed frame, or a message out of role: {error}")


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

    The data of a large chunk goes straight to where `place_chunk(digest, offset, length)` says, if that is set and does
    not say None; the Chunk's `data` is then that memoryview.
    """

    __slots__ = ("_chunk", "_decode", "_filled", "_frame", "_head", "_is_displaced", "_max_frame_bytes", "place_chunk")

    def __init__(self, says: UnionType | type, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decode = _decoder(says).decode
        self._max_frame_bytes = max_frame_bytes
        self.place_chunk: PlaceChunk | None = None
        self._frame: bytearray | memoryview | None = None  # a frame begun, at its full length; or a chunk's data
        self._chunk: Chunk | None = None  # what the frame begun is, if it goes where `place_chunk` said
        self._is_displaced = False  # the frame begun is to be dropped
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
        chunk, self._chunk = self._chunk, None
        if chunk is not None:
            return [chunk]
        if self._is_displaced:
            self._is_displaced = False
            return []
        return self._messages(frame)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Take the next bytes of the stream; return all messages of the frames they complete, in order."""
        view = memoryview(data)
        end = len(view)
        if self._frame is None and not self._head and end >= HEADER_BYTES:  # mostly: one frame, whole and alone
            (size,) = _unpack_header(view)
            if end - HEADER_BYTES == size <= self._max_frame_bytes:
                try:
                    return self._decode(view[HEADER_BYTES:])  # type: ignore[no-any-return]
                except _BAD_BYTES as error:
                    raise _malformed(error) from None
        messages: list[Message] = []
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
        at = self._place(size, start)
        if not at:
            self._frame = bytearray(size)
        assert self._frame is not None
        self._filled = len(start) - at
        self._frame[:self._filled] = start[at:]

    def _place(self, size: int, start: memoryview) -> int:
        """If a chunk begins here whose data somebody wants elsewhere, make that the frame; return how much precedes it."""
        chunk = _read_chunk(size, start) if size >= PLACED_BYTES and self.place_chunk is not None else None
        if chunk is None:
            return 0
        at, digest, offset, length = chunk
        assert self.place_chunk is not None
        target = self.place_chunk(digest, offset, length)
        if target is None:
            return 0
        self._frame, self._chunk = target, Chunk(digest, offset, cast("bytes", target))
        return at

    def displace_chunk(self, digest: bytes) -> None:
        """Drop the chunk being received if it is of this blob: the space it goes to is used for something else now."""
        if self._chunk is not None and self._chunk.digest == digest:
            assert self._frame is not None
            self._frame, self._chunk = bytearray(len(self._frame)), None
            self._is_displaced = True

    def _messages(self, body: memoryview | bytearray) -> list[Message]:
        try:
            return self._decode(body)  # type: ignore[no-any-return]
        except _BAD_BYTES as error:
            raise _malformed(error) from None
