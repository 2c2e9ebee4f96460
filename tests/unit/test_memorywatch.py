"""Laws of sizes, of whose memory counts as whose, and of what the kernel's counters prove."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distexec import memorywatch
from distexec.memorywatch import OomKills, format_size, parse_size


@pytest.mark.parametrize(("text", "size_bytes"), [
    ("2G", 2 << 30), ("500M", 500 << 20), ("500m", 500 << 20), ("1.5G", 3 << 29), ("64KiB", 64 << 10), ("1 GB", 1 << 30),
    (" 4096 ", 4096), ("1T", 1 << 40),
])
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    """A number, and a unit of a power of 1,024 if there is one."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "0.1", "2X", "1e9", "2G of it", "1,5G", "infG"])
def test_what_is_no_size(text: str) -> None:
    """Anything else is refused, with what would do."""
    with pytest.raises(ValueError, match="500M"):
        parse_size(text)


@pytest.mark.parametrize(("size_bytes", "text"), [
    (1, "1 bytes"), (1 << 10, "1 KiB"), (1500 << 20, "1.46 GiB"), (209 << 20, "209 MiB"), (1023 << 20, "1023 MiB"),
    (2 << 40, "2 TiB"),
])
def test_sizes_are_written(size_bytes: int, text: str) -> None:
    """Three digits are enough."""
    assert format_size(size_bytes) == text


def test_a_tree_is_a_process_and_its_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of children count, other processes do not, and who is gone has nothing."""
    listed = [(1, 0, 1), (10, 1, 100), (11, 10, 20), (12, 11, 3), (20, 1, 7), (21, 20, 8)]
    monkeypatch.setattr(memorywatch, "_processes", lambda: iter(listed))
    assert memorywatch.trees([10, 20, 99]) == {10: {10: 100, 11: 20, 12: 3}, 20: {20: 7, 21: 8}, 99: {}}


def test_our_own_memory() -> None:
    """What the system says of this process is more than nothing, and no more with shared pages divided."""
    resident = memorywatch.trees([os.getpid()])[os.getpid()][os.getpid()]
    assert 1 << 20 < memorywatch._fair_bytes(os.getpid(), resident) <= resident + (8 << 20)


# ---- the kernel's kills

MACHINES = {  # what /proc/self/cgroup says, where the counter is, the limit beside it
    "second version": ("0::/a/b\n", "sys/fs/cgroup/a/b/memory.events", "sys/fs/cgroup/a/b/memory.max"),
    "container": ("0::/a/b\n", "sys/fs/cgroup/memory.events", "sys/fs/cgroup/memory.max"),
    "first version": ("4:memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.oom_control",
                      "sys/fs/cgroup/memory/a/memory.limit_in_bytes"),
    "no group": ("0::/\n", "proc/vmstat", ""),
}


def write(root: Path, path: str, text: str) -> Path:
    """Make a file below the pretended root."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return root / path


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A pretended machine, and its counter."""
    groups, counter, limit = MACHINES[request.param]
    write(tmp_path, "proc/self/cgroup", groups)
    if limit:
        write(tmp_path, limit, f"{512 << 20}\n")
    return tmp_path, write(tmp_path, counter, "oom_kill_disable 0\noom_kill 3\n")


def test_each_kill_explains_one_death(machine: tuple[Path, Path]) -> None:
    """Deaths are explained by kills counted since the last look, each by one; what was before is nobody's."""
    root, counter = machine
    kills = OomKills(str(root))
    assert kills.claim(0.0) == ""
    counter.write_text("oom_kill_disable 0\noom_kill 5\n")
    assert str(counter) in kills.claim(1.0)
    assert str(counter) in kills.claim(1.0), "two workers were killed at once"
    assert kills.claim(1.0) == ""


def test_the_limit_is_told(machine: tuple[Path, Path]) -> None:
    """Where there is a control group with a limit, that is told."""
    root, counter = machine
    kills = OomKills(str(root))
    counter.write_text("oom_kill 4\n")
    assert ("512 MiB" in kills.claim(0.0)) == (counter.name != "vmstat")


def test_an_old_kill_explains_nothing(machine: tuple[Path, Path]) -> None:
    """A kill that hit something else is not blamed for a death much later."""
    root, counter = machine
    kills = OomKills(str(root))
    counter.write_text("oom_kill 5\n")
    assert kills.claim(0.0)
    assert kills.claim(memorywatch.RECENT_S + 1) == ""


def test_without_limit(tmp_path: Path) -> None:
    """A control group without a limit says "max", or a number beyond all memory; neither is told."""
    write(tmp_path, "proc/self/cgroup", "0::/a\n")
    counter = write(tmp_path, "sys/fs/cgroup/a/memory.events", "oom_kill 0\n")
    kills = OomKills(str(tmp_path))
    for number, text in enumerate(("max\n", f"{(1 << 63) - 4096}\n"), 1):
        write(tmp_path, "sys/fs/cgroup/a/memory.max", text)
        counter.write_text(f"oom_kill {number}\n")
        assert kills.claim(0.0) == f"{counter} has counted such a kill"


def test_where_nothing_is_told(tmp_path: Path) -> None:
    """Without any of these files nothing is known, and nothing fails."""
    assert OomKills(str(tmp_path)).claim(0.0) == ""
