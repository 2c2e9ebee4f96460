"""Loops and links over real sockets: nothing is lost, doubled or reordered, and every end is told once."""

from __future__ import annotations

import datetime
import errno
import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from distexec import opening
from distexec.errors import AuthenticationFailed, DistexecError, IncompatibleNode, ProtocolError
from distexec.messages import Bye, Chunk, FromControl, FromWorker, Kill, Message, Ping, Ready, Role, Run, ToControl, Want
from distexec.tls import make_client_context, make_server_context
from distexec.transport import Link, Loop
from tests.leaks import wait_until
from tests.system.wires import (
    ANYTHING,
    Echo,
    Witness,
    credentials,
    dial,
    running_loop,
    server_context,
    unix_pair,
)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A running loop."""
    with running_loop() as running:
        yield running


def runs(count: int, start: int = 0, size_bytes: int = 20) -> list[Message]:
    return [Run(1, seq, 0, 0, bytes(size_bytes)) for seq in range(start, start + count)]


def adopted(loop: Loop, one: Witness, other: Witness, size_bytes: int | None = None,
            fds: bool = False) -> tuple[Link, Link]:
    left, right = unix_pair(size_bytes)
    return (loop.adopt(left, ANYTHING, one.on_messages, one.on_closed, fds=fds),
            loop.adopt(right, ANYTHING, other.on_messages, other.on_closed, fds=fds))


def secured(loop: Loop, one: Witness, other: Witness) -> tuple[Link, Link]:
    listener = loop.listen(("127.0.0.1", 0), credentials("listener"), server_context(), other.accept)
    link = dial(loop, listener.address, one)
    assert wait_until(lambda: other.links)
    return link, other.links[0]


# ---- links


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
        assert link.pending_bytes > 10_000_000
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
        fd = os.memfd_create("distexec-test")
        os.write(fd, str(number).encode())
        link.queue(runs(1, 2 * number))
        link.queue(runs(1, 2 * number + 1), fds=[fd])
        os.close(fd)
        if number % 3 == 0:
            link.flush()
    link.flush()
    assert other.saw(80)
    assert other.messages == runs(80)
    assert len(peer.received_fds) == 40
    while peer.received_fds:
        fd = peer.received_fds.popleft()
        assert not os.get_inheritable(fd)
        contents.append(int(os.pread(fd, 10, 0)))
        os.close(fd)
    assert contents == list(range(40))


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


# ---- the loop


def test_calls_from_other_threads_keep_their_order(loop: Loop) -> None:
    """call_soon from any thread is run on the I/O thread, every call, in the order of its thread."""
    seen: list[tuple[int, int, bool]] = []

    def call(thread: int) -> None:
        for number in range(500):
            loop.call_soon(lambda number=number: seen.append((thread, number, loop.is_current())))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wait_until(lambda: len(seen) == 2000)
    assert all(is_current for _, _, is_current in seen)
    assert all([number for thread, number, _ in seen if thread == which] == list(range(500)) for which in range(4))
    assert not loop.is_current()


def test_timers_fire_in_the_order_of_their_time(loop: Loop) -> None:
    """Timers fire on the I/O thread, the earlier one first, whatever the order they were made in."""
    fired: list[int] = []
    for delay in (30, 10, 20, 0):
        loop.call_later(delay / 1000, fired.append, delay)
    assert wait_until(lambda: len(fired) == 4)
    assert fired == [0, 10, 20, 30]


def test_cancelled_timers_do_not_fire_and_let_go(loop: Loop) -> None:
    """A cancelled timer is never called and holds nothing; thousands of them cost nothing later."""
    fired = threading.Event()

    class Thing:
        """Something a timer refers to."""

    thing = Thing()
    gone = weakref.ref(thing)
    for _ in range(10_000):
        loop.call_later(3600, lambda thing=thing: fired.set()).cancel()
    timer = loop.call_later(0.02, fired.set)
    timer.cancel()
    timer.cancel()
    del thing
    done = threading.Event()
    loop.call_later(0.05, done.set)
    assert done.wait(10)
    gc.collect()
    assert gone() is None
    assert not fired.is_set()
    assert len(loop._timers) < 200


def test_finalizers_wake_the_loop_through_hooks(loop: Loop) -> None:
    """A finalizer that sets a flag and wakes the loop has its hook run, on whichever thread it ran."""
    flags: list[int] = []
    seen: list[int] = []
    loop.idle_hooks.append(lambda: seen.extend(flags))

    class Dropped:
        """Something whose end the loop must learn of."""

    def drop() -> None:
        weakref.finalize(Dropped(), lambda: (flags.append(1), loop.wake()))

    drop()
    assert wait_until(lambda: seen)
    seen.clear()
    loop.call_soon(drop)
    assert wait_until(lambda: seen)


def test_watched_descriptors(loop: Loop) -> None:
    """A watched descriptor calls when readable, and no more after unwatch."""
    reader, writer = os.pipe()
    seen: list[bytes] = []
    loop.watch(reader, lambda: seen.append(os.read(reader, 100)))
    os.write(writer, b"a")
    assert wait_until(lambda: seen == [b"a"])
    loop.unwatch(reader)
    done = threading.Event()
    os.write(writer, b"b")
    loop.call_later(0.02, done.set)
    assert done.wait(10)
    assert seen == [b"a"]
    loop.unwatch(reader)
    os.close(reader)
    os.close(writer)


def test_a_descriptor_closed_by_an_earlier_callback_is_not_called(loop: Loop) -> None:
    """Of two descriptors ready at once, the first one's callback may retire the second."""
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def retire(mine: int, other: int) -> None:
        called.append(mine)
        os.read(mine, 1)
        loop.unwatch(other)

    (first, _), (second, _) = pipes
    gate = threading.Event()
    loop.call_soon(gate.wait, 30)
    loop.watch(first, lambda: retire(first, second))
    loop.watch(second, lambda: retire(second, first))
    for _, writer in pipes:
        os.write(writer, b"x")
    gate.set()
    done = threading.Event()
    assert wait_until(lambda: called)
    loop.call_later(0.02, done.set)
    assert done.wait(10)
    assert len(called) == 1
    for reader, writer in pipes:
        os.close(reader)
        os.close(writer)


