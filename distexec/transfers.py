"""Blobs on their way over one link, both ways.

    puller: Fetch ──►          sender: Chunk Chunk Chunk ──►          puller: Credit ──► … Credit(full size) ──►

The rule: control messages come first, and no receiver is sent more than it has room for. A blob is bytes in the store, or a
file: `filetransfers` knows the difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from distexec.filetransfers import FileReceiving, FileSending, FileTraffic
from distexec.messages import BlobRef, Buffers, Chunk, Credit, Fetch, Message, Missing
from distexec.protocol import PlaceChunk
from distexec.shipping import BlobStore, BlobWriter
from distexec.trees import FileWriter

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

    __slots__ = ("_store", "_view", "allowed", "ref", "sent")

    def __init__(self, ref: BlobRef, store: BlobStore) -> None:
        # Not copied: the reference is held until the receiver has credited the last byte, so the view stays good.
        self.ref, self.sent, self.allowed = ref, 0, WINDOW_BYTES
        self._store, self._view = store, store.view(ref)

    def next_chunk(self) -> Chunk:
        """Give what is to be sent next."""
        start = self.sent
        self.sent = min(start + CHUNK_BYTES, self.allowed, self.ref.size_bytes)
        return Chunk(self.ref.digest, start, cast("bytes", self._view[start:self.sent]))

    def end(self) -> None:
        """Let go of it."""
        self._store.release(self.ref)


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

    `files` has the blobs that are files here, and does what waits for a disk; None: there are none, and none can come.

    Not thread-safe: everything is called on the link's I/O thread.
    """

    def __init__(self, link: ChunkLink, store: BlobStore, call_later: Callable[[float, Callable[[], None]], object],
                 files: FileTraffic | None = None) -> None:
        self._link, self._store, self._call_later, self._files = link, store, call_later, files
        self._sending: dict[bytes, _Sending | FileSending] = {}
        self._turns: deque[_Sending | FileSending] = deque()  # those that may send more
        self._receiving: dict[bytes, _Receiving] = {}
        self._files_in: dict[bytes, FileReceiving] = {}
        self._postponed: dict[bytes, list[Callable[[], object]]] = {}  # what waits for the same bytes to come in otherwise
        self._retrying = False
        link.place_chunks(self._place)

    def __repr__(self) -> str:
        return f"<Transfers: {len(self._sending)} out, {len(self._receiving) + len(self._files_in)} in>"

    def pull(self, ref: BlobRef, on_done: Callable[[BlobRef], object],
             on_failed: Callable[[BlobRef, str], object]) -> None:
        """Fetch a blob from the other end; exactly one of the two callbacks follows, perhaps before this returns.

        `on_done(ref)` hands over one reference, to be released; `on_failed(ref, reason)` says why not.
        """
        if self._store.retain_if_here(ref):
            on_done(ref)
            return
        if ref.digest in self._files_in:
            self._postponed.setdefault(ref.digest, []).append(lambda: self.pull(ref, on_done, on_failed))
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

    def pull_file(self, ref: BlobRef, make_writer: Callable[[], FileWriter], on_done: Callable[[BlobRef], object],
                  on_failed: Callable[[BlobRef, str], object]) -> None:
        """Fetch a blob from the other end into a file; one of the two callbacks follows, later.

        `make_writer` is called on the disk thread.
        """
        assert self._files is not None, "only vertices with a disk thread fetch files"
        if ref.digest in self._files_in or ref.digest in self._receiving:
            self._postponed.setdefault(ref.digest, []).append(lambda: self.pull_file(ref, make_writer, on_done, on_failed))
            return
        self._files_in[ref.digest] = FileReceiving(ref, self._files, make_writer, self, on_done, on_failed)

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
                self._fail(message.digest, message.reason or "the other end does not have the blob (any more)")
            case _:
                return False
        return True

    def close(self, reason: str = "the link was closed") -> None:
        """End everything under way: what was being sent is released, what was awaited fails."""
        for sending in list(self._sending.values()):
            self._end_sending(sending)
        while self._receiving or self._files_in:
            for digest in [*self._receiving, *self._files_in]:
                self._fail(digest, reason)

    # ---- the sending side

    def _on_fetch(self, message: Fetch) -> None:
        ref = message.blob
        if ref.digest in self._sending:
            self._end_sending(self._sending[ref.digest])
        if self._store.retain_if_here(ref):
            self._turns.append(_Sending(ref, self._store))
            self._sending[ref.digest] = self._turns[-1]
            self._pump()
        elif self._files is not None and self._files.has(ref):
            self._sending[ref.digest] = FileSending(ref, self._files, WINDOW_BYTES, CHUNK_BYTES, self._on_ready,
                                                    self._on_unreadable)
        else:
            self._link.send([Missing(ref.digest)])

    def _on_ready(self, sending: FileSending) -> None:
        if sending not in self._turns and (sending.sent < sending.allowed or not sending.ref.size_bytes):
            self._turns.append(sending)
        self._pump()

    def _on_unreadable(self, sending: FileSending, reason: str) -> None:
        self._end_sending(sending)
        self._link.send([Missing(sending.ref.digest, reason)])

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

    def _end_sending(self, sending: _Sending | FileSending) -> None:
        del self._sending[sending.ref.digest]
        if sending in self._turns:
            self._turns.remove(sending)
        sending.end()

    def _pump(self) -> None:
        while self._turns and self._link.pending_bytes < BACKLOG_BYTES:
            sending = self._turns.popleft()
            chunk = sending.next_chunk()
            if chunk is None:
                continue  # it comes back when it has read more
            self._link.send([chunk])
            if sending.sent < min(sending.allowed, sending.ref.size_bytes):
                self._turns.append(sending)
        if self._turns and not self._retrying:
            self._retrying = True
            self._call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        self._pump()

    # ---- the receiving side

    def _place(self, digest: bytes, offset: int, size_bytes: int) -> memoryview | None:
        receiving = self._receiving.get(digest)
        if receiving is not None:
            return receiving.writer.space(offset, size_bytes)
        file = self._files_in.get(digest)
        return None if file is None else file.space(offset, size_bytes)

    def _on_chunk(self, message: Chunk) -> None:
        receiving = self._receiving.get(message.digest)
        if receiving is None:
            self._on_file_chunk(message)
            return
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
        self._go_on(ref.digest)

    def _fail(self, digest: bytes, reason: str) -> None:
        receiving, file = self._receiving.pop(digest, None), self._files_in.pop(digest, None)
        if receiving is None and file is None:
            return  # it arrived or failed before
        self._link.displace_chunk(digest)
        if file is not None:
            file.end()
            file.on_failed(file.ref, reason)
        if receiving is not None:
            receiving.writer.abandon()
            for _, on_failed in receiving.waiting:
                on_failed(receiving.writer.ref, reason)
        self._go_on(digest)

    def _go_on(self, digest: bytes) -> None:
        """Fetch again what came in as something else than was wanted."""
        for fetch_again in self._postponed.pop(digest, ()):
            fetch_again()

    # ---- files coming in

    def _on_file_chunk(self, message: Chunk) -> None:
        file = self._files_in.get(message.digest)
        if file is None:
            return  # it failed here and the sender was told; these were under way
        file.take(message.offset, message.data)
        if file.unwritten_bytes > 2 * WINDOW_BYTES:
            self.file_ended(file, "the other end sends more than it was allowed to")

    def file_opened(self, file: FileReceiving) -> None:
        """There is a place for a file: have it sent."""
        self._link.send([Fetch(file.ref)])

    def file_written(self, file: FileReceiving) -> None:
        """Let the sender go on."""
        if file.written_bytes - file.credited >= CREDIT_BYTES:
            file.credited = file.written_bytes
            self._link.send([Credit(file.ref.digest, file.written_bytes)])

    def file_ended(self, file: FileReceiving, reason: str) -> None:
        """A file is here whole, or is not to come any more."""
        ref = file.ref
        self._link.send([Credit(ref.digest, ref.size_bytes)])
        if reason:
            self._fail(ref.digest, reason)
        else:
            del self._files_in[ref.digest]
            file.on_done(ref)
            self._go_on(ref.digest)


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
