"""Who may connect to a listener while nobody knows yet who it is. Pure: sources, times and decisions.

A stranger costs a TLS handshake and some memory, so there is a limit to how many there are at once, to how many of
one source, and to how fast one source may come again. Who proves the secret gets its token back: an honest cluster
that starts on one machine is not slowed down.
"""

from __future__ import annotations

import ipaddress

__all__ = ["Gate", "source_of"]

MAX_STRANGERS = 64
"""Connections at once that have not proved the secret."""

MAX_STRANGERS_OF_ONE = 32
"""Of these, how many from one source: one source alone must not shut out the others."""

BURST = 64.0
"""Connections that a source may waste at once. Smaller: a wrong secret on a large machine looks like an attack."""

REFILL_PER_S = 8.0
"""Wasted connections per second and source afterwards. Larger: guessing and TLS handshakes take more of our time."""

MAX_SOURCES = 4096
"""Sources remembered. Beyond that the one seen longest ago is forgotten, that is, treated as new."""


def source_of(host: str) -> str:
    """Return what counts as one source: an IPv4 address, or an IPv6 network of 64 bits, which one machine may own."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)


class Gate:
    """Admits strangers. Each admitted one must be followed by one `leave`."""

    def __init__(self) -> None:
        self.strangers: dict[str, int] = {}  # source: how many are in the making
        self._buckets: dict[str, tuple[float, float]] = {}  # source: (tokens, when); the longest unseen first

    def admit(self, source: str, now: float) -> str:
        """Return "" and count the stranger in, or why it is refused."""
        if sum(self.strangers.values()) >= MAX_STRANGERS:
            return f"{MAX_STRANGERS} connections have not proved the secret yet"
        of_one = self.strangers.get(source, 0)
        if of_one >= MAX_STRANGERS_OF_ONE:
            return f"{of_one} connections from there have not proved the secret yet"
        tokens = self._tokens(source, now)
        if tokens < 1.0:
            return "too many connections from there came to nothing"
        self._keep(source, tokens - 1.0, now)
        self.strangers[source] = of_one + 1
        return ""

    def leave(self, source: str, now: float, *, is_proved: bool) -> None:
        """Count a stranger out: it has proved the secret, or is gone."""
        left = self.strangers.pop(source) - 1
        if left:
            self.strangers[source] = left
        if is_proved:
            self._keep(source, self._tokens(source, now) + 1.0, now)

    def _tokens(self, source: str, now: float) -> float:
        tokens, seen = self._buckets.get(source, (BURST, now))
        return min(BURST, tokens + (now - seen) * REFILL_PER_S)

    def _keep(self, source: str, tokens: float, now: float) -> None:
        self._buckets.pop(source, None)
        if len(self._buckets) >= MAX_SOURCES:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[source] = (min(BURST, tokens), now)