def test_stop_closes_everything_and_joins() -> None:
    """stop sends what was sent, tells every link, closes listeners, ends the thread; a second time is harmless."""
    loop = Loop("test-stopping")
    loop.start()
    one, other = Witness(), Witness()
    link, peer = unix_pair()
    mine = loop.adopt(link, ANYTHING, one.on_messages, one.on_closed)
    listener = loop.listen(("127.0.0.1", 0), credentials("listener"), server_context(), other.accept)
    mine.send(runs(2))
    loop.stop()
    loop.stop()
    assert one.reasons == ["this end was stopped"]
    assert peer.recv(1 << 16)
    assert peer.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.address)
    loop.call_soon(print)
    mine.send(runs(1))
    peer.close()
    assert not any(thread.name == "test-stopping" for thread in threading.enumerate())


def test_stop_from_its_own_thread(loop: Loop) -> None:
    """A callback may stop the loop it runs on."""
    witness, other = Witness(), Witness()
    adopted(loop, witness, other)
    loop.call_soon(loop.stop)
    assert witness.is_closed
    assert wait_until(lambda: not loop._thread.is_alive())


def test_stop_gives_up_on_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full socket delays stop by the linger time at most."""
    monkeypatch.setattr("distexec.iothread.LINGER_S", 0.2)
    left, right = unix_pair(20_000)
    witness = Witness()
    with running_loop("stuck") as loop:
        loop.adopt(left, ANYTHING, witness.on_messages, witness.on_closed).send(runs(9, size_bytes=100_000))
    assert len(witness.reasons) == 1
    right.close()


def test_a_forked_child_keeps_no_connection_open(loop: Loop) -> None:
    """While a forked child lives, closing a link here is seen at its other end at once."""
    one = Witness()
    left, right = unix_pair()
    link = loop.adopt(left, ANYTHING, one.on_messages, one.on_closed)
    listener = loop.listen(("127.0.0.1", 0), credentials("listener"), server_context(), Witness().accept)
    assert wait_until(lambda: link in loop.tenants and listener in loop.tenants)
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            link.send(runs(1))
            loop.wake()
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(told, 1) == b"x"
    link.close("over")
    listener.close()
    right.settimeout(10)
    assert right.recv(100) == b""
    assert wait_until(lambda: listener not in loop.tenants)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.address)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for fd in (told, tell):
        os.close(fd)
    right.close()


def test_local_links_need_no_tls() -> None:
    """A process that only adopts socketpairs imports neither ssl nor cryptography."""
    code = ("import sys; import distexec.transport as t; loop = t.Loop('x'); loop.start(); loop.stop(); "
            "print(*({'ssl', 'cryptography', 'distexec.tls', 'pickle', 'cloudpickle'} & set(sys.modules) - {'pickle'}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---- dialling and listening


def test_both_ends_know_each_other(loop: Loop) -> None:
    """A link opens with both Hellos, addresses and the dialler's role, encrypted by TLS 1.3."""
    one, other = Witness(), Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), other.accept)
    link = dial(loop, listener.address, one, Role.DOWNSTREAM, credentials("client"))
    assert wait_until(lambda: other.links)
    (peer,) = other.links
    assert link.hello is not None
    assert peer.hello is not None
    assert (link.hello.name, peer.hello.name) == ("agent", "client")
    assert link.hello.slots == 3
    assert link.role is peer.role is Role.DOWNSTREAM
    assert link.address == listener.address
    assert peer.address is not None
    assert peer.address[0] == "127.0.0.1"
    assert "client" in repr(peer)
    assert link._stream.tls.version() == "TLSv1.3"  # type: ignore[attr-defined]
    assert wait_until(lambda: link.rtt_s is not None and peer.rtt_s is not None)


