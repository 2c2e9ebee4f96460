"""The handshake without a socket: who gets through, who does not, and what is said before trust."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec import handshake
from distexec.auth import Secret
from distexec.errors import AuthenticationFailed, IncompatibleNode, ProtocolError
from distexec.handshake import Credentials, DiallerHandshake, Handshake, ListenerHandshake, Refusal, State
from distexec.messages import Hello, Role
from distexec.protocol import encode

SECRET, OTHER_SECRET = Secret(bytes(range(32))), Secret(bytes(range(1, 33)))
CERTIFICATE = b"c" * 32
ROLES = frozenset(Role)


def credentials(name: str, secret: Secret = SECRET, python: str = "3.11") -> Credentials:
    return Credentials(secret, name, name.encode().ljust(16), python, "0.1", 4, "linux-x86_64")


def dialler(role: Role = Role.UPSTREAM, *, secret: Secret = SECRET, python: str = "3.11", nonce: bytes = b"d" * 32,
            certificate: bytes = CERTIFICATE) -> DiallerHandshake:
    return DiallerHandshake(credentials("client", secret, python), role, nonce, certificate)


def listener(*, secret: Secret = SECRET, python: str = "3.11", nonce: bytes = b"l" * 32,
             certificate: bytes = CERTIFICATE, roles: frozenset[Role] = ROLES) -> ListenerHandshake:
    return ListenerHandshake(credentials("agent", secret, python), roles, nonce, certificate)


def talk(one: DiallerHandshake, other: Handshake, piece: int = 1 << 20) -> list[tuple[str, bytes]]:
    """Carry bytes both ways, in pieces, until nobody has more to say; return who said what."""
    said = []
    to_other, to_one = one.opening(), b""
    while to_other or to_one:
        if to_other:
            said.append(("dialler", to_other))
        to_one += feed(other, to_other, piece)
        if to_one:
            said.append(("listener", to_one))
        to_other, to_one = feed(one, to_one, piece), b""
    return said


def feed(end: Handshake, data: bytes, piece: int) -> bytes:
    return b"".join(end.receive(data[start:start + piece]) for start in range(0, len(data), piece))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_both_get_through(role: Role, piece: int) -> None:
    """With one secret both ends open, know each other's Hello and role, however the bytes are cut."""
    one, other = dialler(role), listener()
    talk(one, other, piece)
    assert (one.state, other.state) == (State.OPEN, State.OPEN)
    assert one.hello == credentials("agent").hello()
    assert other.hello == credentials("client").hello()
    assert one.role is other.role is role


def test_what_follows_the_hello_is_kept() -> None:
    """Frames sent right behind a Hello are handed on, not swallowed."""
    one, other = dialler(), listener()
    answer = other.receive(one.opening())
    verdict = other.receive(one.receive(answer))
    hello = one.receive(verdict + b"early frames")
    assert (one.state, one.rest) == (State.OPEN, b"early frames")
    other.receive(hello + b"more")
    assert (other.state, other.rest) == (State.OPEN, b"more")


def test_wrong_secret() -> None:
    """The listener refuses with a code alone; both ends say so."""
    one, other = dialler(secret=OTHER_SECRET), listener()
    said = talk(one, other)
    assert isinstance(one.failure, AuthenticationFailed)
    assert isinstance(other.failure, AuthenticationFailed)
    assert said[-1] == ("listener", bytes([Refusal.PROOF]) + bytes(32))
    assert other.hello is None


def test_listener_says_nothing_of_the_secret_before_the_proof() -> None:
    """Up to the proof a listener's bytes are the same with any secret."""
    replies = {listener(secret=secret).receive(dialler().opening()) for secret in (SECRET, OTHER_SECRET)}
    assert len(replies) == 1


def test_dialler_unmasks_a_listener_without_the_secret() -> None:
    """A listener that says yes to everybody cannot make up its proof, and learns nothing of the dialler's Hello."""
    one = dialler()
    one.receive(listener(secret=OTHER_SECRET).receive(one.opening()))
    reply = one.receive(bytes([Refusal.NONE]) + b"p" * 32 + encode([credentials("agent").hello()]))
    assert isinstance(one.failure, AuthenticationFailed)
    assert reply == b""


def test_somebody_in_between_shows() -> None:
    """If the two ends saw different certificates, the dialler's proof fails."""
    one, other = dialler(certificate=b"m" * 32), listener()
    talk(one, other)
    assert isinstance(other.failure, AuthenticationFailed)
    assert isinstance(one.failure, AuthenticationFailed)


def test_replay() -> None:
    """Bytes recorded from a good handshake do not open a second one: its nonce is another."""
    said = talk(dialler(), listener())
    again = listener(nonce=b"n" * 32)
    for who, data in said:
        if who == "dialler" and again.state is not State.FAILED:
            again.receive(data)
    assert isinstance(again.failure, AuthenticationFailed)


def test_reflection() -> None:
    """The dialler's own proof, and its own bytes, sent back to it, prove nothing."""
    one = dialler()
    proof = one.receive(listener().receive(one.opening()))
    one.receive(bytes([Refusal.NONE]) + proof + encode([credentials("agent").hello()]))
    assert isinstance(one.failure, AuthenticationFailed)
    one = dialler()
    one.receive(one.opening())
    assert one.state is State.FAILED


