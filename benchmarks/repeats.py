"""Many tasks with the same large array: seconds, and the bytes that crossed the network, beside those who offer the same.

Each contender runs in a process and a network namespace of its own, so that the loopback interface there counts its bytes
and nobody else's; where namespaces are not to be had, only seconds are given. Run as
`python -m benchmarks.repeats CONTENDER BYTES TASKS` (prints two numbers; the second is -1 without a namespace).
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy

from benchmarks.contenders import ADDRESS_VARIABLE, SECRET_VARIABLE, WORKERS, agent
from benchmarks.measures import Numbers

_CLONE_NEWNET, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x40000000, 0x8913, 0x8914, 1

TIMEOUT_S = 600.0

Run = Callable[[Any, int], None]


def total(array: Any, number: int) -> float:
    """The task: read a page in a hundred."""
    return float(array[::51200].sum()) + number


@contextmanager
def _argument() -> Iterator[Run]:
    with agent(), _executor() as executor:
        executor.submit(total, numpy.ones(1), 0).result()

        def run(array: Any, tasks: int) -> None:
            for future in [executor.submit(total, array, number) for number in range(tasks)]:
                future.result()
        yield run


@contextmanager
def _share() -> Iterator[Run]:
    with agent(), _executor() as executor:
        executor.submit(total, numpy.ones(1), 0).result()

        def run(array: Any, tasks: int) -> None:
            with executor.share(array) as shared:
                for future in [executor.submit(total, shared, number) for number in range(tasks)]:
                    future.result()
        yield run


def _executor() -> Any:
    from distexec import ClusterExecutor
    return ClusterExecutor(nodes=[os.environ[ADDRESS_VARIABLE]], secret=os.environ[SECRET_VARIABLE])


@contextmanager
def _pool() -> Iterator[Run]:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(WORKERS, get_context("forkserver")) as executor:
        executor.submit(total, numpy.ones(1), 0).result()

        def run(array: Any, tasks: int) -> None:
            for future in [executor.submit(total, array, number) for number in range(tasks)]:
                future.result()
        yield run


@contextmanager
def _dask() -> Iterator[Run]:
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        client.submit(total, numpy.ones(1), 0).result()

        def run(array: Any, tasks: int) -> None:
            shared = client.scatter(array, broadcast=True)
            client.gather([client.submit(total, shared, number) for number in range(tasks)])
        yield run


@contextmanager
def _ray() -> Iterator[Run]:
    import ray
    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="error")
    remote = ray.remote(total)
    ray.get(remote.remote(numpy.ones(1), 0))

    def run(array: Any, tasks: int) -> None:
        shared = ray.put(array)
        ray.get([remote.remote(shared, number) for number in range(tasks)])
    yield run
    ray.shutdown()


_RUNS = {"cluster argument": _argument, "cluster share": _share, "ppe argument": _pool, "dask scatter": _dask,
         "ray put": _ray}
_NEEDS = {"dask scatter": "distributed", "ray put": "ray"}


def contenders() -> tuple[str, ...]:
    """Those that are installed."""
    missing = [name for name, module in _NEEDS.items() if importlib.util.find_spec(module) is None]
    return tuple(name for name in _RUNS if name not in missing)


def repeats(name: str, size_bytes: int, tasks: int) -> Numbers:
    """Have tasks read the same array, all submitted at once: seconds, and MB that crossed the network."""
    command = [sys.executable, "-m", "benchmarks.repeats", name, str(size_bytes), str(tasks)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    seconds, crossed = map(float, done.stdout.split()[-2:])
    return {"s": seconds, "mb": crossed / 1e6} if crossed >= 0 else {"s": seconds}


def _enter_namespace() -> bool:
    """Be alone on a network with nothing but a loopback interface; False if that may not be."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = struct.unpack("16sh", fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))
    return True


def _received_bytes() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.partition(":")[2].split()[0]) for line in lines if line.strip().startswith("lo:"))


def _main(name: str, size_bytes: int, tasks: int) -> None:
    is_alone = _enter_namespace()
    array = numpy.ones(size_bytes // 8)
    with _RUNS[name]() as run:
        before = _received_bytes() if is_alone else 0
        began = time.perf_counter()
        run(array, tasks)
        seconds = time.perf_counter() - began
        crossed = _received_bytes() - before if is_alone else -1
    print(seconds, crossed)


if __name__ == "__main__":
    import benchmarks.repeats  # tasks are found by this name, not in `__main__`

    benchmarks.repeats._main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
