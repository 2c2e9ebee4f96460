"""Laws of the outbox: what waits, for how long, and in what order it goes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec.messages import BlobRef, Outcome, OutcomeKind, Segment, ToWorker
from distexec.outbox import FDS_PER_FRAME, MAX_SKIPPED, QUICK_NS, SPIN_NS, BlockingLink, Outbox, RunTimes


class FakeLink:
    """Remembers what was sent, a list a frame."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []
        self.fds: list[int] = []
        self.sent = threading.Event()

    def send(self, messages: list[Any], fds: list[int] = ()) -> None:  # type: ignore[assignment]
        """Take a frame."""
        self.frames.append(messages)
        self.fds.append(len(fds))
        self.sent.set()


def outcome(seq: int, data: bytes = b"") -> Outcome:
    """An outcome of task `seq`."""
    return Outcome(1, seq, 1, OutcomeKind.VALUE, data, 1)


@given(st.lists(st.integers(0, 2 * QUICK_NS), max_size=100))
def test_quick_means_the_last_sixteen_were(times: list[int]) -> None:
    """A function is quick if its last 32 tasks were, not if one of its last 16 was not, and unknown is not quick."""
    run_times = RunTimes()
    assert not run_times.is_quick
    for count, each in enumerate(times, 1):
        run_times.add(each)
        if any(late > QUICK_NS for late in times[max(0, count - 16):count]):
            assert not run_times.is_quick
        if all(late <= QUICK_NS for late in times[max(0, count - 32):count]):
            assert run_times.is_quick


def test_flush_sends_one_frame_in_order() -> None:
    """Whatever waits goes in one frame, in the order it was added; an empty outbox sends nothing."""
    link = FakeLink()
    outbox = Outbox(link)  # type: ignore[arg-type]
    messages = [outcome(seq) for seq in range(5)]
    for message in messages:
        outbox.append(message)
    outbox.flush()
    outbox.flush()
    assert link.frames == [messages]


def test_large_outcomes_are_sent_early() -> None:
    """More than a megabyte does not wait for the end of the batch."""
    link = FakeLink()
    outbox = Outbox(link)  # type: ignore[arg-type]
    outbox.append_large(outcome(1, bytes(600_000)), [])
    assert not link.frames
    outbox.append_large(outcome(2, bytes(600_000)), [])
    assert [message.seq for message in link.frames[0]] == [1, 2]


def test_segments_go_before_their_outcome() -> None:
    """Descriptors go with the frame of their announcement, no frame carries too many, and all are closed afterwards."""
    link = FakeLink()
    outbox = Outbox(link)  # type: ignore[arg-type]
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(FDS_PER_FRAME + 3)]
    segments = [(Segment(BlobRef(bytes([number]) * 16, 1), number, 0), fd) for number, fd in enumerate(fds)]
    outbox.append_large(outcome(1), segments)
    outbox.flush()
    sent = [message for frame in link.frames for message in frame]
    assert sent == [*(segment for segment, _ in segments), outcome(1)]
    assert link.fds == [FDS_PER_FRAME, 3]
    assert not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in fds)


def test_flusher_sends_what_waits_too_long() -> None:
    """Without anybody calling flush, an armed flusher sends."""
    link = FakeLink()
    outbox = Outbox(link)  # type: ignore[arg-type]
    outbox.append(outcome(1))
    outbox.flusher.arm()
    assert link.sent.wait(10)
    outbox.flusher.join()
    assert link.frames == [[outcome(1)]]


def test_joined_flusher_leaves_no_thread_and_can_start_again() -> None:
    """After join the system knows one thread less; arming starts the flusher anew."""
    link = FakeLink()
    outbox = Outbox(link)  # type: ignore[arg-type]
    before = len(os.listdir("/proc/self/task"))
    for _ in range(50):
        link.sent.clear()
        outbox.append(outcome(1))
        outbox.flusher.arm()
        assert len(os.listdir("/proc/self/task")) == before + 1
        assert link.sent.wait(10)
        outbox.flusher.join()
        assert len(os.listdir("/proc/self/task")) == before
    assert not outbox.flusher.is_armed


# ---- looking for the next frame before sleeping


class Looks:
    """A link whose looks are counted, with a clock that goes on with each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = socket.socketpair()
        self.link = BlockingLink(theirs, ToWorker)
        self.count = 0
        self._poll = self.link._poll
        self.link._poll = self._look  # type: ignore[method-assign,assignment]
        monkeypatch.setattr("distexec.outbox.monotonic_ns", lambda: self.count * SPIN_NS // 4)

    def _look(self, timeout: int) -> list[Any]:
        self.count += 1
        return self._poll(timeout)

    def looks_of(self, frames: int = 1) -> list[int]:
        """How often it looked after each of so many lone frames."""
        counts = []
        for _ in range(frames):
            before = self.count
            self.link.look_ahead()
            counts.append(self.count - before)
        return counts


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Looks]:
    """The link, closed afterwards."""
    found = Looks(monkeypatch)
    yield found
    found.link.close()
    found.ours.close()


def test_looks_until_something_is_there(looks: Looks) -> None:
    """What is there already is seen at the first look, each time."""
    looks.ours.send(b"x")
    assert looks.looks_of(3) == [1, 1, 1]


def test_looks_for_a_moment_and_then_more_and_more_seldom(looks: Looks) -> None:
    """In vain it looks for the whole moment, then after every 2nd frame, 4th, and so on; no more seldom than it says."""
    vain = looks.looks_of(10)
    assert [index for index, count in enumerate(vain) if count] == [0, 2, 6]
    assert vain[0] > 3
    looks.looks_of(1000)
    assert sum(map(bool, looks.looks_of(10 * (MAX_SKIPPED + 1)))) == 10


def test_looks_always_once_it_was_worth_it(looks: Looks) -> None:
    """The first look that is not in vain brings it back."""
    looks.looks_of(100)
    looks.ours.send(b"x")
    assert [count for count in looks.looks_of(MAX_SKIPPED + 2) if count][:1] == [1]
    assert all(looks.looks_of(5))


def test_a_closed_link_is_something(looks: Looks) -> None:
    """That the pool went is noticed at once."""
    looks.ours.shutdown(socket.SHUT_RDWR)
    assert looks.looks_of() == [1]
