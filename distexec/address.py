"""Addresses as users write them, and as sockets want them. The rule: what cannot be an address is refused with its
text."""

from __future__ import annotations

import re
import socket
from typing import Any

__all__ = ["DEFAULT_PORT", "format_address", "own_addresses", "parse_address", "resolve"]

DEFAULT_PORT = 9730

_FORMS = re.compile(r"\[(?P<v6>[^\[\]]+)\](?::(?P<v6_port>\d+))?\Z"
                    r"|(?P<host>[^\s:\[\]/@]+)(?::(?P<port>\d+))?\Z", re.ASCII)


def parse_address(text: str, default_port: int = DEFAULT_PORT, *, lowest_port: int = 1) -> tuple[str, int]:
    """Split "host", "host:port", "[v6]", "[v6]:port" or a bare IPv6 address into host and port.

    `lowest_port` is 0 for an address to listen on, where 0 stands for a free port. Raises ValueError that quotes the
    text and shows the forms.
    """
    text = text.strip()
    if len(text.split()) > 1:
        raise ValueError(f"not an address: {text!r}; separate nodes by commas")
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    match = _FORMS.match(text)
    if match is None or (match["v6"] and not _is_v6(match["v6"])):
        raise ValueError(f"not an address: {text!r}; write host, host:port or [v6]:port")
    port = int(match["v6_port"] or match["port"] or default_port)
    if not lowest_port <= port < 65536:
        raise ValueError(f"not a port: {port} in {text!r}; ports go from {lowest_port} to 65535")
    return match["v6"] or match["host"], port


def resolve(address: tuple[str, int]) -> list[tuple[Any, ...]]:
    """Return the socket addresses of (host, port), best first. Blocks as long as the system's resolver does.

    Raises ValueError that names the host when it does not resolve.
    """
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"host {host!r} does not resolve ({why}); check the name, /etc/hosts and the DNS") from None
    return list(dict.fromkeys(sockaddr for *_kind, sockaddr in found))


def format_address(sockaddr: tuple[Any, ...]) -> str:
    """Write a socket address as `parse_address` reads it."""
    host, port = sockaddr[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_addresses() -> list[str]:
    """List this machine's addresses by which others can reach it, IPv4 first: no loopback, nothing of one link only."""
    import netifaces  # late: only agents that listen everywhere ask

    found = []
    for family in (netifaces.AF_INET, netifaces.AF_INET6):
        for interface in netifaces.interfaces():
            for entry in netifaces.ifaddresses(interface).get(family, ()):
                found.append(str(entry["addr"]).partition("%")[0])
    return [text for text in found if not text.startswith(("127.", "169.254.", "fe80:")) and text != "::1"]


def _is_v6(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except OSError:
        return False
    return True
