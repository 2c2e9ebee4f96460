"""For every test: a temporary directory of our own; for those with real processes: nothing may be left behind."""

from __future__ import annotations

import atexit
import faulthandler
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import leaks

settings.register_profile("distexec", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("distexec")

EXIT_S = 60.0
"""How long the interpreter may take to end after the last test, before it says where it hangs and fails."""

WITH_PROCESSES = {Path(__file__).parent / name for name in ("system", "contract")}


def pytest_configure(config: pytest.Config) -> None:
    """Move the temporary directory before anything is made in it."""
    directory = tempfile.mkdtemp(prefix="dx-")
    os.environ["TMPDIR"] = directory
    tempfile.tempdir = None
    atexit.register(_remove, directory)
    for name in [name for name in os.environ if name.startswith("DISTEXEC_")]:
        del os.environ[name]  # the developer's own cluster is not to be tested on
    os.environ["XDG_CONFIG_HOME"] = os.path.join(directory, "pytest-of-config")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # we run in a shell's background; programs under test shall not
        signal.signal(signal.SIGINT, signal.default_int_handler)
    leaks.adopt_orphans()


def _remove(directory: str) -> None:
    util._run_finalizers()  # multiprocessing removes what it keeps there itself, and complains if it is gone
    shutil.rmtree(directory, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Let the interpreter end: an executor that a failed test left behind must not keep CI waiting for ever."""
    faulthandler.dump_traceback_later(EXIT_S, exit=True)


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, thread, socket, memfd or file is left by a test that works with real ones."""
    if not WITH_PROCESSES & set(request.path.parents):
        yield
        return
    before = leaks.Footprint()
    yield
    left = before.leaks()
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)
