"""What tasks log reaches the client's handlers, on its own workers and on nodes, unless they have handlers of their own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from distexec import ClusterExecutor, current_task
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds


@pytest.fixture(params=["local", "spawn", "agent"])
def make(request: pytest.FixtureRequest) -> Callable[..., ClusterExecutor]:
    """A constructor of executors: on local workers of either kind, through an agent."""
    if request.param == "agent":
        agent: AgentProcess = request.getfixturevalue("shared_agent")
        return partial(ClusterExecutor, nodes=[agent.address], secret=agent.secret)
    context = None if request.param == "local" else multiprocessing.get_context("spawn")
    return partial(ClusterExecutor, 2, mp_context=context, nodes="local")


class Notes(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)

    def messages(self) -> list[str]:
        """What was logged, in order."""
        return [record.getMessage() for record in self.records]


@pytest.fixture
def notes() -> Iterator[Notes]:
    """A handler of the root logger, which lets everything from INFO on through."""
    handler, before = Notes(), logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    yield handler
    logging.root.setLevel(before)
    logging.root.removeHandler(handler)


def log_all(word: str) -> None:
    """Log in several ways."""
    logging.info("convenient %s", word)
    logging.getLogger("some.one").warning("named %s", word, extra={"word": word})
    task = current_task()
    assert task is not None
    task.logger.error("task's %s", word)
    try:
        raise LookupError(word)
    except LookupError:
        logging.getLogger("some.one").exception("raised")
    logging.getLogger("some.one").debug("not wanted")


def test_records_reach_the_client(make: Callable[..., ClusterExecutor], notes: Notes,
                                  capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever logged, from where; nothing is printed besides, and nothing below the client's level travels."""
    with make() as executor:
        future = executor.submit(log_all, "word")
        assert future.result() is None
        assert wait_until(lambda: len(notes.records) == 4, 20)
        node, task_id = future.node, future.task_id
    assert notes.messages() == ["convenient word", "named word", "task's word", "raised"]
    assert [record.name for record in notes.records] == ["root", "some.one", "distexec.task", "some.one"]
    assert {(record.node, record.task_id) for record in notes.records} == {(node, task_id)}
    assert notes.records[1].word == "word"
    assert "LookupError: word" in notes.records[3].exc_text
    assert notes.records[0].process != os.getpid()
    out, err = capfd.readouterr()
    assert "word" not in out + err


def test_levels_are_the_clients(make: Callable[..., ClusterExecutor], notes: Notes) -> None:
    """A logger that may say more, or less, here may do so there."""
    loud, quiet = logging.getLogger("loud"), logging.getLogger("quiet")
    loud.setLevel(logging.DEBUG)
    quiet.setLevel(logging.ERROR)
    try:
        with make() as executor:
            executor.submit(deeds.log, "loud.child", logging.DEBUG, "detail").result()
            executor.submit(deeds.log, "quiet.child", logging.WARNING, "nothing").result()
            executor.submit(deeds.log, "quiet.child", logging.ERROR, "something").result()
            executor.submit(deeds.log, "other", logging.INFO, "last").result()
            assert wait_until(lambda: "last" in notes.messages(), 20)
    finally:
        loud.setLevel(logging.NOTSET)
        quiet.setLevel(logging.NOTSET)
    assert sorted(notes.messages()) == ["detail", "last", "something"]


def configure(word: str) -> None:
    """Give the root logger a handler of its own."""
    logging.basicConfig(format=f"{word} %(message)s", level=logging.INFO)


def test_handlers_of_an_initializer_are_used_instead(shared_agent: AgentProcess, notes: Notes) -> None:
    """`basicConfig` in an initializer works as in ProcessPoolExecutor, and takes the place of ours."""
    with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret, initializer=configure, initargs=("mine",),
                         echo=False) as executor:
        future = executor.submit(deeds.log, "some.one", logging.INFO, "hello")
        assert future.result() == 1
        assert future.stderr == "mine hello\n"
    assert notes.messages() == []


def log_in_initializer() -> None:
    """Log before there is a task."""
    logging.getLogger("early").warning("prepared")


def test_initializers_log_too(make: Callable[..., ClusterExecutor], notes: Notes) -> None:
    """What they log has no task."""
    with make(initializer=log_in_initializer) as executor:
        assert executor.submit(deeds.double, 1).result() == 2
        assert wait_until(lambda: "prepared" in notes.messages(), 20)
    assert notes.records[0].task_id == 0


def fork_and_log() -> int:
    """Log in a forked child, whose records nobody can send."""
    logging.getLogger("x").info("parent")
    child = os.fork()
    if child == 0:
        logging.getLogger("x").warning("child")
        logging.getLogger("x").info("too little for stderr")
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_forked_children_print_theirs(shared_agent: AgentProcess, notes: Notes) -> None:
    """They do what they would do without us; the worker's conversation is not disturbed."""
    with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret, echo=False) as executor:
        future = executor.submit(fork_and_log)
        assert future.result() == 0
        assert future.stderr == "child\n"
        executor.submit(deeds.log, "x", logging.INFO, "last").result()
        assert wait_until(lambda: "last" in notes.messages(), 20)
    assert notes.messages() == ["parent", "last"]


def log_from_a_signal_handler(count: int) -> int:
    """Log in a handler that comes in the middle of logging."""
    import signal
    signal.signal(signal.SIGALRM, lambda *_: logging.getLogger("x").info("signal"))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for number in range(count):
            logging.getLogger("x").info("%d", number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return count


def test_logging_in_signal_handlers(make: Callable[..., ClusterExecutor], notes: Notes) -> None:
    """Nothing stands still, and nothing is lost."""
    with make() as executor:
        assert executor.submit(log_from_a_signal_handler, 3000).result(60) == 3000
        assert wait_until(lambda: "2999" in notes.messages(), 20)
    assert [text for text in notes.messages() if text != "signal"] == [str(number) for number in range(3000)]


def flood(count: int) -> int:
    """Log much."""
    logger = logging.getLogger("flood")
    for number in range(count):
        logger.info("record %d %s", number, "x" * 1000)
    return count


def test_a_flood_delays_no_result(make: Callable[..., ClusterExecutor]) -> None:
    """A handler that stands still: results come all the same, what is too much is dropped, and told."""
    class Still(Notes):
        def emit(self, record: logging.LogRecord) -> None:
            assert go_on.wait(60)
            super().emit(record)

    go_on = threading.Event()
    logger, handler, told = logging.getLogger("flood"), Still(), Notes()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger("distexec").addHandler(told)
    try:
        with make() as executor:
            assert executor.submit(flood, 15_000).result(60) == 15_000
            assert list(executor.map(deeds.double, range(100), timeout=60)) == [2 * number for number in range(100)]
            go_on.set()
    finally:
        go_on.set()
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logging.getLogger("distexec").removeHandler(told)
    lost = sum(record.args[0] for record in told.records if "log records of tasks were dropped" in record.msg)
    assert lost
    assert len(handler.records) + lost == 15_000


def test_who_does_not_log_does_not_pay(make: Callable[..., ClusterExecutor], notes: Notes,
                                       request: pytest.FixtureRequest) -> None:
    """Workers do not import `logging` before a task does, and then it is as it ever was."""
    with make() as executor:
        if "spawn" not in request.node.name:  # multiprocessing has imported it there
            assert not executor.submit(deeds.has_imported, "logging").result()
        executor.submit(deeds.log_loader, logging.INFO).result()
        assert wait_until(lambda: bool(notes.records), 20)
    assert notes.messages() == ["SourceFileLoader"]
