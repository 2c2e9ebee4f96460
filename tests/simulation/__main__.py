"""The longer run: `python -m tests.simulation --seeds 0:100000 --minutes 30`; stops at the first history that fails.

`--verbose` writes down, event by event, the one history of a single seed: `--seeds 4711:4712 --verbose`.
"""

from __future__ import annotations

import argparse
import sys
import time

from .history import Total, play, play_shards


def main() -> int:
    """Play histories until the seeds or the minutes run out; exit code 1 if an invariant failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0:100000", help="first:last (not included); replayed exactly")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so long")
    parser.add_argument("--verbose", action="store_true", help="write every event of the history")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition(":")
    seeds = range(int(first), int(last or int(first) + 1))
    if arguments.verbose:
        return _recount(seeds)
    deadline = time.monotonic() + arguments.minutes * 60
    total = Total()
    began = time.monotonic()
    for part in play_shards(seeds):
        total += part
        print(f"\r{total}, {total.steps / (time.monotonic() - began):.0f} events/s", end="", flush=True)
        if total.failures or time.monotonic() > deadline:
            break
    print()
    for failure in total.failures:
        print(failure, file=sys.stderr)
    return 1 if total.failures else 0


def _recount(seeds: range) -> int:
    for seed in seeds:
        log: list[str] = []
        try:
            print(play(seed, log=log))
        except Exception as failure:
            print(*log, repr(failure), *getattr(failure, "__notes__", []), sep="\n")
            return 1
        print(*log, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
