"""What `nodes()` and `status()` return: immutable rows that print as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["ClusterStatus", "NodeStatus"]


class NodeStatus(NamedTuple):
    """One node as the executor sees it now."""

    name: str
    address: str
    state: str  # up, connecting, suspended, refused, leaving, quarantined (up, but tasks die there that run well elsewhere)
    slots: int  # that this executor may use now
    running: int  # tasks leased to it, at most `slots` of them running
    done: int  # tasks of this executor that ended there
    cpu_percent: float | None  # of the whole machine; None: not told yet
    memory_free_bytes: int | None
    python: str
    version: str
    problem: str  # why it is not up, or gets no tasks

    def __str__(self) -> str:
        return _table([self])


class ClusterStatus(NamedTuple):
    """The executor's work so far and now."""

    nodes: tuple[NodeStatus, ...]
    slots: int
    queued: int
    running: int  # leased to a worker or node
    done: int  # tasks ended, however
    failed: int  # of these, with an error
    retried: int  # attempts lost and run again
    elapsed_s: float  # since the executor was made
    run_s: float  # summed run time of the functions themselves

    @property
    def rate_per_s(self) -> float:
        """Tasks ended per second since the executor was made."""
        return self.done / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def speed_up(self) -> float:
        """Seconds of function run time per second elapsed."""
        return self.run_s / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        head = (f"{self.done} done ({self.failed} failed, {self.retried} retried), {self.running} running, "
                f"{self.queued} queued, {self.slots} slots; {self.elapsed_s:.1f} s, {self.rate_per_s:.1f} tasks/s, "
                f"speed-up {self.speed_up:.1f}")
        return f"{head}\n{_table(list(self.nodes))}" if self.nodes else head


def _table(nodes: list[NodeStatus]) -> str:
    rows = [("node", "address", "state", "slots", "running", "done", "cpu", "free memory", "problem")]
    for node in nodes:
        cpu = "" if node.cpu_percent is None else f"{node.cpu_percent:.0f} %"
        memory = "" if node.memory_free_bytes is None else f"{node.memory_free_bytes / 2**30:.1f} GiB"
        rows.append((node.name, node.address, node.state, str(node.slots), str(node.running), str(node.done), cpu, memory,
                     node.problem))
    return layout(rows)


def layout(rows: Sequence[tuple[str, ...]]) -> str:
    """Set rows of cells in columns, the first row being their heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
