"""Links, loops and listeners for the tests of the transport, and what they saw."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Any

from distexec.auth import Secret
from distexec.handshake import Credentials
from distexec.messages import FromDownstream, FromUpstream, Message, Role, Run
from distexec.tls import ServerContext, make_server_context
from distexec.transport import Link, Loop
from tests.leaks import wait_until

SECRET = Secret(bytes(range(32)))
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
ANYTHING = FromUpstream | FromDownstream

_contexts: list[ServerContext] = []


def server_context() -> ServerContext:
    """Return one context for all tests: making keys takes time."""
    if not _contexts:
        _contexts.append(make_server_context())
    return _contexts[0]


def credentials(name: str, secret: Secret = SECRET, python: str = PYTHON) -> Credentials:
    """Return what a process of that name would show."""
    return Credentials(secret, name, os.urandom(16), python, "0.1", 3, "linux-x86_64")


class Witness:
    """The callbacks of links, and what they were called with."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.batches = 0
        self.reasons: list[str] = []
        self.links: list[Link] = []
        self.failures: list[Exception] = []

    def on_messages(self, _link: Link, messages: list[Message]) -> None:
        """Note a batch."""
        self.messages += messages
        self.batches += 1

    def on_closed(self, _link: Link, reason: str) -> None:
        """Note an end."""
        self.reasons.append(reason)

    def accept(self, link: Link) -> tuple[UnionType | type, Any, Any]:
        """Note a link that was listened for."""
        self.links.append(link)
        return ANYTHING, self.on_messages, self.on_closed

    def saw(self, count: int) -> bool:
        """Wait until so many messages came."""
        return wait_until(lambda: len(self.messages) >= count)

    @property
    def is_closed(self) -> bool:
        """Wait until a link ended."""
        return wait_until(lambda: self.reasons)


class Echo(Witness):
    """Sends every batch back."""

    def on_messages(self, link: Link, messages: list[Message]) -> None:
        """Note a batch and send it back."""
        super().on_messages(link, messages)
        link.send(messages)


@contextmanager
def running_loop(name: str = "io") -> Iterator[Loop]:
    """A loop that runs within the block."""
    loop = Loop(f"test-{name}")
    loop.start()
    try:
        yield loop
    finally:
        loop.stop()


def dial(loop: Loop, address: tuple[Any, ...], witness: Witness, role: Role = Role.UPSTREAM,
         who: Credentials | None = None, timeout_s: float = 5.0) -> Link:
    """Dial and wait; return the link, or raise what it failed with."""
    loop.dial([address], role, who or credentials("dialler"), ANYTHING, witness.links.append, witness.failures.append,
              witness.on_messages, witness.on_closed, timeout_s)
    assert wait_until(lambda: witness.links or witness.failures), "neither on_open nor on_failed was called"
    if witness.failures:
        raise witness.failures.pop()
    return witness.links[0]


def unix_pair(size_bytes: int | None = None) -> tuple[socket.socket, socket.socket]:
    """A socketpair, with small buffers if a size is given."""
    pair = socket.socketpair()
    for sock in pair if size_bytes else ():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes or 0)
    return pair


def runs(count: int, start: int = 0, size_bytes: int = 20) -> list[Message]:
    """Messages that differ in their number, of some size."""
    return [Run(1, seq, 0, 0, bytes(size_bytes)) for seq in range(start, start + count)]


def adopted(loop: Loop, one: Witness, other: Witness, size_bytes: int | None = None,
            fds: bool = False) -> tuple[Link, Link]:
    """Two links over a socketpair, on one loop."""
    left, right = unix_pair(size_bytes)
    return (loop.adopt(left, ANYTHING, one.on_messages, one.on_closed, fds=fds),
            loop.adopt(right, ANYTHING, other.on_messages, other.on_closed, fds=fds))


def secured(loop: Loop, one: Witness, other: Witness) -> tuple[Link, Link]:
    """Two links over TLS, on one loop: the dialler's and the listener's."""
    listener = loop.listen(("127.0.0.1", 0), credentials("listener"), server_context(), other.accept)
    link = dial(loop, listener.address, one)
    assert wait_until(lambda: other.links)
    return link, other.links[0]
