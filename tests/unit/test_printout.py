"""What tasks print, at the client: with their futures, and shown line by line; the loop and the streams are stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from distexec import printout
from distexec.future import ClusterFuture
from distexec.messages import Stream
from distexec.printed import SHRUNK_BYTES
from distexec.printout import EchoMode, Printout

OUT, ERR = Stream.STDOUT, Stream.STDERR


class FakeLoop:
    """Calls when it is told to."""

    def __init__(self) -> None:
        self.later: list[Callable[[], object]] = []

    def is_current(self) -> bool:
        """Always."""
        return True

    def call_later(self, _delay_s: float, fn: Callable[[], object]) -> None:
        """Keep it."""
        self.later.append(fn)

    def pass_time(self) -> None:
        """Call what is due."""
        due, self.later = self.later, []
        for fn in due:
            fn()


class Rig:
    """A root with some tasks, and what was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: EchoMode = True, capture: bool | None = None) -> None:
        self.shown = {"stdout": b"", "stderr": b""}
        monkeypatch.setattr(printout, "Echo", lambda name: SimpleNamespace(
            write=lambda data: self.shown.update({name: self.shown[name] + data}), close=lambda: None, give_up=lambda: None))
        self.loop = FakeLoop()
        self.session = SimpleNamespace(tasks={})
        self.printout = Printout(self)  # type: ignore[arg-type]
        self.printout.configure(mode, capture)

    def task(self, seq: int, attempt: int = 1) -> ClusterFuture[Any]:
        """A task begins, or an attempt of it."""
        known = self.session.tasks.get(seq)
        future: ClusterFuture[Any] = known.owner if known else ClusterFuture()
        self.session.tasks[seq] = SimpleNamespace(run=SimpleNamespace(seq=seq, attempt=attempt), owner=future)
        return future

    def end(self, seq: int) -> None:
        """It ends."""
        self.printout.ended([(self.session.tasks.pop(seq), None)])  # type: ignore[list-item]

    def take(self, seq: int, data: bytes, stream: Stream = OUT, attempt: int | None = 1, offset: int | None = None,
             node: str = "n") -> None:
        """It prints."""
        self.printout.take(node, seq, stream, data, attempt, offset)

    @property
    def out(self) -> str:
        """What was shown on the standard output."""
        return self.shown["stdout"].decode()


def test_lines_are_shown_when_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks write piece by piece → lines come whole; what is not ended is shown with the task's end."""
    rig = Rig(monkeypatch)
    one, two = rig.task(1), rig.task(2)
    rig.take(1, b"on")
    rig.take(2, b"tw")
    rig.take(1, b"e\nrest")
    rig.take(2, b"o\n")
    assert rig.out == "one\ntwo\n"
    rig.end(2)
    assert rig.out == "one\ntwo\n"
    rig.end(1)
    assert rig.out == "one\ntwo\nrest"
    assert (one.stdout, two.stdout, two.stderr) == ("one\nrest", "two\n", "")
    assert not rig.printout.printing


def test_a_prompt_is_shown_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line without its end is shown once, and goes on where it was."""
    rig = Rig(monkeypatch)
    rig.task(1)
    rig.take(1, b"a...")
    rig.loop.pass_time()
    assert rig.out == "a..."
    rig.loop.pass_time()
    rig.take(1, b"b\n")
    assert rig.out == "a...b\n"
    assert len(rig.loop.later) == 0


def test_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One before each line, none within; who comes between begins a line of its own; every line is ended."""
    rig = Rig(monkeypatch, "prefix")
    for seq in (1, 2):
        rig.task(seq)
    rig.take(1, b"a\nb\n50%\r")
    rig.take(1, b"go")
    rig.loop.pass_time()
    rig.take(1, b"ing")
    rig.loop.pass_time()
    rig.take(2, b"between\n")
    rig.take(1, b" on\n")
    rig.take(0, b"nobody\n")
    rig.take(9, b"long gone")
    rig.take(2, b"no end")
    rig.end(2)
    assert rig.out == ("[n:1] a\n[n:1] b\n[n:1] 50%\r[n:1] going\n[n:2] between\n[n:1]  on\n[n] nobody\n[n:9] long gone\n"
                       "[n:2] no end\n")


def test_nothing_is_shown_but_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`echo=False`."""
    rig = Rig(monkeypatch, False)
    future = rig.task(1)
    rig.take(1, b"word")
    rig.end(1)
    rig.take(9, b"late")
    assert (rig.out, future.stdout) == ("", "word")


def test_nothing_is_kept_but_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`capture=False`."""
    rig = Rig(monkeypatch, True, False)
    future = rig.task(1)
    rig.take(1, b"word")
    rig.end(1)
    assert (rig.out, future.stdout) == ("word", None)


def test_what_is_said_again_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cut link; and a gap is told on stderr."""
    rig = Rig(monkeypatch)
    future = rig.task(1)
    rig.take(1, b"one\ntwo\n", offset=0)
    rig.take(1, b"one\ntwo\nthree\n", offset=0)
    rig.take(1, b"end\n", offset=114)
    assert rig.out == "one\ntwo\nthree\nend\n"
    assert rig.shown["stderr"] == b"[distexec: node 'n': 100 bytes printed there are missing before this line]\n"
    assert future.stdout == "one\ntwo\nthree\n[distexec: 100 bytes are left out here]\nend\n"


def test_each_attempt_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The future has the last one's; an earlier one that is heard late is only shown; a silent last one printed nothing."""
    rig = Rig(monkeypatch)
    future = rig.task(1)
    rig.take(1, b"first", attempt=1, offset=0)
    rig.task(1, attempt=2)
    rig.take(1, b"second\n", attempt=2, offset=0)
    rig.take(1, b"late\n", attempt=1, offset=5)
    assert rig.out == "firstsecond\nlate\n"
    assert future.stdout == "second\n"
    rig.task(1, attempt=3)
    rig.end(1)
    assert future.printed is None


def test_futures_together_keep_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the oldest that still lives keeps little; those nobody holds do not count."""
    monkeypatch.setattr(printout, "KEPT_TOTAL_BYTES", 1_000_000)
    rig = Rig(monkeypatch, False)

    def ended(seq: int) -> ClusterFuture[Any]:
        future = rig.task(seq)
        rig.take(seq, b"x" * 100_000)
        rig.end(seq)
        return future

    held = [ended(seq) for seq in range(1, 10)]
    for seq in range(100, 200):
        ended(seq)
    gc.collect()
    assert all(len(future.stdout or "") == 100_000 for future in held)
    more = [ended(seq) for seq in range(200, 220)]
    assert all(len(future.stdout or "") < 3 * SHRUNK_BYTES for future in held)
    assert len(more[-1].stdout or "") == 100_000
    assert sum(future.printed.size_bytes for future in held + more if future.printed is not None) <= 1_400_000


def test_closing_shows_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tasks that never ended too."""
    rig = Rig(monkeypatch)
    rig.task(1)
    rig.take(1, b"rest")
    rig.printout.close()
    assert rig.out == "rest"
