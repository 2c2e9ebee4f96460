"""Addresses as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec.address import format_address, parse_address, resolve


@pytest.mark.parametrize(("text", "expected"), [
    ("node1", ("node1", 9730)), ("node1:99", ("node1", 99)), (" node1.example.org:99 ", ("node1.example.org", 99)),
    ("10.0.0.7", ("10.0.0.7", 9730)), ("10.0.0.7:65535", ("10.0.0.7", 65535)), ("[::1]", ("::1", 9730)),
    ("[::1]:99", ("::1", 99)), ("fe80::1%eth0", ("fe80::1%eth0", 9730)), ("[fe80::1%eth0]:99", ("fe80::1%eth0", 99)),
])
def test_forms(text: str, expected: tuple[str, int]) -> None:
    """Host, host:port, [v6]:port and a bare IPv6 address are read; without a port it is ours."""
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", ":", ":99", "node1:", "node1:http", "node1:-1", "a b", "[::1", "::1]",
                                  "[node1]:9",
                                  "1:2:3", "http://node1", "user@node1", "[]:99", "node1:9\n7", "node1:٩"])
def test_other_forms_are_refused(text: str) -> None:
    """What is no address is refused, quoted, with the forms."""
    with pytest.raises(ValueError, match="not an address"):
        parse_address(text)


@pytest.mark.parametrize("text", ["node1:0", "node1:65536", "[::1]:99999999999"])
def test_ports_have_a_range(text: str) -> None:
    """A port outside 1 to 65535 is refused as such."""
    with pytest.raises(ValueError, match="not a port"):
        parse_address(text)


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """There is no third way out."""
    try:
        host, port = parse_address(text)
    except ValueError:
        return
    assert host
    assert 0 < port < 65536


def test_resolve_literals() -> None:
    """Numeric addresses resolve to themselves, and are written as they are read."""
    assert [address[:2] for address in resolve(("127.0.0.1", 99))] == [("127.0.0.1", 99)]
    assert format_address(("::1", 99, 0, 0)) == "[::1]:99"
    assert parse_address(format_address(("::1", 99, 0, 0))) == ("::1", 99)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300, "a..b"])
def test_unknown_hosts_are_named(host: str) -> None:
    """A host that does not resolve is a ValueError that names it."""
    with pytest.raises(ValueError, match=f"{host}.*does not resolve"):
        resolve((host, 99))
