"""The I/O thread: calls, timers, watched descriptors, its end, and forked children."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator

import pytest

from distexec import iothread
from distexec.transport import Loop
from tests.leaks import wait_until
from tests.system.wires import ANYTHING, Witness, adopted, credentials, running_loop, runs, server_context, unix_pair


@pytest.fixture(params=["epoll", "selectors"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A running loop, by epoll itself and as on systems that have none."""
    if request.param == "selectors":
        monkeypatch.setattr(iothread, "_Epoll", iothread._Selector)
    with running_loop() as running:
        yield running


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
    loop.call_soon(os.write, writer, b"b")
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


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
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
