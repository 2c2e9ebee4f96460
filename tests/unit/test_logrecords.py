"""Log records as they travel, and as the client's handlers get them: late handlers keep nobody waiting."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from distexec import logbook
from distexec.logbook import Logbook
from distexec.logrecords import TEXT_CHARS, pack, set_levels, unpack
from distexec.messages import Record


def record(msg: object, *args: object, level: int = logging.INFO, exc_info: Any = None,
           **extra: object) -> logging.LogRecord:
    """Make one, as a logger does."""
    return logging.getLogger("tests.records").makeRecord(
        "tests.records", level, __file__, 7, msg, args, exc_info, "here", extra)  # type: ignore[arg-type]


def travel(sent: logging.LogRecord) -> logging.LogRecord:
    """Send it from task 5 on node n."""
    return logging.makeLogRecord(unpack(Record(1, 5, 1, sent.levelno, sent.name, *pack(sent)), "n"))


class Nobody:
    """Refuses to be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_a_record_arrives_as_it_was() -> None:
    """Message, arguments, place, time, thread, process; and where it comes from."""
    sent = record("%s is %d, %.1f", "it", 2, 3.5, colour="red", code=404)
    got = travel(sent)
    for name in ("name", "msg", "args", "levelno", "levelname", "pathname", "filename", "module", "lineno", "funcName",
                 "created", "thread", "threadName", "process", "processName", "exc_text", "stack_info", "colour", "code"):
        assert getattr(got, name) == getattr(sent, name), name
    assert abs(got.msecs - sent.msecs) <= 1.0
    assert got.getMessage() == "it is 2, 3.5"
    assert (got.node, got.task_id) == ("n", 5)  # type: ignore[attr-defined]


def test_what_cannot_travel_does_as_text() -> None:
    """Arguments and extra attributes that are no plain values; numbers too large; what cannot even be shown."""
    got: Any = travel(record("%s", [1, {2}], thing=object, big=1 << 100, nobody=Nobody()))
    assert (got.getMessage(), got.args) == ("[1, {2}]", ())
    assert "object" in got.thing
    assert got.big == str(1 << 100)
    assert "RuntimeError" in got.nobody


def test_exceptions_travel_as_text() -> None:
    """The traceback is shown by the client's formatter."""
    try:
        raise LookupError("where is it")
    except LookupError:
        sent = record("failed", exc_info=sys.exc_info())
    got = travel(sent)
    assert got.exc_info is None
    text = logging.Formatter().format(got)
    assert text.startswith("failed\nTraceback")
    assert text.endswith("LookupError: where is it")


def test_large_records_are_cut() -> None:
    """A message, a traceback or attributes of any size travel in little room."""
    many = {f"a{number}": "z" * 1000 for number in range(1000)}
    text, data = pack(record("x" * 10_000_000, blob="y" * 10_000_000, **many))
    assert len(text) < TEXT_CHARS + 100
    assert text.endswith("more characters)")
    assert len(data) < 200_000


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa5extra\x01"])
def test_what_is_no_record_is_a_message_still(data: bytes) -> None:
    """Whatever a node sends, the message arrives."""
    got = logging.makeLogRecord(unpack(Record(1, 5, 1, 20, "name", "100 % text", data), "n"))
    assert (got.getMessage(), got.name, got.levelno) == ("100 % text", "name", 20)
    assert logging.Formatter("%(asctime)s %(levelname)s %(message)s").format(got).endswith("INFO 100 % text")


def test_set_levels() -> None:
    """The root's, and of the others those that were set."""
    logger = logging.getLogger("tests.levels")
    logger.setLevel(17)
    logging.getLogger("tests.levels.unset")
    try:
        levels = set_levels()
    finally:
        logger.setLevel(logging.NOTSET)
    assert levels[""] == logging.root.level
    assert levels["tests.levels"] == 17
    assert "tests.levels.unset" not in levels


# ---- the client's end


