"""What is measured of one contender at a time: rates, latencies, start, large values.

A measure takes a running pool (or a contender's name) and returns named numbers. Each is called once per round.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from benchmarks import work
from benchmarks.contenders import CONTENDERS, WORKERS, Pool

Numbers = dict[str, float]

ENOUGH_S = 0.8
"""How long a measured stretch should take at least. Shorter: noise. Longer: a longer run for nothing."""


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of all lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _enough(run: Callable[[int], float], least: int, most: int) -> float:
    """Rate of `run(count)` at a count that takes long enough, found with a small one first."""
    rate = least / run(least)
    count = max(least, min(most, int(rate * ENOUGH_S)))
    gc.collect()
    return count / run(count)


def task_rate(pool: Pool) -> Numbers:
    """Submit no-op tasks one by one, wait for all: tasks per second."""
    def run(count: int) -> float:
        began = time.perf_counter()
        for future in [pool.submit(work.nothing) for _ in range(count)]:
            future.result()
        return time.perf_counter() - began
    return {"tasks_per_s": _enough(run, 1000, 100_000)}


def blocking_call(pool: Pool, calls: int = 1000) -> Numbers:
    """One no-op call after the other, each waited for: microseconds per call."""
    times = [_call(pool.submit) for _ in range(calls)]
    return {"p50_us": statistics.median(times) * 1e6, "p99_us": quantile(times, 0.99) * 1e6}


def _call(submit: Callable[..., Any]) -> float:
    began = time.perf_counter()
    submit(work.nothing).result()
    return time.perf_counter() - began


def map_rate(chunksize: int, most: int) -> Callable[[Pool], Numbers]:
    """Make a measure: map a no-op over many items with this chunksize: items per second."""
    def measure(pool: Pool) -> Numbers:
        def run(count: int) -> float:
            began = time.perf_counter()
            for _ in pool.map(work.nothing, range(count), chunksize):
                pass
            return time.perf_counter() - began
        return {"items_per_s": _enough(run, 2000, most)}
    return measure


def first_result_again(name: str) -> Numbers:
    """From a constructor to the first result in a program that has used this kind of executor before: milliseconds."""
    began = time.perf_counter()
    pool = CONTENDERS[name](WORKERS)
    pool.submit(work.nothing).result()
    took = time.perf_counter() - began
    pool.close()
    return {"ms": took * 1e3}


FIRST_SCRIPT = """
import time
began = time.perf_counter()
from benchmarks import work
from benchmarks.contenders import CONTENDERS, WORKERS
if __name__ == "__main__":
    pool = CONTENDERS[{name!r}](WORKERS)
    pool.submit(work.nothing).result()
    print(time.perf_counter() - began)
    pool.close()
"""


def first_result_of_program(name: str) -> Numbers:
    """The same in a program just started, its imports included: milliseconds."""
    done = subprocess.run([sys.executable, "-c", FIRST_SCRIPT.format(name=name)], stdout=subprocess.PIPE, check=True,
                          text=True, timeout=60)
    return {"ms": float(done.stdout) * 1e3}


LARGE_BYTES = 50_000_000


def large_values(pool: Pool, calls: int = 8) -> Numbers:
    """50 MB arrays as arguments and as results, one call after the other: MB per second, and the best call's."""
    import numpy

    array = numpy.ones(LARGE_BYTES, dtype="u1")

    def send(i: int) -> None:
        array[:9] = i % 251, *os.urandom(8)  # never the same bytes twice
        assert pool.submit(work.first_byte, array).result() == i % 251

    def receive(i: int) -> None:
        assert pool.submit(work.large_result, LARGE_BYTES, i % 251).result()[0] == i % 251

    return {f"{name}_mb_per_s": LARGE_BYTES / 1e6 / statistics.median(_times(function, range(-2, calls))[2:])
            for name, function in (("argument", send), ("result", receive))}


def _times(function: Callable[[int], None], numbers: Iterable[int]) -> list[float]:
    times = []
    for i in numbers:
        began = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - began)
    return times


def mixed_makespan(pool: Pool, durations: list[float]) -> Numbers:
    """Submit sleeps of mixed length, wait for all: seconds from the first submit to the last result."""
    began = time.perf_counter()
    for future in [pool.submit(work.sleep, duration) for duration in durations]:
        future.result()
    return {"makespan_s": time.perf_counter() - began}


def urgent_call(pool: Pool, queued: int, calls: int) -> Numbers:
    """Blocking calls at high priority while no-ops are queued: microseconds per call."""
    urgent = pool.executor.options(priority=10)
    futures = [pool.submit(work.nothing) for _ in range(queued)]
    times = []
    while len(times) < calls and not futures[-1].done():
        times.append(_call(urgent.submit))
    not_done = set(futures)
    while not_done:
        not_done = wait(not_done, return_when=FIRST_COMPLETED).not_done if len(not_done) < 100 else {
            future for future in not_done if not future.done()}
    return {"p50_us": statistics.median(times) * 1e6, "p99_us": quantile(times, 0.99) * 1e6, "calls": len(times)}