def test_first_messages_are_not_lost(loop: Loop) -> None:
    """What either end sends from its first callback arrives, right behind the handshake."""
    one, other = Witness(), Witness()

    def accept(link: Link) -> object:
        link.send(runs(100))
        return other.accept(link)

    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), accept)  # type: ignore[arg-type]
    loop.dial([listener.address], Role.UPSTREAM, credentials("client"), ANYTHING, lambda link: link.send(runs(100)),
              one.failures.append, one.on_messages, one.on_closed)
    assert one.saw(100)
    assert other.saw(100)
    assert one.messages == other.messages == runs(100)


def test_bulk_in_both_directions(loop: Loop) -> None:
    """Large chunks both ways at once over TLS arrive unharmed."""
    one, other = Witness(), Witness()
    link, peer = secured(loop, one, other)
    chunks: list[Message] = [Chunk(bytes([number]) * 16, number, os.urandom(256 << 10)) for number in range(40)]
    for chunk in chunks:
        link.send([chunk])
        peer.send([chunk])
    assert one.saw(40)
    assert other.saw(40)
    assert one.messages == other.messages == chunks


def test_nobody_listens(loop: Loop) -> None:
    """A closed port is a ConnectionRefusedError that names the address and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1:{address[1]}.*distexec-agent"):
        dial(loop, address, Witness())


def test_the_next_address_is_tried(loop: Loop) -> None:
    """Of several addresses the first that answers is used."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()
    one, other = Witness(), Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), other.accept)
    loop.dial([dead, dead, listener.address], Role.UPSTREAM, credentials("client"), ANYTHING, one.links.append,
              one.failures.append, one.on_messages, one.on_closed)
    assert wait_until(lambda: one.links)
    assert one.links[0].address == listener.address
    assert one.failures == []


def test_ipv6(loop: Loop) -> None:
    """IPv6 works, and a listener on every interface takes both families."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    listener = loop.listen(("", 0), credentials("agent"), server_context(), Witness().accept)
    for address in (("::1", listener.address[1], 0, 0), ("127.0.0.1", listener.address[1])):
        assert dial(loop, address, Witness()).address == address


def failing_dial(loop: Loop, caplog: pytest.LogCaptureFixture, kind: type[Exception], **who: object) -> tuple[str, str]:
    """Dial with other credentials than the listener's; return what the dialler was told and what the log says."""
    other = Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), other.accept)
    with caplog.at_level(logging.WARNING), pytest.raises(kind) as caught:
        dial(loop, listener.address, Witness(), who=credentials("client", **who))  # type: ignore[arg-type]
    assert wait_until(lambda: "refused" in caplog.text)
    assert other.links == []
    assert f"127.0.0.1:{listener.address[1]}" in str(caught.value)
    assert "from 127.0.0.1:" in caplog.text
    return str(caught.value), caplog.text


