"""Numbers to a table with the gates, to JSON, and to a picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contenders import REFERENCE
from benchmarks.suite import Results

ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("rate", "tasks_per_s", "no-op tasks/s", "{:,.0f}"),
    ("call", "p50_us", "blocking call, µs, p50", "{:,.0f}"),
    ("call", "p99_us", "blocking call, µs, p99", "{:,.0f}"),
    ("map-1", "items_per_s", "map chunksize=1, items/s", "{:,.0f}"),
    ("map-1000", "items_per_s", "map chunksize=1000, items/s", "{:,.0f}"),
    ("first", "ms", "first result, fresh executor, ms", "{:,.0f}"),
    ("program", "ms", "first result, fresh program, ms", "{:,.0f}"),
    ("large", "argument_mb_per_s", "50 MB argument, MB/s", "{:,.0f}"),
    ("large", "result_mb_per_s", "50 MB result, MB/s", "{:,.0f}"),
    ("large", "tcp_mb_per_s", "50 MB over bare TCP, MB/s", "{:,.0f}"),
    ("large", "tls_mb_per_s", "50 MB over bare TLS, MB/s", "{:,.0f}"),
    ("memory", "bytes_per_task", "client bytes per pending task", "{:,.0f}"),
    ("mixed", "makespan_s", "mixed sleeps, 64 workers, s", "{:.2f}"),
    ("urgent", "p50_us", "urgent call among queued, µs, p50", "{:,.0f}"),
    ("urgent", "p99_us", "urgent call among queued, µs, p99", "{:,.0f}"),
    ("crowd", "seconds", "all at once, s", "{:.2f}"),
    ("crowd-x10", "seconds", "ten times as many, s", "{:.2f}"),
    ("crowd-x10", "bytes_per_task", "client bytes per task of these", "{:,.0f}"),
    ("fleet", "cpu_us_per_task", "client CPU per task, µs", "{:.1f}"),
    ("files", "file_to_client_mb_per_s", "file from a task to its client, MB/s", "{:,.0f}"),
    ("files", "file_to_task_mb_per_s", "file from the client to a task, MB/s", "{:,.0f}"),
    ("files", "tcp_mb_per_s", "file over bare TCP, MB/s", "{:,.0f}"),
    ("files", "tls_mb_per_s", "file over bare TLS, MB/s", "{:,.0f}"),
    ("repeats", "s", "40 tasks, one 100 MB array, s", "{:.2f}"),
    ("repeats", "mb", "40 tasks, one 100 MB array, MB on the network", "{:,.0f}"),
    ("modules", "alone_s", "first call that imports 200 modules, s", "{:.3f}"),
    ("modules", "package_s", "the same, parts of one package, s", "{:.3f}"),
    ("recovery", "worker_s", "runs again after its worker died, s", "{:.3f}"),
    ("recovery", "agent_s", "runs again after its agent died, s", "{:.3f}"),
    ("recovery", "silent_beyond_s", "after its node fell silent, s beyond node_timeout", "{:.3f}"),
)


@dataclass(frozen=True)
class Gate:
    """A bound that DESIGN.md §10 sets, and what was measured."""

    text: str
    value: float
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        """Does the value keep the bound?"""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{'met   ' if self.is_met else 'MISSED'}  {self.text}: {self.value:,.2f} ({sign} {self.bound:g})"


def gates(results: Results) -> Iterator[Gate]:
    """Every gate whose numbers were measured."""
    for text, needs, value, bound, at_least in _GATES:
        if all(contender in results.numbers.get(experiment, {}) for experiment, contender in needs):
            yield Gate(text, value(results), bound, at_least)


def _ratio(experiment: str, key: str, contender: str, reference: str = REFERENCE) -> tuple[
        tuple[tuple[str, str], ...], Callable[[Results], float]]:
    """What is needed for, and how to get, the median over the rounds of the ratio within a round."""
    return (((experiment, contender), (experiment, reference)),
            lambda results: statistics.median(ratios(results, experiment, key, contender, reference)))


def ratios(results: Results, experiment: str, key: str, contender: str, reference: str = REFERENCE) -> list[float]:
    """The ratio of two contenders in each round."""
    numbers = results.numbers[experiment]
    return [ours / theirs for ours, theirs in zip(numbers[contender][key], numbers[reference][key], strict=True)]


def _median(results: Results, experiment: str, contender: str, key: str) -> float:
    return statistics.median(results.numbers[experiment][contender][key])


def _large_beside_tls(key: str) -> tuple[tuple[tuple[str, str], ...], Callable[[Results], float]]:
    return ((("large", "cluster-agent"), ("large", "bare socket")),
            lambda results: (_median(results, "large", "cluster-agent", key)
                             / _median(results, "large", "bare socket", "tls_mb_per_s")))


def _absolute(experiment: str, key: str, contender: str, scale: float = 1.0) -> tuple[
        tuple[tuple[str, str], ...], Callable[[Results], float]]:
    return ((experiment, contender),), lambda results: _median(results, experiment, contender, key) * scale


def _growth(contender: str) -> tuple[tuple[tuple[str, str], ...], Callable[[Results], float]]:
    return ((("crowd", contender), ("crowd-x10", contender)),
            lambda results: (_median(results, "crowd-x10", contender, "seconds")
                             / _median(results, "crowd", contender, "seconds")))


_GATES = tuple(
    (text, needs, value, bound, at_least) for text, (needs, value), bound, at_least in (
        ("local no-op rate / PPE", _ratio("rate", "tasks_per_s", "cluster"), 6.0, True),
        ("local no-op rate / ThreadPoolExecutor", _ratio("rate", "tasks_per_s", "cluster", "threads"), 1.0, True),
        ("local durable no-op rate / PPE", _ratio("rate", "tasks_per_s", "cluster-durable"), 3.0, True),
        ("local blocking call / PPE", _ratio("call", "p50_us", "cluster"), 0.5, False),
        ("agent no-op rate / PPE", _ratio("rate", "tasks_per_s", "cluster-agent"), 4.0, True),
        ("agent blocking call / PPE", _ratio("call", "p50_us", "cluster-agent"), 1.0, False),
        ("local map chunksize=1 / PPE", _ratio("map-1", "items_per_s", "cluster"), 10.0, True),
        ("first result of a fresh local executor / PPE", _ratio("first", "ms", "cluster"), 1.5, False),
        ("first result of a fresh local program / PPE", _ratio("program", "ms", "cluster"), 1.5, False),
        ("local client kB per pending task", _absolute("memory", "bytes_per_task", "cluster", 1e-3), 2.0, False),
        ("agent client kB per pending task", _absolute("memory", "bytes_per_task", "cluster-agent", 1e-3), 2.0, False),
        ("local 50 MB argument, GB/s", _absolute("large", "argument_mb_per_s", "cluster", 1e-3), 1.0, True),
        ("local 50 MB result, GB/s", _absolute("large", "result_mb_per_s", "cluster", 1e-3), 1.0, True),
        ("agent 50 MB argument / bare TLS", _large_beside_tls("argument_mb_per_s"), 0.7, True),
        ("agent 50 MB result / bare TLS", _large_beside_tls("result_mb_per_s"), 0.7, True),
        ("mixed sleeps makespan / PPE", _ratio("mixed", "makespan_s", "cluster"), 1.05, False),
        ("time of ten times the tasks, local", _growth("cluster"), 11.0, False),
        ("time of ten times the tasks, agent", _growth("cluster-agent"), 11.0, False),
        ("client CPU a task, 200 agents / 1 agent", _ratio("fleet", "cpu_us_per_task", "200 agents", "1 agent"), 1.3, False),
        ("s from a local worker's death to its task's next run", _absolute("recovery", "worker_s", "cluster"), 0.5, False),
        ("s from an agent's worker's death to the same", _absolute("recovery", "worker_s", "cluster-agent"), 0.5, False),
        ("s from an agent's kill -9 to the same", _absolute("recovery", "agent_s", "cluster-agent"), 1.0, False),
        ("s from silence to the same, beyond node_timeout", _absolute("recovery", "silent_beyond_s", "cluster-agent"), 1.0,
         False),
    ))


def table(results: Results) -> str:
    """Medians, and in brackets the median of the rounds' ratios to ProcessPoolExecutor with a fork server."""
    rows = [["median (ratio to " + REFERENCE + ")", *_contenders(results)]]
    for experiment, key, label, form in ROWS:
        numbers = results.numbers.get(experiment, {})
        if any(key in measured for measured in numbers.values()):
            rows.append([label, *(_cell(results, experiment, key, name, form) for name in rows[0][1:])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                           zip(row[1:], widths[1:], strict=True))]) for row in rows)


