"""Many tasks at once, each measure in a process of its own so that its memory is nothing but its own.

Memory is the growth of the client's resident set, as the kernel counts it: with it come the allocator's losses and
whatever C libraries take, which tracemalloc does not see; what is left of the executor's fixed cost is taken away by
measuring between two counts. Run as `python -m benchmarks.crowds pending|wait CONTENDER COUNT`; prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future

import psutil

from benchmarks import work
from benchmarks.contenders import CONTENDERS, WORKERS
from benchmarks.measures import Numbers


def pending_memory(name: str, count: int) -> Numbers:
    """Client memory per pending no-op task, its future included: bytes."""
    return _in_process("pending", name, count)


def wait_for_all(name: str, count: int) -> Numbers:
    """Submit `count` no-ops at once and wait for all: seconds, and peak memory per task in bytes."""
    return _in_process("wait", name, count)


def _in_process(what: str, name: str, count: int) -> Numbers:
    done = subprocess.run([sys.executable, "-m", "benchmarks.crowds", what, name, str(count)], stdout=subprocess.PIPE,
                          check=True, text=True, timeout=600)
    numbers: Numbers = json.loads(done.stdout)
    return numbers


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _pending(name: str, count: int) -> Numbers:
    pool = CONTENDERS[name](WORKERS)
    with tempfile.NamedTemporaryFile() as busy:
        holding = [pool.submit(work.hold, busy.name) for _ in range(WORKERS)]
        futures = [pool.submit(work.nothing) for _ in range(count // 10)]
        time.sleep(0.5)  # let its threads hand out what they want to
        before = _resident_bytes()
        futures += [pool.submit(work.nothing) for _ in range(count)]
        time.sleep(0.5)
        grown = _resident_bytes() - before
    for future in holding + futures:
        future.result()
    pool.close()
    return {"bytes_per_task": grown / count}


def _wait(name: str, count: int) -> Numbers:
    pool = CONTENDERS[name](WORKERS)
    pool.submit(work.nothing).result()
    before = _resident_bytes()
    began = time.perf_counter()
    futures: list[Future[None]] = [pool.submit(work.nothing) for _ in range(count)]
    submitted = time.perf_counter()
    for future in futures:
        future.result()
    took = time.perf_counter() - began
    grown = psutil.Process().memory_info().rss - before
    pool.close()
    return {"seconds": took, "submit_seconds": submitted - began, "bytes_per_task": grown / count,
            "unresolved": float(sum(not future.done() for future in futures))}


def main() -> None:
    """Measure in this process."""
    what, name, count = sys.argv[1:]
    print(json.dumps((_pending if what == "pending" else _wait)(name, int(count))))
    sys.stdout.flush()
    os._exit(0)  # a million futures need not be taken apart one by one


if __name__ == "__main__":
    main()
