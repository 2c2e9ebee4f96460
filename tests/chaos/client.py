"""A client in a storm: `python -m tests.chaos.client DIRECTORY SEED NODE…`, the secret in the environment.

It submits until there is a file `stop` in the directory, then waits for what is under way, and writes `report.json`. An
executor that hangs is reported by name; so is every answer that is wrong and every task that began too often.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass, field
from typing import Any

from distexec import ClusterExecutor, ClusterFuture, TaskKilled, TaskTimeout, WorkerLost
from tests.chaos import errands

PENDING = 40
RETRIES = 60
"""More deaths than any storm gives one task."""

NODE_TIMEOUT_S = 4.0
FINISH_S = 150.0
"""How long what is under way may take once the storm is over. Longer than every clock of ours together."""

KINDS = {"trifle": 30, "quick": 20, "slow": 20, "dying": 3, "argument": 4, "result": 4, "talking": 3, "careless": 0.3,
         "failing": 2, "fragile": 12, "limited": 1, "killed": 2}
"""Of tasks, and how many of each among the others."""

Check = Callable[[Any, BaseException | None], bool]


@dataclass
class Client:
    """Submits, checks, counts."""

    executor: ClusterExecutor
    chance: random.Random
    directory: str
    pending: dict[ClusterFuture[Any], tuple[int, str, Check]] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)  # by key, of all that ended
    attempts: dict[int, int] = field(default_factory=dict)  # by key, of all that ended
    trifles: set[int] = field(default_factory=set)  # keys of the tasks that may be run again uncharged
    fragile: set[int] = field(default_factory=set)  # keys of the tasks that must not be run again
    valued: set[int] = field(default_factory=set)  # keys of the tasks that gave a value
    wrong: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.log = os.path.join(self.directory, "begun")

    # ---- submitting

    def submit(self, key: int) -> None:
        """Submit a task of a random kind."""
        kind, = self.chance.choices(list(KINDS), list(KINDS.values()))
        future, check = getattr(self, f"_{kind}")(key)
        self.pending[future] = (key, kind, check)

    def _send(self, fn: Callable[..., Any], key: int, *args: Any, **options: Any) -> ClusterFuture[Any]:
        executor = self.executor.options(**options) if options else self.executor
        future: ClusterFuture[Any] = executor.submit(fn, self.log, key, *args)  # type: ignore[assignment]
        return future

    def _trifle(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        self.trifles.add(key)
        return self._send(errands.trifle, key), gives(key * key)

    def _quick(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        return self._send(errands.square, key), gives(key * key)

    def _slow(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        return self._send(errands.square, key, self.chance.choice([0.01, 0.05, 0.3, 2.0])), gives(key * key)

    def _dying(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        return self._send(errands.die_at_first, key), gives(key * key)

    def _argument(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        size = self.chance.randrange(1 << 20, 6 << 20)
        return self._send(errands.measure, key, bytes([key % 251]) * size), gives((size, key % 251))

    def _result(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        size = self.chance.randrange(1 << 20, 6 << 20)
        return self._send(errands.make, key, size), gives(bytes([key % 251]) * size)

    def _talking(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        return self._send(errands.talk, key, self.chance.choice([1, 100, 5000])), gives(key * key)

    def _careless(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        return self._send(errands.abandon_a_child, key), gives(key * key)

    def _failing(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        def check(_value: Any, error: BaseException | None) -> bool:
            return type(error) is ValueError and error.args == (key,)
        return self._send(errands.refuse, key), check

    def _fragile(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        self.fragile.add(key)
        future = self._send(errands.square, key, self.chance.choice([0.0, 0.2]), retries=0)
        return future, lambda value, error: isinstance(error, WorkerLost) or gives(key * key)(value, error)

    def _limited(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        future = self._send(errands.square, key, 20.0, timeout=0.3)
        return future, lambda _value, error: isinstance(error, TaskTimeout)

    def _killed(self, key: int) -> tuple[ClusterFuture[Any], Check]:
        future = self._send(errands.square, key, 1.0)
        future.kill()
        return future, lambda value, error: isinstance(error, (TaskKilled, CancelledError)) or gives(key * key)(value, error)

    # ---- checking

    def collect(self, timeout_s: float) -> None:
        """Take in what has ended, or ends in time."""
        for future in wait(self.pending, timeout_s, FIRST_COMPLETED).done:
            key, kind, check = self.pending.pop(future)
            error = CancelledError() if future.cancelled() else future.exception()
            value = None if error is not None else future.result()
            self.attempts[key], self.kinds[key] = future.attempts, kind
            self.ends["value" if error is None else type(error).__name__] += 1
            if error is None:
                self.valued.add(key)
            if not check(value, error):
                self.wrong.append(f"{kind} {key} gave {value!r:.100}, {error!r:.300}, attempts {future.attempts}")

    def finish(self) -> None:
        """Wait for the rest, then hold what began against what is said to have begun."""
        deadline = time.monotonic() + FINISH_S
        while self.pending and time.monotonic() < deadline:
            self.collect(1.0)
        self.wrong += [f"{kind} {key} never ended: {future!r} on {future.node!r}"
                       for future, (key, kind, _) in self.pending.items()]
        begun = Counter(errands.begun(self.log))
        for key, attempts in self.attempts.items():
            if begun[key] > attempts and key not in self.trifles:
                self.wrong.append(f"{self.kinds[key]} {key} began {begun[key]} times, but its attempts are {attempts}")
            if begun[key] > 1 and key in self.fragile:
                self.wrong.append(f"{key} must not be run again, and began {begun[key]} times")
            if not begun[key] and key in self.valued:
                self.wrong.append(f"{key} has a value, but never began")

    def report(self) -> dict[str, Any]:
        """Say what came of it."""
        return {"ended": len(self.attempts), "ends": self.ends, "wrong": self.wrong,
                "again": sum(max(0, attempts - 1) for attempts in self.attempts.values())}


def gives(expected: object) -> Check:
    """Make the check of a task that always gives the same."""
    return lambda value, error: error is None and value == expected


def main(directory: str, seed: str, *nodes: str) -> None:
    """Work until told to stop."""
    faulthandler.register(signal.SIGUSR1)
    with ClusterExecutor(nodes=nodes, retries=RETRIES, node_timeout=NODE_TIMEOUT_S) as executor:
        client = Client(executor, random.Random(seed), directory)
        key = 0
        while not os.path.exists(os.path.join(directory, "stop")):
            while len(client.pending) < PENDING:
                key += 1
                client.submit(key)
            client.collect(0.2)
        client.finish()
        report = client.report()
        with open(os.path.join(directory, "report.json"), "w", encoding="ascii") as file:
            json.dump(report, file)
        if client.pending:
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
