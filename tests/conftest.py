"""For every test: a temporary directory of our own; for those with real processes: nothing may be left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import leaks

settings.register_profile("distexec", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("distexec")

WITH_PROCESSES = {Path(__file__).parent / name for name in ("system", "contract")}


def pytest_configure(config: pytest.Config) -> None:
    """Move the temporary directory before anything is made in it."""
    directory = tempfile.mkdtemp(prefix="dx-")
    os.environ["TMPDIR"] = directory
    tempfile.tempdir = None
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith("DISTEXEC_")]:
        del os.environ[name]  # the developer's own cluster is not to be tested on
    os.environ["XDG_CONFIG_HOME"] = os.path.join(directory, "pytest-of-config")
    leaks.adopt_orphans()


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
