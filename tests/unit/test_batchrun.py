"""Which runs `distexec run` makes of what it is given."""

from __future__ import annotations

import pytest

from distexec.batchrun import Counts, argument_sets


def test_each_set_is_a_run() -> None:
    """Common arguments first; split as a shell does; comments and empty lines are none."""
    sets = argument_sets(["-v"], ["1 'two words'", ""], ["# none", "", "  \n", 'x "y z"\n'])
    assert list(sets) == [["-v", "1", "two words"], ["-v"], ["-v", "x", "y z"]]


def test_without_sets_it_runs_once() -> None:
    """But not if a file of sets has none."""
    assert list(argument_sets(["a"], [])) == [["a"]]
    assert list(argument_sets(["a"], [], ["# none"])) == []


def test_a_quote_that_is_not_closed() -> None:
    """The error names the set."""
    with pytest.raises(ValueError, match="argument set \"'x\": No closing quotation"):
        list(argument_sets([], ["'x"]))


def test_counts_in_words() -> None:
    """One run, several runs."""
    assert str(Counts(1, 0)) == "1 run: 1 succeeded, 0 failed"
    assert str(Counts(999, 1)) == "1,000 runs: 999 succeeded, 1 failed"
