"""The door to all connections: a `Loop` adopts, dials and listens, and gives `Link`s.

    loop.adopt(socketpair end)          ─► Link                       local workers
    loop.dial(addresses, role, ...)     ─► Dial, then on_open(link)   ╮ TLS, both ends proved: `opening`
    loop.listen(address, ..., accept)   ─► Listener, accept(link)     ╯

The thread itself is in `iothread`, what a link does in `link`, what TLS adds in `tls`. TLS is imported only by the
first dial or listen, since an executor with local workers needs none.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any

from .address import parse_address, resolve
from .iothread import IoThread, Timer
from .link import HEARTBEAT_S, FdLink, Link, OnClosed, OnMessages
from .messages import Role
from .protocol import FrameDecoder

if TYPE_CHECKING:
    import ssl

    from .handshake import Credentials
    from .opening import Accept, Dial, Listener
    from .tls import ServerContext

__all__ = ["HEARTBEAT_S", "Link", "Loop", "OnClosed", "OnMessages", "Timer", "parse_address", "resolve"]


class Loop(IoThread):
    """One I/O thread with all links of a process.

    Args:
        name: the thread's name.
    """

    def adopt(self, sock: socket.socket, says: UnionType | type, on_messages: OnMessages, on_closed: OnClosed, *,
              fds: bool = False) -> Link:
        """Make a link of a connected socketpair or Unix socket, which from now on belongs to the link. Any thread.

        Args:
            says: what the peer may utter.
            on_messages: called with the link and each batch received.
            on_closed: called once, with the link and a sentence, after everything received was delivered.
            fds: whether descriptors may travel on it, both ways; a Unix socket then.
        """
        kind = FdLink if fds else Link
        link = kind(self, sock, FrameDecoder(says), on_messages, on_closed)
        self.run_here(link.begin)
        return link

    def dial(self, addresses: Sequence[tuple[Any, ...]], role: Role, credentials: Credentials, says: UnionType | type,
             on_open: Callable[[Any], object], on_failed: Callable[[Exception], object], on_messages: OnMessages,
             on_closed: OnClosed, timeout_s: float = 5.0, context: ssl.SSLContext | None = None) -> Dial:
        """Connect to the first of `addresses` that answers, prove the secret both ways, exchange Hellos. Any thread.

        Then `on_open(link)`, or `on_failed(exception)`: OSError (nobody listens, no route), TimeoutError,
        AuthenticationFailed, IncompatibleNode, ProtocolError. The returned dial can be cancelled: then neither is
        called.

        Args:
            addresses: as `resolve` returns them.
            role: what this end is on the link.
            context: for certificates of one's own, from `tls.make_client_context`.
        """
        from .opening import Dial
        dial = Dial(self, addresses, role, credentials, says, on_open, on_failed, on_messages, on_closed, timeout_s,
                    context)
        self.run_here(dial.begin)
        return dial

    def listen(self, address: tuple[str, int], credentials: Credentials, context: ServerContext,
               accept: Accept) -> Listener:
        """Listen on (host, port); host "" is every interface, port 0 takes a free one. Any thread.

        `accept(link)` is called for each link whose peer proved the secret and said Hello; `link.role` is what the peer
        wants to be. It returns (says, on_messages, on_closed), or None to refuse.
        Raises OSError naming the port and the remedy when it cannot be had.
        """
        from .opening import Listener
        listener = Listener(self, address, credentials, context, accept)
        self.run_here(listener.begin)
        return listener
