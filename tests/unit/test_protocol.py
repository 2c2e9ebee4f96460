"""Frames: what goes in comes out, however it is cut, and nothing else gets in."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec import protocol
from distexec.errors import ProtocolError
from distexec.messages import (
    Ack,
    BlobRef,
    Bye,
    Chunk,
    Fetch,
    FromControl,
    FromDownstream,
    FromUpstream,
    FromWorker,
    Kill,
    Message,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Ping,
    Ready,
    Returned,
    Run,
    Segment,
    SessionSpec,
    ToControl,
    ToWorker,
)
from distexec.protocol import FrameDecoder, encode, pack

numbers = st.integers(0, 2**63 - 1)
blobs = st.builds(BlobRef, st.binary(min_size=16, max_size=16), numbers)
buffers = st.lists(st.binary(max_size=30) | blobs, max_size=3).map(tuple)
messages = st.one_of(
    st.builds(Run, numbers, numbers, numbers, numbers, st.binary(max_size=200), buffers,
              st.none() | st.builds(Options, st.floats(0, 1e9), st.integers(-9, 9), st.text(max_size=9),
                                    st.booleans())),
    st.builds(Ack, numbers, st.lists(numbers, max_size=5)),
    st.builds(Kill, numbers, numbers, numbers),
    st.builds(Chunk, st.binary(min_size=16, max_size=16), numbers, st.binary(max_size=300)),
    st.builds(Open, numbers, st.binary(max_size=16), st.binary(max_size=16), st.floats(0, 10), numbers,
              st.builds(SessionSpec, name=st.text(max_size=9),
                        environ=st.dictionaries(st.text(), st.text(), max_size=2))),
    st.builds(Ping, numbers), st.builds(Fetch, blobs), st.builds(Bye, st.text(max_size=20)))
batches = st.lists(messages, max_size=8)
RUN = Run(1, 2, 3, 4, b"x" * 50)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.lists(batches, max_size=5), st.lists(st.integers(0, 10**6), max_size=12))
def test_messages_survive_any_cut(sent: list[list[Message]], places: list[int]) -> None:
    """Batches come out whole and in order, however the stream is cut."""
    decoder = FrameDecoder(FromUpstream)
    received: list[Message] = []
    for piece in cut(b"".join(bytes(encode(batch)) for batch in sent), places):
        received += decoder.feed(piece)
    assert received == [message for batch in sent for message in batch]
    assert decoder.is_between_frames


@given(batches, st.lists(st.integers(0, 10**6), max_size=12))
def test_receiving_into_space_is_the_same(sent: list[Message], places: list[int]) -> None:
    """A reader that fills `space` sees what one that feeds sees."""
    decoder = FrameDecoder(FromUpstream)
    received: list[Message] = []
    for piece in cut(bytes(encode(sent)) * 2, places):
        while piece:
            space = decoder.space()
            if space is None:
                received += decoder.feed(piece)
                break
            size = min(len(space), len(piece))
            space[:size] = piece[:size]
            received += decoder.grew(size)
            piece = piece[size:]
    assert received == sent * 2


chunks = st.builds(Chunk, st.binary(min_size=16, max_size=16), numbers,
                   st.sampled_from([0, 1, 60_000, 70_000, 200_000]).map(lambda size: bytes(range(100)) * (size // 100)))


@given(chunks)
def test_a_chunk_is_packed_as_it_is_encoded(chunk: Chunk) -> None:
    """The pieces of a chunk that is sent without a copy make a frame like any other."""
    frame = b"".join(pack([chunk]))
    assert FrameDecoder(FromUpstream).feed(frame) == [chunk]


@given(st.lists(chunks, min_size=1, max_size=4), st.lists(st.integers(0, 10**6), max_size=12), st.booleans(),
       st.booleans())
def test_chunks_go_where_they_are_wanted(sent: list[Chunk], places: list[int], is_wanted: bool, uses_space: bool) -> None:
    """However the stream is cut, chunks arrive in order with their bytes, in place or not; other messages as always."""
    decoder = FrameDecoder(FromUpstream)
    given_out: list[memoryview] = []

    def place(digest: bytes, offset: int, length: int) -> memoryview | None:
        assert Chunk(digest, offset, bytes(length)) in [Chunk(e.digest, e.offset, bytes(len(e.data))) for e in sent]
        if not is_wanted:
            return None
        given_out.append(memoryview(bytearray(length)))
        return given_out[-1]

    decoder.place_chunk = place
    received: list[Message] = []
    for piece in cut(b"".join(b"".join(pack([each])) + encode([RUN]) for each in sent), places):
        while piece:
            space = decoder.space() if uses_space else None
            if space is None:
                received += decoder.feed(piece)
                break
            size = min(len(space), len(piece))
            space[:size] = piece[:size]
            received += decoder.grew(size)
            piece = piece[size:]
    assert received == [message for each in sent for message in (each, RUN)]
    assert all(any(message.data is view for message in received if isinstance(message, Chunk)) for view in given_out)


def test_a_displaced_chunk_is_dropped() -> None:
    """The rest of a chunk whose place is used for something else goes nowhere, and what follows it is heard."""
    decoder = FrameDecoder(FromUpstream)
    view = memoryview(bytearray(100_000))
    decoder.place_chunk = lambda *_: view
    frame = b"".join(pack([Chunk(b"d" * 16, 5, b"x" * 100_000)]))
    assert decoder.feed(frame[:50_000]) == []
    decoder.displace_chunk(b"another blob's..")
    assert decoder.feed(frame[50_000:60_000]) == []
    decoder.displace_chunk(b"d" * 16)
    before = bytes(view)
    assert decoder.feed(frame[60_000:] + encode([RUN])) == [RUN]
    assert bytes(view) == before != b"x" * 100_000
    decoder.displace_chunk(b"d" * 16)  # nothing is under way
    assert len(decoder.feed(frame)) == 1


@pytest.mark.parametrize("at", range(35))
def test_what_only_resembles_a_chunk_is_not_placed(at: int) -> None:
    """A frame that differs from a chunk's in any byte before the data is decoded, or refused, like any other."""
    frame = bytearray(b"".join(pack([Chunk(b"d" * 16, 70_000, b"x" * 70_000)])))
    asked: list[tuple[bytes, int, int]] = []
    frame[at] ^= 0x05
    decoder = FrameDecoder(FromUpstream)

    def place(digest: bytes, offset: int, length: int) -> None:
        asked.append((digest, offset, length))

    decoder.place_chunk = place
    try:
        decoder.feed(memoryview(frame)[:60_000])
        decoder.feed(memoryview(frame)[60_000:])
    except ProtocolError:
        pass  # as any malformed frame
    assert all(length == 70_000 for _, _, length in asked)


