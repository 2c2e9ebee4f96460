"""From a bare TCP connection to a link whose two ends have proved the secret.

    Dial      connect ─► TLS ─► DiallerHandshake  ─► TlsLink ─► on_open(link)     else on_failed(exception)
    Listener  accept ─► Gate ─► TLS ─► ListenerHandshake ─► TlsLink ─► accept(link)   else a line in the log

Rules: before the proof a stranger holds one of few places, for five seconds, and gets a fixed code or nothing; no
byte of it reaches a decoder. Everything here runs on the I/O thread.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from types import UnionType
from typing import Any

from .address import format_address
from .errors import DistexecError
from .gate import Gate, source_of
from .handshake import NONCE_BYTES, Credentials, DiallerHandshake, Handshake, ListenerHandshake, State
from .iothread import STOPPED, IoThread
from .link import OnClosed, OnMessages
from .messages import Hello, Role
from .protocol import FrameDecoder
from .tls import ServerContext, TlsLink, TlsStream, default_client_context, explain

__all__ = ["Accept", "Dial", "Listener"]

Acceptance = tuple[UnionType | type, OnMessages, OnClosed]
Accept = Callable[[Any], Acceptance | None]
"""Called with a link whose peer proved the secret; says what becomes of it, or None to refuse it."""

STRANGER_S = 5.0
"""How long a connection may take to prove the secret. Smaller: a loaded machine is refused. Larger: silence costs
more."""

RECEIVE_BYTES = 16 << 10
"""What is taken from a stranger at once."""

BACKLOG = 128
ACCEPT_COUNT = 32  # connections taken per round, so that links get their turn
PAUSE_S = 1.0  # without descriptors left, accept fails at once and the listener stays readable: not a busy loop

NOTE_EVERY_S = 10.0
"""A refusal is logged once per source and reason in this time."""

MAX_NOTES = 20
"""Lines about refusals in that time; the rest is counted, and the count logged at its end."""

KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_COUNT = 15, 5, 3
"""For links on which nothing is under way. Where something is, `unanswered_s` tells; not TCP_USER_TIMEOUT, which also ends
connections to a program that is stopped, once its window is full, though its kernel answers every probe."""

RETRANSMITS = 3
"""How often the same must have been sent in vain. Smaller: what was sent only just now counts as unanswered."""

PROBES = 2
"""How often a full window must have been probed in vain; from one probe to the next the time doubles. Smaller: one that is
under way counts."""

_TCP_INFO = struct.Struct("=2xBB20xI28xI")
"""Of Linux's `struct tcp_info`: tcpi_retransmits, tcpi_probes, tcpi_unacked, tcpi_last_ack_recv (milliseconds)."""

_BIND_REMEDIES = {
    errno.EADDRINUSE: "another program has this port: stop it or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address: listen on one of its own",
    errno.EACCES: "ports below 1024 are for root: choose one above",
}
_EVERY_ROLE = frozenset(Role)
_log = logging.getLogger("distexec")


