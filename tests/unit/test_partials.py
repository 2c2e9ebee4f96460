"""Partial results at the client: who gets them, in which order, what is kept; at an agent: how long; at a worker: when."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from distexec import partials, resultfiles, task
from distexec.future import ClusterFuture
from distexec.messages import Ack, BlobRef, Heard, Partial, Resume, partial_bytes
from distexec.partials import PartialLog, hear
from distexec.payload import CallPacker, CallUnpacker
from distexec.published import AWAY_BYTES, Published
from distexec.shipping import BlobStore

WAIT_S = 30.0


def fill(log: PartialLog, numbers: range, attempt: int = 1) -> None:
    """Add values that are their own numbers."""
    for number in numbers:
        log.add(attempt, number, number, 1)


# ---- the client


def test_readers_go_their_own_pace() -> None:
    """Each reader gets all, whenever it began, and ends with the task."""
    future: ClusterFuture[Any] = ClusterFuture()
    early = future.partials(WAIT_S)
    fill(future.partial_log(), range(1, 4))
    assert next(early) == 1
    late = future.partials(WAIT_S)
    future.conclude(None, None)
    assert (list(early), list(late), list(future.partials(0))) == ([2, 3], [1, 2, 3], [1, 2, 3])


def test_a_reader_waits() -> None:
    """next() returns when a value comes, raises TimeoutError when none does, and StopIteration when the task ends."""
    future: ClusterFuture[Any] = ClusterFuture()
    with pytest.raises(TimeoutError):
        next(future.partials(0))
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(future.partials(WAIT_S)))
    thread.start()
    fill(future.partial_log(), range(1, 3))
    future.conclude(None, None)
    thread.join()
    assert found == [1, 2]


def test_a_cancelled_task_has_none() -> None:
    """Its readers end."""
    future: ClusterFuture[Any] = ClusterFuture()
    reader = future.partials(WAIT_S)
    future.cancel()
    assert list(reader) == []


def test_a_silent_future_has_no_log() -> None:
    """Who neither publishes nor reads pays nothing."""
    future: ClusterFuture[Any] = ClusterFuture()
    future.conclude(1, None)
    assert "_log" not in vars(future)


def test_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ten are kept; a reader that missed some goes on with the oldest there is, and is told how many; a new one is not."""
    monkeypatch.setattr(partials, "KEPT", 10)
    future: ClusterFuture[Any] = ClusterFuture()
    slow = future.partials(WAIT_S)
    fill(future.partial_log(), range(1, 26))
    future.conclude(None, None)
    assert list(future.partials(0)) == list(range(16, 26))
    assert not caplog.records
    assert list(slow) == list(range(16, 26))
    assert "15 partial results" in caplog.text


def test_large_ones_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes count as well; the newest stays however large it is."""
    monkeypatch.setattr(partials, "KEPT_BYTES", 100)
    future: ClusterFuture[Any] = ClusterFuture()
    for number, size in enumerate((60, 60, 500), 1):
        future.partial_log().add(1, number, number, size)
        reader = future.partials(0)
        assert next(reader) == number
        with pytest.raises(TimeoutError):
            next(reader)


def test_attempts() -> None:
    """What an attempt is known by is its number; what was heard is not heard again, nor what an older attempt says."""
    log = PartialLog("task 1")
    fill(log, range(1, 3))
    assert [log.expects(*each) for each in ((1, 2), (1, 3), (2, 1))] == [False, True, True]
    fill(log, range(1, 2), attempt=2)
    assert [log.expects(*each) for each in ((1, 9), (2, 1), (2, 2))] == [False, False, True]


def test_a_callback_is_never_called_by_two_threads() -> None:
    """One thread adds a callback, which blocks; what comes meanwhile is called by it afterwards, in order."""
    future: ClusterFuture[Any] = ClusterFuture()
    fill(future.partial_log(), range(1, 2))
    is_in, go, found = threading.Event(), threading.Event(), []

    def callback(value: int) -> None:
        found.append((value, threading.current_thread()))
        is_in.set()
        go.wait(WAIT_S)
    thread = threading.Thread(target=future.add_partial_callback, args=(callback,))
    thread.start()
    assert is_in.wait(WAIT_S)
    fill(future.partial_log(), range(2, 4))
    assert [value for value, _ in found] == [1]
    go.set()
    thread.join()
    assert found == [(1, thread), (2, thread), (3, thread)]


def test_a_callback_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next value comes."""
    future: ClusterFuture[Any] = ClusterFuture()
    found = []

    def callback(value: int) -> None:
        found.append(value)
        raise SystemExit(1)
    future.add_partial_callback(callback)
    with caplog.at_level(logging.ERROR):
        fill(future.partial_log(), range(1, 3))
    assert found == [1, 2]
    assert len(caplog.records) == 2


