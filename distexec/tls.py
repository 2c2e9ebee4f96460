"""What TLS adds to a link: certificates made at start-up, records, heartbeats.

    messages ─► frames ─► SSL object ─► memory ─► socket ─► memory ─► SSL object ─► decoder

The SSL object works on memory, not on the socket: one system call then moves many records, and a write never has to be
repeated with the same bytes. It is not safe for two threads at once, so the link's lock is around every use of it. The
certificates prove nothing by themselves: the handshake binds the secret to the one that was shown.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import socket
import ssl
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import AuthenticationFailed, ProtocolError
from .iothread import IoThread, Timer
from .link import HEARTBEAT_S, Link, OnClosed, OnMessages
from .messages import Message, Ping
from .protocol import FrameDecoder, pack

__all__ = ["ServerContext", "TlsLink", "TlsStream", "explain", "make_client_context", "make_server_context"]

RECORD_BYTES = 16 << 10
"""The most plaintext in one TLS record (RFC 8446 §5.1)."""

WRITE_BYTES = 256 << 10
"""Encrypted before it is handed to the socket. Smaller: more system calls. Larger: it leaves the processor's cache."""

VALID_FOR = datetime.timedelta(days=3650)  # nobody checks it, and a program may run for years


@dataclass(frozen=True)
class ServerContext:
    """What a listener shows: an SSL context, and SHA-256 of the certificate in it."""

    context: ssl.SSLContext
    certificate_digest: bytes


def make_server_context(certificate: str | os.PathLike[str] | None = None, key: str | os.PathLike[str] | None = None,
                        authority: str | os.PathLike[str] | None = None) -> ServerContext:
    """Make what a listener shows: by default a fresh self-signed certificate whose key nobody else ever sees.

    Args:
        certificate: PEM file of one's own certificate and its chain.
        key: PEM file of its private key, if it is not in the same file.
        authority: PEM file of the authority that must have signed the certificates of those who connect.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # links are not resumed: every one is proved anew
    if certificate is None:
        chain = _make_certificate()
        _load_chain(context, chain)
        pem = chain.decode("ascii")
    else:
        context.load_cert_chain(certificate, key)
        pem = Path(certificate).read_text("ascii")
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    begin = pem.index("-----BEGIN CERTIFICATE-----")
    end = pem.index("-----END CERTIFICATE-----", begin) + len("-----END CERTIFICATE-----")
    return ServerContext(context, hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem[begin:end])).digest())


def make_client_context(certificate: str | os.PathLike[str] | None = None, key: str | os.PathLike[str] | None = None,
                        authority: str | os.PathLike[str] | None = None) -> ssl.SSLContext:
    """Make what a dialler uses; with `authority`, the listener's certificate must be signed by it as well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the proofs say who it is; nodes have no names that an authority knows
    context.verify_mode = ssl.CERT_NONE
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


@functools.cache
def default_client_context() -> ssl.SSLContext:
    """Return the context of diallers without certificates of their own."""
    return make_client_context()


def _make_certificate() -> bytes:
    from cryptography import x509  # late: 50 ms that only listeners pay
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "distexec")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number())
                   .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + VALID_FOR)
                   .sign(key, hashes.SHA256()))
    return certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _load_chain(context: ssl.SSLContext, chain: bytes) -> None:
    """Load certificate and key from memory; `ssl` reads only files, so there is a private one for a moment."""
    fd, path = tempfile.mkstemp(prefix="distexec-")  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(chain)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)


def explain(error: ssl.SSLError) -> Exception:
    """Make of a TLS failure during the handshake the exception that says what it means."""
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, ssl.SSLCertVerificationError) or "certificate" in reason or "unknown ca" in reason:
        return AuthenticationFailed(f"a certificate was not accepted ({reason}); both ends need certificates signed "
                                    "by the configured authority")
    return ProtocolError(f"TLS 1.3 could not be agreed on ({reason}); is another program using this port?")


