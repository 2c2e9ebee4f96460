"""One program, many argument sets, all over the cluster: what `distexec run` does.

    argument sets ──► submit(Program, …) ──► results as they come ──► their output whole, one after the other; a summary

The rule: output goes to stdout and stderr as the program's own would, everything of ours to stderr.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any, NamedTuple, TextIO

from .executor import ClusterExecutor
from .future import ClusterFuture
from .program import Program

__all__ = ["Counts", "argument_sets", "run_all"]


class Counts(NamedTuple):
    """How the runs ended."""

    good: int
    failed: int

    def __str__(self) -> str:
        runs = f"{self.good + self.failed:,} run{'s' * (self.good + self.failed != 1)}"
        return f"{runs}: {self.good:,} succeeded, {self.failed:,} failed"


def argument_sets(common: Sequence[str], given: Sequence[str], lines: Iterable[str] | None = None) -> Iterator[list[str]]:
    """Give the arguments of each run: the common ones, then one set's, split as a shell does.

    Args:
        lines: more sets; empty ones, and those that begin with #, are none. None: if none is given either, there is one run.

    Raises ValueError for a quote that is not closed.
    """
    if lines is None and not given:
        yield list(common)
    for text in (*given, *(line for line in lines or () if line.strip() and not line.lstrip().startswith("#"))):
        try:
            yield [*common, *shlex.split(text)]
        except ValueError as error:
            raise ValueError(f"argument set {text.strip()!r}: {error}") from None


def run_all(executor: ClusterExecutor, program: Program, sets: Iterable[Sequence[str]], files: Sequence[str],
            *, has_prefix: bool) -> Counts:
    """Run the program once for each set of arguments and print what comes of it, in the order in which runs end."""
    submitter: Any = executor.options(files=files) if files else executor
    runs: dict[ClusterFuture[CompletedProcess[bytes]], list[str]] = {}
    for arguments in sets:
        runs[submitter.submit(program, *arguments)] = list(arguments)
    good = failed = 0
    progress = _Progress(len(runs))
    futures: list[Any] = list(runs)
    ended: Iterator[Any] = as_completed(futures)
    for future in ended:
        arguments = runs.pop(future)
        progress.clear()
        is_good = _show(future, shlex.join([program.path, *arguments]), has_prefix=has_prefix)
        good, failed = good + is_good, failed + (not is_good)
        progress.show(good, failed)
    progress.clear()
    return Counts(good, failed)


def _show(future: ClusterFuture[CompletedProcess[bytes]], command: str, *, has_prefix: bool) -> bool:
    prefix = f"[{future.node}:{future.task_id}] ".encode() if has_prefix else b""
    error = future.exception()
    if isinstance(error, TimeoutExpired):
        _write(sys.stdout, error.output or b"", prefix)
        _write(sys.stderr, error.stderr or b"", prefix)
    if error is not None:
        return _tell(f"{command}: {error}")
    done = future.result()
    _write(sys.stdout, done.stdout, prefix)
    _write(sys.stderr, done.stderr, prefix)
    if done.returncode > 0:
        return _tell(f"{command}: exit code {done.returncode} on node {future.node!r}")
    if done.returncode < 0:
        return _tell(f"{command}: ended by signal {-done.returncode} on node {future.node!r}")
    return True


def _tell(text: str) -> bool:
    print(f"distexec run: {text}", file=sys.stderr, flush=True)
    return False


def _write(stream: TextIO, data: bytes, prefix: bytes) -> None:
    if prefix:
        data = b"".join(prefix + line for line in data.splitlines(keepends=True))
        data += b"\n" * (data != b"" and not data.endswith(b"\n"))
    stream.flush()
    stream.buffer.write(data)
    stream.flush()


class _Progress:
    """A line at the bottom of the terminal, if there is one."""

    def __init__(self, total: int) -> None:
        self._total, self._is_shown = total, False

    def show(self, good: int, failed: int) -> None:
        if sys.stderr.isatty():
            text = f"{good + failed:,} of {self._total:,} runs done, {failed:,} failed"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
            self._is_shown = True

    def clear(self) -> None:
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
