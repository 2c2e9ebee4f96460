"""Blobs on their way over one link, both ways.

    puller: Fetch ──►          sender: Chunk Chunk Chunk ──►          puller: Credit ──► … Credit(full size) ──►

The rule: control messages come first, and no receiver is sent more than it has room for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from distexec.messages import BlobRef, Buffers, Chunk, Credit, Fetch, Message, Missing
from distexec.protocol import PlaceChunk
from distexec.shipping import BlobStore, BlobWriter

__all__ = ["ChunkLink", "Transfers", "fetch"]

CHUNK_BYTES = 256 << 10
"""Of a blob, in one message. Larger: a control message waits longer behind it. Smaller: more work per byte."""

WINDOW_BYTES = 8 << 20
"""Sent of one blob and not yet consumed. Smaller: a long way is not filled. Larger: more memory at a slow receiver."""

CREDIT_BYTES = 2 << 20
"""Consumed before the sender is told. Near the window: the sender stalls. Smaller: more messages."""

BACKLOG_BYTES = 1 << 20
"""Unsent on a link above which no chunk is added. Larger: a control message waits longer behind chunks."""

RETRY_S = 0.002
"""Until a link with a backlog is looked at again, if no credit comes first. Larger: the link may idle so long."""


class ChunkLink(Protocol):
    """What transfers need of a link."""

    @property
    def pending_bytes(self) -> int:
        """Bytes queued and not yet sent."""

    def send(self, messages: Sequence[Message], /) -> object:
        """Queue messages and send what the socket takes."""

    def place_chunks(self, place: PlaceChunk, /) -> object:
        """Have chunks' data received where `place` says."""

    def displace_chunk(self, digest: bytes, /) -> object:
        """Drop the chunk of this blob that is being received where `place` said."""


class _Sending:
    """A blob on its way out: `sent` bytes queued, of which the receiver may have up to `allowed`."""

    __slots__ = ("allowed", "ref", "sent", "view")

    def __init__(self, ref: BlobRef, view: memoryview) -> None:
        # Not copied: the reference is held until the receiver has credited the last byte, so the view stays good.
        self.ref, self.view, self.sent, self.allowed = ref, view, 0, WINDOW_BYTES


class _Receiving:
    """A blob on its way in, and who waits for it."""

    __slots__ = ("credited", "waiting", "writer")

    def __init__(self, writer: BlobWriter) -> None:
        self.writer, self.credited = writer, 0
        self.waiting: list[tuple[Callable[[BlobRef], object], Callable[[BlobRef, str], object]]] = []