def test_feed_does_not_keep_the_buffer() -> None:
    """The caller may overwrite its buffer at once: decoded bytes are copies, parts of frames too."""
    data = bytearray(encode([RUN])) + bytearray(encode([RUN]))
    decoder = FrameDecoder(FromUpstream)
    received = decoder.feed(memoryview(data)[:-10])
    rest = bytes(data[-10:])
    data[:] = bytes(len(data))
    assert received + decoder.feed(rest) == [RUN, RUN]


@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=30))
def test_pack_splits_only_what_is_large(sizes: list[int]) -> None:
    """A batch is one frame up to the target; above it, frames near the target, with every message once and in order."""
    sent = [Run(0, seq, 0, 0, bytes(size)) for seq, size in enumerate(sizes)]
    frames = pack(sent)
    assert [message for frame in frames for message in FrameDecoder(FromUpstream).feed(frame)] == sent
    if len(encode(sent)) <= protocol.FRAME_TARGET_BYTES:
        assert len(frames) == 1
    assert all(len(frame) <= protocol.FRAME_TARGET_BYTES + protocol.HEADER_BYTES for frame in frames)


def test_no_frame_above_the_limit_is_made() -> None:
    """A message that no peer would take is refused where it is made, by name."""
    for message in (Run(0, 0, 0, 0, bytes(protocol.MAX_FRAME_BYTES)), Chunk(b"", 0, bytes(protocol.MAX_FRAME_BYTES))):
        with pytest.raises(ProtocolError, match=f"{type(message).__name__}.*blobs"):
            pack([message])


def test_largest_frame_passes() -> None:
    """The limit itself is allowed on both sides."""
    overhead = len(encode([Run(0, 0, 0, 0, bytes(1 << 20))])) - protocol.HEADER_BYTES - (1 << 20)
    message = Run(0, 0, 0, 0, bytes(protocol.MAX_FRAME_BYTES - overhead))
    frame = encode([message])
    assert len(frame) == protocol.MAX_FRAME_BYTES + protocol.HEADER_BYTES
    assert FrameDecoder(FromUpstream).feed(frame) == [message]


