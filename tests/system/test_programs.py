"""Whole programs, written for ProcessPoolExecutor, mean the same with ClusterExecutor: however they are run, and wherever.

Each has no `if __name__ == "__main__"`. What it prints is compared with what it prints with ProcessPoolExecutor and
forked workers, where that can run it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents import ROOT, AgentProcess

PEER = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
def Executor(*args, **kwargs): return ProcessPoolExecutor(*args, mp_context=multiprocessing.get_context("fork"), **kwargs)
"""

MEANING = """
import os, sys

SCALE = 1
MEMO = {}
seen = [1, 2]

class Point:
    count = 7
    def __init__(self, x): self.x = x
    def moved(self, by): return Point(self.x + by)
    def __eq__(self, other): return type(other) is type(self) and other.x == self.x

class Refused(Exception):
    def __init__(self, code): super().__init__(code); self.code = code

def prepare(scale):
    global SCALE
    SCALE = scale
    Point.count = 8

def scaled(x): return SCALE * x
def remembered(key):
    MEMO[key] = MEMO.get(key, 0) + 1
    return MEMO[key]
def moved(point, by): return point.moved(by), isinstance(point, Point), Point.count
def length(items): return len(items)
def refuse(code): raise Refused(code)
def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
def is_main(): return __name__, Point.__module__
def identity(value): return value

with Executor(1, initializer=prepare, initargs=(10,)) as executor:
    print(executor.submit(scaled, 3).result(), SCALE)
    print([executor.submit(remembered, "a").result() for _ in range(3)], MEMO)
    point, was_point, count = executor.submit(moved, Point(1), 2).result()
    print(type(point) is Point, point == Point(3), was_point, count, Point.count)
    first = executor.submit(length, seen).result()
    seen.append(3)
    print(first, executor.submit(length, seen).result())
    try:
        executor.submit(refuse, 42).result()
    except Refused as error:
        print("Refused", error.code, type(error.__cause__).__name__)
    print(list(executor.map(fibonacci, range(10))))
    print(list(executor.map(fibonacci, range(10), chunksize=4)))
    print(executor.submit(is_main).result())
    print(executor.submit(identity, Point).result() is Point, executor.submit(identity, scaled).result() is scaled)
    print(executor.submit(Point(5).moved, 1).result().x)
"""

CLOSURES = """
import functools

base = 100

def adder(n):
    def add(x): return x + n + base
    return add

class Counter:
    def __init__(self): self.hits = 0
    def hit(self): self.hits += 1; return self.hits

counter = Counter()

def changing():
    numbers = [1]
    ask = lambda: sum(numbers)
    first = executor.submit(ask).result()
    numbers.append(10)
    return first, executor.submit(ask).result()

with Executor(2) as executor:
    print(executor.submit(lambda x: x * base, 3).result())
    print(list(executor.map(adder(1), range(3))))
    print(executor.submit(functools.partial(adder(2), 5)).result())
    base = 200
    print(executor.submit(adder(1), 0).result())
    print(changing())
    print(executor.submit(lambda: (lambda: 7)).result()())
    print(executor.submit(lambda: [fact(n) for n in range(5)]).result() if "fact" in globals() else "no fact")
    fact = lambda n: 1 if n < 2 else n * fact(n - 1)
    print(executor.submit(lambda: [fact(n) for n in range(5)]).result())
    executor.submit(counter.hit).result()
    print(counter.hits)
"""

CLOSURES_SAY = "300\n[101, 102, 103]\n107\n201\n(1, 11)\n7\nno fact\n[1, 1, 2, 6, 24]\n0\n"

DYING = """
import os, signal

def die_once(path):
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"

def die(code): os._exit(code)

with Executor(2) as executor:
    print(executor.submit(die_once, path).result())
    from concurrent.futures.process import BrokenProcessPool
    try:
        executor.submit(die, 3).result()
    except BrokenProcessPool as error:
        print(error.exitcode, error.attempts)
    print(sorted(executor.map(abs, range(-3, 3))))
"""


def as_file(source: str, directory: Path) -> tuple[list[str], str]:
    """A script in a file."""
    (directory / "program.py").write_text(source)
    return [str(directory / "program.py")], ""


def as_command(source: str, directory: Path) -> tuple[list[str], str]:
    """`python -c`."""
    return ["-c", source], ""


def as_input(source: str, directory: Path) -> tuple[list[str], str]:
    """Standard input."""
    return ["-"], source


def as_cells(source: str, directory: Path) -> tuple[list[str], str]:
    """A notebook: pieces of code without a file, one after the other in `__main__`."""
    return ["-c", f"import sys\nfor cell in {source.split(chr(10) * 2)!r}:\n"
            "    exec(compile(cell, '<cell>', 'exec'), vars(sys.modules['__main__']))"], ""


def as_module(source: str, directory: Path) -> tuple[list[str], str]:
    """`python -m`."""
    (directory / "prog.py").write_text(source)
    return ["-m", "prog"], ""


FORMS = [as_file, as_command, as_input, as_cells, as_module]
Form = Callable[[str, Path], tuple[list[str], str]]


def run(source: str, form: Form, directory: Path) -> str:
    """Run a program; give what it printed."""
    arguments, stdin = form(source, directory)
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{directory}"}
    done = subprocess.run([sys.executable, *arguments], input=stdin, cwd=directory, env=environ, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(params=["local", "agent"])
def ours(request: pytest.FixtureRequest) -> str:
    """The lines that define `Executor`, local or on an agent."""
    kwargs = "nodes='local'"
    if request.param == "agent":
        agent: AgentProcess = request.getfixturevalue("shared_agent")
        kwargs = f"nodes=[{agent.address!r}], secret={agent.secret!r}"
    return ("from distexec import ClusterExecutor\n"
            f"def Executor(*args, **more): return ClusterExecutor(*args, {kwargs}, **more)\n")


@pytest.mark.parametrize("form", FORMS)
def test_meaning(ours: str, form: Form, tmp_path: Path) -> None:
    """Globals, memos, class attributes, identities and values at submit mean what they mean with forked processes."""
    theirs = run(PEER + MEANING, form, tmp_path)
    assert theirs.count("\n") == 10
    assert run(ours + MEANING, form, tmp_path) == theirs


@pytest.mark.parametrize("form", FORMS)
def test_closures(ours: str, form: Form, tmp_path: Path) -> None:
    """Lambdas and closures, which ProcessPoolExecutor refuses, work, and see the globals as they are at submit."""
    assert run(ours + CLOSURES, form, tmp_path) == CLOSURES_SAY


def test_dying(ours: str, tmp_path: Path) -> None:
    """A guard-less program whose workers die goes on."""
    source = f"path = {str(tmp_path / 'died')!r}\n" + ours + DYING
    assert run(source, as_command, tmp_path) == "alive\n3 4\n[0, 1, 1, 2, 2, 3]\n"


@pytest.mark.parametrize("name", ["DISTEXEC_NODES", "NEITHER"])
def test_nodes_from_the_environment(shared_agent: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    name: str) -> None:
    """An unchanged program runs on the nodes of $DISTEXEC_NODES, or on this machine without it."""
    monkeypatch.setenv(name, shared_agent.address)
    monkeypatch.setenv("DISTEXEC_SECRET", shared_agent.secret)
    source = ("from distexec import ClusterExecutor\nwith ClusterExecutor() as executor:\n"
              "    future = executor.submit(lambda: 6 * 7)\n    print(future.result(), future.node)\n")
    assert run(source, as_command, tmp_path) == f"42 {'shared' if name == 'DISTEXEC_NODES' else 'local'}\n"
