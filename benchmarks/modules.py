"""The first call that needs 200 modules of the user's own: sent to an agent for it, beside local workers that have them.

Once as 200 modules of their own, each of which is asked for, and once as one package with as many parts, which is asked for
once. The worker is there before, and every module is compiled where it is imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contenders import ADDRESS_VARIABLE, SECRET_VARIABLE
from benchmarks.measures import Numbers
from benchmarks.work import import_all, nothing
from distexec import ClusterExecutor

LINES = 100
"""Functions in each module, so that it is as long as modules are."""


def first_call(name: str, count: int) -> Numbers:
    """Import `count` modules in a call."""
    directory = Path(tempfile.mkdtemp(prefix="distexec-bench-"))
    text = "\n".join(f"def function_{number}(x):\n    return x + {number}\n" for number in range(LINES))
    alone = [f"alone_{number}" for number in range(count)]
    parts = [f"bench_package.part_{number}" for number in range(count)]
    try:
        (directory / "bench_package").mkdir()
        (directory / "bench_package/__init__.py").touch()
        for module in (*alone, *parts):
            (directory / (module.replace(".", "/") + ".py")).write_text(text)
        sys.path.insert(0, str(directory))
        nodes = "local" if name == "cluster" else os.environ[ADDRESS_VARIABLE]
        with ClusterExecutor(1, nodes=nodes, secret=os.environ[SECRET_VARIABLE]) as executor:
            executor.submit(nothing).result()
            numbers = {}
            for key, modules in (("alone_s", alone), ("package_s", parts)):
                began = time.perf_counter()
                executor.submit(import_all, modules).result()
                numbers[key] = time.perf_counter() - began
            return numbers
    finally:
        sys.path.remove(str(directory))
        shutil.rmtree(directory)
