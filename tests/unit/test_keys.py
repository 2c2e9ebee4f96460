"""Keys of calls: the same in every process, different for what does something else."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from distexec.keys import CallKeys, name_of, named_key

ROOT = Path(__file__).parents[2]

CALLS = '''
import functools, collections, numpy
class Point:
    def __init__(self, x): self.x = x
    def norm(self): return abs(self.x)
def add(a, b=2, *, c=3): return a + b + c
def make(n):
    def inner(x): return x * n
    return inner
@functools.lru_cache
def cached(x): return x
CALLS = [(add, (1,), {}), (add, (1.0,), {}), (add, (True,), {}), (add, ("1",), {}), (add, (1,), {"c": 4}),
    (lambda x: x + 1, (1,), {}), (lambda x: x + 2, (1,), {}), (make(2), (1,), {}), (make(3), (1,), {}),
    (functools.partial(add, 5), (), {}), (functools.partial(add, 6), (), {}), (cached, (1,), {}),
    (Point(3).norm, (), {}), (Point(4).norm, (), {}), (add, (Point(1),), {}), (add, (Point(2),), {}),
    (add, ({"a", "b", "c", "d", "e"},), {}), (add, (frozenset(("a", "b", "c", "d")),), {}), (len, ("abc",), {}),
    (add, (numpy.arange(10),), {}), (add, (numpy.arange(20000),), {}), (add, (numpy.arange(20000) + 1,), {}),
    (add, ({"a": {1, 2}},), {}), (add, ([make(2)],), {}), (add, ([make(3)],), {}), (Point, (1,), {}),
    (lambda x: x in {"p", "q", "r", "s"}, (1,), {})]
'''


def keys_in_a_process(code: str, seed: int) -> list[str]:
    """Run the code as a program, and give the keys of its CALLS."""
    show = "from distexec.keys import CallKeys\nkeys = CallKeys()\nfor fn, args, kwargs in CALLS:\n" \
           "    call = keys.call_of(fn, args, kwargs)\n    print(call and call.hex())\n"
    done = subprocess.run([sys.executable, "-c", code + show], cwd=ROOT, env={"PYTHONHASHSEED": str(seed), "PATH": ""},
                          stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_keys_are_the_same_in_every_process() -> None:
    """Whatever the hash seed and wherever the code stands in its file; and every call has one of its own."""
    first = keys_in_a_process(CALLS, 1)
    assert "None" not in first
    assert len(set(first)) == len(first)
    assert keys_in_a_process("# a comment more\n\n" + CALLS, 2) == first


def test_changed_code_is_another_call() -> None:
    """A function, method, default or constant that was changed gives other keys, and leaves those of the rest alone."""
    first = keys_in_a_process(CALLS, 1)
    for old, new, count in (("return a + b + c", "return a + b - c", 17), ("x * n", "x / n", 4),
                            ("abs(self.x)", "-self.x", 5), ("b=2", "b=7", 17)):
        second = keys_in_a_process(CALLS.replace(old, new), 3)
        changed = [before != after for before, after in zip(first, second, strict=True)]
        assert sum(changed) >= count, old
        assert not all(changed)


def test_equal_calls_are_told_apart_by_their_order() -> None:
    """The k-th equal call of a run has a key of its own; the same in the next run."""
    runs = []
    for _ in range(2):
        keys = CallKeys()
        runs.append([keys.next_of(call) for call in [keys.call_of(len, ("x",), {})] * 3 if call is not None])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_a_function_that_changes_is_looked_at_again() -> None:
    """What a closure holds, defaults and code may change between two calls."""
    value = [1]

    def inner(x: int, y: int = 1) -> list[int]:
        return [*value, x, y]
    keys = CallKeys()
    seen = {keys.call_of(inner, (1,), {})}
    value.append(2)
    seen.add(keys.call_of(inner, (1,), {}))

    def plain(x: int, y: int = 1) -> int:
        return x + y
    seen.add(keys.call_of(plain, (1,), {}))
    plain.__defaults__ = (2,)
    seen.add(keys.call_of(plain, (1,), {}))
    plain.__code__ = (lambda x, y: x - y).__code__
    seen.add(keys.call_of(plain, (1,), {}))
    assert len(seen) == 5


@pytest.mark.parametrize("argument", [threading.Lock(), (x for x in ()), sys.stdout], ids=["lock", "generator", "file"])
def test_what_cannot_be_pickled_has_no_key(argument: Any) -> None:
    """No name that another process would give it → None, and no exception."""
    assert CallKeys().call_of(print, (argument,), {}) is None
    assert CallKeys().call_of(partial(print, argument), (), {}) is None


def test_functions_may_refer_to_themselves() -> None:
    """A recursive closure and a cached function have keys."""
    def count(n: int) -> int:
        return n and count(n - 1)
    assert CallKeys().call_of(count, (3,), {}) is not None
    assert CallKeys().call_of(lru_cache(count), (3,), {}) not in (None, CallKeys().call_of(count, (3,), {}))


def test_named_keys() -> None:
    """A name comes back; a computed key has none."""
    assert name_of(named_key("run 1/ä\udcff")) == "run 1/ä\udcff"
    keys = CallKeys()
    call = keys.call_of(len, ((),), {})
    assert call is not None
    assert name_of(keys.next_of(call)) is None
