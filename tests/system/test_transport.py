"""Dialling and listening: who comes through, and what everybody else is told."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from distexec import opening
from distexec.auth import Secret
from distexec.errors import AuthenticationFailed, DistexecError, IncompatibleNode, ProtocolError
from distexec.messages import Bye, Chunk, FromControl, Message, Role, ToControl
from distexec.tls import make_client_context, make_server_context
from distexec.transport import Link, Loop
from tests.leaks import wait_until
from tests.system.wires import ANYTHING, Witness, credentials, dial, running_loop, runs, secured, server_context


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A running loop."""
    with running_loop() as running:
        yield running


def test_local_links_need_no_tls() -> None:
    """A process that only adopts socketpairs imports neither ssl nor cryptography."""
    code = ("import sys; import distexec.transport as t; loop = t.Loop('x'); loop.start(); loop.stop(); "
            "print(*({'ssl', 'cryptography', 'distexec.tls', 'cloudpickle'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


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
    with pytest.raises(ConnectionRefusedError, match=rf"127\.0\.0\.1:{address[1]}.*distexec-agent"):
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
    told = r"no answer within 0\.2 s"
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError, match=told):
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
        attempt = loop.dial([server.getsockname()], Role.UPSTREAM, credentials("client"), ANYTHING,
                            witness.links.append, witness.failures.append, witness.on_messages, witness.on_closed, 0.1)
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


def free_descriptors() -> int:
    """How many descriptors this process may still open."""
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit - len([fd for fd in taken if fd < limit]) + 1  # the listing's own is gone again


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
        fillers.extend(os.dup(0) for _ in range(free_descriptors()))
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
        subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)])
                           for who in (name, "authority"))
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