class Home:
    """A root with one task, leased to `peer`, and its store."""

    def __init__(self, peer: object, attempt: int = 1) -> None:
        self.packer, self.store = CallPacker(), BlobStore(keeps_received=True)
        self.future: ClusterFuture[Any] = ClusterFuture()
        task = SimpleNamespace(run=SimpleNamespace(attempt=attempt), lane=SimpleNamespace(peer=peer), owner=self.future)
        self.session: Any = SimpleNamespace(tasks={7: task})

    def partial(self, number: int, value: Any, attempt: int = 1, seq: int = 7) -> Partial:
        """A partial result of the task, its large buffers in the store."""
        data, views = CallUnpacker().pack_value(value)
        return Partial(1, seq, attempt, number, data, tuple(self.store.put(view) for view in views))

    def values(self) -> list[Any]:
        """What has come."""
        self.future.conclude(None, None)
        return list(self.future.partials(0))


@pytest.fixture
def home() -> Iterator[Home]:
    """One in whose store nothing may be left."""
    home = Home("n1")
    yield home
    assert "0 blobs" in repr(home.store)
    home.store.close()


def test_only_the_attempt_that_runs_is_heard(home: Home) -> None:
    """Another node, an older attempt, an unknown task and repetitions are not; their blobs are let go."""
    large = bytearray(1 << 20)
    hear(home, "n2", home.partial(1, "elsewhere"))
    hear(home, "n1", home.partial(1, large, attempt=2))
    hear(home, "n1", home.partial(1, large, seq=8))
    hear(home, "n1", home.partial(1, "first"))
    hear(home, "n1", home.partial(1, large))
    hear(home, "n1", home.partial(2, "second"))
    assert home.values() == ["first", "second"]


def test_a_nested_call_has_no_reader(home: Home) -> None:
    """What it publishes is let go."""
    home.session.tasks[7].owner = object()
    hear(home, "n1", home.partial(1, 5))
    assert home.values() == []


def test_one_that_cannot_be_rebuilt(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and the next one counts."""
    hear(home, "n1", Partial(1, 7, 1, 1, b"no pickle", ()))
    hear(home, "n1", home.partial(2, "second"))
    assert home.values() == ["second"]
    assert "partial result 1 of task 7" in caplog.text


# ---- the agent


class Link:
    """Notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int]] = []

    def send(self, messages: list[Partial]) -> None:
        """Note it."""
        self.sent += [(each.seq, each.attempt, each.number) for each in messages]


class Side:
    """An agent's side: a session that is connected or not, a worker's page, and what is kept."""

    def __init__(self, linger_s: float = 20.0) -> None:
        self.store, self.link, self.heard_bytes = BlobStore(), Link(), 0
        self.published = Published(self.store, linger_s)
        self.session: Any = SimpleNamespace(upstream=SimpleNamespace(link=self.link), reconciling=False, uplink_no=3)
        self.worker: Any = SimpleNamespace(page=SimpleNamespace(hear=self._hear))

    def _hear(self, size_bytes: int) -> None:
        self.heard_bytes += size_bytes

    def publish(self, seq: int, attempt: int, numbers: range, blob: bytes = b"") -> None:
        """Have a task publish."""
        for number in numbers:
            buffers: tuple[BlobRef, ...] = (self.store.put(blob),) if blob else ()
            self.published.add(self.session, self.worker, Partial(1, seq, attempt, number, b"x", buffers))

    def cut(self) -> None:
        """The link goes."""
        self.away, self.session.upstream = self.session.upstream, None
        self.published.client_left()

    def heal(self, ack: list[int] | None = None, drop: list[tuple[int, int]] | None = None) -> None:
        """It comes back, and both ends agree."""
        self.link.sent.clear()
        self.session.upstream = self.away
        self.published.say_again(self.session, Resume(3, drop or [], ack or []))


ONE_BYTES = partial_bytes(b"x", ())


def test_kept_until_heard() -> None:
    """Passed on at once; heard up to two → the third is kept, and the worker has room for as much again."""
    side = Side()
    side.publish(1, 1, range(1, 4))
    assert side.link.sent == [(1, 1, 1), (1, 1, 2), (1, 1, 3)]
    assert side.heard_bytes == 0
    side.published.heard(Heard(3, 1, 1, 2))
    assert side.heard_bytes == 2 * ONE_BYTES
    side.cut()
    side.heal()
    assert side.link.sent == [(1, 1, 3)]
    side.published.heard(Heard(3, 1, 1, 3))
    assert side.published.is_empty
    side.published.heard(Heard(3, 9, 1, 3))  # what is unknown is nobody's


def test_said_again_in_order() -> None:
    """What came while the link was away follows what was not heard before; nothing is said until both ends agree."""
    side = Side()
    side.publish(1, 1, range(1, 3))
    side.cut()
    side.publish(1, 1, range(3, 5))
    side.session.upstream, side.session.reconciling = side.away, True
    side.publish(1, 1, range(5, 6))
    side.session.reconciling = False
    side.heal()
    assert side.link.sent == [(1, 1, number) for number in range(1, 6)]


