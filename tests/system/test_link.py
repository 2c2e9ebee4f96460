"""Links: nothing is lost, doubled or reordered, and each end is told once that it is over."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from distexec.messages import FromWorker, Kill, Message, Ping, Ready, Want
from distexec.transport import Link, Loop
from tests.leaks import wait_until
from tests.system.wires import (
    ANYTHING,
    Echo,
    Witness,
    adopted,
    credentials,
    dial,
    running_loop,
    runs,
    secured,
    server_context,
    unix_pair,
)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A running loop."""
    with running_loop() as running:
        yield running


@pytest.mark.parametrize("kind", ["plain", "fds", "tls"])
def test_batches_arrive_whole_and_in_order(loop: Loop, kind: str) -> None:
    """What one thread queues and flushes comes out once, in order, and back again."""
    one, other = Witness(), Echo()
    link = secured(loop, one, other)[0] if kind == "tls" else adopted(loop, one, other, fds=kind == "fds")[0]
    sent = runs(3000)
    for start in range(0, 3000, 100):
        link.queue(sent[start:start + 50])
        link.send(sent[start + 50:start + 100])
    assert one.saw(3000)
    assert one.messages == other.messages == sent
    assert link.bytes_out > 0
    assert link.bytes_in > 0


def test_flush_sends_from_the_callers_thread() -> None:
    """With nothing pending, flush needs no I/O thread: this one is not even started."""
    left, right = unix_pair()
    link = Loop("test-unstarted").adopt(left, ANYTHING, print, print)
    link.send(runs(3))
    assert right.recv(1 << 16)
    link.loop.stop()
    assert right.recv(1) == b""
    right.close()


def test_what_is_queued_is_one_frame(loop: Loop) -> None:
    """A flush makes one batch of all that was queued before."""
    one, other = Witness(), Witness()
    link, _ = adopted(loop, one, other)
    for message in runs(200):
        link.queue([message])
    assert other.messages == []
    link.flush()
    assert other.saw(200)
    assert other.batches == 1