class TlsStream:
    """An SSL object between two memory buffers."""

    def __init__(self, context: ssl.SSLContext, *, is_server: bool) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=is_server)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt; the records are then in `outgoing`."""
        sent = self.tls.write(data)
        while sent < len(data):  # it may take one record at a time
            sent += self.tls.write(memoryview(data)[sent:])


class TlsLink(Link):
    """A link over TCP and TLS, both ends of which have proved the secret."""

    def __init__(self, loop: IoThread, sock: socket.socket, stream: TlsStream, decoder: FrameDecoder,
                 on_messages: OnMessages, on_closed: OnClosed, *, has_heartbeat: bool = True) -> None:
        super().__init__(loop, sock, decoder, on_messages, on_closed)
        self._stream = stream
        self._has_heartbeat = has_heartbeat
        self._heard_bytes = -1  # bytes_in when it was last looked at
        self._heartbeat: Timer | None = None
        self._record = memoryview(bytearray(RECORD_BYTES))
        self._rest = b""  # plaintext that came before the link began

    def begin_with(self, rest: bytes) -> None:
        """Start to read; `rest` came behind the peer's Hello."""
        self.begin()
        if self._has_heartbeat:
            self._beat()
        self._rest = rest
        if self.is_open:
            self._take(0)  # that, and what was received but not yet decrypted

    def _beat(self) -> None:
        if self._is_ended:
            return
        is_silent = self._heard_bytes == self.bytes_in and not self.pending_bytes  # who does not read would not hear it
        if is_silent or self._heard_bytes < 0:
            self.send([Ping(time.monotonic_ns())])  # at once for the round-trip time, then whenever it was silent
        self._heard_bytes = self.bytes_in
        self._heartbeat = self.loop.call_later(HEARTBEAT_S, self._beat)

    # ---- writing, lock held

    def _write_messages(self, messages: list[Message]) -> None:
        if self._broken:
            return
        outgoing = self._stream.outgoing
        for piece in pack(messages):
            self._stream.write(piece)
            if outgoing.pending >= WRITE_BYTES:
                self._write(outgoing.read())
        if outgoing.pending:
            self._write(outgoing.read())

    def _say_farewell(self) -> None:
        if self._broken:
            return
        with contextlib.suppress(ssl.SSLError):  # it wants the peer's farewell too, which nobody waits for
            self._stream.tls.unwrap()
        self._write(self._stream.outgoing.read())

    # ---- I/O thread

    def _receive(self) -> tuple[int, bool]:
        size = self.sock.recv_into(self.loop.scratch)
        return size, size < len(self.loop.scratch)

    def _decode(self, size: int) -> list[Message]:
        messages: list[Message] = []
        if self._rest:
            rest, self._rest = self._rest, b""
            messages = self.decoder.feed(rest)
        with self._lock:  # held elsewhere only for a write that does not block
            self._stream.incoming.write(self.loop.scratch[:size])
            is_more = True
            while is_more:
                space = self.decoder.space()
                target = self._record if space is None else space
                count = self._decrypt(target)
                is_more = count == len(target)
                batch = self.decoder.feed(target[:count]) if space is None else self.decoder.grew(count)
                messages = messages + batch if messages else batch
            if self._stream.outgoing.pending:  # the answer to a change of keys
                self._write(self._stream.outgoing.read())
        if self._outbox:  # who found the lock taken left the messages to us
            self.flush()
        return messages

    def _decrypt(self, target: memoryview) -> int:
        """Fill the target as far as records are here; return how far. Lock held."""
        read, incoming, room = self._stream.tls.read, self._stream.incoming, len(target)
        count = 0
        try:
            while count < room:
                count += read(room - count, target[count:] if count else target)  # type: ignore[operator]
                if count < room and not incoming.pending:
                    break  # that was the last record; asking again would cost an exception
        except ssl.SSLWantReadError:
            pass  # the rest of a record is still under way
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._end = "closed by the other end"
        except ssl.SSLError as error:
            self._end = f"TLS failed: {error.reason or error}"
        return count

    def finish(self, reason: str) -> None:
        """Close at once."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        super().finish(reason)
