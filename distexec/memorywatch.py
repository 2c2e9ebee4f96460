"""How much memory the processes below each worker use, and whether the kernel killed one for want of it.

    /proc/*/stat ── trees ──► suspects ── stopped, smaps_rollup ──► over the limit: to be killed, or going on

The rule: who is killed for its memory still uses it at that moment. A suspect is stopped before it is measured exactly,
so it is the task that runs in it at that moment, and none begins meanwhile. (What an earlier task left behind in its
worker counts too: nobody can tell the two apart.)
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import NamedTuple

__all__ = ["MemoryLimit", "OomKills", "Usage", "environ_limit", "format_size", "oom_kills", "overusers", "parse_size",
           "trees"]

VARIABLE = "DISTEXEC_MEMORY_LIMIT"
"""Sets the limit of local workers, and that of agents that were not told another."""

LOOK_S = 0.2
"""Between two looks at all workers. Longer: a task can take more before it is noticed. Shorter: more time spent looking."""

LOOK_SHARE = 20
"""A look is followed by so many times its own duration without one: on a machine with thousands of processes it is slow."""

RECENT_S = 10.0
"""How old a kill of the kernel's may be to explain a death. Longer: it is blamed for somebody's `kill -9`. Shorter: on a
machine that swaps, a death is told so late that it finds no explanation."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


class MemoryLimit(NamedTuple):
    """How much memory a worker may use together with the processes that its task started, and who said so."""

    size_bytes: int
    origin: str  # what the user would have to change, as "distexec-agent --memory-limit"

    def explain(self, used: Usage) -> str:
        """Say why a worker that used so much was killed, and what can be done."""
        return (f"it used {used}, and was killed because a worker with what its task starts may use "
                f"{format_size(self.size_bytes)} ({self.origin}): raise that limit, or let the task hold less at once")


class Usage(NamedTuple):
    """What a process and its descendants use."""

    size_bytes: int
    processes: int

    def __str__(self) -> str:
        where = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"{format_size(self.size_bytes)} of memory{where}"


def parse_size(text: str) -> int:
    """Read a size like "2G", "500M", "1.5 GiB" or a number of bytes; units are powers of 1,024. ValueError otherwise."""
    match = _SIZE.fullmatch(text.strip())
    size_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size_bytes < 1:
        raise ValueError(f"{text!r} is no size of memory; give one like 2G, 500M or 1.5G")
    return size_bytes


def environ_limit() -> MemoryLimit | None:
    """Give the limit that $DISTEXEC_MEMORY_LIMIT sets; None if it sets none. Raises ValueError if it is no size."""
    text = os.environ.get(VARIABLE)
    try:
        return MemoryLimit(parse_size(text), f"${VARIABLE}") if text else None
    except ValueError as error:
        raise ValueError(f"${VARIABLE}: {error}") from None


def format_size(size_bytes: int) -> str:
    """Write a size for a reader: 1.9 GiB."""
    for unit, name in (("T", "TiB"), ("G", "GiB"), ("M", "MiB"), ("K", "KiB")):
        if size_bytes >= _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.3g} {name}" if size_bytes < 1000 * _UNITS[unit] else (
                f"{size_bytes // _UNITS[unit]} {name}")
    return f"{size_bytes} bytes"


# ---- what processes use


def overusers(pids: Iterable[int], limit_bytes: int) -> list[tuple[int, Usage]]:
    """Give those of the processes that use more than the limit together with their descendants, and how much.

    They are left stopped, for the caller to kill. Shared memory counts in full when they are looked for, and divided by
    the processes that share it when they are judged, where the system can tell (Linux).
    """
    found = []
    for pid, members in trees(pids).items():
        if sum(members.values()) > limit_bytes:
            used = _judge(pid, limit_bytes)
            if used is not None:
                found.append((pid, used))
    return found


