"""Clients at work while agents, workers, links and clients are killed, frozen, cut and restored at random.

    storm ── network of namespaces ── agents on "one", "two", "three"
       └──── clients on "first", "second", each a process of its own that checks its own answers

A storm has a seed, and says at its end what it did. Afterwards every future has ended, every answer is right, no task
began more often than its `attempts` say, every slot is there, and nothing is left behind. The long run is
`python -m tests.chaos --minutes 60`, the one of every day `tests/system/test_chaos.py`.
"""