def test_wrong_secret(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """Another secret is AuthenticationFailed with the remedy; the listener's log names the source."""
    from distexec.auth import Secret
    told, logged = failing_dial(loop, caplog, AuthenticationFailed, secret=Secret(bytes(range(1, 33))))
    assert "$DISTEXEC_SECRET" in told
    assert "does not hold the secret" in logged


def test_other_python(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """Another Python minor version is IncompatibleNode, naming both, at both ends."""
    told, logged = failing_dial(loop, caplog, IncompatibleNode, python="3.9")
    assert "3.9" in told
    assert "3.9" in logged


def test_not_distexec(loop: Loop) -> None:
    """A port of another program is a ProtocolError that says so."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        thread.start()
        with pytest.raises(ProtocolError, match="another program"):
            dial(loop, server.getsockname(), Witness())
        thread.join()


def test_silent_listener(loop: Loop) -> None:
    """A port that accepts and says nothing is a TimeoutError after the given time."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError, match="no answer within 0.2 s"):
        dial(loop, server.getsockname(), Witness(), timeout_s=0.2)


def test_listener_that_hangs_up(loop: Loop) -> None:
    """A connection closed before the proof is an OSError, which callers take as worth another try."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with pytest.raises(ConnectionResetError):
            dial(loop, server.getsockname(), Witness())
        thread.join()


def test_cancelled_dials_call_nobody(loop: Loop) -> None:
    """After cancel neither callback comes, whatever the dial was waiting for."""
    witness = Witness()
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = loop.dial([server.getsockname()], Role.UPSTREAM, credentials("client"), ANYTHING, witness.links.append,
                            witness.failures.append, witness.on_messages, witness.on_closed, 0.1)
        attempt.cancel()
        done = threading.Event()
        loop.call_later(0.2, done.set)
        assert done.wait(10)
    assert witness.links == []
    assert witness.failures == []
    assert not loop.tenants


def test_stop_during_a_dial_tells() -> None:
    """A dial that stop cuts short ends with a failure, so that nobody waits for ever."""
    witness = Witness()
    with socket.create_server(("127.0.0.1", 0)) as server, running_loop("cut short") as loop:
        loop.dial([server.getsockname()], Role.UPSTREAM, credentials("client"), ANYTHING, witness.links.append,
                  witness.failures.append, witness.on_messages, witness.on_closed)
        loop.stop()
    assert isinstance(witness.failures[0], ConnectionAbortedError)


def test_failing_callbacks_of_new_links(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in accept or on_open is logged and closes the link; the listener goes on."""
    one, other = Witness(), Witness()

    def fail(_link: Link) -> None:
        raise RuntimeError("callback failed")

    bad = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), fail)
    dial(loop, bad.address, one)
    assert one.is_closed
    good = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), other.accept)
    loop.dial([good.address], Role.UPSTREAM, credentials("client"), ANYTHING, fail, one.failures.append,
              one.on_messages, one.on_closed)
    assert other.is_closed
    assert caplog.text.count("RuntimeError: callback failed") == 2
    assert loop.tenants == {bad, good}


def test_unwanted_links_are_refused(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """accept may return None: the link is closed and the log says so."""
    one = Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), lambda _link: None)
    dial(loop, listener.address, one)
    assert one.is_closed
    assert "not wanted" in caplog.text