class Opening:
    """A connection in the making: TLS, then the handshake. Ends with one call of `on_done(opening, failure or None)`.

    Afterwards the socket belongs to the link that `link` makes, or is closed.
    """

    def __init__(self, loop: IoThread, sock: socket.socket, stream: TlsStream, on_done: OnDone) -> None:
        self.loop, self.sock, self.stream = loop, sock, stream
        self.handshake: Handshake | None = None  # once TLS is agreed
        self._on_done = on_done
        self._unsent = b""
        self._is_over = False
        self._timer = loop.call_later(STRANGER_S, self._on_timeout)
        loop.tenants.add(self)

    def begin(self) -> None:
        """Start: the dialler speaks, the listener waits."""
        self.loop.select(self.sock, selectors.EVENT_READ, self._on_ready)
        self._advance()

    def close(self, reason: str) -> None:
        """Give up."""
        self._fail(ConnectionAbortedError(errno.ECONNABORTED, reason))

    finish = close

    def abandon(self) -> None:
        """Close the descriptor in a forked child."""
        self._is_over = True
        self.sock.close()

    def link(self, says: UnionType | type, on_messages: OnMessages, on_closed: OnClosed, *,
             has_heartbeat: bool) -> TlsLink:
        """Make the link, not yet reading: `begin_with(handshake.rest)` starts it."""
        assert self.handshake is not None
        link = TlsLink(self.loop, self.sock, self.stream, FrameDecoder(says), on_messages, on_closed,
                       has_heartbeat=has_heartbeat)
        link.hello, link.role = self.handshake.hello, self.handshake.role
        return link

    def _start_handshake(self) -> Handshake:
        raise NotImplementedError

    def _on_ready(self, events: int) -> None:
        if self._is_over:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self._send()
            if events & selectors.EVENT_READ:
                data = self.sock.recv(RECEIVE_BYTES)
                if not data:
                    raise _gone()
                self.stream.incoming.write(data)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self._advance()

    def _advance(self) -> None:
        failure: Exception | None = None
        try:
            self._speak()
        except ssl.SSLWantReadError:
            pass  # the rest is still under way; `_on_ready` or the deadline goes on from here
        except ssl.SSLZeroReturnError:
            failure = _gone()
        except ssl.SSLError as error:
            failure = explain(error)
        try:
            self._send()  # a refusal code or a TLS alert too
        except OSError as error:
            failure = failure or error
        handshake = self.handshake
        if failure is None and handshake is not None:
            failure = handshake.failure
        if failure is not None:
            self._fail(failure)
        elif handshake is not None and handshake.state is State.OPEN and not self._unsent:
            self._finish(None)

    def _speak(self) -> None:
        if self.handshake is None:
            self.stream.tls.do_handshake()
            self.handshake = self._start_handshake()
        while self.handshake.state not in (State.OPEN, State.FAILED):
            reply = self.handshake.receive(self.stream.tls.read(RECEIVE_BYTES))
            if reply:
                self.stream.write(reply)

    def _send(self) -> None:
        self._unsent += self.stream.outgoing.read()
        if self._unsent:
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent):]
            except BlockingIOError:
                pass  # it stays unsent, and the selector says when to go on
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            self.loop.select(self.sock, events, self._on_ready)

    def _on_timeout(self) -> None:
        what = self.handshake.state.value if self.handshake else "TLS"
        self._fail(TimeoutError(errno.ETIMEDOUT,
                                f"no proof of the secret within {STRANGER_S:g} s; {what} never came"))

    def _fail(self, failure: Exception) -> None:
        if not self._is_over:
            self._finish(failure)

    def _finish(self, failure: Exception | None) -> None:
        self._is_over = True
        self._timer.cancel()
        self.loop.tenants.discard(self)
        self.loop.unselect(self.sock)
        if failure is not None:
            self.sock.close()
        self._on_done(self, failure)


OnDone = Callable[[Any, Exception | None], object]


class DialOpening(Opening):
    """The dialler's side."""

    def __init__(self, loop: IoThread, sock: socket.socket, context: ssl.SSLContext, credentials: Credentials,
                 role: Role, on_done: OnDone) -> None:
        super().__init__(loop, sock, TlsStream(context, is_server=False), on_done)
        self._credentials, self._role = credentials, role

    def _start_handshake(self) -> Handshake:
        certificate = self.stream.tls.getpeercert(binary_form=True)
        assert certificate is not None, "TLS 1.3 servers always show a certificate"
        digest = sha256(certificate).digest()
        handshake = DiallerHandshake(self._credentials, self._role, os.urandom(NONCE_BYTES), digest)
        self.stream.write(handshake.opening())
        return handshake


class ListenOpening(Opening):
    """The listener's side."""

    def __init__(self, loop: IoThread, sock: socket.socket, context: ServerContext, credentials: Credentials,
                 on_done: OnDone) -> None:
        super().__init__(loop, sock, TlsStream(context.context, is_server=True), on_done)
        self._credentials, self._digest = credentials, context.certificate_digest

    def _start_handshake(self) -> Handshake:
        return ListenerHandshake(self._credentials, _EVERY_ROLE, os.urandom(NONCE_BYTES), self._digest)