def _judge(pid: int, limit_bytes: int) -> Usage | None:
    """Stop a suspect and measure it; let it go on if it uses no more than the limit."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return None  # it ended by itself
    members = trees([pid])[pid]
    used = Usage(sum(_fair_bytes(each, rss) for each, rss in members.items()), len(members))
    if used.size_bytes > limit_bytes:
        return used
    with suppress(ProcessLookupError):  # as above
        os.kill(pid, signal.SIGCONT)
    return None


def trees(pids: Iterable[int]) -> dict[int, dict[int, int]]:
    """Give, for each process, the resident bytes of itself and of each of its descendants that is alive."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for pid, parent, size_bytes in _processes():
        children.setdefault(parent, []).append(pid)
        resident[pid] = size_bytes
    result = {}
    for root in pids:
        members = [root] if root in resident else []
        for pid in members:  # grows while we walk
            members.extend(children.get(pid, ()))
        result[root] = {pid: resident[pid] for pid in members}
    return result


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield (pid, parent, resident bytes) of every process that is not a zombie."""
    if sys.platform != "linux":
        import psutil

        for process in psutil.process_iter(["ppid", "memory_info"]):
            if process.info["memory_info"] is not None:
                yield process.pid, process.info["ppid"], process.info["memory_info"].rss
        return
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                    fields = file.read(1024).rpartition(b")")[2].split()
            except OSError:
                continue  # it ended while we looked
            if fields and fields[0] not in (b"Z", b"X"):
                yield int(name), int(fields[1]), int(fields[21]) * _PAGE_BYTES


def _fair_bytes(pid: int, resident_bytes: int) -> int:
    """Give a process's memory with each shared page divided by those who share it; the resident size if that is unknown."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb", buffering=0) as file:
            for line in file.read(4096).splitlines():
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass  # it ended, belongs to another user, or the system does not tell
    return resident_bytes


# ---- what the kernel did


class OomKills:
    """Counts the processes that the kernel killed for want of memory around here: in our control group, or on the machine.

    One per process, because every look takes note of what is new. Any thread.
    """

    def __init__(self, root: str = "/") -> None:
        self._lock = threading.Lock()  # guards `_seen` and `_unclaimed`
        self._unclaimed: list[float] = []  # when kills were seen that explained no death yet
        self._seen = 0
        self._counter, self._limit = _find_counter(root)
        self._seen = self._count()

    def __repr__(self) -> str:
        return f"<OomKills: {self._seen} in {self._counter}>"

    def claim(self, now: float | None = None) -> str:
        """Say what speaks for a death by the kernel's hand just now; "" if nothing does. Each kill explains one death."""
        now = time.monotonic() if now is None else now
        with self._lock:
            count = self._count()
            self._unclaimed += [now] * (count - self._seen)
            self._seen = count
            self._unclaimed = [at for at in self._unclaimed if now - at < RECENT_S]
            if not self._unclaimed:
                return ""
            self._unclaimed.pop()
        limit_bytes = self._limit_bytes()
        limit = f"; the limit of its control group is {format_size(limit_bytes)}" if limit_bytes else ""
        return f"{self._counter} has counted such a kill{limit}"

    def explain(self, peak_bytes: int) -> str:
        """Say what is known of a SIGKILL that was not ours, and what can be done; `peak_bytes` 0: not known."""
        used = f" after it had used up to {format_size(peak_bytes)}" if peak_bytes else ""
        proof = self.claim()
        if proof:
            return (f"{used}, by the kernel because memory ran out ({proof}): run fewer such tasks at once (fewer slots), "
                    "give them more memory, or let the task hold less")
        return f"{used}, and not by distexec: by somebody, or by the kernel because memory ran out (`dmesg` would tell)"

    def _count(self) -> int:
        match = re.search(r"^oom_kill (\d+)$", _read(self._counter), re.MULTILINE)
        return int(match[1]) if match else self._seen  # if the control group is gone, nothing more is known

    def _limit_bytes(self) -> int:
        text = _read(self._limit).strip()
        limit_bytes = int(text) if text.isdigit() else 0  # else "max"
        return limit_bytes if limit_bytes < 1 << 60 else 0  # the first version's way to say that there is none


@cache
def oom_kills() -> OomKills:
    """Give this process's."""
    return OomKills()


def _find_counter(root: str) -> tuple[str, str]:
    """Find the file that counts the kernel's kills nearest to this process, and the one with the limit that it watches."""
    groups = os.path.join(root, "sys/fs/cgroup")
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base = os.path.join(groups, controllers)
            counter, limit = (("memory.oom_control", "memory.limit_in_bytes") if controllers
                              else ("memory.events", "memory.max"))
            for directory in (os.path.join(base, path.lstrip("/")), base):  # in a container the path may be the host's
                if os.path.isfile(os.path.join(directory, counter)):
                    return os.path.join(directory, counter), os.path.join(directory, limit)
    return os.path.join(root, "proc/vmstat"), ""


def _read(path: str) -> str:
    """Read a small file of the kernel's; "" if there is none."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
