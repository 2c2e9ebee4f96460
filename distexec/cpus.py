"""The CPUs of this machine, and how many threads a task may use of its own accord.

The rule: libraries that start a thread for each CPU they see are told a slot's share of them, unless somebody has told
them anything else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_FALL_BACK = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""What libraries look for before they look for OMP_NUM_THREADS."""

_OTHERS = ("VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS")


def usable_cpus() -> int:
    """Count the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def thread_limits(environ: Mapping[str, str], slots: int) -> dict[str, str]:
    """Give the variables that limit the threads of a task where `slots` run at once, but those that `environ` has."""
    share = str(max(1, usable_cpus() // max(1, slots)))
    names = _OTHERS if "OMP_NUM_THREADS" in environ else ("OMP_NUM_THREADS", *_FALL_BACK, *_OTHERS)
    return {name: share for name in names if name not in environ}
