"""Blobs under way: credit, turns, backlog, and every pull answered once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from distexec import transfers
from distexec.messages import BlobRef, Chunk, Credit, Fetch, Message, Missing, Ping
from distexec.protocol import PlaceChunk
from distexec.shipping import BlobStore
from distexec.transfers import Transfers

MIB = 1 << 20


class FakeLink:
    """One end of an in-memory link: what is sent waits in `sent` until the test delivers it."""

    def __init__(self) -> None:
        self.sent: deque[Message] = deque()
        self.pending_bytes = 0
        self.displaced: list[bytes] = []

    def place_chunks(self, place: PlaceChunk) -> None:
        self.place = place

    def displace_chunk(self, digest: bytes) -> None:
        self.displaced.append(digest)

    def send(self, messages: Sequence[Message]) -> None:
        self.sent.extend(messages)


class Ends:
    """Two vertices with a store each and a link between them, and a clock that never moves by itself."""

    def __init__(self, *, keeps_received: bool = False) -> None:
        self.later: list[Callable[[], None]] = []
        self.is_in_place = False
        self.stores = BlobStore(), BlobStore(keeps_received=keeps_received)
        self.links = FakeLink(), FakeLink()
        self.transfers = tuple(Transfers(link, store, self.call_later)
                               for link, store in zip(self.links, self.stores, strict=True))
        self.events: list[tuple[str, BlobRef] | tuple[str, BlobRef, str]] = []

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self.later.append(function)

    def pull(self, ref: BlobRef) -> None:
        self.transfers[1].pull(ref, lambda ref: self.events.append(("done", ref)),
                               lambda ref, reason: self.events.append(("failed", ref, reason)))

    def deliver(self, side: int, limit: int = 10**9) -> list[Message]:
        """Bring up to `limit` of what `side` sent to the other end."""
        moved: list[Message] = []
        while self.links[side].sent and len(moved) < limit:
            message = self.links[side].sent.popleft()
            if isinstance(message, Chunk):
                message = Chunk(message.digest, message.offset, self.received(side, message))
            assert self.transfers[1 - side].handle(message)
            moved.append(message)
        return moved

    def received(self, side: int, chunk: Chunk) -> bytes:
        """Receive a chunk's data as a link does: where the other end wants it, or anywhere."""
        space = self.links[1 - side].place(chunk.digest, chunk.offset, len(chunk.data)) if self.is_in_place else None
        if space is None:
            return bytes(chunk.data)
        space[:] = chunk.data
        return cast("bytes", space)

    def settle(self) -> None:
        while self.links[0].sent or self.links[1].sent:
            self.deliver(1)
            self.deliver(0)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    for store in ends.stores:
        store.close()


