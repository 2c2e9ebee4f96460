"""Large results: whose they are, how long they stay, what is left of them. Their memory is used again behind the scenes."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import xxhash

from distexec import WorkerLost
from tests.leaks import wait_until
from tests.system.conftest import Make, make_local

WAIT_S = 60.0
SIZE = 2 << 20


def filled(number: int, size: int = SIZE) -> Any:
    """An array in which every byte is the number's last."""
    return numpy.full(size, number % 251, "u1")


def is_filled(array: Any, number: int) -> bool:
    """Whether nothing of it has changed."""
    return bool((array == number % 251).all())


def twice(array: Any) -> tuple[Any, Any, Any]:
    """An argument, the same bytes again, and other ones."""
    return array, array.copy(), array + 1


def die_in_the_middle(number: int) -> Any:
    """Return a large array and be killed when a part of it has been handed over."""
    class Deadly:
        def update(self, piece: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    vars(xxhash)["xxh3_128"] = Deadly  # what is copied is hashed piece by piece
    return filled(number)


def count_descriptors(pid: int | str = "self") -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def own_descriptors(_: object) -> int:
    """How many this worker has."""
    return count_descriptors()


def test_kept_results_stay(make: Make) -> None:
    """What the user keeps is as it was after many more results have come and gone, and writing to it changes no other."""
    with make() as executor:
        kept = list(executor.map(filled, range(20)))
        kept[3][:] = 255
        for first in range(0, 300, 50):
            for number, array in enumerate(executor.map(filled, range(first, first + 50)), first):
                assert is_filled(array, number)
        assert all(is_filled(array, number) for number, array in enumerate(kept) if number != 3)
        assert (kept[3] == 255).all()


def test_equal_results_are_independent(make: Make) -> None:
    """Arrays of the same bytes, one of them the argument, are each the user's own, to write to."""
    argument = filled(7)
    with make() as executor:
        for _ in range(3):
            results = [array for future in [executor.submit(twice, argument) for _ in range(4)]
                       for array in future.result(WAIT_S)]
            for place, array in enumerate(results):
                assert is_filled(array, 7 + (place % 3 == 2))
                array[:] = place
            assert all((array == place).all() for place, array in enumerate(results))
            assert is_filled(argument, 7)


def test_a_thousand_held_at_once() -> None:
    """However many results are held, neither here nor in a worker descriptors pile up, and all are as they came."""
    with make_local() as executor:
        assert executor.submit(own_descriptors, 0).result(WAIT_S) > 0
        before = count_descriptors()
        held = list(executor.map(filled, range(1000), buffersize=20))
        assert wait_until(lambda: count_descriptors() <= before + 40, WAIT_S)
        counts = list(executor.map(own_descriptors, range(20)))
        assert max(counts) < 100
        assert all(is_filled(array, number) for number, array in enumerate(held))
        del held
        assert is_filled(executor.submit(filled, 5).result(WAIT_S), 5)


def test_a_forked_child_keeps_its_results() -> None:
    """A child that the client forks sees the results of that moment, whatever its parent does with its own."""
    with make_local(1) as executor:
        array = executor.submit(filled, 1).result(WAIT_S)
        ask, answer = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child only looks
            child = os.fork()
        if not child:
            os.read(ask[0], 1)
            os.write(answer[1], b"y" if is_filled(array, 1) else b"n")
            os._exit(0)
        try:
            del array
            for number in range(2, 30):
                assert is_filled(executor.submit(filled, number).result(WAIT_S), number)
        finally:
            os.write(ask[1], b"?")
            said = os.read(answer[0], 1)
            os.waitpid(child, 0)
            for fd in (*ask, *answer):
                os.close(fd)
        assert said == b"y"


def test_death_in_the_middle_of_a_result(make: Make) -> None:
    """A worker killed while it hands over a result is lost like any other; results that it gave before stay."""
    with make() as executor:
        kept = list(executor.map(filled, range(8)))
        with pytest.raises(WorkerLost):
            executor.options(retries=0).submit(die_in_the_middle, 9).result(WAIT_S)
        again = list(executor.map(filled, range(8, 16)))
        assert all(is_filled(array, number) for number, array in enumerate([*kept, *again]))


def test_results_outlive_the_executor(make: Make) -> None:
    """What was kept is good after everything else is gone."""
    with make() as executor:
        kept = list(executor.map(filled, range(5)))
    assert all(is_filled(array, number) for number, array in enumerate(kept))
    kept[0][0] = 1


def test_idle_workers_give_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after the last large result no worker keeps a file for the next."""
    monkeypatch.setattr("distexec.pool.TRIM_S", 0.05)
    with make_local(1) as executor:
        pid = executor.submit(os.getpid).result(WAIT_S)
        before = count_descriptors(pid)
        assert is_filled(executor.submit(filled, 1).result(WAIT_S), 1)
        assert wait_until(lambda: count_descriptors(pid) == before, WAIT_S)
        assert is_filled(executor.submit(filled, 2).result(WAIT_S), 2)