def test_forgotten_with_the_outcome() -> None:
    """Acknowledged, or dropped when the link returned: nothing is kept of it, blobs included."""
    side = Side()
    for seq in range(1, 5):
        side.publish(seq, 1, range(1, 3), bytes(100_000))
    side.published.acknowledged(Ack(3, [1]))
    side.published.acknowledged(Ack(3, [2], [7]))  # another attempt's
    side.cut()
    side.heal(ack=[3], drop=[(4, 1)])
    assert side.link.sent == [(2, 1, 1), (2, 1, 2)]
    side.published.end()
    assert "0 blobs" in repr(side.store)
    assert side.heard_bytes == 8 * (ONE_BYTES + 100_000)
    side.store.close()


def test_a_client_that_is_away_for_a_short_time() -> None:
    """The worker is not told, and so its task waits when too much has collected."""
    side = Side()
    side.cut()
    side.publish(1, 1, range(1, 100), bytes(100_000))
    assert side.heard_bytes == 0
    side.published.end()
    side.store.close()


def test_a_client_that_may_be_away_for_long() -> None:
    """The task does not wait; the newest are kept."""
    side = Side(linger_s=86_400.0)
    side.publish(1, 1, range(1, 3))
    side.cut()
    assert side.heard_bytes == 2 * ONE_BYTES
    side.publish(1, 1, range(3, 300), bytes(200_000))
    assert side.heard_bytes == 299 * ONE_BYTES + 297 * 200_000
    side.heal()
    numbers = [number for _, _, number in side.link.sent]
    assert numbers == list(range(300 - len(numbers), 300))
    assert len(numbers) == AWAY_BYTES // (200_000 + ONE_BYTES)
    side.published.heard(Heard(3, 1, 1, 299))
    assert side.heard_bytes == 299 * ONE_BYTES + 297 * 200_000, "the worker is told once"
    side.store.close()


# ---- the worker


class FakeWorker:
    """One whose outbox takes note, and whose page says that `heard_bytes` were heard."""

    def __init__(self) -> None:
        self.unpacker, self.page = CallUnpacker(), self
        self.outbox: Any = self
        self.current: Any = SimpleNamespace(session=1, seq=7, attempt=1)
        self.at_end: list[Any] = []
        self.said: list[Partial] = []
        self.heard_bytes = 0
        self.on_flush: Any = lambda: None

    def append_large(self, partial: Partial, segments: list[Any]) -> None:
        """Note it."""
        resultfiles.close_parts(segments)
        self.said.append(partial)

    def flush(self) -> None:
        """Let the test act."""
        self.on_flush()

    def end(self) -> None:
        """End the task as a worker does; `current` is still what it was."""
        while self.at_end:
            self.at_end.pop()()


def test_nothing_is_published_after_the_end() -> None:
    """From the moment on when the outcome is made, however late the thread; the next task counts from 1 again."""
    worker: Any = FakeWorker()
    publisher, run = task._Publisher(worker), worker.current
    publisher.publish(run, 1)
    publisher.publish(run, 2)
    worker.end()
    with pytest.raises(RuntimeError, match="task 7 has ended"):
        publisher.publish(run, 3)
    worker.current = SimpleNamespace(session=1, seq=8, attempt=1)
    publisher.publish(worker.current, 1)
    assert [(each.seq, each.number) for each in worker.said] == [(7, 1), (7, 2), (8, 1)]


def test_publish_waits_for_room() -> None:
    """Half of what may be under way, and half again: the third waits until enough was heard."""
    worker: Any = FakeWorker()
    publisher, half = task._Publisher(worker), bytes(task.WINDOW_BYTES // 2 - 600)
    waited = []

    def look() -> None:
        waited.append(len(worker.said))
        if len(waited) == 5:
            worker.heard_bytes = partial_bytes(worker.said[0].data, worker.said[0].buffers)
    publisher.publish(worker.current, half)
    publisher.publish(worker.current, half)
    worker.on_flush = look
    publisher.publish(worker.current, half)
    assert waited == [2, 2, 2, 2, 2, 3]


def test_publish_gives_up_with_its_task() -> None:
    """A thread that waits for room when the task ends is told, and nothing is sent."""
    worker: Any = FakeWorker()
    publisher = task._Publisher(worker)
    publisher.publish(worker.current, bytes(task.WINDOW_BYTES))
    failures: list[RuntimeError] = []
    is_waiting = threading.Event()
    worker.on_flush = is_waiting.set

    def wait() -> None:
        try:
            publisher.publish(worker.current, 2)
        except RuntimeError as error:
            failures.append(error)
    thread = threading.Thread(target=wait)
    thread.start()
    assert is_waiting.wait(WAIT_S)
    worker.end()
    thread.join()
    assert len(failures) == len(worker.said) == 1
