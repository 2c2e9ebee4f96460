"""What tasks print on an agent, on its way up: before their ends, through cut links, past clients that do not read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distexec import outgoing
from distexec.messages import Output, Record, Resume, SessionSpec, Stream
from distexec.outgoing import OUTPUT_BACKLOG_BYTES, Outgoing
from distexec.printed import KEPT_BYTES, Printed

OUT, ERR = Stream.STDOUT, Stream.STDERR


class FakeLink:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.pending_bytes = 0

    def queue(self, messages: list[Any]) -> None:
        """Note them."""
        self.said += messages

    def flush(self) -> None:
        """Nothing is held back."""


class Rig:
    """A session with some tasks, a client at the other end of its link, and what it made of what it heard."""

    def __init__(self, *seqs: int, **spec: Any) -> None:
        self.link = FakeLink()
        self.session: Any = SimpleNamespace(tasks={}, unacked={}, upstream=SimpleNamespace(link=self.link),
                                            reconciling=False, uplink_no=7)
        for seq in seqs:
            self.lease(seq)
        self.outgoing = Outgoing(SessionSpec(**spec))

    def lease(self, seq: int, attempt: int = 1) -> None:
        """A task is there."""
        self.session.tasks[seq] = SimpleNamespace(run=SimpleNamespace(attempt=attempt))

    def end(self, seq: int) -> None:
        """It has ended."""
        self.outgoing.finish(self.session, seq)
        self.session.unacked[seq] = self.session.tasks.pop(seq)

    def write(self, seq: int, data: bytes, stream: Stream = OUT) -> None:
        """It prints."""
        self.outgoing.wrote(self.session, seq, stream, data)

    def cut(self) -> None:
        """The link breaks."""
        self.session.upstream = None

    def reopen(self) -> None:
        """Another is there, and the two ends have not agreed yet."""
        self.link = FakeLink()
        self.session.upstream, self.session.reconciling, self.session.uplink_no = SimpleNamespace(link=self.link), True, 8

    def resume(self, **agreed: Any) -> None:
        """They have."""
        self.outgoing.resume(self.session, Resume(8, agreed.get("drop", []), agreed.get("ack", [])))
        self.session.reconciling = False

    def heard(self, seq: int) -> Printed:
        """What a client makes of all said on the present link."""
        printed = Printed(1)
        for message in self.link.said:
            if isinstance(message, Output) and message.seq == seq:
                printed.add(message.stream, message.data, message.offset)
        return printed


def test_what_is_printed_is_said_at_once() -> None:
    """Each piece with where it belongs, by stream and attempt."""
    rig = Rig(3)
    rig.write(3, b"one")
    rig.write(3, b"two")
    rig.write(3, b"oops", ERR)
    assert rig.link.said == [
        Output(7, 3, OUT, b"one", 1, 0), Output(7, 3, OUT, b"two", 1, 3), Output(7, 3, ERR, b"oops", 1, 0)]
    rig.end(3)
    assert len(rig.link.said) == 3


def test_what_a_cut_link_swallowed_is_said_again() -> None:
    """Printed before, during and after the cut → on the next link all of it, once the two ends agree, and nothing before."""
    rig = Rig(3, 4)
    rig.write(3, b"before ")
    rig.write(4, b"other ")
    rig.cut()
    rig.write(3, b"meanwhile ")
    rig.end(4)
    rig.reopen()
    rig.write(3, b"early ")
    assert rig.link.said == []
    rig.resume()
    rig.write(3, b"after")
    assert rig.heard(3).text(OUT) == "before meanwhile early after"
    assert rig.heard(4).text(OUT) == "other "
    assert {message.session for message in rig.link.said} == {8}


def test_what_the_client_has_is_not_said_again() -> None:
    """Ends that it knows, and leases that it gave up, are not."""
    rig = Rig(3, 4, 5, 6)
    for seq in (3, 4, 5, 6):
        rig.write(seq, b"word")
    rig.end(3)
    rig.end(4)
    rig.outgoing.acknowledged([3], [])
    rig.cut()
    rig.reopen()
    rig.resume(ack=[4], drop=[(5, 1)])
    assert [message.seq for message in rig.link.said] == [6]


def test_only_the_attempt_that_is_acknowledged_is_forgotten() -> None:
    """A late end of an earlier attempt leaves the present one's output alone."""
    rig = Rig(3)
    rig.lease(3, attempt=2)
    rig.write(3, b"second")
    rig.outgoing.acknowledged([3], [1])
    assert rig.outgoing.is_busy
    rig.outgoing.acknowledged([3], [2])
    assert not rig.outgoing.is_busy