class TestTransfers:
    @pytest.mark.parametrize("size", [0, 1, transfers.CHUNK_BYTES, transfers.CHUNK_BYTES + 1, 11 * MIB + 3])
    def test_a_pulled_blob_arrives(self, ends: Ends, size: int) -> None:
        """fetch → chunks ↔ credit → done; the sender then holds nothing for it."""
        content = os.urandom(size)
        ref = ends.stores[0].put(content)
        ends.pull(ref)
        ends.settle()
        assert ends.events == [("done", ref)]
        assert ends.stores[1].view(ref) == content
        ends.stores[0].release(ref)
        assert not ends.stores[0].has(ref)
        assert repr(ends.transfers[0]) == "<Transfers: 0 out, 0 in>"

    @pytest.mark.parametrize("size", [0, 1, transfers.CHUNK_BYTES + 1, 11 * MIB + 3])
    @pytest.mark.parametrize("is_in_place", [False, True])
    def test_for_the_end_of_the_way(self, size: int, is_in_place: bool) -> None:
        """What a root pulls is taken by its owner without a copy, by each of several owners with one of its own."""
        ends = Ends(keeps_received=True)
        ends.is_in_place = is_in_place
        content = os.urandom(size)
        ref = ends.stores[0].put(content)
        ends.pull(ref)
        ends.pull(ref)
        ends.settle()
        assert ends.events == [("done", ref)] * 2
        first, second = ends.stores[1].take(ref), ends.stores[1].take(ref)
        assert first == second == content
        if size:
            first[0] ^= 1
        assert second == content
        for store in ends.stores:
            store.close()

    def test_in_place_and_in_a_batch(self, ends: Ends) -> None:
        """Places are given out ahead of the messages; what is then delivered in order becomes the blob."""
        content = os.urandom(3 * MIB)
        ref = ends.stores[0].put(content)
        ends.pull(ref)
        ends.deliver(1)
        sent = [message for message in ends.links[0].sent if isinstance(message, Chunk)]
        ends.links[0].sent.clear()
        place = ends.links[1].place
        assert place(ref.digest, 5, 100) is None  # not the next
        assert place(ref.digest, 0, 4 * MIB) is None  # more than there is
        assert place(b"?" * 16, 0, 100) is None
        ends.is_in_place = True
        for message in [Chunk(each.digest, each.offset, ends.received(0, each)) for each in sent]:
            ends.transfers[1].handle(message)
        assert ends.events == [("done", ref)]
        assert ends.stores[1].view(ref) == content

    def test_a_failed_pull_takes_its_place_back(self, ends: Ends) -> None:
        """Nothing is received any more into space that was given up."""
        ref = ends.stores[0].put(os.urandom(MIB))
        ends.pull(ref)
        assert ends.links[1].place(ref.digest, 0, 1000) is not None
        ends.transfers[1].close()
        assert ends.links[1].displaced == [ref.digest]
        assert ends.links[1].place(ref.digest, 1000, 1000) is None

    def test_chunks_are_small_and_wait_for_credit(self, ends: Ends) -> None:
        """Without credit no more than a window is sent, in chunks of at most 256 KiB."""
        ref = ends.stores[0].put(bytes(20 * MIB))
        ends.pull(ref)
        ends.deliver(1)
        chunks = [message for message in ends.links[0].sent if isinstance(message, Chunk)]
        assert sum(len(chunk.data) for chunk in chunks) == transfers.WINDOW_BYTES
        assert max(len(chunk.data) for chunk in chunks) == 256 * 1024
        ends.deliver(0)
        ends.deliver(1, limit=1)
        sent = sum(len(message.data) for message in ends.links[0].sent if isinstance(message, Chunk))
        assert sent == transfers.CREDIT_BYTES

    def test_transfers_take_turns(self, ends: Ends) -> None:
        """A small blob fetched after a large one does not wait for it."""
        large, small = ends.stores[0].put(bytes(20 * MIB)), ends.stores[0].put(b"s" * MIB)
        ends.links[0].pending_bytes = transfers.BACKLOG_BYTES
        ends.pull(large)
        ends.pull(small)
        ends.deliver(1)
        assert not ends.links[0].sent
        ends.links[0].pending_bytes = 0
        ends.later.pop()()
        order = [message.digest for message in ends.links[0].sent if isinstance(message, Chunk)]
        assert order[:8] == [large.digest, small.digest] * 4

    def test_a_backlog_stops_chunks_until_it_is_gone(self, ends: Ends) -> None:
        """With much unsent no chunk is added, and the link is looked at again without any message coming."""
        ref = ends.stores[0].put(os.urandom(MIB))
        ends.links[0].pending_bytes = transfers.BACKLOG_BYTES
        ends.pull(ref)
        ends.deliver(1)
        assert not ends.links[0].sent
        assert len(ends.later) == 1
        ends.links[0].pending_bytes = 0
        ends.later.pop()()
        ends.settle()
        assert ends.events == [("done", ref)]

    def test_two_who_want_the_same_fetch_once(self, ends: Ends) -> None:
        """Both are told, each with a reference of its own, and the bytes come once."""
        ref = ends.stores[0].put(os.urandom(MIB))
        ends.pull(ref)
        ends.pull(ref)
        assert list(ends.links[1].sent) == [Fetch(ref)]
        ends.settle()
        assert ends.events == [("done", ref)] * 2
        ends.stores[1].release(ref)
        assert ends.stores[1].has(ref)
        ends.stores[1].release(ref)
        assert not ends.stores[1].has(ref)

    def test_what_is_here_is_not_fetched(self, ends: Ends) -> None:
        """A blob in the store is done at once, with a reference."""
        ref = ends.stores[1].put(b"here" * 1000)
        ends.pull(ref)
        assert ends.events == [("done", ref)]
        assert not ends.links[1].sent

    def test_missing_blob(self, ends: Ends) -> None:
        """fetch → missing → failed with the reason."""
        ends.pull(BlobRef(b"?" * 16, 100))
        ends.deliver(1)
        assert list(ends.links[0].sent) == [Missing(b"?" * 16)]
        ends.settle()
        assert ends.events == [("failed", BlobRef(b"?" * 16, 100), "the other end does not have the blob (any more)")]

    def test_damaged_bytes_fail_and_free_the_sender(self, ends: Ends) -> None:
        """A blob that is not what its name says fails here, and the sender is told to stop."""
        ref = ends.stores[0].put(bytes(8 * MIB))
        ends.pull(ref)
        ends.deliver(1)
        ends.links[0].sent[0] = Chunk(ref.digest, 5, b"out of place")
        ends.settle()
        assert [event[0] for event in ends.events] == ["failed"]
        assert ends.links[1].sent == deque()
        assert repr(ends.transfers[0]) == "<Transfers: 0 out, 0 in>"

    def test_a_lost_link_fails_what_was_awaited(self, ends: Ends) -> None:
        """On close every pull fails once and what was being sent is released."""
        ref = ends.stores[0].put(bytes(8 * MIB))
        ends.pull(ref)
        ends.deliver(1)
        ends.transfers[1].close()
        ends.transfers[0].close()
        assert ends.events == [("failed", ref, "the link was closed")]
        ends.stores[0].release(ref)
        assert not ends.stores[0].has(ref)

    def test_a_blob_released_while_it_is_sent_is_sent_whole(self, ends: Ends) -> None:
        """The transfer holds a reference of its own."""
        content = os.urandom(6 * MIB)
        ref = ends.stores[0].put(content)
        ends.pull(ref)
        ends.deliver(1)
        ends.stores[0].release(ref)
        ends.settle()
        assert ends.stores[1].view(ref) == content
        assert not ends.stores[0].has(ref)

    def test_stray_messages_change_nothing(self, ends: Ends) -> None:
        """Chunks, credit and refusals for a transfer that is over are ignored; other messages are not ours."""
        sender = ends.transfers[0]
        for message in (Chunk(b"s" * 16, 0, b"x"), Credit(b"s" * 16, 5), Missing(b"s" * 16)):
            assert sender.handle(message)
        assert not sender.handle(Ping(1))
        assert not ends.links[0].sent
