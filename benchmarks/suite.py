"""Which measures are taken of whom, and in which order: A B C, A B C, …, so that a machine's moods hit all alike."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks import crowds, files, fleet, measures, modules, recovery, repeats, sockets
from benchmarks.contenders import CONTENDERS, agent, running
from benchmarks.measures import Numbers

EVERYONE = tuple(CONTENDERS)
PROCESSES = tuple(name for name in EVERYONE if name not in ("threads", "cluster-durable"))
OURS = ("cluster", "cluster-agent")


@dataclass(frozen=True)
class Experiment:
    """One measure of several contenders, over several rounds."""

    name: str
    title: str
    contenders: tuple[str, ...]
    measure: Callable[..., Numbers]
    rounds: int = 5
    takes_name: bool = False  # the measure starts the contender itself
    workers: int = 2

    def run(self, report: Callable[[str, int, str, Numbers], None]) -> None:
        """Take the measure of every contender in every round."""
        with contextlib.ExitStack() as stack:
            if "cluster-agent" in self.contenders:
                stack.enter_context(agent())
            subjects: dict[str, Any] = {
                name: name if self.takes_name else stack.enter_context(running(name, self.workers))
                for name in self.contenders}
            for number in range(self.rounds):
                for name, subject in subjects.items():
                    report(self.name, number, name, self.measure(subject))


@dataclass
class Results:
    """All numbers: experiment → contender → measure → one value per round (of what was measured in it)."""

    numbers: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def add(self, experiment: str, number: int, contender: str, numbers: Numbers) -> None:
        """Keep one contender's numbers of one round."""
        for key, value in numbers.items():
            self.numbers.setdefault(experiment, {}).setdefault(contender, {}).setdefault(key, []).append(value)


def _mixed_durations(count: int) -> list[float]:
    durations = [0.001] * (count - count // 200) + [1.0] * (count // 200)
    random.Random(1).shuffle(durations)
    return durations


def experiments(*, quick: bool) -> Sequence[Experiment]:
    """The whole list; quick: fewer rounds and smaller numbers, for a first look."""
    rounds = 2 if quick else 5
    many = 20_000 if quick else 100_000
    return (
        Experiment("rate", "no-op tasks, submit one by one, wait for all", EVERYONE, measures.task_rate, rounds),
        Experiment("call", "one blocking call", EVERYONE,
                   partial(measures.blocking_call, calls=300 if quick else 1000), rounds),
        Experiment("map-1", "map, chunksize 1", EVERYONE, measures.map_rate(1, 200_000), rounds),
        Experiment("map-1000", "map, chunksize 1000", EVERYONE, measures.map_rate(1000, 1_000_000), rounds),
        Experiment("first", "first result of a fresh executor", EVERYONE, measures.first_result_again, rounds,
                   takes_name=True),
        Experiment("program", "first result of a fresh program, imports included", EVERYONE,
                   measures.first_result_of_program, rounds, takes_name=True),
        Experiment("large", "50 MB numpy arrays", PROCESSES, partial(measures.large_values, calls=4 if quick else 8),
                   1 if quick else 3),
        Experiment("memory", "client memory per pending task", ("ppe-forkserver", *OURS, "threads"),
                   partial(crowds.pending_memory, count=many), 1 if quick else 3, takes_name=True),
        Experiment("mixed", "64 workers, 0.5 % 1 s sleeps among 1 ms sleeps", ("ppe-forkserver", "cluster"),
                   partial(measures.mixed_makespan, durations=_mixed_durations(4_000 if quick else 12_000)),
                   2 if quick else 3, workers=64),
        Experiment("urgent", "blocking call at high priority while no-ops are queued", OURS,
                   partial(measures.urgent_call, queued=many, calls=100 if quick else 300), 1 if quick else 3),
        Experiment("crowd", "no-ops at once", OURS, partial(crowds.wait_for_all, count=many), 1 if quick else 3,
                   takes_name=True),
        Experiment("crowd-x10", "ten times as many no-ops at once", OURS,
                   partial(crowds.wait_for_all, count=10 * many), 1, takes_name=True),
        Experiment("fleet", "client CPU a task under 1 and 200 agents that only answer", tuple(fleet.SIZES),
                   partial(fleet.cost_of_fleet, tasks=60_000 if quick else 200_000), rounds, takes_name=True),
        Experiment("files", "a file each way", (*OURS, files.BARE),
                   partial(files.file_speed, size_bytes=(256 if quick else 1024) << 20), rounds, takes_name=True),
        Experiment("repeats", "40 tasks with the same 100 MB array", repeats.contenders(),
                   partial(repeats.repeats, size_bytes=100_000_000, tasks=40), 1 if quick else 3, takes_name=True),
        Experiment("modules", "first call that needs 200 modules of the user's own", OURS,
                   partial(modules.first_call, count=200), rounds, takes_name=True),
        Experiment("recovery", "a task runs again after what ran it died", OURS, recovery.recovery, rounds, takes_name=True),
    )


def run(names: Sequence[str], *, quick: bool) -> Results:
    """Run the experiments named (all if none are) and return every number."""
    results = Results()
    for experiment in _chosen(names, quick=quick):
        print(f"… {experiment.name}: {experiment.title}", file=sys.stderr, flush=True)
        experiment.run(results.add)
        if experiment.name == "large":
            results.add("large", 0, "bare socket", sockets.bare_sockets())
    return results


def _chosen(names: Sequence[str], *, quick: bool) -> Iterator[Experiment]:
    known = experiments(quick=quick)
    unknown = set(names) - {experiment.name for experiment in known}
    if unknown:
        raise SystemExit(f"no such experiment: {', '.join(sorted(unknown))}; "
                         f"there are {', '.join(experiment.name for experiment in known)}")
    yield from (experiment for experiment in known if not names or experiment.name in names)
