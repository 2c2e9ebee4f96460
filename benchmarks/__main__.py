"""Compare ClusterExecutor with its peers; print a table and the gates, write JSON and a plot."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from benchmarks import report, suite

BUILD = Path("build/benchmarks")


def main() -> int:
    """Run what the command line asks for; exit code 1 if a gate was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller numbers, for a first look")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this experiment; repeatable: "
                        + ", ".join(experiment.name for experiment in suite.experiments(quick=True)))
    parser.add_argument("--output", type=Path, default=BUILD, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody's programs run without compiled modules
    warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
    results = suite.run(options.only, quick=options.quick)
    options.output.mkdir(parents=True, exist_ok=True)
    report.write_json(results, options.output / "results.json")
    report.write_plot(results, options.output / "results.png")
    print(report.table(results))
    print()
    missed = 0
    for gate in report.gates(results):
        print(gate)
        missed += not gate.is_met
    print(f"\nwritten: {options.output / 'results.json'}, {options.output / 'results.png'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