class Dial:
    """An attempt to connect to the first of several addresses that answers. Made by `Loop.dial`."""

    def __init__(self, loop: IoThread, addresses: Sequence[tuple[Any, ...]], role: Role, credentials: Credentials,
                 says: UnionType | type, on_open: Callable[[Any], object], on_failed: Callable[[Exception], object],
                 on_messages: OnMessages, on_closed: OnClosed, timeout_s: float,
                 context: ssl.SSLContext | None) -> None:
        if not addresses:
            raise ValueError("no address to dial")
        self._loop, self._role, self._credentials = loop, role, credentials
        self._says, self._on_messages, self._on_closed = says, on_messages, on_closed
        self._on_open, self._on_failed = on_open, on_failed
        self._timeout_s = timeout_s
        self._context = context or default_client_context()
        self._left = list(addresses)
        self._address: tuple[Any, ...] = self._left[0]
        self._sock: socket.socket | None = None  # while it connects
        self._opening: DialOpening | None = None
        self._is_over = False

    def __repr__(self) -> str:
        return f"<Dial of {format_address(self._address)}: {'over' if self._is_over else 'under way'}>"

    def cancel(self) -> None:
        """Give up, and call nobody. Any thread; a call that has begun is not taken back."""
        self._loop.run_here(self._cancel)

    # ---- I/O thread

    def begin(self) -> None:
        """Start. For the loop."""
        if self._is_over:
            return
        self._loop.tenants.add(self)
        self._timer = self._loop.call_later(self._timeout_s, self._on_timeout)
        self._try_next()

    def close(self, reason: str) -> None:
        """Give up and say so to `on_failed`."""
        self._fail(ConnectionAbortedError(errno.ECONNABORTED, reason))

    finish = close

    def abandon(self) -> None:
        """Close the descriptor in a forked child."""
        self._is_over = True
        if self._sock is not None:
            self._sock.close()

    def _try_next(self) -> None:
        self._address = self._left.pop(0)
        try:
            sock = socket.socket(socket.AF_INET6 if len(self._address) == 4 else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            self._fail_here(error)
            return
        self._sock = sock
        sock.setblocking(False)
        code = sock.connect_ex(self._address)
        if code in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            self._loop.select(sock, selectors.EVENT_WRITE, self._on_connected)
        else:
            self._fail_here(OSError(code, os.strerror(code)))

    def _on_connected(self, _events: int) -> None:
        sock = self._sock
        assert sock is not None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail_here(OSError(code, os.strerror(code)))
            return
        if sock.getsockname() == sock.getpeername():  # TCP met itself on a port that nobody listens on
            self._fail_here(ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)))
            return
        self._loop.unselect(sock)
        self._sock = None
        tune(sock)
        self._opening = DialOpening(self._loop, sock, self._context, self._credentials, self._role, self._on_done)
        self._opening.begin()

    def _on_done(self, opening: DialOpening, failure: Exception | None) -> None:
        self._opening = None
        if self._is_over:
            return
        if failure is not None:
            self._fail_here(failure)
            return
        assert opening.handshake is not None
        link = opening.link(self._says, self._on_messages, self._on_closed, has_heartbeat=True)
        link.address = self._address
        link.name = f"to {format_address(self._address)}"
        self._end()
        if self._loop.guard(self._on_open, link):
            link.begin_with(opening.handshake.rest)
        else:
            link.finish("this end failed on the new link; see its log")

    def _fail_here(self, failure: Exception) -> None:
        """Note that this address did not do; the next one may, unless somebody there told us what is wrong."""
        if self._left and isinstance(failure, OSError):
            self._drop()
            self._try_next()
        else:
            self._fail(failure)

    def _on_timeout(self) -> None:
        self._fail(TimeoutError(errno.ETIMEDOUT, f"no answer within {self._timeout_s:g} s; is the machine up, and "
                                                 "does a firewall let this port through?"))

    def _cancel(self) -> None:
        self._is_over = True
        self._end()

    def _fail(self, failure: Exception) -> None:
        if self._is_over:
            return
        self._end()
        self._on_failed(_addressed(failure, format_address(self._address)))

    def _end(self) -> None:
        self._is_over = True
        self._loop.tenants.discard(self)
        self._drop()
        timer = getattr(self, "_timer", None)
        if timer is not None:
            timer.cancel()

    def _drop(self) -> None:
        if self._sock is not None:
            self._loop.unselect(self._sock)
            self._sock.close()
            self._sock = None
        if self._opening is not None:
            self._opening.close("given up")


