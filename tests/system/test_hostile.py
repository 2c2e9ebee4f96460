"""Strangers, and peers gone bad, against a real listener.

Each test makes trouble while an honest link works: it must go on working, the thread must live, the places must come
back, the log must say who was refused, and nothing of a stranger may reach a decoder, let alone a pickle.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import random
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import sha256

import pytest

from distexec import gate, opening
from distexec.auth import Secret
from distexec.errors import AuthenticationFailed
from distexec.handshake import Credentials, DiallerHandshake, ListenerHandshake, Refusal, State
from distexec.messages import Message, Role, Run, Want
from distexec.opening import Listener
from distexec.protocol import FrameDecoder, encode
from distexec.tls import make_client_context
from distexec.transport import Link, Loop
from tests.leaks import wait_until
from tests.system.wires import ANYTHING, Echo, Witness, credentials, dial, running_loop, server_context

OTHER_SECRET = Secret(bytes(range(1, 33)))


class Bomb:
    """Explodes when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("/tmp/distexec-test-was-unpickled",)


BOMB = pickle.dumps(Bomb())


class Site:
    """A listener with an honest link to it, from another loop."""

    def __init__(self, loop: Loop, listener: Listener, witness: Echo, honest: Link, seen: Witness) -> None:
        self.loop, self.listener, self.witness, self.honest, self.seen = loop, listener, witness, honest, seen
        self.heard: list[Message] = []  # all that any decoder of the site made of bytes

    def connect(self, timeout_s: float = 20.0) -> socket.socket:
        """Come as a stranger."""
        return socket.create_connection(self.listener.address, timeout_s)

    def connect_tls(self) -> ssl.SSLSocket:
        """Come as a stranger that speaks TLS."""
        return make_client_context().wrap_socket(self.connect())

    def check(self) -> None:
        """The honest link answers, and the thread lives."""
        before = len(self.seen.messages)
        self.honest.send([Want(1, before)])
        assert self.seen.saw(before + 1)
        assert self.seen.messages[-1] == Want(1, before)
        assert self.loop._thread.is_alive()

    @property
    def is_empty(self) -> bool:
        """Wait until no stranger is inside."""
        return wait_until(lambda: not self.listener._gate.strangers and len(self.loop.tenants) == 2)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Site]:
    """A listener under observation; afterwards it must be as healthy as before."""
    monkeypatch.setattr(opening, "STRANGER_S", 1.0)
    caplog.set_level(logging.WARNING)
    witness, seen = Echo(), Witness()
    with running_loop("site") as loop, running_loop("honest") as honest_loop:
        listener = loop.listen(("127.0.0.1", 0), credentials("site"), server_context(), witness.accept)
        site = Site(loop, listener, witness, dial(honest_loop, listener.address, seen), seen)
        decode = FrameDecoder._messages

        def observed(decoder: FrameDecoder, body: memoryview | bytearray) -> list[Message]:
            messages = decode(decoder, body)
            if loop.is_current():
                site.heard += messages
            return messages

        monkeypatch.setattr(FrameDecoder, "_messages", observed)
        site.check()
        site.heard.clear()
        yield site
        site.check()
        assert site.is_empty
        listener._gate._buckets.clear()  # who comes now is not of the strangers, though it has their address
        late = Witness()
        assert dial(honest_loop, listener.address, late).is_open
        assert "Traceback" not in caplog.text
        assert not os.path.exists("/tmp/distexec-test-was-unpickled")


def read_to_end(sock: socket.socket) -> bytes:
    """What a peer says until it hangs up, by whatever way."""
    received = b""
    with contextlib.suppress(OSError):
        while data := sock.recv(1 << 16):
            received += data
    return received


def strangers_heard(site: Site) -> list[Message]:
    """What decoders made of bytes, without the honest link's messages and pings."""
    return [message for message in site.heard if isinstance(message, Run)]


RUN_FRAME = bytes(encode([Run(1, 1, 1, 1, BOMB)]))


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\n\r\n", BOMB, RUN_FRAME, b"\x16\x03\x01", bytes(70_000)],
                         ids=["nothing", "http", "pickle", "frame", "half a record", "zeros"])
def test_no_tls(site: Site, caplog: pytest.LogCaptureFixture, first: bytes) -> None:
    """Who does not speak TLS is put out, with an alert at most, and named in the log."""
    with site.connect() as sock:
        with contextlib.suppress(OSError):  # it may hang up in the middle
            sock.sendall(first)
        assert len(read_to_end(sock)) < 50
        assert wait_until(lambda: "refused" in caplog.text)
    assert "connection from 127.0.0.1:" in caplog.text
    assert site.heard == []