def test_relaying_to_another_listener_of_the_cluster() -> None:
    """Who passes a dialler's bytes on to a real listener is caught, since that one shows its own certificate."""
    one = dialler(certificate=b"of the relay".ljust(32))
    real = listener(certificate=b"of the real listener".ljust(32))
    talk(one, real)
    assert isinstance(real.failure, AuthenticationFailed)


@given(st.integers(0, 44), st.integers(1, 255))
def test_every_byte_of_the_opening_counts(place: int, change: int) -> None:
    """An opening changed on its way is refused at once or fails the proof: every field is covered."""
    one, other = dialler(), listener()
    opening = bytearray(one.opening())
    opening[place] ^= change
    reply = other.receive(bytes(opening))
    if other.state is State.PROOF:
        other.receive(one.receive(reply))
    assert other.state is State.FAILED


@given(st.integers(0, 34), st.integers(1, 255))
def test_every_byte_of_the_answer_counts(place: int, change: int) -> None:
    """An answer changed on its way is refused at once or makes the proof fail."""
    one, other = dialler(), listener()
    answer = bytearray(other.receive(one.opening()))
    answer[place] ^= change
    proof = one.receive(bytes(answer))
    if one.state is State.VERDICT:
        other.receive(proof)
        assert other.state is State.FAILED
    else:
        assert one.state is State.FAILED


def test_protocol_versions() -> None:
    """A listener without a common version says which it has; the dialler tells its user."""
    one, other = dialler(), listener()
    opening = handshake._opening.pack(b"distexec", 7, 9, Role.UPSTREAM, b"d" * 32)
    reply = other.receive(opening)
    assert isinstance(other.failure, IncompatibleNode)
    assert "7 to 9" in str(other.failure)
    one.receive(reply)
    assert isinstance(one.failure, IncompatibleNode)
    newer = listener()
    newer.receive(handshake._opening.pack(b"distexec", 1, 9, Role.UPSTREAM, b"d" * 32))
    assert newer.state is State.PROOF


@pytest.mark.parametrize("role", [Role.UPSTREAM, Role.DOWNSTREAM])
def test_python_minor_versions(role: Role) -> None:
    """Two Pythons that cannot exchange pickles find out, both, and say which they are."""
    one, other = dialler(role, python="3.13"), listener()
    talk(one, other)
    for end in (one, other):
        assert isinstance(end.failure, IncompatibleNode)
        assert "3.11" in str(end.failure)
        assert "3.13" in str(end.failure)


def test_control_links_cross_python_versions() -> None:
    """Asking for a node's state works from any Python."""
    one, other = dialler(Role.CONTROL, python="3.13"), listener()
    talk(one, other)
    assert (one.state, other.state) == (State.OPEN, State.OPEN)


def test_roles_that_are_not_served() -> None:
    """A listener says with a code that it does not take such links."""
    one, other = dialler(Role.DOWNSTREAM), listener(roles=frozenset({Role.UPSTREAM}))
    talk(one, other)
    assert isinstance(one.failure, ProtocolError)
    assert isinstance(other.failure, ProtocolError)


@pytest.mark.parametrize("steps", [0, 1])
def test_speaking_out_of_turn(steps: int) -> None:
    """Before the proof a byte more than asked for ends the handshake, without a word."""
    one, other = dialler(), listener()
    data = one.opening()
    for _ in range(steps):
        data = one.receive(other.receive(data))
    assert other.receive(data + b"x") == b""
    assert isinstance(other.failure, ProtocolError)


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_random_bytes(pieces: list[bytes]) -> None:
    """Who sends random bytes gets nowhere, learns nothing of the secret, and has next to nothing kept of what it sent."""
    ends = listener(), listener(secret=OTHER_SECRET), dialler()
    replies, same, _ = ([end.receive(piece) for piece in pieces] for end in ends)
    assert replies == same
    for end in ends:
        assert end.state in (State.OPENING, State.PROOF, State.ANSWER, State.VERDICT, State.FAILED)
        assert end.hello is None
        assert len(end._buffer) < 45


HELLO = credentials("client").hello()
BAD_HELLOS = {
    "too large": msgspec.structs.replace(HELLO, name="n" * handshake.MAX_HELLO_BYTES),
    "control characters": msgspec.structs.replace(HELLO, name="a\nb"),
    "short incarnation": msgspec.structs.replace(HELLO, incarnation=b"x"),
    "negative slots": msgspec.structs.replace(HELLO, slots=-1),
}


def until_hello(other: ListenerHandshake) -> None:
    one = dialler()
    other.receive(one.receive(other.receive(one.opening())))
    assert other.state is State.HELLO_SIZE


@pytest.mark.parametrize("name", BAD_HELLOS)
def test_bad_hellos(name: str) -> None:
    """A Hello that lies about its form ends the handshake."""
    other = listener()
    until_hello(other)
    other.receive(bytes(encode([BAD_HELLOS[name]])))
    assert isinstance(other.failure, ProtocolError)


@pytest.mark.parametrize("frame", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\1\x90", b"\0\0\0\2\x91\xc0"])
def test_malformed_hellos(frame: bytes) -> None:
    """Not even a holder of the secret can make a listener fail otherwise."""
    other = listener()
    until_hello(other)
    other.receive(frame)
    assert isinstance(other.failure, ProtocolError)
    assert other.hello is None


def test_two_hellos() -> None:
    """A first frame with two Hellos is malformed."""
    other = listener()
    until_hello(other)
    other.receive(bytes(encode([HELLO, HELLO])))
    assert isinstance(other.failure, ProtocolError)
    assert isinstance(HELLO, Hello)