@pytest.mark.parametrize("size", [protocol.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_announced_size_is_not_believed(size: int) -> None:
    """A frame too large is refused at its header, before memory is taken for it."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="allowed"):
            FrameDecoder(FromUpstream).feed(size.to_bytes(4, "big") + bytes(100))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_limit_of_a_decoder_is_its_own() -> None:
    """A decoder may be made tighter than the rest."""
    frame = encode([RUN])
    size = len(frame) - protocol.HEADER_BYTES
    assert FrameDecoder(FromUpstream, size).feed(frame) == [RUN]
    with pytest.raises(ProtocolError):
        FrameDecoder(FromUpstream, size - 1).feed(frame)


OUTCOME = Outcome(1, 2, 3, OutcomeKind.VALUE, b"", 5)
READY, SEGMENT = Ready(7), Segment(BlobRef(bytes(16), 5), 1, 0)
SPOKEN = {FromUpstream: [RUN, Ping(1)], FromDownstream: [OUTCOME, Returned(1, [(1, 1)]), Ping(1)],
          FromControl: [Ping(1)], ToControl: [Ping(1)], ToWorker: [RUN, SEGMENT],
          FromWorker: [READY, OUTCOME, SEGMENT, Returned(1, [(1, 1)])]}
ALL = [RUN, OUTCOME, READY, SEGMENT, Ping(1), Returned(1, [(1, 1)])]


@pytest.mark.parametrize("says", SPOKEN, ids=["upstream", "downstream", "control", "to control", "worker", "to worker"])
def test_only_ones_own_lines_are_heard(says: type) -> None:
    """Every decoder takes what its peer may say, and refuses what only others may."""
    for message in ALL:
        if message in SPOKEN[says]:
            assert FrameDecoder(says).feed(encode([message])) == [message]
        else:
            with pytest.raises(ProtocolError, match="out of role"):
                FrameDecoder(says).feed(encode([message]))


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


HOSTILE = {
    "empty": b"", "no array": b"\x01", "truncated": encode([RUN])[4:-1], "trailing": bytes(encode([RUN])[4:]) + b"\x00",
    "array of 4 billion": b"\xdd\xff\xff\xff\xff", "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "bytes of 4 billion": b"\x91\x93\x04\xc6\xff\xff\xff\xff", "unknown tag": msgspec.msgpack.encode([[99, 1]]),
    "tag is a list": msgspec.msgpack.encode([[[1], 1]]), "too few fields": msgspec.msgpack.encode([[4, 1]]),
    "wrong type": msgspec.msgpack.encode([[4, "a", 1, 1, 1, b""]]), "bad UTF-8": b"\x91\x92\x1d\xa2\xff\xfe",
    "deep": b"\x91\x93\x28\x01" + b"\x91" * 100_000 + b"\xc0", "deep in place": b"\x91" * 100_000 + b"\xc0",
    "huge number": msgspec.msgpack.encode([[6, 2**64 - 1, 1, 1]])[:3] + b"\xcb" + b"\xff" * 8,
    "extension": b"\x91\xc7\x05\x01abcde", "reserved": b"\x91\xc1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_protocol_errors(name: str) -> None:
    """Whatever a body holds, the only exception is ProtocolError, and little memory is taken."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            FrameDecoder(FromUpstream).feed(framed(HOSTILE[name]))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=60) | st.tuples(batches, st.integers(0, 10**6), st.integers(0, 255)).map(
    lambda mutated: bytes(damage(bytes(encode(mutated[0]))[4:], mutated[1], mutated[2]))))
def test_random_and_damaged_bodies(body: bytes) -> None:
    """Random bytes, and real frames with one byte changed, give messages or ProtocolError."""
    try:
        received = FrameDecoder(FromUpstream).feed(framed(body))
    except ProtocolError:
        return
    assert all(isinstance(message, FromUpstream) for message in received)


def damage(body: bytes, place: int, value: int) -> bytearray:
    damaged = bytearray(body)
    if damaged:
        damaged[place % len(damaged)] = value
    return damaged


def test_workers_import_it_cheaply() -> None:
    """`protocol` brings neither multiprocessing nor cryptography into a worker."""
    code = ("import sys; before = set(sys.modules); import distexec.protocol; "
            "print(*sorted({'multiprocessing', 'concurrent.futures', 'ssl', 'hashlib', 'logging', 'asyncio', 'pickle'} "
            "& (set(sys.modules) - before)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
