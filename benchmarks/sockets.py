"""The measure of what a connection can carry: one process sends 50 MB to another over loopback, bare and with TLS."""

from __future__ import annotations

import multiprocessing
import socket
import ssl
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.measures import LARGE_BYTES, Numbers


def bare_sockets(calls: int = 6) -> Numbers:
    """MB per second of 50 MB messages, each answered with a byte, over TCP and over TLS 1.3."""
    with tempfile.TemporaryDirectory() as directory:
        certificate = make_certificate(Path(directory))
        return {"tcp_mb_per_s": _speed(None, calls), "tls_mb_per_s": _speed(certificate, calls)}


def _speed(certificate: str | None, calls: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = multiprocessing.get_context("fork").Process(target=_receive, args=(listener, certificate, calls))
        receiver.start()
        with connect(listener.getsockname(), certificate) as sock:
            message = memoryview(bytes(LARGE_BYTES))
            times = []
            for _ in range(calls):
                began = time.perf_counter()
                sock.sendall(message)
                sock.recv(1)
                times.append(time.perf_counter() - began)
        receiver.join()
    return LARGE_BYTES / 1e6 / statistics.median(times)


def connect(address: tuple[str, int], certificate: str | None) -> socket.socket:
    """Connect; with TLS, if there is a certificate."""
    sock = socket.create_connection(address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if certificate is None:
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificate)
    return context.wrap_socket(sock)


def _receive(listener: socket.socket, certificate: str | None, calls: int) -> None:
    sock = accept(listener, certificate)
    buffer = memoryview(bytearray(LARGE_BYTES))
    for _ in range(calls):
        got = 0
        while got < LARGE_BYTES:
            got += sock.recv_into(buffer[got:])
        sock.sendall(b"k")
    sock.close()


def accept(listener: socket.socket, certificate: str | None) -> socket.socket:
    """Take a connection; with TLS, if there is a certificate."""
    sock, _ = listener.accept()
    if certificate is None:
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    return context.wrap_socket(sock, server_side=True)


def make_certificate(directory: Path) -> str:
    """Make a key and a certificate for it, and give the path of both."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "benchmark")])
    now = datetime.now(UTC)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
                   .sign(key, hashes.SHA256()))
    path = directory / "certificate.pem"
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                       serialization.NoEncryption())
                     + certificate.public_bytes(serialization.Encoding.PEM))
    return str(path)
