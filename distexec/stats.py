"""One machine's load, as an agent tells it."""

from __future__ import annotations

import psutil

from .messages import Load


def read_load(slots: int, busy: int, sessions: int) -> Load:
    """Read the machine's state: CPU use since the last call (per cent of all CPUs), free and total memory (bytes)."""
    memory = psutil.virtual_memory()
    return Load(slots, busy, sessions, psutil.cpu_percent(interval=None), memory.available, memory.total)