class Transfers:
    """The blobs under way on one link, both ways.

    What is sent goes round robin between the blobs fetched, in chunks, while the receiver's credit lasts and the link
    has little unsent, so that control messages pass. `call_later(seconds, function)` is the loop's, used only when a
    backlog stops everything. Credit for the full size ends a transfer: its receiver has it, or wants no more of it.

    Not thread-safe: everything is called on the link's I/O thread.
    """

    def __init__(self, link: ChunkLink, store: BlobStore,
                 call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._link, self._store, self._call_later = link, store, call_later
        self._sending: dict[bytes, _Sending] = {}
        self._turns: deque[_Sending] = deque()  # those that may send more
        self._receiving: dict[bytes, _Receiving] = {}
        self._retrying = False
        link.place_chunks(self._place)

    def __repr__(self) -> str:
        return f"<Transfers: {len(self._sending)} out, {len(self._receiving)} in>"

    def pull(self, ref: BlobRef, on_done: Callable[[BlobRef], object],
             on_failed: Callable[[BlobRef, str], object]) -> None:
        """Fetch a blob from the other end; exactly one of the two callbacks follows, perhaps before this returns.

        `on_done(ref)` hands over one reference, to be released; `on_failed(ref, reason)` says why not.
        """
        if self._store.retain_if_here(ref):
            on_done(ref)
            return
        receiving = self._receiving.get(ref.digest)
        if receiving is None:
            try:
                receiving = _Receiving(self._store.writer(ref))
            except (OSError, ValueError) as error:
                on_failed(ref, f"no room for a blob of {ref.size_bytes:,} bytes: {error}")
                return
            self._receiving[ref.digest] = receiving
            self._link.send([Fetch(ref)])
        receiving.waiting.append((on_done, on_failed))

    def handle(self, message: Message) -> bool:
        """Act on a message that concerns transfers; False if it does not."""
        match message:
            case Chunk():
                self._on_chunk(message)
            case Credit():
                self._on_credit(message)
            case Fetch():
                self._on_fetch(message)
            case Missing():
                self._fail(message.digest, "the other end does not have the blob (any more)")
            case _:
                return False
        return True

    def close(self, reason: str = "the link was closed") -> None:
        """End everything under way: what was being sent is released, what was awaited fails."""
        for sending in list(self._sending.values()):
            self._end_sending(sending)
        for digest in list(self._receiving):
            self._fail(digest, reason)

    # ---- the sending side

    def _on_fetch(self, message: Fetch) -> None:
        ref = message.blob
        if ref.digest in self._sending:
            self._end_sending(self._sending[ref.digest])
        if not self._store.retain_if_here(ref):
            self._link.send([Missing(ref.digest)])
            return
        sending = self._sending[ref.digest] = _Sending(ref, self._store.view(ref))
        self._turns.append(sending)
        self._pump()

    def _on_credit(self, message: Credit) -> None:
        sending = self._sending.get(message.digest)
        if sending is None:
            return  # credit for chunks that were under way when the transfer ended
        if message.offset >= sending.ref.size_bytes:
            self._end_sending(sending)
        elif message.offset + WINDOW_BYTES > sending.allowed:
            sending.allowed = message.offset + WINDOW_BYTES
            if sending.sent < sending.ref.size_bytes and sending not in self._turns:
                self._turns.append(sending)
        self._pump()

    def _end_sending(self, sending: _Sending) -> None:
        del self._sending[sending.ref.digest]
        if sending in self._turns:
            self._turns.remove(sending)
        self._store.release(sending.ref)

    def _pump(self) -> None:
        while self._turns and self._link.pending_bytes < BACKLOG_BYTES:
            sending = self._turns.popleft()
            self._link.send([self._next_chunk(sending)])
            if sending.sent < min(sending.allowed, sending.ref.size_bytes):
                self._turns.append(sending)
        if self._turns and not self._retrying:
            self._retrying = True
            self._call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        self._pump()

    def _next_chunk(self, sending: _Sending) -> Chunk:
        start = sending.sent
        sending.sent = min(start + CHUNK_BYTES, sending.allowed, sending.ref.size_bytes)
        return Chunk(sending.ref.digest, start, cast("bytes", sending.view[start:sending.sent]))

    # ---- the receiving side

    def _place(self, digest: bytes, offset: int, size_bytes: int) -> memoryview | None:
        receiving = self._receiving.get(digest)
        return None if receiving is None else receiving.writer.space(offset, size_bytes)

    def _on_chunk(self, message: Chunk) -> None:
        receiving = self._receiving.get(message.digest)
        if receiving is None:
            return  # it failed here and the sender was told; these were under way
        writer = receiving.writer
        try:
            writer.write(message.offset, message.data)
            if writer.is_complete:
                self._complete(receiving)
                return
        except (OSError, ValueError) as error:
            self._link.send([Credit(message.digest, writer.ref.size_bytes)])
            self._fail(message.digest, str(error))
            return
        if writer.written_bytes - receiving.credited >= CREDIT_BYTES:
            receiving.credited = writer.written_bytes
            self._link.send([Credit(message.digest, writer.written_bytes)])

    def _complete(self, receiving: _Receiving) -> None:
        ref = receiving.writer.finish()
        del self._receiving[ref.digest]
        self._link.send([Credit(ref.digest, ref.size_bytes)])
        for _ in receiving.waiting[1:]:
            self._store.retain(ref)
        for on_done, _ in receiving.waiting:
            on_done(ref)

    def _fail(self, digest: bytes, reason: str) -> None:
        receiving = self._receiving.pop(digest, None)
        if receiving is None:
            return  # it arrived or failed before
        self._link.displace_chunk(digest)
        receiving.writer.abandon()
        for _, on_failed in receiving.waiting:
            on_failed(receiving.writer.ref, reason)


def fetch(transfers: Transfers, store: BlobStore, buffers: Buffers, on_done: Callable[[], object],
          on_failed: Callable[[str], object]) -> None:
    """Pull the blobs among some buffers; then call `on_done`, each reference being the caller's, or `on_failed`, once."""
    refs = [ref for ref in buffers if isinstance(ref, BlobRef)]
    got: list[BlobRef] = []
    reasons: list[str] = []

    def done(ref: BlobRef) -> None:
        got.append(ref)
        if reasons:
            store.release(ref)
        elif len(got) == len(refs):
            on_done()

    def failed(_ref: BlobRef, reason: str) -> None:
        reasons.append(reason)
        if len(reasons) == 1:
            for ref in got:
                store.release(ref)
            on_failed(reason)

    if not refs:
        on_done()
    for ref in refs:
        transfers.pull(ref, done, failed)