def test_random_bytes(site: Site) -> None:
    """Random bytes, of any length, do nothing."""
    chance = random.Random(1)
    for _ in range(30):
        with site.connect() as sock, contextlib.suppress(OSError):
            sock.sendall(chance.randbytes(chance.randrange(2000)))
            sock.shutdown(socket.SHUT_WR)
            read_to_end(sock)
    assert site.heard == []


@pytest.mark.parametrize("first", [BOMB, RUN_FRAME, bytes(45), b"distexec" + bytes(37), bytes(1 << 20)],
                         ids=["pickle", "frame", "zeros", "version 0", "a megabyte"])
def test_tls_and_then_nonsense(site: Site, caplog: pytest.LogCaptureFixture, first: bytes) -> None:
    """Within TLS, what is not an opening is answered by a fixed code or nothing."""
    with site.connect_tls() as sock:
        with contextlib.suppress(OSError):  # it may hang up in the middle
            sock.sendall(first)
        assert read_to_end(sock) in (b"", bytes([Refusal.VERSION, 0, 1]) + bytes(32))
        assert wait_until(lambda: "refused" in caplog.text)
    assert site.heard == []


def shake(site: Site, sock: ssl.SSLSocket, who: Credentials | None = None) -> tuple[DiallerHandshake, bytes]:
    """Go as far as the proof; return the handshake and the proof, not yet sent."""
    certificate = sock.getpeercert(binary_form=True)
    assert certificate
    hand = DiallerHandshake(who or credentials("stranger"), Role.UPSTREAM, os.urandom(32), sha256(certificate).digest())
    sock.sendall(hand.opening())
    return hand, hand.receive(sock.recv(1000))


@pytest.mark.parametrize("behind", [b"", RUN_FRAME, BOMB])
def test_wrong_secret(site: Site, caplog: pytest.LogCaptureFixture, behind: bytes) -> None:
    """A wrong proof gets one code, no Hello, and whatever is sent with it is thrown away."""
    with site.connect_tls() as sock:
        hand, proof = shake(site, sock, credentials("stranger", OTHER_SECRET))
        sock.sendall(proof + behind)
        reply = read_to_end(sock)
        if not behind:
            assert reply == bytes([Refusal.PROOF]) + bytes(32)
            hand.receive(reply)
            assert isinstance(hand.failure, AuthenticationFailed)
        else:
            assert reply == b""  # out of turn: not even the proof is looked at
    assert wait_until(lambda: "refused" in caplog.text)
    assert site.heard == []
    assert len(site.witness.links) == 1


def test_right_proof_with_early_frames(site: Site) -> None:
    """Even a holder of the secret may not send frames before it is told that it is in."""
    with site.connect_tls() as sock:
        _, proof = shake(site, sock)
        sock.sendall(proof + RUN_FRAME)
        assert read_to_end(sock) == b""
    assert site.heard == []


def test_truncated_handshakes(site: Site) -> None:
    """A handshake cut at any byte of it is no link."""
    for place in (0, 1, 44, 45, 46, 76):
        with site.connect_tls() as sock:
            certificate = sock.getpeercert(binary_form=True)
            assert certificate
            digest = sha256(certificate).digest()
            hand = DiallerHandshake(credentials("stranger"), Role.UPSTREAM, os.urandom(32), digest)
            said = hand.opening()
            sock.sendall(said[:place])
            if place >= len(said):
                sock.sendall(hand.receive(sock.recv(1000))[:place - len(said)])
            sock.shutdown(socket.SHUT_WR)
    assert site.is_empty
    assert site.heard == []


