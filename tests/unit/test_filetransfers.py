"""Blobs that are files, under way: read and written piece by piece, verified, and every pull answered once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distexec import filetransfers, transfers
from distexec.depot import Depot
from distexec.diskthread import DiskThread
from distexec.filetransfers import FileTraffic
from distexec.messages import BlobRef, Chunk, Credit, Fetch, Message, Missing
from distexec.shipping import BlobStore, digest_of
from distexec.transfers import Transfers
from distexec.trees import FileWriter, Folder
from tests.unit.test_transfers import FakeLink

MIB = 1 << 20


class FakeDisk:
    """A disk thread whose work waits until the test does it."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Callable[[], Any], Callable[[Any], object] | None]] = deque()

    def run(self, work: Callable[[], Any], done: Callable[[Any], object] | None = None) -> None:
        self.queue.append((work, done))

    def step(self) -> bool:
        if not self.queue:
            return False
        work, done = self.queue.popleft()
        try:
            result = work()
        except Exception as error:
            result = error
        if done is not None:
            done(result)
        return True

    def close(self) -> None:
        while self.step():
            pass


class End:
    """One vertex: a store, files, and its end of the link."""

    def __init__(self) -> None:
        self.store = BlobStore()
        self.files = FileTraffic(self)
        self.disk = FakeDisk()
        self.files.disk = self.disk  # type: ignore[assignment]
        self.link = FakeLink()
        self.later: list[Callable[[], None]] = []
        self.transfers = Transfers(self.link, self.store, lambda _seconds, fn: self.later.append(fn), self.files)

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        raise AssertionError("the fake disk calls back itself")


class Ends:
    """A sender and a receiver of files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sender, self.receiver = End(), End()
        self.events: list[tuple[Any, ...]] = []
        self.most_bytes = 0
        (directory / "sent").mkdir()
        (directory / "received").mkdir()

    def offer(self, content: bytes, name: str = "file") -> BlobRef:
        path = self.directory / "sent" / name
        path.write_bytes(content)
        ref = BlobRef(digest_of(content), len(content))
        self.sender.files.register(ref, partial(os.open, path, os.O_RDONLY))
        return ref

    def pull(self, ref: BlobRef, name: str = "file") -> None:
        self.receiver.transfers.pull_file(
            ref, partial(self.make_writer, name, ref), lambda _: self.events.append(("done", name)),
            lambda _, reason: self.events.append(("failed", name, reason)))

    def make_writer(self, name: str, ref: BlobRef) -> FileWriter:
        with Folder(str(self.directory / "received")) as folder:
            return FileWriter(folder, name, 0o644, ref)

    def deliver(self, end: End, other: End) -> bool:
        if not end.link.sent:
            return False
        message = end.link.sent.popleft()
        if isinstance(message, Chunk):
            space = other.link.place(message.digest, message.offset, len(message.data))
            data: Any = bytes(message.data)
            if space is not None:
                space[:] = message.data
                data = space
            message = Chunk(message.digest, message.offset, data)
        assert other.transfers.handle(message)
        return True

    def settle(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let everything happen that can, one thing after the other."""
        acts = [partial(self.deliver, self.sender, self.receiver), partial(self.deliver, self.receiver, self.sender),
                self.sender.disk.step, self.receiver.disk.step]
        while not until() and sum(act() for act in acts):
            for sending in self.sender.transfers._sending.values():
                self.most_bytes = max(self.most_bytes, getattr(sending, "_ready_bytes", 0))
            for file in self.receiver.transfers._files_in.values():
                self.most_bytes = max(self.most_bytes, file.unwritten_bytes)

    def received(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.directory / "received").iterdir()}


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    open_before = len(os.listdir("/proc/self/fd"))
    ends = Ends(tmp_path)
    yield ends
    for end in (ends.sender, ends.receiver):
        end.transfers.close()
        end.disk.close()
        end.store.close()
    assert len(os.listdir("/proc/self/fd")) == open_before, "descriptors are left"


