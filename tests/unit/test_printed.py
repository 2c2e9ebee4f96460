"""What is kept of what an attempt printed, and its division into lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec.messages import Stream
from distexec.printed import KEPT_BYTES, LINE_BYTES, SHRUNK_BYTES, Lines, Printed, whole_characters

OUT, ERR = Stream.STDOUT, Stream.STDERR


def printed(*pieces: bytes) -> Printed:
    """What is kept of these, written to the standard output."""
    kept = Printed(1)
    for piece in pieces:
        assert kept.add(OUT, piece) == (piece, 0)
    return kept


def test_little_is_kept_whole() -> None:
    """Up to the sum of both bounds nothing is missing, on either stream."""
    kept = printed(b"a" * KEPT_BYTES, b"b" * KEPT_BYTES)
    kept.add(ERR, "naïve".encode())
    assert kept.text(OUT) == "a" * KEPT_BYTES + "b" * KEPT_BYTES
    assert kept.text(ERR) == "naïve"


@pytest.mark.parametrize("size", [1, 1000, KEPT_BYTES, 1 << 20])
def test_of_much_the_middle_is_missing(size: int) -> None:
    """Beginning and end are there, between them one line says how much is not, whatever the pieces."""
    data = b"".join(b"line %07d\n" % number for number in range(400_000))
    kept = Printed(1)
    for start in range(0, len(data), size) if size > 1 else (0,):
        kept.add(OUT, data[start:start + size] if size > 1 else data)
    text = kept.text(OUT).encode()
    head, note, tail = text.partition(f"[distexec: {len(data) - 2 * KEPT_BYTES:,} bytes are left out here]\n".encode())
    assert note
    assert head.rstrip(b"\n") == data[:KEPT_BYTES].rstrip(b"\n")
    assert tail == data[-KEPT_BYTES:]
    assert kept.size_bytes == 2 * KEPT_BYTES
    assert kept.count(OUT) == len(data)


def test_characters_are_not_cut() -> None:
    """Where the middle is missing, no half of a character is shown."""
    text = printed("€".encode() * 100_000).text(OUT)
    assert "\ufffd" not in text
    assert printed(b"\xff\xfe").text(OUT) == "\ufffd\ufffd"


def test_what_is_said_twice_counts_once() -> None:
    """An offset before the last byte: only what is new counts."""
    kept = printed(b"0123456789")
    assert kept.add(OUT, b"0123456789", 0) == (b"", 0)
    assert kept.add(OUT, b"56789abc", 5) == (b"abc", 0)
    assert kept.text(OUT) == "0123456789abc"


def test_a_gap_is_told() -> None:
    """An offset beyond the last byte: what is missing is counted, and said where it is."""
    kept = printed(b"begun\n")
    assert kept.add(OUT, b"end", 106) == (b"end", 100)
    assert kept.text(OUT) == "begun\n[distexec: 100 bytes are left out here]\nend"
    assert kept.add(OUT, b"!", 210) == (b"!", 101)
    assert kept.text(OUT) == "begun\n[distexec: 204 bytes are left out here]\n!"


@given(st.lists(st.binary(min_size=1, max_size=KEPT_BYTES), max_size=8), st.integers(0, 8 * KEPT_BYTES))
def test_what_is_kept_can_be_said_again(pieces: list[bytes], start: int) -> None:
    """The pieces from any offset on, taken in elsewhere, make the same text; and those who have heard some lose nothing."""
    whole = b"".join(pieces)
    kept = printed(*pieces)
    again = Printed(1)
    for offset, piece in kept.pieces(OUT, 0):
        assert whole[offset:offset + len(piece)] == piece
        again.add(OUT, piece, offset)
    assert again.text(OUT) == kept.text(OUT)
    heard = Printed(1)
    heard.add(OUT, whole[:start])
    for offset, piece in kept.pieces(OUT, min(start, len(whole))):
        heard.add(OUT, piece, offset)
    assert heard.count(OUT) == len(whole)
    if len(whole) <= 2 * KEPT_BYTES:
        assert heard.text(OUT) == kept.text(OUT)


def test_shrinking_keeps_both_ends() -> None:
    """What nobody asks for becomes little, and says what is missing; what was little already stays."""
    for size in (1000, KEPT_BYTES, 10 * KEPT_BYTES):
        data = bytes(ord("a") + index % 26 for index in range(size))
        kept = printed(data)
        kept.shrink()
        text = kept.text(OUT).encode()
        assert kept.size_bytes <= 2 * SHRUNK_BYTES
        assert text.startswith(data[:1000])
        assert text.endswith(data[-1000:])
        kept.add(OUT, b"more")
        assert kept.text(OUT).endswith("more")
        assert kept.size_bytes <= 2 * SHRUNK_BYTES


def test_lines_come_whole() -> None:
    """Nothing is given before its line ends; carriage returns end lines too; the rest comes on request."""
    lines = Lines()
    assert lines.add(b"be") == b""
    assert lines.is_waiting
    assert lines.add(b"gun\nand\nno") == b"begun\nand\n"
    assert lines.add(b"t\r") == b"not\r"
    assert not lines.is_waiting
    assert lines.add(b"rest") == b""
    assert lines.rest() == b"rest"
    assert lines.rest() == b""


def test_a_line_without_end_is_given_in_parts() -> None:
    """Beyond a bound it is not waited for, and no character is cut."""
    lines = Lines()
    data = "€".encode() * LINE_BYTES
    given_bytes = b""
    for start in range(0, len(data), 1000):
        ready = lines.add(data[start:start + 1000])
        ready.decode()
        given_bytes += ready
    assert len(data) - len(given_bytes) <= LINE_BYTES
    assert given_bytes + lines.rest() == data


@given(st.text(max_size=5), st.integers(0, 3))
def test_whole_characters(text: str, cut: int) -> None:
    """Of what is cut in a character the part is left out, of whole text nothing."""
    data = text.encode()
    assert whole_characters(data) == data
    part = data[:len(data) - cut]
    assert whole_characters(part).decode() == part.decode(errors="ignore")
