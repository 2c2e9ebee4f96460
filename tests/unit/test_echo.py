"""Output of tasks on its way to the program's own stream, whose reader may be slow, gone, or nobody at all."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

import pytest

from distexec import echo
from distexec.echo import Echo, Rate


@contextmanager
def piped() -> Iterator[int]:
    """Give the reader's end of a pipe that is our standard output meanwhile; pytest's capturing rules out a fixture."""
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as stream, redirect_stdout(stream):
        yield reader
    os.close(reader)


def read(reader: int, size: int) -> bytes:
    """Read exactly so much."""
    with open(os.dup(reader), "rb") as file:
        return file.read(size)


def test_what_the_stream_takes_is_written_at_once() -> None:
    """A reader with room → the bytes are there when `write` returns, and no thread is started."""
    with piped() as pipe:
        before = threading.active_count()
        Echo("stdout").write("añb\n".encode())
        assert threading.active_count() == before
        assert os.read(pipe, 100) == "añb\n".encode()


def test_a_reader_that_stands_still_keeps_nobody() -> None:
    """More than the pipe holds → `write` returns; the reader gets all in order once it reads; then the thread is gone."""
    with piped() as pipe:
        out = Echo("stdout")
        pieces = [f"{number:7}".encode() * 4096 for number in range(20)]
        for piece in pieces:
            out.write(piece)
        assert read(pipe, sum(map(len, pieces))) == b"".join(pieces)
        out.close()
        out.write(b"again")
        assert os.read(pipe, 100) == b"again"


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound output is dropped, and the stream says how much."""
    with piped() as pipe:
        monkeypatch.setattr(echo, "BACKLOG_CHARS", 1 << 20)
        out = Echo("stdout")
        for _ in range(64):
            out.write(b"z" * (1 << 17))
        text = b""
        while b"dropped" not in text:
            text += os.read(pipe, 1 << 20)
        kept = text.count(b"z")
        assert 1 << 20 <= kept < 2 << 20
        assert f"{(64 << 17) - kept:,} more characters were printed and dropped".encode() in text
        out.close()


def test_giving_up_ends_the_wait() -> None:
    """`give_up` → `close` does not wait for a reader that never reads."""
    with piped():
        out = Echo("stdout")
        out.write(b"x" * (1 << 20))
        out.give_up()
        out.close()


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_stream_that_is_no_file(stream: TextIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What replaced the stream gets the text; no stream at all is no error."""
    monkeypatch.setattr(sys, "stderr", stream)
    Echo("stderr").write(b"word")
    assert stream is None or stream.getvalue() == "word"  # type: ignore[attr-defined]


def test_a_reader_that_is_gone() -> None:
    """A broken pipe ends the output, and nothing else."""
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w", encoding="utf-8") as stream, redirect_stdout(stream):
        out = Echo("stdout")
        out.write(b"x" * (1 << 20))
        out.close()
    assert not any(thread.name == "distexec-echo" for thread in threading.enumerate())


def test_a_flood_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the burst → it is left out, until there is room again for a second of it."""
    monkeypatch.setattr(echo, "BURST_BYTES", 8000)
    monkeypatch.setattr(echo, "RATE_BYTES_S", 3000)
    rate = Rate(100.0)
    assert [rate.allows(3000, 100.0) for _ in range(3)] == [True, True, False]
    assert not rate.allows(1, 100.0), "a little is left out too until there is enough"
    assert rate.allows(1000, 101.0)
    assert not rate.allows(5000, 101.0)
    assert rate.allows(8000, 200.0)
    assert not rate.allows(9000, 1e9)


def test_what_was_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of its own, where it is missing."""
    monkeypatch.setattr(echo, "BURST_BYTES", 10)
    monkeypatch.setattr(sys, "stdout", box := io.StringIO())
    out = Echo("stdout")
    out.write(b"begun")
    out.write(b"x" * 2000)
    out.write(b"y" * 345)
    out.close()
    assert box.getvalue().startswith("begun\n[distexec: 2,345 bytes are left out here: tasks print more than 4 MiB a second")
    assert box.getvalue().endswith("]\n")
