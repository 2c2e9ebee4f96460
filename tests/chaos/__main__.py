"""The longer run: `python -m tests.chaos --minutes 60 --seed 1`, one storm after the other, each with the next seed."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import leaks, netns
from tests.chaos.storm import Storm

STORM_S = 120.0


def main() -> int:
    """Let storms pass until the minutes are over; exit code 1 at the first that leaves something wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no other storm after so long (default: 10)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20), help="of the first storm")
    parser.add_argument("--seconds", type=float, default=STORM_S, help="how long each storm lasts (default: %(default)g)")
    arguments = parser.parse_args()
    try:
        netns.require()
    except pytest.skip.Exception as reason:
        print(f"python -m tests.chaos {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it would be ignored
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    leaks.adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="dx-") as directory:
        os.environ["TMPDIR"] = tempfile.tempdir = directory  # where nobody else leaves anything
        try:
            return _let_pass(arguments)
        except KeyboardInterrupt:
            print("interrupted in the middle of a storm", file=sys.stderr)
            return 130


def _let_pass(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.minutes * 60
    seed = arguments.seed
    while time.monotonic() < deadline:
        if weather(seed, arguments.seconds):
            return 1
        seed += 1
    return 0


def weather(seed: int, seconds: float) -> list[str]:
    """Let one storm pass, print its figures, and give what is wrong after it."""
    before = leaks.Footprint()
    with tempfile.TemporaryDirectory(prefix="pytest-of-storm-") as directory, Storm(seed, Path(directory)) as storm:
        storm.run(seconds)
        figures = storm.settle()
    figures.wrong += [f"left behind: {leak}" for leak in before.leaks()]
    print(figures, flush=True)
    return figures.wrong


if __name__ == "__main__":
    sys.exit(main())