class TestFiles:
    @pytest.mark.parametrize("size", [0, 1, transfers.CHUNK_BYTES, filetransfers.READ_BYTES + 1, 21 * MIB + 3])
    def test_a_file_arrives(self, ends: Ends, size: int) -> None:
        """fetch → pieces → in its place; no more than a window was ever held."""
        content = os.urandom(size)
        ends.pull(ends.offer(content))
        ends.settle()
        assert ends.events == [("done", "file")]
        assert ends.received() == {"file": content}
        assert ends.most_bytes <= transfers.WINDOW_BYTES + filetransfers.READ_BYTES
        assert not ends.sender.transfers._sending

    def test_several_take_turns(self, ends: Ends) -> None:
        """All arrive, and none waits for the end of another."""
        contents = {str(number): os.urandom(12 * MIB) for number in range(3)}
        for name, content in contents.items():
            ends.pull(ends.offer(content, name), name)
        seen: set[bytes] = set()

        def is_mixed() -> bool:
            seen.update(each.digest for each in ends.sender.link.sent if isinstance(each, Chunk))
            return len(seen) == 3

        ends.settle(is_mixed)
        assert not ends.events
        ends.settle()
        assert ends.received() == contents

    def test_the_receiver_has_no_place(self, ends: Ends) -> None:
        """Nothing is fetched, and the reason is told."""
        (ends.directory / "received" / "file").mkdir()
        ends.pull(ends.offer(b"x"))
        ends.settle()
        assert [event[0] for event in ends.events] == ["failed"]
        assert "is a directory" in ends.events[0][2]

    def test_the_sender_has_no_such_file(self, ends: Ends) -> None:
        """Missing, at once."""
        ends.pull(BlobRef(bytes(16), 5))
        ends.settle()
        assert ends.events == [("failed", "file", "the other end does not have the blob (any more)")]
        assert ends.received() == {}

    def test_a_file_that_cannot_be_opened(self, ends: Ends) -> None:
        """What the system says reaches the other end."""
        ref = ends.offer(b"x")
        (ends.directory / "sent" / "file").unlink()
        ends.pull(ref)
        ends.settle()
        assert ends.events[0][0] == "failed"
        assert "No such file" in ends.events[0][2]

    def test_a_file_that_changes_while_it_is_sent(self, ends: Ends) -> None:
        """The digest tells; nothing is left of it."""
        ref = ends.offer(bytes(20 * MIB))
        ends.pull(ref)
        ends.settle(lambda: any(file.written_bytes for file in ends.receiver.transfers._files_in.values()))
        (ends.directory / "sent" / "file").write_bytes(b"x" * 20 * MIB)
        ends.settle()
        assert ends.events[0][0] == "failed"
        assert "changed while it was sent" in ends.events[0][2]
        assert ends.received() == {}

    def test_a_file_that_becomes_shorter(self, ends: Ends) -> None:
        """It can be read no further, and both ends know."""
        ref = ends.offer(bytes(20 * MIB))
        ends.pull(ref)
        ends.settle(lambda: any(file.written_bytes for file in ends.receiver.transfers._files_in.values()))
        os.truncate(ends.directory / "sent" / "file", 5)
        ends.settle()
        assert ends.events == [("failed", "file", "the file became shorter while it was sent")]
        assert not ends.sender.transfers._sending

    def test_a_disk_that_is_full(self, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sender stops, what there was is removed, the next file arrives."""
        real = os.write
        left = 3 * MIB

        def write(fd: int, data: Any) -> int:
            nonlocal left
            left -= len(data)
            if left < 0:
                raise OSError(28, "No space left on device")
            return real(fd, data)

        monkeypatch.setattr(os, "write", write)
        ends.pull(ends.offer(bytes(20 * MIB)))
        ends.settle()
        assert ends.events == [("failed", "file", "[Errno 28] No space left on device")]
        assert ends.received() == {}
        assert not ends.sender.transfers._sending
        monkeypatch.setattr(os, "write", real)
        ends.pull(ends.offer(b"next", "next"), "next")
        ends.settle()
        assert ends.received() == {"next": b"next"}

    def test_the_link_ends_in_between(self, ends: Ends) -> None:
        """Both ends let go; what was written is not left."""
        ends.pull(ends.offer(bytes(20 * MIB)))
        ends.settle(lambda: any(file.written_bytes for file in ends.receiver.transfers._files_in.values()))
        ends.sender.transfers.close("cut")
        ends.receiver.transfers.close("cut")
        ends.settle()
        assert ends.events == [("failed", "file", "cut")]
        assert ends.received() == {}

    def test_one_that_is_wanted_twice(self, ends: Ends) -> None:
        """Two names: the second is fetched after the first."""
        ref = ends.offer(b"content")
        ends.pull(ref, "a")
        ends.pull(ref, "b")
        ends.settle()
        assert ends.events == [("done", "a"), ("done", "b")]
        assert ends.received() == {"a": b"content", "b": b"content"}

    def test_the_same_bytes_as_a_file_and_in_memory(self, ends: Ends) -> None:
        """Neither waits for ever, whichever is first."""
        for is_file_first in (True, False):
            content = os.urandom(3 * MIB)
            ref = ends.offer(content)
            got: list[BlobRef] = []
            pulls = [lambda ref=ref: ends.pull(ref),
                     lambda ref=ref, got=got: ends.receiver.transfers.pull(ref, got.append, lambda *_: None)]
            for pull in pulls if is_file_first else reversed(pulls):
                pull()
            ends.settle()
            assert got == [ref]
            assert ends.receiver.store.view(ref) == content
            ends.receiver.store.release(ref)
        assert ends.events == [("done", "file")] * 2

    def test_a_sender_that_ignores_credit(self, ends: Ends) -> None:
        """It is not allowed to fill our memory."""
        ref = BlobRef(bytes(16), 1 << 30)
        ends.pull(ref)
        ends.receiver.disk.step()
        assert [type(each) for each in ends.receiver.link.sent] == [Fetch]
        for number in range(2 * transfers.WINDOW_BYTES // MIB + 1):
            ends.receiver.transfers.handle(Chunk(ref.digest, number * MIB, bytes(MIB)))
        assert ends.events[0][:2] == ("failed", "file")
        assert "more than it was allowed" in ends.events[0][2]

    @pytest.mark.parametrize("chunks", [[(1, b"x")], [(0, b"x"), (0, b"x")], [(0, b"xxxx")], [(0, b"x"), (2, b"x")]])
    def test_chunks_that_lie(self, ends: Ends, chunks: list[tuple[int, bytes]]) -> None:
        """Wrong offsets and sizes end the transfer, or are not heard; nothing is left."""
        ref = BlobRef(bytes(16), 3)
        ends.pull(ref)
        ends.receiver.disk.step()
        for offset, data in chunks:
            ends.receiver.transfers.handle(Chunk(ref.digest, offset, data))
        while ends.receiver.disk.step():
            pass
        ends.receiver.transfers.close()
        ends.receiver.disk.close()
        assert [event[0] for event in ends.events] == ["failed"]
        assert ends.received() == {}

    def test_every_pull_is_answered_once(self, ends: Ends) -> None:
        """Missing after the last chunk, credit after the end, chunks after a failure: all are late and harmless."""
        ref = ends.offer(b"content")
        ends.pull(ref)
        ends.settle()
        late: list[Message] = [Missing(ref.digest), Chunk(ref.digest, 0, b"content"), Credit(ref.digest, 7)]
        for message in late:
            ends.receiver.transfers.handle(message)
            ends.sender.transfers.handle(message)
        ends.settle()
        assert ends.events == [("done", "file")]


class TestDepot:
    def test_files_are_fetched_once(self, ends: Ends) -> None:
        """Two tasks want one, at the same time and later."""
        depot = Depot(str(ends.directory / "home"))
        ref = ends.offer(b"content")
        events: list[str] = []
        for _ in range(2):
            depot.fetch(ends.receiver.transfers, [ref], lambda: events.append("done"), events.append)
        ends.settle()
        depot.fetch(ends.receiver.transfers, [ref], lambda: events.append("done"), events.append)
        assert events == ["done"] * 3
        assert os.listdir(depot.home + "/files") == [ref.digest.hex()]

    def test_what_was_written_to_is_fetched_again(self, ends: Ends) -> None:
        """It is not what its name says any more."""
        depot = Depot(str(ends.directory / "home"))
        ref = ends.offer(b"content")
        depot.fetch(ends.receiver.transfers, [ref], lambda: None, pytest.fail)
        ends.settle()
        assert depot.has(ref)
        os.chmod(depot.path(ref), 0o644)
        Path(depot.path(ref)).write_bytes(b"changed")
        assert not depot.has(ref)
        depot.fetch(ends.receiver.transfers, [ref], lambda: None, pytest.fail)
        ends.settle()
        assert Path(depot.path(ref)).read_bytes() == b"content"

    def test_one_failure_is_told_once(self, ends: Ends) -> None:
        """Though several files are missing."""
        depot = Depot(str(ends.directory / "home"))
        events: list[str] = []
        refs = [ends.offer(b"here"), BlobRef(bytes(16), 5), BlobRef(bytes(15) + b"x", 5)]
        depot.fetch(ends.receiver.transfers, refs, lambda: events.append("done"), events.append)
        ends.settle()
        assert len(events) == 1
        assert "does not have" in events[0]

    def test_only_idle_files_make_room(self, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest go first, and none that is pinned."""
        monkeypatch.setattr("distexec.depot.IDLE_BYTES", 20)
        depot = Depot(str(ends.directory / "home"))
        refs = [ends.offer(bytes([number]) * 8, str(number)) for number in range(4)]
        for ref in refs:
            depot.pin(ref)
        depot.fetch(ends.receiver.transfers, refs, lambda: None, pytest.fail)
        ends.settle()
        for ref in refs[1:]:
            depot.unpin(ref)
        assert [depot.has(ref) for ref in refs] == [True, False, False, True]


class TestDiskThread:
    def test_work_is_done_in_order_and_to_the_end(self) -> None:
        """Also what comes while it is being closed, and afterwards."""
        loop = Calls()
        disk = DiskThread(loop)
        done: list[int] = []
        for number in range(100):
            disk.run(partial(done.append, number))
        disk.close()
        disk.run(partial(done.append, 100))
        disk.close()
        assert done == list(range(101))

    def test_results_and_exceptions_come_back(self) -> None:
        """On the I/O thread."""
        loop = Calls()
        disk = DiskThread(loop)
        results: list[Any] = []
        disk.run(lambda: 1, results.append)
        disk.run(lambda: 1 / 0, results.append)
        disk.close()
        assert not results
        loop.run()
        assert results[0] == 1
        assert isinstance(results[1], ZeroDivisionError)


class Calls:
    """An I/O thread that calls when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        self.calls.append(partial(fn, *args))

    def run(self) -> None:
        while self.calls:
            self.calls.pop(0)()