def test_oversized_hello(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """After the proof a first frame above the size of a Hello is refused by its header."""
    with site.connect_tls() as sock:
        _, proof = shake(site, sock)
        sock.sendall(proof)
        assert sock.recv(1000)
        with contextlib.suppress(OSError):
            sock.sendall((8 << 20).to_bytes(4, "big") + bytes(1000))
        read_to_end(sock)
    assert wait_until(lambda: "Hello has 8388608 bytes" in caplog.text)
    assert site.heard == []


def test_replay_of_a_good_handshake(site: Site) -> None:
    """The bytes of a dialler that was let in do not let in the next one that says them."""
    with site.connect_tls() as sock:
        hand, proof = shake(site, sock)
        opening_bytes = hand.opening()
        sock.sendall(proof)
        hello = hand.receive(sock.recv(1000))
        assert hello
        sock.sendall(hello)
        assert wait_until(lambda: len(site.witness.links) == 2)
    with site.connect_tls() as sock:
        sock.sendall(opening_bytes)
        assert sock.recv(1000)[0] == Refusal.NONE
        sock.sendall(proof)
        assert read_to_end(sock) == bytes([Refusal.PROOF]) + bytes(32)
    assert len(site.witness.links) == 2


def test_somebody_in_between(site: Site) -> None:
    """Who ends the dialler's TLS and relays every byte to a real listener gets neither end to trust it."""
    from distexec.tls import make_server_context
    impostor = make_server_context().context
    witness = Witness()
    with socket.create_server(("127.0.0.1", 0)) as server, running_loop("victim") as loop:
        def relay() -> None:
            sock, _ = server.accept()
            with impostor.wrap_socket(sock, server_side=True) as victim, site.connect_tls() as real:
                while data := victim.recv(1000):  # they take turns
                    real.sendall(data)
                    if not (data := real.recv(1000)):
                        break
                    victim.sendall(data)

        thread = threading.Thread(target=relay)
        thread.start()
        with pytest.raises(AuthenticationFailed):
            dial(loop, server.getsockname(), witness)
        thread.join()
    assert len(site.witness.links) == 1
    assert site.heard == []


def impostor_listener(reply: Callable[[bytes, bytes], bytes]) -> tuple[socket.socket, threading.Thread]:
    """A listener without the secret that answers the opening like a real one, and the proof by `reply`."""
    context = server_context()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = server.accept()
        with context.context.wrap_socket(sock, server_side=True) as victim, contextlib.suppress(OSError):
            hand = ListenerHandshake(credentials("impostor", OTHER_SECRET), frozenset(Role), os.urandom(32),
                                     context.certificate_digest)
            victim.sendall(hand.receive(victim.recv(1000)))
            proof = victim.recv(1000)
            victim.sendall(reply(proof, hand.receive(proof)))
            rest = read_to_end(victim)
            assert rest == b"", "the dialler said more to an impostor"

    thread = threading.Thread(target=serve)
    thread.start()
    return server, thread


@pytest.mark.parametrize("reply", [
    lambda proof, _own: bytes([Refusal.NONE]) + proof,
    lambda _proof, _own: bytes([Refusal.NONE]) + bytes(32) + RUN_FRAME,
    lambda _proof, own: bytes([Refusal.NONE]) + own[1:],
], ids=["reflected proof", "no proof, but frames", "proof of another secret"])
def test_impostors_get_no_hello(reply: Callable[[bytes, bytes], bytes]) -> None:
    """A dialler shows nobody its Hello, and delivers nothing from anybody, before the proof."""
    witness = Witness()
    server, thread = impostor_listener(reply)
    with server, running_loop("victim") as loop:
        with pytest.raises(AuthenticationFailed):
            dial(loop, server.getsockname(), witness)
        thread.join()
    assert witness.messages == []


def test_a_byte_now_and_then(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A peer that trickles bytes does not get more time by it."""
    with site.connect_tls() as sock:
        message = b"distexec" * 50
        sock.settimeout(0.05)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < len(message):
                sock.sendall(message[sent:sent + 1])
                sent += 1
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(1):
                        break
        assert sent < 44
    assert wait_until(lambda: "no proof of the secret within 1 s" in caplog.text)
    assert site.heard == []


def test_many_half_open_connections(site: Site, caplog: pytest.LogCaptureFixture,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of silent connections holds few places for a short time; links there are go on, and the log is short."""
    monkeypatch.setattr(opening, "STRANGER_S", 3.0)  # time for all to come
    with contextlib.ExitStack() as stack:
        flood = []
        for _ in range(300):
            with contextlib.suppress(OSError):
                flood.append(stack.enter_context(site.connect()))
        assert wait_until(lambda: "connections from there have not proved the secret" in caplog.text)
        assert sum(site.listener._gate.strangers.values()) <= gate.MAX_STRANGERS_OF_ONE
        site.check()
        assert site.is_empty
        for sock in flood:
            assert read_to_end(sock) == b""
    site.check()
    assert len([line for line in caplog.text.splitlines() if "refused" in line]) <= 9  # three reasons, now and then
    assert "127.0.0.1:" in caplog.text


def test_memory_of_strangers_is_bounded(site: Site) -> None:
    """Places full of strangers that send all they can cost little Python memory, and no frame buffers."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with contextlib.ExitStack() as stack:
            for _ in range(gate.MAX_STRANGERS_OF_ONE):
                sock = stack.enter_context(site.connect_tls())
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    sock.send(b"distexec" + b"\xff" * 1_000_000)
            site.check()
            peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 16 << 20
    finally:
        tracemalloc.stop()
    assert site.is_empty


def test_guessing_is_slowed_down(site: Site, caplog: pytest.LogCaptureFixture,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose proofs fail again and again is refused before TLS; one line in the log says each reason."""
    monkeypatch.setattr(gate, "BURST", 5.0)
    monkeypatch.setattr(gate, "REFILL_PER_S", 0.0)
    refused = 0
    for _ in range(12):
        try:
            with site.connect_tls() as sock:
                _, proof = shake(site, sock, credentials("guesser", OTHER_SECRET))
                sock.sendall(proof)
                read_to_end(sock)
        except OSError:
            refused += 1
    assert refused == 7
    assert caplog.text.count("came to nothing") == 1
    assert caplog.text.count("does not hold the secret") == 1


def trusted(site: Site, behind: bytes = b"") -> ssl.SSLSocket:
    """Come in with the secret, on a bare socket; `behind` goes with the Hello in one record."""
    sock = site.connect_tls()
    hand, proof = shake(site, sock)
    sock.sendall(proof)
    sock.sendall(hand.receive(sock.recv(1000)) + behind)
    assert hand.state is State.OPEN
    assert wait_until(lambda: len(site.witness.links) == 2)
    return sock


@pytest.mark.parametrize("data", [
    (8 << 21).to_bytes(4, "big"), b"\0\0\0\5\xdd\xff\xff\xff\xff", b"\0\0\0\1\xc1", len(BOMB).to_bytes(4, "big") + BOMB,
], ids=["oversized", "array of 4 billion", "reserved byte", "pickle"])
def test_members_gone_bad(site: Site, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    """A peer that proved the secret and then breaks the protocol loses its link, and nobody else does."""
    with trusted(site) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(data)
        read_to_end(sock)
    assert wait_until(lambda: site.witness.reasons)
    assert "broke the protocol" in site.witness.reasons[0]
    assert "broke the protocol" in caplog.text
    assert strangers_heard(site) == []


def test_frames_in_one_record_with_the_hello(site: Site) -> None:
    """What a peer sends right behind its Hello is delivered, once, and what comes later after it."""
    with trusted(site, bytes(encode([Want(5, 1)]) + encode([Want(5, 2)])[:7])) as sock:
        sock.sendall(encode([Want(5, 2)])[7:])
        assert wait_until(lambda: Want(5, 2) in site.witness.messages)
    theirs = [message for message in site.witness.messages if isinstance(message, Want) and message.session == 5]
    assert theirs == [Want(5, 1), Want(5, 2)]
    assert wait_until(lambda: site.witness.reasons)


def test_member_cut_in_a_frame(site: Site) -> None:
    """A link that ends within a frame delivers the whole frames and not the part."""
    with trusted(site) as sock:
        sock.sendall(bytes(encode([Want(7, 7)])) + RUN_FRAME[:-1])
        sock.shutdown(socket.SHUT_WR)
        assert wait_until(lambda: site.witness.reasons)
    assert Want(7, 7) in site.witness.messages
    assert strangers_heard(site) == []


def test_damaged_records(site: Site) -> None:
    """One bit changed on the wire ends the link, and nothing of the record is delivered."""
    with trusted(site) as sock:
        raw = socket.socket(fileno=os.dup(sock.fileno()))
        raw.sendall(b"\x17\x03\x03\x00\x40" + os.urandom(64))
        assert wait_until(lambda: site.witness.reasons)
        raw.close()
    assert "TLS" in site.witness.reasons[0]


def test_pieces_of_everything(site: Site) -> None:
    """A member whose every byte comes alone is understood all the same."""
    with trusted(site) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in encode([Want(3, number) for number in range(20)]):
            sock.sendall(bytes([byte]))
        assert wait_until(lambda: Want(3, 19) in site.witness.messages)
    assert wait_until(lambda: site.witness.reasons)


def test_links_are_not_confused(site: Site) -> None:
    """While strangers come and go by the dozen, honest traffic is neither lost nor doubled."""
    chance = random.Random(2)
    is_over = threading.Event()

    def annoy() -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError), site.connect() as sock:
                sock.sendall(chance.randbytes(chance.randrange(100)))

    threads = [threading.Thread(target=annoy) for _ in range(2)]
    for thread in threads:
        thread.start()
    before = len(site.seen.messages)
    sent: list[Message] = [Want(9, number) for number in range(5000)]
    for start in range(0, 5000, 50):
        site.honest.send(sent[start:start + 50])
    done = site.seen.saw(before + 5000)
    is_over.set()
    for thread in threads:
        thread.join()
    assert done
    assert site.seen.messages[before:] == sent


def test_only_the_unions_are_spoken(site: Site) -> None:
    """The site's links hear nothing outside of the union that `accept` chose."""
    assert all(isinstance(message, ANYTHING) for message in site.witness.messages)