class Slow(logging.Handler):
    """Notes records once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Wait for word, note."""
        assert self.may_go_on.wait(30)
        self.records.append(record)


@pytest.fixture
def slow() -> Iterator[Slow]:
    """A handler of the logger `tests.slow`."""
    logger, handler = logging.getLogger("tests.slow"), Slow()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    handler.may_go_on.set()
    logger.removeHandler(handler)


def said(number: int, level: int = logging.INFO, lost: int = 0) -> Record:
    """What a task logged."""
    return Record(1, number, 1, level, "tests.slow", f"number {number}", b"", lost)


def test_records_are_handled_in_order(slow: Slow) -> None:
    """All of the level that the logger has now, on a thread that ends with the book."""
    slow.may_go_on.set()
    book = Logbook()
    for number in range(100):
        book.take("n", said(number, logging.DEBUG if number % 2 else logging.INFO))
    book.close()
    assert [each.getMessage() for each in slow.records] == [f"number {number}" for number in range(0, 100, 2)]
    assert not any(thread.name == "distexec-log" for thread in threading.enumerate())
    book.take("n", said(100))
    assert not book.is_busy


def test_a_slow_handler_is_waited_for_once(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls behind → the I/O thread waits a moment, then no more until all is handled; then again."""
    book = Logbook()
    book.take("n", said(1))
    book.catch_up()
    assert slow.records == []
    monkeypatch.setattr(logbook, "PATIENCE_S", 3600.0)
    book.catch_up()
    slow.may_go_on.set()
    with book._changed:
        assert book._changed.wait_for(lambda: not book.is_busy, 30)
    slow.may_go_on.clear()
    monkeypatch.setattr(logbook, "PATIENCE_S", 0.0)
    book.take("n", said(2))
    book.catch_up()
    slow.may_go_on.set()
    book.close()
    assert len(slow.records) == 2


def test_what_was_logged_is_handled_before_the_result(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick handler has its record when `catch_up` returns."""
    monkeypatch.setattr(logbook, "PATIENCE_S", 30.0)  # a machine that is too busy is not what this is about
    slow.may_go_on.set()
    book = Logbook()
    for number in range(50):
        book.take("n", said(number))
        book.catch_up()
        assert len(slow.records) == number + 1
    book.close()


def test_what_waits_is_bounded(slow: Slow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the bound records are dropped, and how many is logged, along with those that others have dropped."""
    monkeypatch.setattr(logbook, "MAX_WAITING", 10)
    book = Logbook()
    book.take("n", said(0, lost=5))
    for number in range(1, 100):
        book.take("n", said(number))
    slow.may_go_on.set()
    book.close()
    assert 10 <= len(slow.records) <= 12
    lost = [each for each in caplog.records if each.name == "distexec"]
    assert sum(int(each.args[0]) for each in lost) == 105 - len(slow.records)  # type: ignore[index,arg-type]


def test_a_filter_that_raises(slow: Slow, caplog: pytest.LogCaptureFixture) -> None:
    """The user's mistake is told, and the records after it are handled."""
    slow.may_go_on.set()

    def refuse(record: logging.LogRecord) -> bool:
        if record.getMessage() == "number 1":
            raise ValueError("bad filter")
        return True

    logger = logging.getLogger("tests.slow")
    logger.addFilter(refuse)
    book = Logbook()
    book.take("n", said(1))
    book.take("n", said(2))
    book.close()
    logger.removeFilter(refuse)
    assert [each.getMessage() for each in slow.records] == ["number 2"]
    assert "bad filter" in caplog.text


def test_giving_up(slow: Slow) -> None:
    """What waits is dropped; what is being handled is waited for."""
    book = Logbook()
    for number in range(100):
        book.take("n", said(number))
    while len(book._waiting) == 100:
        book.catch_up()
    book.give_up()
    slow.may_go_on.set()
    book.close()
    assert len(slow.records) <= 2