def _contenders(results: Results) -> list[str]:
    names: dict[str, None] = {}
    for numbers in results.numbers.values():
        names.update(dict.fromkeys(numbers))
    return sorted(names, key=lambda name: (not name.startswith("cluster"), name != REFERENCE))


def _cell(results: Results, experiment: str, key: str, name: str, form: str) -> str:
    numbers = results.numbers[experiment]
    if key not in numbers.get(name, {}):
        return "–"
    text = form.format(statistics.median(numbers[name][key]))
    if key not in numbers.get(REFERENCE, {}):
        return text
    return f"{text} ({statistics.median(ratios(results, experiment, key, name)):.2f})"


def write_json(results: Results, path: Path) -> None:
    """Every number of every round, the gates, and what machine it was."""
    machine = {"python": sys.version, "platform": platform.platform(), "cpus": os.cpu_count()}
    document = {"machine": machine, "numbers": results.numbers,
                "gates": [asdict(gate) | {"is_met": gate.is_met} for gate in gates(results)]}
    path.write_text(json.dumps(document, indent=1) + "\n")


PANELS = (("rate", "tasks_per_s", "no-op tasks/s"), ("call", "p50_us", "blocking call, µs (less is better)"),
          ("map-1", "items_per_s", "map chunksize=1, items/s"),
          ("first", "ms", "first result, ms (less is better)"),
          ("large", "argument_mb_per_s", "50 MB argument, MB/s"), ("large", "result_mb_per_s", "50 MB result, MB/s"))


def write_plot(results: Results, path: Path) -> None:
    """A bar per contender for the main measures, with the span between the worst and the best round."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if panel[0] in results.numbers]
    if not panels:
        return
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (experiment, key, title) in zip(axes.flat, panels, strict=False):
        names = [name for name in _contenders(results) if key in results.numbers[experiment].get(name, {})]
        rounds = [results.numbers[experiment][name][key] for name in names]
        middle = [statistics.median(values) for values in rounds]
        spans = [[m - min(v) for m, v in zip(middle, rounds, strict=True)],
                 [max(v) - m for m, v in zip(middle, rounds, strict=True)]]
        colours = ["tab:blue" if name.startswith("cluster") else "tab:gray" for name in names]
        axis.barh(names, middle, xerr=spans, color=colours, ecolor="black", capsize=2)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
