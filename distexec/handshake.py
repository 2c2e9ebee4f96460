"""Two ends of a connection prove to each other that they hold the secret. Pure: bytes in, bytes out; nonces come in.

    dialler                                                listener
    opening: magic, versions, role, nonce  ──────────────►
                                           ◄──────────────  answer: code, version, nonce
    proof                                  ──────────────►
                                           ◄──────────────  verdict: code, proof; Hello
    Hello                                  ──────────────►  both open

The rules: the dialler proves first, and until it has, the listener sends nothing that depends on the secret. Before
the proofs every field has a fixed size, every refusal is one of the codes below, and a byte too many ends it. The
proofs cover all fields and the server's certificate as each end sees it, so who sits in between, or replays, or
reflects, fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from struct import Struct

from . import auth
from .auth import Secret
from .errors import AuthenticationFailed, DistexecError, IncompatibleNode, ProtocolError
from .messages import Hello, Role
from .protocol import HEADER_BYTES, FrameDecoder, encode

__all__ = ["MAX_HELLO_BYTES", "NONCE_BYTES", "PROTOCOL_VERSION", "Credentials", "DiallerHandshake", "Handshake",
           "ListenerHandshake", "Refusal", "State"]

PROTOCOL_VERSION = 1
OLDEST_VERSION = 1
"""We speak every version from this one to `PROTOCOL_VERSION`."""

NONCE_BYTES = 32
MAX_HELLO_BYTES = 1024
"""The largest Hello. Its peer proved the secret, but has not yet earned room for whole frames."""

_MAGIC = b"distexec"
_opening = Struct(f">8sHHB{NONCE_BYTES}s")  # magic, oldest and newest version the dialler speaks, role, nonce
_answer = Struct(f">BH{NONCE_BYTES}s")  # code, version (refused: the listener's newest), nonce
_PROOF_BYTES = 32
_verdict = Struct(f">B{_PROOF_BYTES}s")  # code, proof


class Refusal(IntEnum):
    """All that a listener says to one that it does not trust."""

    NONE = 0
    VERSION = 1
    ROLE = 2
    PROOF = 3


class State(Enum):
    """What an end waits for."""

    OPENING = "the opening"
    ANSWER = "the answer to the opening"
    PROOF = "the proof"
    VERDICT = "the verdict on the proof"
    HELLO_SIZE = "the Hello"
    HELLO = "the rest of the Hello"
    OPEN = "nothing more"
    FAILED = "nothing, having failed"


_SPEAKS_ON = frozenset({State.VERDICT, State.HELLO_SIZE, State.HELLO, State.OPEN})
"""Where more may follow what is awaited; elsewhere the peer must wait for our answer."""


@dataclass(frozen=True)
class Credentials:
    """Who this process is on its links: the secret it proves and what it says in Hello."""

    secret: Secret
    name: str
    incarnation: bytes  # 16 random bytes, one per process life
    python: str  # "3.11"
    version: str  # of distexec
    slots: int = 0
    platform: str = ""  # "linux-x86_64"

    def hello(self) -> Hello:
        """Return what we say once both ends have proved the secret."""
        return Hello(self.version, self.python, self.platform, self.name, self.incarnation, self.slots)


class Handshake:
    """What both ends have in common. Feed it with `receive`; send what that returns, then look at `state`.

    FAILED: `failure` says why; what was returned is still to be sent (a refusal code), then the connection is to be
    closed. OPEN: `hello` is the peer's, `role` what the dialler is on the link, and `rest` what the peer already sent
    after it.
    """

    def __init__(self, credentials: Credentials, nonce: bytes, certificate_digest: bytes, state: State) -> None:
        assert len(nonce) == NONCE_BYTES
        self.state = state
        self.failure: DistexecError | None = None
        self.hello: Hello | None = None
        self.role: Role | None = None
        self.rest = b""
        self._credentials = credentials
        self._nonce = nonce
        self._certificate_digest = certificate_digest
        self._key = b""  # made only when a proof is due
        self._fields: tuple[bytes, ...] = ()
        self._buffer = b""
        self._hello_size = 0

    def receive(self, data: bytes) -> bytes:
        """Take the next bytes of the peer; return what to send it now."""
        reply = b""
        self._buffer += data
        while self.state not in (State.FAILED, State.OPEN):
            needed, step = self._steps()[self.state]
            if len(self._buffer) < needed:
                return reply
            if len(self._buffer) > needed and self.state not in _SPEAKS_ON:
                self._fail(ProtocolError(f"it spoke out of turn while {self.state.value} was awaited"))
                break
            field, self._buffer = self._buffer[:needed], self._buffer[needed:]
            reply += step(field)
        self.rest, self._buffer = self._buffer if self.state is State.OPEN else b"", b""
        return reply

    def _steps(self) -> dict[State, tuple[int, Callable[[bytes], bytes]]]:
        """Return for each state how many bytes are awaited and what takes them."""
        raise NotImplementedError

    def _hello_steps(self) -> dict[State, tuple[int, Callable[[bytes], bytes]]]:
        return {State.HELLO_SIZE: (HEADER_BYTES, self._on_hello_size),
                State.HELLO: (self._hello_size, self._on_hello)}

    def _fail(self, failure: DistexecError) -> bytes:
        self.state, self.failure = State.FAILED, failure
        return b""

    def _agree(self, oldest: int, newest: int, version: int, role: int, dialler: bytes, listener: bytes) -> None:
        """Fix what the proofs cover."""
        numbers = [number.to_bytes(2, "big") for number in (oldest, newest, version, role)]
        self._fields = (_MAGIC, *numbers, dialler, listener, self._certificate_digest)

    def _proof(self, direction: bytes) -> bytes:
        self._key = self._key or auth.link_key(self._credentials.secret)
        return auth.proof(self._key, direction, self._fields)

    def _our_hello(self) -> bytes:
        return bytes(encode([self._credentials.hello()]))

    def _on_hello_size(self, field: bytes) -> bytes:
        self._hello_size = int.from_bytes(field, "big")
        if not 0 < self._hello_size <= MAX_HELLO_BYTES:
            return self._fail(ProtocolError(f"its Hello has {self._hello_size} bytes"))
        self.state = State.HELLO
        return b""

    def _on_hello(self, body: bytes) -> bytes:
        try:
            (hello,) = FrameDecoder(Hello).feed(self._hello_size.to_bytes(HEADER_BYTES, "big") + body)
        except (ProtocolError, ValueError) as error:
            return self._fail(ProtocolError(f"its Hello is malformed: {error}"))
        assert isinstance(hello, Hello)
        if len(hello.incarnation) != 16 or hello.slots < 0 or not hello.name.isprintable():
            return self._fail(ProtocolError("its Hello is malformed: bad name, slots or incarnation"))
        ours = self._credentials.python
        if self.role is not Role.CONTROL and hello.python != ours:
            return self._fail(IncompatibleNode(
                f"it ({hello.name!r}) runs Python {hello.python}, this process Python {ours}: calls and values cannot "
                "be exchanged; run the same Python minor version at both ends"))
        self.hello, self.state = hello, State.OPEN
        return b""


class DiallerHandshake(Handshake):
    """The end that connected. Send `opening()` first.

    Args:
        role: what this end is on the link.
        nonce: 32 random bytes, never used before.
        certificate_digest: SHA-256 of the certificate that the other end showed.
    """

    def __init__(self, credentials: Credentials, role: Role, nonce: bytes, certificate_digest: bytes) -> None:
        super().__init__(credentials, nonce, certificate_digest, State.ANSWER)
        self.role = role

    def opening(self) -> bytes:
        """Return the first bytes on the connection."""
        assert self.role is not None
        return _opening.pack(_MAGIC, OLDEST_VERSION, PROTOCOL_VERSION, self.role, self._nonce)

    def _steps(self) -> dict[State, tuple[int, Callable[[bytes], bytes]]]:
        return {State.ANSWER: (_answer.size, self._on_answer), State.VERDICT: (_verdict.size, self._on_verdict),
                **self._hello_steps()}

    def _on_answer(self, field: bytes) -> bytes:
        code, version, nonce = _answer.unpack(field)
        if code == Refusal.VERSION:
            return self._fail(IncompatibleNode(
                f"it speaks protocol versions up to {version}, this process {OLDEST_VERSION} to {PROTOCOL_VERSION}; "
                "install the same version of distexec at both ends"))
        if code == Refusal.ROLE:
            return self._fail(ProtocolError("it does not take this kind of connection (two agents, or two clients?)"))
        if code != Refusal.NONE or not OLDEST_VERSION <= version <= PROTOCOL_VERSION:
            return self._fail(ProtocolError("it does not answer like distexec"))
        assert self.role is not None
        self._agree(OLDEST_VERSION, PROTOCOL_VERSION, version, self.role, self._nonce, nonce)
        self.state = State.VERDICT
        return self._proof(auth.DIALLER)

    def _on_verdict(self, field: bytes) -> bytes:
        code, claimed = _verdict.unpack(field)
        if code != Refusal.NONE:
            return self._fail(AuthenticationFailed(
                "it refused the proof: its secret is another one, or somebody sits in between; put the same secret "
                "($DISTEXEC_SECRET or the file of `distexec secret new`) at both ends"))
        if not auth.is_equal(claimed, self._proof(auth.LISTENER)):
            return self._fail(AuthenticationFailed(
                "it could not prove that it holds the secret: it is not one of ours, or somebody sits in between"))
        self.state = State.HELLO_SIZE
        return self._our_hello()


class ListenerHandshake(Handshake):
    """The end that was connected to.

    Args:
        roles: what the other end may be here.
        nonce: 32 random bytes, never used before.
        certificate_digest: SHA-256 of the certificate that this end shows.
    """

    def __init__(self, credentials: Credentials, roles: frozenset[Role], nonce: bytes,
                 certificate_digest: bytes) -> None:
        super().__init__(credentials, nonce, certificate_digest, State.OPENING)
        self._roles = roles

    def _steps(self) -> dict[State, tuple[int, Callable[[bytes], bytes]]]:
        return {State.OPENING: (_opening.size, self._on_opening), State.PROOF: (_PROOF_BYTES, self._on_proof),
                **self._hello_steps()}

    def _on_opening(self, field: bytes) -> bytes:
        magic, oldest, newest, role, nonce = _opening.unpack(field)
        if magic != _MAGIC:
            return self._fail(ProtocolError("it does not speak distexec"))
        version = min(newest, PROTOCOL_VERSION)
        if version < max(oldest, OLDEST_VERSION):
            self._fail(IncompatibleNode(f"it speaks protocol versions {oldest} to {newest}, this process "
                                        f"{OLDEST_VERSION} to {PROTOCOL_VERSION}"))
            return _answer.pack(Refusal.VERSION, PROTOCOL_VERSION, bytes(NONCE_BYTES))
        if role not in self._roles:
            self._fail(ProtocolError(f"it asks for role {role}, which is not served here"))
            return _answer.pack(Refusal.ROLE, PROTOCOL_VERSION, bytes(NONCE_BYTES))
        self.role = Role(role)
        self._agree(oldest, newest, version, role, nonce, self._nonce)
        self.state = State.PROOF
        return _answer.pack(Refusal.NONE, version, self._nonce)

    def _on_proof(self, claimed: bytes) -> bytes:
        if not auth.is_equal(claimed, self._proof(auth.DIALLER)):
            self._fail(AuthenticationFailed("it does not hold the secret of this cluster"))
            return _verdict.pack(Refusal.PROOF, bytes(_PROOF_BYTES))
        self.state = State.HELLO_SIZE
        return _verdict.pack(Refusal.NONE, self._proof(auth.LISTENER)) + self._our_hello()