class Listener:
    """A listening socket. Made by `Loop.listen`. Attributes: `address` (host, port), the one bound to."""

    def __init__(self, loop: IoThread, address: tuple[str, int], credentials: Credentials, context: ServerContext,
                 accept: Accept) -> None:
        self._loop, self._credentials, self._context, self._accept = loop, credentials, context, accept
        self._sock = _bind(address)
        self._sock.setblocking(False)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]
        self._gate = Gate()
        self._notes: set[tuple[str, str]] = set()  # what was logged in the last NOTE_EVERY_S
        self._unnoted = 0
        self._is_over = False

    def __repr__(self) -> str:
        return f"<Listener on {format_address(self.address)}: {'closed' if self._is_over else 'open'}>"

    def close(self, reason: str = STOPPED) -> None:
        """Listen no more; links that came about stay. Any thread."""
        self._loop.run_here(self.finish, reason)

    # ---- I/O thread

    def begin(self) -> None:
        """Start. For the loop."""
        if self._loop.is_stopping:
            self.finish(STOPPED)
        if not self._is_over:
            self._loop.tenants.add(self)
            self._loop.select(self._sock, selectors.EVENT_READ, self._on_ready)

    def finish(self, _reason: str) -> None:
        """Listen no more. I/O thread."""
        self._is_over = True
        self._loop.tenants.discard(self)
        self._loop.unselect(self._sock)
        self._sock.close()

    def abandon(self) -> None:
        """Close the descriptor in a forked child."""
        self._is_over = True
        self._sock.close()

    def _on_ready(self, _events: int) -> None:
        for _ in range(ACCEPT_COUNT):
            if self._is_over:
                return
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):  # taken all, or it went before we came
                return
            except OSError as error:
                _log.warning("distexec: %r cannot accept connections: %s; trying again in %g s (raise `ulimit -n`?)",
                             self, error, PAUSE_S)
                self._loop.unselect(self._sock)
                self._loop.call_later(PAUSE_S, self.begin)
                return
            self._admit(sock, address)

    def _admit(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        source = source_of(address[0])
        refusal = self._gate.admit(source, time.monotonic())
        if refusal:
            sock.close()
            self._note(address, refusal)
            return
        sock.setblocking(False)
        tune(sock)

        def on_done(opening: ListenOpening, failure: Exception | None) -> None:
            self._gate.leave(source, time.monotonic(), is_proved=failure is None)
            if failure is None:
                self._open(opening, address)
            else:
                self._note(address, str(getattr(failure, "strerror", None) or failure))

        ListenOpening(self._loop, sock, self._context, self._credentials, on_done).begin()

    def _open(self, opening: ListenOpening, address: tuple[Any, ...]) -> None:
        assert opening.handshake is not None
        hello = opening.handshake.hello
        assert hello is not None
        # A control end may not say Pong, so it is not asked for a sign of life.
        link = opening.link(Hello, _nobody, _nobody, has_heartbeat=opening.handshake.role is not Role.CONTROL)
        link.address = address
        link.name = f"from {format_address(address)} ({hello.name})"
        verdict = self._ask(link)
        if verdict is None:
            self._note(address, "it is not wanted here")
            link.finish("refused")
            return
        says, link.on_messages, link.on_closed = verdict
        link.decoder = FrameDecoder(says)
        link.decoder.place_chunk = link.place_chunk
        link.begin_with(opening.handshake.rest)

    def _ask(self, link: TlsLink) -> Acceptance | None:
        if self._is_over:
            return None
        try:
            return self._accept(link)
        except Exception:
            _log.exception("distexec: unexpected error on a new link, %r", link)
            return None

    def _note(self, address: tuple[Any, ...], why: str) -> None:
        """Log a refusal, unless the same was just logged, or too many were."""
        if (source_of(address[0]), why) in self._notes:
            self._unnoted += 1
            return
        if not self._notes:
            self._loop.call_later(NOTE_EVERY_S, self._forget_notes)
        if len(self._notes) >= MAX_NOTES:
            self._unnoted += 1
            return
        self._notes.add((source_of(address[0]), why))
        _log.warning("distexec: connection from %s to %s refused: %s", format_address(address),
                     format_address(self.address), why)

    def _forget_notes(self) -> None:
        if self._unnoted:
            _log.warning("distexec: %d more connections to %s refused in the last %g s", self._unnoted,
                         format_address(self.address), NOTE_EVERY_S)
        self._notes.clear()
        self._unnoted = 0


def _nobody(*_args: object) -> None:
    """Stand in until `accept` said who listens to the link."""


def tune(sock: socket.socket) -> None:
    """Set what every TCP link has: no waiting for small packets, and a kernel that notices when the peer is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", KEEPALIVE_IDLE_S), ("TCP_KEEPINTVL", KEEPALIVE_EVERY_S),
                          ("TCP_KEEPCNT", KEEPALIVE_COUNT)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def unanswered_s(sock: socket.socket) -> float:
    """Say for how long the other end's kernel has acknowledged nothing, though it was sent the same data again and again.

    Seconds; 0.0 as long as it answers (it does so for a program that is stopped), and where the system does not say.
    """
    if not hasattr(socket, "TCP_INFO") or not sys.platform.startswith("linux"):
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:  # closed meanwhile, which its link is told
        return 0.0
    if len(info) < _TCP_INFO.size:
        return 0.0
    retransmits, probes, unacked, last_ack_ms = _TCP_INFO.unpack(info)
    return last_ack_ms / 1000 if (unacked and retransmits >= RETRANSMITS) or probes >= PROBES else 0.0


def _bind(address: tuple[str, int]) -> socket.socket:
    host, port = address
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, sockaddr = found[0]
        return socket.create_server(sockaddr[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        code = error.errno or 0
        why = os.strerror(code) if code > 0 else str(error)  # the resolver's codes are negative
        remedy = _BIND_REMEDIES.get(code, "check the address")
        raise OSError(code, f"cannot listen on port {port} of {host or 'every address'}: {why}; {remedy}") from None


def _gone() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "it closed the connection before the secret was proved")


def _addressed(failure: Exception, address: str) -> Exception:
    """Put the address before what happened there."""
    if isinstance(failure, OSError):
        what = failure.strerror or str(failure)
        if isinstance(failure, ConnectionRefusedError):
            what += "; nobody listens there: is distexec-agent running, and is this its port?"
        return type(failure)(failure.errno, f"{address}: {what}")
    if isinstance(failure, DistexecError):
        return type(failure)(f"{address}: {failure}")
    return failure