def test_another_attempt_begins_anew() -> None:
    """What an attempt printed that was replaced here is not the next one's."""
    rig = Rig(3)
    rig.write(3, b"first")
    rig.lease(3, attempt=2)
    rig.write(3, b"second")
    assert rig.link.said[-1] == Output(7, 3, OUT, b"second", 2, 0)


def test_a_client_that_does_not_read() -> None:
    """Beyond the bound pieces are left out; its end is said with the task's, and the client knows how much is missing."""
    rig = Rig(3)
    rig.write(3, b"a" * 1000)
    rig.link.pending_bytes = OUTPUT_BACKLOG_BYTES + 1
    for _ in range(100):
        rig.write(3, b"b" * 10_000)
    assert len(rig.link.said) == 1
    rig.end(3)
    assert rig.heard(3).count(OUT) == 1_001_000
    assert rig.heard(3).text(OUT).endswith("b" * KEPT_BYTES)
    rig.lease(4)
    rig.link.pending_bytes = 3 * OUTPUT_BACKLOG_BYTES
    rig.write(4, b"c")
    rig.end(4)
    assert rig.heard(4).count(OUT) == 0


def test_without_echo_a_share_is_sent() -> None:
    """The client shows nothing: of much it is sent what its future keeps, and no more."""
    rig = Rig(3, echo=False)
    for number in range(1000):
        rig.write(3, b"%9d\n" % number * 1000)
    assert sum(len(message.data) for message in rig.link.said) <= 2 * KEPT_BYTES
    rig.end(3)
    assert sum(len(message.data) for message in rig.link.said) <= 4 * KEPT_BYTES
    text = rig.heard(3).text(OUT)
    assert text.startswith("        0\n" * 1000)
    assert text.endswith("      999\n" * 1000)
    assert rig.heard(3).count(OUT) == 10_000_000


def test_nothing_is_sent_to_who_wants_nothing() -> None:
    """Neither shown nor captured: nothing is sent or kept."""
    rig = Rig(3, echo=False, is_captured=False)
    rig.write(3, b"word")
    rig.end(3)
    assert (rig.link.said, rig.outgoing.is_busy) == ([], False)


def test_what_a_task_left_running_prints() -> None:
    """After its end was told there is no future for it; it is only shown."""
    rig = Rig(3)
    rig.write(3, b"in time")
    rig.end(3)
    rig.write(3, b"late")
    assert rig.link.said[-1] == Output(7, 3, OUT, b"late")
    rig.outgoing.acknowledged([3], [])
    rig.write(0, b"nobody's")
    assert rig.link.said[-1] == Output(7, 0, OUT, b"nobody's")
    assert not rig.outgoing.is_busy


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks that print much, and a client that is away: the oldest keep far less, each still both its ends."""
    monkeypatch.setattr(outgoing, "KEPT_TOTAL_BYTES", 20 * KEPT_BYTES)
    rig = Rig(*range(1, 101))
    rig.cut()
    for seq in range(1, 101):
        rig.write(seq, b"%03d" % seq * 100_000)
        rig.end(seq)
    assert rig.outgoing._kept_bytes <= 20 * KEPT_BYTES + 100 * 8192
    rig.reopen()
    rig.resume()
    for seq in range(1, 101):
        assert rig.heard(seq).count(OUT) == 300_000
        assert rig.heard(seq).text(OUT).endswith(f"{seq:03}" * 10)
    rig.outgoing.acknowledged(list(range(1, 101)), [])
    assert rig.outgoing._kept_bytes == 0


def test_attempts_whose_end_nobody_hears_are_forgotten() -> None:
    """Abandoned tasks leave without an acknowledgement; what they printed does not stay for ever."""
    rig = Rig()
    for seq in range(1, 1001):
        rig.lease(seq)
        rig.write(seq, b"word")
        del rig.session.tasks[seq]
    assert len(rig.outgoing._notes) <= 2 * outgoing.SWEEP_NOTES


def test_log_records_that_are_lost_are_counted() -> None:
    """No link, or one that is not read → the next record that is sent says how many are missing."""
    rig = Rig(3)
    record = Record(1, 3, 1, 20, "name", "text", b"")
    rig.outgoing.logged(rig.session, record)
    rig.link.pending_bytes = OUTPUT_BACKLOG_BYTES + 1
    rig.outgoing.logged(rig.session, record)
    rig.link.pending_bytes = 0
    rig.cut()
    rig.outgoing.logged(rig.session, record)
    rig.session.upstream = SimpleNamespace(link=rig.link)
    rig.outgoing.logged(rig.session, record)
    assert [(message.session, message.lost) for message in rig.link.said] == [(7, 0), (7, 2)]
