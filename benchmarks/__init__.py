"""Benchmarks of ClusterExecutor beside its peers, in one run and as ratios. Run: `python -m benchmarks --help`."""
