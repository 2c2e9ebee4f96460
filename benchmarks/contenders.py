"""Who is compared. A contender makes something with `submit`, `map` and `close`; two workers unless told otherwise."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

REFERENCE = "ppe-forkserver"
WORKERS = 2
ADDRESS_VARIABLE, SECRET_VARIABLE = "BENCH_AGENT_ADDRESS", "BENCH_AGENT_SECRET"


class Pool:
    """A contender that was started: the same three verbs for all."""

    def __init__(self, executor: Any, close: Callable[[], object]) -> None:
        self.executor, self.close = executor, close

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return something with `result()`."""
        return self.executor.submit(function, *args)

    def map(self, function: Callable[..., Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        """Return the results in order."""
        mapped: Iterable[Any] = self.executor.map(function, items, chunksize=chunksize)
        return mapped


def _executor_pool(executor: Executor) -> Pool:
    return Pool(executor, executor.shutdown)


class _Applied:
    def __init__(self, result: Any) -> None:
        self.result = result.get


class MultiprocessingPool(Pool):
    """multiprocessing.Pool's verbs under the executors' names."""

    def __init__(self, workers: int) -> None:
        pool = multiprocessing.get_context("forkserver").Pool(workers)

        def close() -> None:
            pool.close()
            pool.join()
        super().__init__(pool, close)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return _Applied(self.executor.apply_async(function, args))


class PebblePool(Pool):
    """pebble.ProcessPool's verbs under the executors' names."""

    def __init__(self, workers: int) -> None:
        from pebble import ProcessPool
        pool = ProcessPool(workers, context=multiprocessing.get_context("forkserver"))

        def close() -> None:
            pool.close()
            pool.join()
        super().__init__(pool, close)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.executor.schedule(function, args)

    def map(self, function: Callable[..., Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        results: Iterable[Any] = self.executor.map(function, list(items), chunksize=chunksize).result()
        return results


def _process_pool(method: str, workers: int) -> Pool:
    return _executor_pool(ProcessPoolExecutor(workers, multiprocessing.get_context(method)))


def _cluster(workers: int) -> Pool:
    from distexec import ClusterExecutor
    return _executor_pool(ClusterExecutor(workers, nodes="local"))


def _cluster_durable(workers: int) -> Pool:
    import shutil
    import tempfile

    from distexec import ClusterExecutor
    directory = tempfile.mkdtemp(prefix="distexec-bench-")
    executor = ClusterExecutor(workers, nodes="local", durable=os.path.join(directory, "run.db"))

    def close() -> None:
        executor.shutdown()
        shutil.rmtree(directory)
    return Pool(executor, close)


def _cluster_agent(workers: int) -> Pool:
    from distexec import ClusterExecutor
    executor = ClusterExecutor(nodes=[os.environ[ADDRESS_VARIABLE]], secret=os.environ[SECRET_VARIABLE])
    return _executor_pool(executor)


def _loky(workers: int) -> Pool:
    from loky import ProcessPoolExecutor as LokyExecutor
    return _executor_pool(LokyExecutor(workers))


CONTENDERS: dict[str, Callable[[int], Pool]] = {
    "ppe-fork": lambda workers: _process_pool("fork", workers),  # first: it forks while there are no other threads
    "ppe-forkserver": lambda workers: _process_pool("forkserver", workers),
    "cluster": _cluster,
    "cluster-durable": _cluster_durable,
    "cluster-agent": _cluster_agent,
    "threads": lambda workers: _executor_pool(ThreadPoolExecutor(workers)),
    "mp.Pool": MultiprocessingPool,
    "loky": _loky,
    "pebble": PebblePool,
}
"""Every contender by name."""


@contextlib.contextmanager
def running(name: str, workers: int = WORKERS) -> Iterator[Pool]:
    """Start a contender, have every worker do something, and close it in the end."""
    from benchmarks.work import sleep
    pool = CONTENDERS[name](workers)
    try:
        for future in [pool.submit(sleep, 0.2) for _ in range(workers)]:
            future.result()
        yield pool
    finally:
        pool.close()


def start_agent(slots: int, name: str, secret: str) -> tuple[subprocess.Popen[str], str]:
    """Start an agent on loopback; give its process and address once it is ready. Raises ChildProcessError if it ends."""
    program = "import sys; from distexec.cli import agent_main; sys.exit(agent_main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--listen", "127.0.0.1:0", "--slots", str(slots), "--name", name],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"DISTEXEC_SECRET": secret})
    assert process.stdout is not None
    ready = process.stdout.readline()
    if not ready:
        raise ChildProcessError(f"the agent did not start: exit code {process.wait()}")
    return process, ready.split()[-1]


@contextlib.contextmanager
def agent(slots: int = WORKERS) -> Iterator[None]:
    """Run an agent on loopback for the contender "cluster-agent"; found through two variables, by subprocesses too."""
    secret = secrets.token_hex(32)
    process, address = start_agent(slots, "bench", secret)
    try:
        os.environ[ADDRESS_VARIABLE], os.environ[SECRET_VARIABLE] = address, secret
        yield
    finally:
        process.terminate()
        process.communicate()
        for name in (ADDRESS_VARIABLE, SECRET_VARIABLE):
            os.environ.pop(name, None)