@pytest.mark.parametrize("kind", ["plain", "fds", "tls"])
def test_large_batches_wait_for_a_slow_reader(kind: str) -> None:
    """What the socket does not take is pending, counted, and sent as the reader reads."""
    with running_loop("sender") as sender, running_loop("reader") as reader:
        one, other = Witness(), Witness()
        gate = threading.Event()
        reader.call_soon(gate.wait, 30)
        if kind == "tls":
            listener = sender.listen(("127.0.0.1", 0), credentials("listener"), server_context(), one.accept)
            gate.set()
            dial(reader, listener.address, other)
            assert wait_until(lambda: one.links)
            link = one.links[0]
            gate.clear()
            reader.call_soon(gate.wait, 30)
        else:
            left, right = unix_pair(20_000)
            link = sender.adopt(left, ANYTHING, one.on_messages, one.on_closed, fds=kind == "fds")
            reader.adopt(right, ANYTHING, other.on_messages, other.on_closed, fds=kind == "fds")
        sent = runs(300, size_bytes=100_000)
        for start in range(0, 300, 30):
            link.send(sent[start:start + 30])
        assert wait_until(lambda: link.pending_bytes > 10_000_000)
        gate.set()
        assert other.saw(300)
        assert other.messages == sent
        assert wait_until(lambda: link.pending_bytes == 0)


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_many_threads_share_a_link(loop: Loop, kind: str) -> None:
    """Threads that flush at the same time lose nothing, and each one's messages keep their order; reading goes on."""
    one, other = Witness(), Echo()
    link = (secured if kind == "tls" else adopted)(loop, one, other)[0]

    def talk(session: int) -> None:
        for seq in range(0, 2000, 5):
            link.send([Kill(session, seq + step, 0) for step in range(5)])

    threads = [threading.Thread(target=talk, args=(session,)) for session in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.saw(12_000)
    for session in range(6):
        seqs = [message.seq for message in one.messages if isinstance(message, Kill) and message.session == session]
        assert seqs == list(range(2000))


def test_messages_left_to_the_holder_of_the_lock_go_out(loop: Loop) -> None:
    """Who finds the write side taken leaves its messages there, and the holder sends them before it is done."""
    one, other = Witness(), Witness()
    link, _ = adopted(loop, one, other)
    original = link._write_messages

    def meanwhile(messages: list[Message]) -> None:
        original(messages)
        if messages == runs(1):
            helper = threading.Thread(target=link.send, args=(runs(1, 1),))
            helper.start()
            helper.join()  # it returned, though the lock is ours

    link._write_messages = meanwhile  # type: ignore[method-assign]
    link.send(runs(1))
    assert other.saw(2)
    assert other.messages == runs(2)


@pytest.mark.parametrize("kind", ["plain", "fds", "tls"])
def test_all_that_was_received_is_delivered_before_the_end(loop: Loop, kind: str) -> None:
    """A peer that says much and goes is heard to the end; then on_closed comes, once."""
    one, other = Witness(), Witness()
    link, peer = (secured(loop, one, other) if kind == "tls" else adopted(loop, one, other, fds=kind == "fds"))
    loop.call_soon(lambda: (link.send(runs(5000)), link.close("done")))
    assert other.is_closed
    assert one.is_closed
    assert other.messages == runs(5000)
    assert one.reasons == ["done"]
    assert len(other.reasons) == 1
    assert not link.is_open
    assert not peer.is_open


def test_a_broken_pipe_does_not_hide_what_came_before_it(loop: Loop) -> None:
    """If writing fails first, what the peer had sent is still delivered before on_closed."""
    left, right = unix_pair()
    sender = Loop("test-unstarted").adopt(right, ANYTHING, print, print)
    sender.send(runs(100))
    right.close()
    witness = Witness()
    gate = threading.Event()
    loop.call_soon(gate.wait, 30)
    link = loop.adopt(left, ANYTHING, witness.on_messages, witness.on_closed)
    link.send(runs(1))
    assert not link.is_open
    gate.set()
    assert witness.is_closed
    assert witness.messages == runs(100)
    assert len(witness.reasons) == 1
    sender.loop.stop()


def test_close_waits_for_what_was_sent_but_not_for_ever(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    """Closing sends what is pending; a peer that does not read delays it by the linger time at most."""
    witness = Witness()
    left, right = unix_pair(20_000)
    link = loop.adopt(left, ANYTHING, witness.on_messages, witness.on_closed)
    monkeypatch.setattr("distexec.link.LINGER_S", 0.2)
    link.send(runs(10, size_bytes=100_000))
    link.close("enough")
    assert witness.is_closed
    assert witness.reasons == ["enough"]
    link.send(runs(1))
    right.close()


def test_close_is_over_when_all_is_sent(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    """A closing link ends as soon as the peer has taken what was pending, not when the linger time is over."""
    monkeypatch.setattr("distexec.link.LINGER_S", 3600.0)
    one, other = Witness(), Witness()
    left, right = unix_pair(20_000)
    link = loop.adopt(left, ANYTHING, one.on_messages, one.on_closed)
    link.send(runs(10, size_bytes=100_000))
    link.close("enough")
    assert wait_until(lambda: "closing" in repr(link))
    loop.adopt(right, ANYTHING, other.on_messages, other.on_closed)
    assert one.is_closed
    assert one.reasons == ["enough"]
    assert other.is_closed
    assert other.messages == runs(10, size_bytes=100_000)


def test_sending_on_a_closed_link_does_nothing(loop: Loop) -> None:
    """After the end messages are dropped without an error; on_closed has said so."""
    one, other = Witness(), Witness()
    link, _ = adopted(loop, one, other)
    link.close("over")
    assert one.is_closed
    link.send(runs(5))
    link.close("again")
    assert one.reasons == ["over"]
    assert other.is_closed
    assert other.messages == []


def test_out_of_role_closes_the_link(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that says what only a node may say is cut off, and the log says why."""
    left, right = unix_pair()
    one, other = Witness(), Witness()
    link = loop.adopt(left, FromWorker, one.on_messages, one.on_closed)
    link.name = "worker 7"
    loop.adopt(right, ANYTHING, other.on_messages, other.on_closed).send([Ready(1), Want(1, 2)])
    assert one.is_closed
    assert one.messages == []
    assert "out of role" in one.reasons[0]
    assert "worker 7" in caplog.text


def test_a_message_too_large_closes_the_link_loudly(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be sent must not be missed in silence: the link ends and the log names the message."""
    one, other = Witness(), Witness()
    link, _ = adopted(loop, one, other)
    link.send(runs(1, size_bytes=9 << 20))
    assert one.is_closed
    assert "Run" in one.reasons[0]
    assert "cannot send" in caplog.text


def test_a_failing_callback_costs_its_link_only(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in on_messages is logged with its traceback, closes that link, and the thread lives on."""
    left, right = unix_pair()
    one, other = Witness(), Witness()

    def fail(_link: Link, _messages: list[Message]) -> None:
        raise SystemExit("from a callback")

    loop.adopt(left, ANYTHING, fail, one.on_closed)
    loop.adopt(right, ANYTHING, other.on_messages, other.on_closed).send(runs(1))
    assert one.is_closed
    assert other.is_closed
    assert "from a callback" in caplog.text
    first, second = Witness(), Echo()
    adopted(loop, first, second)[0].send(runs(1))
    assert first.saw(1)


def test_pings_are_answered_and_measure(loop: Loop) -> None:
    """A Ping is answered by the link itself and not handed on; its answer gives the round-trip time."""
    one, other = Witness(), Witness()
    link, _ = adopted(loop, one, other)
    link.send([Want(1, 1), Ping(time.monotonic_ns()), Want(1, 2)])
    assert other.saw(2)
    assert wait_until(lambda: link.rtt_s is not None)
    assert other.messages == [Want(1, 1), Want(1, 2)]
    assert one.messages == []


# ---- descriptors


def test_descriptors_travel_with_their_messages(loop: Loop) -> None:
    """Descriptors arrive no later than their messages, in order, as duplicates, between plain messages."""
    one, other = Witness(), Witness()
    link, peer = adopted(loop, one, other, fds=True)
    contents = []
    for number in range(40):
        pair = [os.memfd_create("distexec-test") for _ in range(2)]
        link.queue(runs(1, 2 * number))
        for which, fd in enumerate(pair):
            os.write(fd, str(2 * number + which).encode())
        link.queue(runs(1, 2 * number + 1), fds=pair)
        for fd in pair:
            os.close(fd)
        if number % 3 == 0:
            link.flush()
    link.flush()
    assert other.saw(80)
    assert other.messages == runs(80)
    assert len(peer.received_fds) == 80
    while peer.received_fds:
        fd = peer.received_fds.popleft()
        assert not os.get_inheritable(fd)
        contents.append(int(os.pread(fd, 10, 0)))
        os.close(fd)
    assert contents == list(range(80))


def test_descriptors_wait_with_their_frame(loop: Loop) -> None:
    """On a full socket descriptors stay with the first byte of their frame."""
    one, other = Witness(), Witness()
    left, right = unix_pair(20_000)
    link = loop.adopt(left, ANYTHING, one.on_messages, one.on_closed, fds=True)
    with open(__file__) as file:
        link.queue(runs(5, size_bytes=100_000))
        for number in range(5, 10):
            link.queue(runs(1, number, 100_000), fds=[file.fileno(), file.fileno()])
        link.flush()
    peer = loop.adopt(right, ANYTHING, other.on_messages, other.on_closed, fds=True)
    assert other.saw(10)
    assert other.messages == runs(10, size_bytes=100_000)
    assert len(peer.received_fds) == 10
    assert all(os.path.samestat(os.fstat(fd), os.stat(__file__)) for fd in peer.received_fds)
    peer.close()
    assert wait_until(lambda: not peer.received_fds)


def test_descriptors_that_cannot_be_sent_are_closed(loop: Loop) -> None:
    """A link that ends keeps none of the descriptors it was to send, nor of those nobody took."""
    one, other = Witness(), Witness()
    before = len(os.listdir("/proc/self/fd"))
    left, right = unix_pair(20_000)
    link = loop.adopt(left, ANYTHING, one.on_messages, one.on_closed, fds=True)
    for number in range(10):
        link.send(runs(1, number, 100_000))
        link.queue(runs(1), fds=[0, 1])
        link.flush()
    link.queue(runs(1), fds=[0])
    right.close()
    assert one.is_closed
    link.queue(runs(1), fds=[0])
    link.flush()
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert other.messages == []


def test_plain_links_refuse_descriptors(loop: Loop) -> None:
    """A link without fds=True says so, rather than drop them."""
    link, _ = adopted(loop, Witness(), Witness())
    with pytest.raises(ValueError, match="descriptors"):
        link.queue(runs(1), fds=[0])
    with pytest.raises(ValueError, match="at most"):
        adopted(loop, Witness(), Witness(), fds=True)[0].queue(runs(1), fds=[0] * 17)


def test_descriptors_that_cannot_be_duplicated_leave_nothing(loop: Loop) -> None:
    """If one descriptor is bad, queue says so, queues nothing and keeps no duplicate of the others."""
    other = Witness()
    link, _ = adopted(loop, Witness(), other, fds=True)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        link.queue(runs(1), fds=[0, 1, 1 << 20])
    assert len(os.listdir("/proc/self/fd")) == before
    link.send(runs(1, 7))
    assert other.saw(1)
    assert other.messages == runs(1, 7)
