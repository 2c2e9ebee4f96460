"""Laws of the page that a worker shares with its pool."""

from __future__ import annotations

import os
from typing import Any

import pytest

from distexec.memory import shared_file
from distexec.messages import Undefine
from distexec.payload import CallUnpacker
from distexec.worker import PAGE_BYTES, Worker, WorkerPage


@pytest.fixture
def pages() -> tuple[WorkerPage, WorkerPage]:
    """The same page as the pool and as the worker see it."""
    fd = shared_file()
    os.ftruncate(fd, PAGE_BYTES)
    both = WorkerPage(fd), WorkerPage(fd)
    os.close(fd)
    return both


def test_pool_sees_what_started(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """The pool reads the order of the task begun last, and when; 0 before the first."""
    pool, worker = pages
    assert pool.started == 0
    assert worker.begin(1, 1000)
    assert worker.begin(2, 2000)
    assert (pool.started, pool.started_at_ns) == (2, 2000)


def test_only_revoked_orders_are_refused(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """A revocation stops its orders, those and no others, until another replaces it."""
    pool, worker = pages
    pool.revoke(2, 3)
    assert [worker.begin(order, 0) for order in (1, 2, 3, 4)] == [True, False, False, True]
    pool.revoke(6, 6)
    assert [worker.begin(order, 0) for order in (5, 6, 7)] == [True, False, True]


def test_revocation_is_widened_without_a_gap(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """While a revocation is widened to earlier orders, the orders revoked before stay revoked at every moment."""
    pool, worker = pages
    pool.revoke(5, 8)
    states = []

    class Spy:
        """The pool's cells, looking at what the worker would see after each store."""

        def __init__(self, cells: memoryview) -> None:
            self.cells = cells

        def __getitem__(self, index: int) -> int:
            return int(self.cells[index])

        def __setitem__(self, index: int, value: int) -> None:
            self.cells[index] = value
            states.append(worker.begin(6, 0))

    pool._cells = Spy(pool._cells)  # type: ignore[assignment]
    pool.revoke(3, 8)
    assert states
    assert not any(states)
    assert not worker.begin(3, 0)


def test_closed_page_stops_the_worker(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """A process that closed the page cannot begin a task."""
    _, worker = pages
    worker.close()
    worker.close()
    with pytest.raises(ValueError, match="released"):
        worker.begin(1, 0)


def test_a_doomed_task_is_told(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """Only the task of that order, and from that moment on; no task before anybody is doomed."""
    pool, worker = pages
    worker.begin(1, 0)
    assert not worker.is_doomed
    pool.doom(2)
    assert not worker.is_doomed
    worker.begin(2, 0)
    assert worker.is_doomed
    worker.begin(3, 0)
    assert not worker.is_doomed


def test_what_was_heard_adds_up(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """The worker sees the sum."""
    pool, worker = pages
    pool.hear(5)
    pool.hear(7)
    assert worker.heard_bytes == 12


class _Frames:
    """A link that gives frames of so many messages, then says that the pool went; notes when the worker looked ahead."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.looked: list[int] = []
        self.received = 0

    def receive(self) -> list[Undefine]:
        """Give the next frame."""
        if self.received == len(self.sizes):
            raise EOFError
        self.received += 1
        return [Undefine(1, [])] * self.sizes[self.received - 1]

    def look_ahead(self) -> None:
        """Note after which frame that was."""
        self.looked.append(self.received)


def test_looks_ahead_after_a_lone_message(pages: tuple[WorkerPage, WorkerPage]) -> None:
    """Who calls, waits and calls again sends them one by one; under load nobody spins."""
    link: Any = _Frames([1, 5, 1, 1, 2])
    with pytest.raises(EOFError):
        Worker(link, pages[1], CallUnpacker(), ()).run()
    assert link.looked == [1, 3, 4]
