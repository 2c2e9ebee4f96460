"""Laws of what is kept of a worker's stderr and crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st

from distexec.lastwords import TAIL_BYTES, WORDS_BYTES, Echo, LastWords, shorten


def new_words() -> LastWords:
    return LastWords(memoryview(bytearray(WORDS_BYTES)))


@given(st.lists(st.integers(0, 2 * TAIL_BYTES + 1), max_size=6))
def test_the_end_is_kept(sizes: list[int]) -> None:
    """Of whatever was printed in whatever pieces, the last bytes are there, in order."""
    words, said = new_words(), b""
    for number, size in enumerate(sizes):
        piece = bytes((65 + (number + at) % 26) for at in range(size))
        words.keep(piece)
        said += piece
    assert words.printed == said[-TAIL_BYTES:].decode()


def test_nothing_was_said() -> None:
    """Of a silent worker there is nothing."""
    assert (new_words().printed, new_words().stacks) == ("", "")


@contextmanager
def pipe_for_stderr() -> Iterator[int]:
    """Put a pipe in the place of descriptor 2; give its other end."""
    saved = os.dup(2)
    here, there = os.pipe()
    os.dup2(there, 2)
    os.close(there)
    try:
        yield here
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(here)


def test_an_echo_writes_and_keeps() -> None:
    """What is printed arrives at descriptor 2, and is kept; without the memory it still arrives."""
    words = new_words()
    echo = Echo(words)
    with pipe_for_stderr() as stderr:
        assert echo.write(b"first\n") == 6
        assert os.read(stderr, 100) == b"first\n"
        assert words.printed == "first\n"
        words.close()
        echo.write(b"second\n")
        assert os.read(stderr, 100) == b"second\n"
        assert (echo.fileno(), echo.isatty()) == (2, False)


def test_a_crash_keeps_its_beginning() -> None:
    """Stacks too long to keep begin with the place of the crash: that is kept, with the end of what came before."""
    stacks = "Fatal Python error: Segmentation fault\n" + "  File x\n" * 1000
    kept = shorten("old\n" * 1000 + "last words\n" + stacks)
    assert "last words\nFatal Python error: Segmentation fault\n  File x" in kept
    assert len(kept) <= TAIL_BYTES * 5 // 4
    assert shorten("old\n" * 2000) == "old\n" * (TAIL_BYTES // 4)
    short = "last words\nFatal Python error: Aborted\n"
    assert shorten("x" * TAIL_BYTES + short).endswith(short)