def test_control_links_are_not_asked_for_life(loop: Loop) -> None:
    """An end that may not say Pong gets no Ping, and its own Pings are answered."""
    one, other = Witness(), Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(),
                           lambda link: (FromControl, *other.accept(link)[1:]))
    loop.dial([listener.address], Role.CONTROL, credentials("cli"), ToControl, one.links.append, one.failures.append,
              one.on_messages, one.on_closed)
    assert wait_until(lambda: one.links)
    (link,) = one.links
    assert wait_until(lambda: link.rtt_s is not None)
    link.send([Bye("done")])
    assert other.saw(1)
    assert one.reasons == []


def test_heartbeats(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent link is pinged again and again, so last_heard goes on while nobody says anything."""
    monkeypatch.setattr("distexec.tls.HEARTBEAT_S", 0.02)
    link, _ = secured(loop, Witness(), Witness())
    heard = link.last_heard
    assert wait_until(lambda: link.last_heard > heard + 0.1)


def test_taken_port_is_named(loop: Loop) -> None:
    """A port that another program has is an OSError with the port and the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .*another program.*choose another port") as caught:
            loop.listen(("127.0.0.1", port), credentials("agent"), server_context(), Witness().accept)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_impossible_addresses_are_named(loop: Loop, host: str) -> None:
    """An address that is not of this machine is an OSError that names it."""
    with pytest.raises(OSError, match=f"port 9 of {host}"):
        loop.listen((host, 9), credentials("agent"), server_context(), Witness().accept)


def test_no_descriptors_left(loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of open files the listener says so, does not spin, and takes the connection when there is room."""
    monkeypatch.setattr(opening, "PAUSE_S", 0.05)
    other, one = Witness(), Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), other.accept)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, before[1]))
    try:
        with pytest.raises(OSError, match="Too many"):
            while True:
                fillers.append(os.dup(0))
        client.connect(listener.address)
        assert wait_until(lambda: "ulimit" in caplog.text)
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    client.close()
    assert dial(loop, listener.address, one).is_open
    assert caplog.text.count("ulimit") < 100


class Authority:
    """Signs certificates, and writes them and itself to files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.path = directory / "authority.pem"
        self.path.write_bytes(self._signed("authority", self._key).public_bytes(serialization.Encoding.PEM))

    def _signed(self, name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)]) for who in (name, "authority"))
        now = datetime.datetime.now(datetime.UTC)
        return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(now)
                .not_valid_after(now + datetime.timedelta(days=1))
                .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
                .sign(self._key, hashes.SHA256()))

    def issue(self, name: str) -> Path:
        """Make a certificate and its key, in one file."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = self._directory / f"{name}.pem"
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                           serialization.NoEncryption())
                         + self._signed(name, key).public_bytes(serialization.Encoding.PEM))
        return path


@pytest.mark.parametrize("client_has_one", [True, False])
def test_own_certificates(loop: Loop, tmp_path: Path, client_has_one: bool) -> None:
    """With certificates of one's own both ends need one of the authority's, on top of the secret."""
    authority = Authority(tmp_path)
    one, other = Witness(), Witness()
    server = make_server_context(authority.issue("agent"), authority=authority.path)
    client = make_client_context(authority.issue("client") if client_has_one else None, authority=authority.path)
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server, other.accept)
    loop.dial([listener.address], Role.UPSTREAM, credentials("client"), ANYTHING, one.links.append, one.failures.append,
              one.on_messages, one.on_closed, context=client)
    assert wait_until(lambda: one.links or one.failures)
    assert bool(one.links) is client_has_one, one.failures
    if not client_has_one:
        assert isinstance(one.failures[0], (DistexecError, OSError))
        assert other.links == []


def test_a_listener_of_another_authority_is_refused(loop: Loop, tmp_path: Path) -> None:
    """A dialler with an authority takes no self-signed certificate, though its owner holds the secret."""
    one = Witness()
    listener = loop.listen(("127.0.0.1", 0), credentials("agent"), server_context(), Witness().accept)
    loop.dial([listener.address], Role.UPSTREAM, credentials("client"), ANYTHING, one.links.append, one.failures.append,
              one.on_messages, one.on_closed, context=make_client_context(authority=Authority(tmp_path).path))
    assert wait_until(lambda: one.failures)
    assert isinstance(one.failures[0], AuthenticationFailed)
    assert "certificate" in str(one.failures[0])
