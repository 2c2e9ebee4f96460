"""A storm of faults of every kind, with a fixed seed; `make chaos` for longer ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import netns
from tests.chaos.storm import Storm

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "45"))


@pytest.mark.timeout(SECONDS + 400)
def test_after_a_storm(tmp_path: Path) -> None:
    """Killed, frozen, cut, restored at random → all futures end, rightly and once; all slots are there; nothing is left."""
    netns.require()
    with Storm(SEED, tmp_path) as storm:
        storm.run(SECONDS)
        figures = storm.settle()
    print(figures)
    assert not figures.wrong, str(figures)
