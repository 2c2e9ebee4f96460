"""`__main__` means what it means with ProcessPoolExecutor: scripts, each with one real worker process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]

PRELUDE = "from tests.system.twoends import Session\n"


def run_file(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a script file."""
    script = directory / "script.py"
    script.write_text(source)
    return run([str(script)])


def run_command(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with -c."""
    return run(["-c", source])


def run_stdin(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program from standard input."""
    return run(["-"], source)


def run_module(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with -m."""
    (directory / "program.py").write_text(source)
    return run(["-m", "program"], cwd=directory)


def run_spawned(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a child that multiprocessing spawned, where `__main__` is called `__mp_main__`."""
    (directory / "program.py").write_text(
        "import multiprocessing\nif __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=len, args=('',))\n"
        "    child.start()\n    child.join()\n    raise SystemExit(child.exitcode)\n" + source)
    return run([str(directory / "program.py")])


def run_cells(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a notebook does: in `__main__`'s dict, without a source file."""
    return run(["-c", f"import sys; exec(compile({source!r}, '<cell 1>', 'exec'), vars(sys.modules['__main__']))"])


def run_foreign(source: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a dict of its own that is only called `__main__`."""
    return run(["-c", f"space = {{'__name__': '__main__'}}; exec({source!r}, space)"])


def run(arguments: list[str], stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with the project's root on its path."""
    return subprocess.run([sys.executable, *arguments], input=stdin, capture_output=True, text=True, timeout=60,
                          cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False)


Way = Callable[[str, Path], subprocess.CompletedProcess[str]]


def check(source: str, directory: Path, way: Way = run_file) -> None:
    """Run a program and see that it came to its end."""
    result = way(PRELUDE + dedent(source) + "\nprint('passed')\n", directory)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("passed\n"), result.stdout


EVERYTHING = """
import enum, functools, os.path, dataclasses

LIMIT = 10
memo = {}
log = []

class Color(enum.Enum):
    RED = 1
    GREEN = 2

@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    def moved(self, by):
        return Point(self.x + by, self.y)

class Failure(Exception):
    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code

def helper(x):
    return os.path.join("a", str(x))

def work(x):
    memo[x] = helper(x)
    return memo[x], len(memo), LIMIT

def paint(point, color):
    assert isinstance(point, Point) and color is Color.GREEN
    return point.moved(1), Color.RED

def fail():
    raise Failure(3, "so")

with Session() as s:
    assert s.call(work, 1) == ("a/1", 1, 10)
    assert s.call(work, 2) == ("a/2", 2, 10)
    point, color = s.call(paint, Point(1), Color.GREEN)
    assert type(point) is Point and point == Point(2), point
    assert color is Color.RED
    LIMIT = 11
    assert s.call(work, 3) == ("a/3", 3, 11)
    assert s.call(lambda: LIMIT) == 11
    try:
        s.call(fail)
    except Failure as error:
        assert error.code == 3 and "raise Failure" not in str(error)
        assert "Failure: (3, 'so')" in str(error.__cause__)
    else:
        raise AssertionError
"""


@pytest.mark.parametrize("way", [run_file, run_command, run_stdin, run_module, run_spawned, run_cells, run_foreign])
def test_it_works_wherever_main_comes_from(way: Way, tmp_path: Path) -> None:
    """Functions, classes and globals mean the same in a script, -c, stdin, a notebook's cells and an exec'ed dict."""
    check(EVERYTHING, tmp_path, way)


def test_initializer_sets_global(tmp_path: Path) -> None:
    """A global that an initializer sets stays set, though the client has another value for it."""
    check("""
        X = None
        Y = "client"
        def init(value):
            global X, Z
            X, Z = value, "worker"
        def read():
            return X, Y, Z
        with Session(init, 5) as s:
            assert s.call(read) == (5, "client", "worker")
            assert s.call(lambda: X) == 5
            Y = "changed"
            assert s.call(read) == (5, "changed", "worker")
            X = 7
            assert s.call(read)[0] == 7
        """, tmp_path)


def test_unsent_global_that_the_initializer_makes(tmp_path: Path) -> None:
    """A global that cannot be pickled does not matter where the worker has its own."""
    check("""
        import sys
        connection = (i for i in range(3))
        def init():
            global connection
            connection = "the worker's"
        def read():
            return connection
        with Session(init) as s:
            assert s.call(read) == "the worker's"
        """, tmp_path)


def test_unsendable_global_is_named(tmp_path: Path) -> None:
    """A global that cannot be pickled is an error only if it is used, and the error names it."""
    check("""
        import pickle
        lines = (i for i in range(3))
        def f(really):
            return list(lines) if really else 1
        def g(x=(i for i in "a")):
            return x
        with Session() as s:
            assert s.call(f, False) == 1
            try:
                s.call(f, True)
            except pickle.PicklingError as error:
                assert "cannot send global 'lines' captured by function f: TypeError: cannot" in str(error), error
            else:
                raise AssertionError
            try:
                s.submit(g)
            except TypeError as error:
                assert "cannot send global 'g'" in str(error), error
            else:
                raise AssertionError
        """, tmp_path)


def test_global_that_only_the_worker_lacks(tmp_path: Path) -> None:
    """What cannot be rebuilt on the worker, or relies on what cannot be sent, is an error only if used, or needed."""
    check("""
        import pickle, sys, types
        from distexec.errors import PayloadError
        gone = sys.modules["gone"] = types.ModuleType("gone")
        gone.__spec__ = __spec__
        exec("class Thing: pass", vars(gone))
        thing = gone.Thing()
        stream = (i for i in "a")
        class Reader:
            source = stream
            def __init__(self, source):
                self.source = source
        reader = Reader(stream)
        def f(what):
            if what == "thing":
                return thing
            if what == "reader":
                return reader
            return 1
        def take(reader):
            return 1
        class Own(Reader):
            pass
        def expect(kind, text, *task):
            try:
                s.call(*task)
            except kind as error:
                assert text in str(error), error
            else:
                raise AssertionError
        with Session() as s:
            assert s.call(f, "nothing") == 1
            expect(pickle.UnpicklingError, "global 'thing' of __main__ could not be rebuilt: Module", f, "thing")
            expect(pickle.UnpicklingError, "cannot send global 'stream'", f, "reader")
            del Reader.source
            own = Own(1)
            Reader.source = stream
            expect(PayloadError, "cannot send global 'stream'", take, own)
            assert s.call(f, "nothing") == 1
        """, tmp_path)


def test_memo_and_class_attribute_persist(tmp_path: Path) -> None:
    """What tasks put into module-level objects and classes is there for later tasks on the same worker."""
    check("""
        import collections, functools
        memo = {}
        counter = collections.Counter()
        class Settings:
            level = 1
            names = []
        def remember(key):
            memo[key] = True
            counter[key] += 1
            Settings.level += 1
            Settings.names.append(key)
            return len(memo), counter[key], Settings.level, len(Settings.names)
        @functools.lru_cache
        def slow(x):
            calls.append(x)
            return x
        calls = []
        def use(x):
            return slow(x), len(calls)
        with Session() as s:
            assert s.call(remember, "a") == (1, 1, 2, 1)
            assert s.call(remember, "b") == (2, 1, 3, 2)
            assert s.call(lambda k: remember(k), "b") == (2, 2, 4, 3)
            assert s.call(remember, "c", **{}) == (3, 1, 5, 4)
            assert s.call(use, 1) == (1, 1) and s.call(use, 1) == (1, 1) and s.call(use, 2) == (2, 2)
            assert s.call(slow, 2) == 2 and s.call(slow, 3) == 3 and s.call(use, 3) == (3, 3)
            assert not memo and not calls and Settings.level == 1
            Settings.level = 100
            assert s.call(remember, "d")[2] == 101
        """, tmp_path)


def test_changes_at_the_client_are_seen(tmp_path: Path) -> None:
    """A task is the value at submit: globals, cells, defaults and classes changed between two submits count."""
    check("""
        items = [1]
        def total():
            return sum(items)
        def closure():
            kept = [1]
            def inner():
                return sum(kept)
            return inner, kept
        def default(x=[1]):
            return sum(x)
        class Box:
            size = 1
            def area(self):
                return self.size
        def measure(box):
            return box.area()
        def redefined():
            return "old"
        def outer():
            return redefined()
        with Session() as s:
            assert s.call(total) == 1
            items.append(2)
            first = s.submit(total)
            items.append(3)
            second = s.submit(total)
            assert (s.wait(first), s.wait(second)) == (3, 6)
            inner, kept = closure()
            assert s.call(inner) == 1
            kept.append(5)
            assert s.call(inner) == 6
            assert s.call(default) == 1
            default.__defaults__[0].append(9)
            assert s.call(default) == 10
            box = Box()
            assert s.call(measure, box) == 1
            Box.size = 2
            assert s.call(measure, box) == 2
            Box.area = lambda self: 3
            assert s.call(measure, box) == 3
            assert s.call(outer) == "old"
            def redefined():
                return "new"
            assert s.call(outer) == "new"
            items = (7,)
            assert s.call(total) == 7
            items = [1, 2, 3]
            assert s.call(total) == 6
        """, tmp_path)


def test_redefined_class(tmp_path: Path) -> None:
    """A class defined anew, as in a notebook, replaces the old one on the worker."""
    check("""
        class Thing:
            def name(self):
                return 1
        def ask(thing):
            return thing.name(), isinstance(thing, Thing), thing
        with Session() as s:
            assert s.call(ask, Thing())[0] == 1
            class Thing:
                def name(self):
                    return 2
            value = s.call(ask, Thing())
            assert value[:2] == (2, True) and type(value[2]) is Thing
        """, tmp_path)


def test_class_identity(tmp_path: Path) -> None:
    """Objects of the client's classes come back as objects of the client's classes."""
    check("""
        import abc, collections, dataclasses, enum, typing
        class Base(abc.ABC):
            made = []
            def __init_subclass__(cls, *, tag, **kwargs):
                super().__init_subclass__(**kwargs)
                cls.tag = tag
                Base.made.append(cls)
            @abc.abstractmethod
            def run(self): ...
        class Derived(Base, tag="t"):
            def __init__(self, x):
                super().__init__()
                self.x = x
            def run(self):
                return self.x
            @staticmethod
            def fixed():
                return "static"
            @classmethod
            def make(cls, x):
                return cls(x)
            @property
            def double(self):
                return self.x * 2
            class Inner:
                pass
        class Slotted:
            __slots__ = ("a", "__weakref__")
            def __init__(self, a):
                self.a = a
        Pair = collections.namedtuple("Pair", "a b")
        class Typed(typing.NamedTuple):
            a: int
        @dataclasses.dataclass(frozen=True, slots=True)
        class Frozen:
            a: int
            b: list = dataclasses.field(default_factory=list)
        class Planet(enum.Enum):
            EARTH = (5.9, 6.3)
            MARS = (0.6, 3.3)
            TERRA = (5.9, 6.3)
            def __init__(self, mass, radius):
                self.mass, self.radius = mass, radius
            @property
            def gravity(self):
                return self.mass / self.radius ** 2
        class Mode(enum.IntFlag):
            R = 4
            W = 2
            RW = 6
        class Name(enum.StrEnum):
            A = enum.auto()
        T = typing.TypeVar("T")
        class Stack(typing.Generic[T]):
            def __init__(self):
                self.items: list[T] = []
        UserId = typing.NewType("UserId", int)
        class Missing:
            def __reduce__(self):
                return "MISSING"
        MISSING = Missing()
        class Meta(type):
            def __len__(cls):
                return 4
        class WithMeta(metaclass=Meta):
            pass

        def look(*objects):
            d = objects[0]
            assert Base.made == [Derived] and Derived.tag == "t"
            assert type(d) is Derived and isinstance(d, Base) and d.run() == 3 and d.double == 6
            assert Derived.make(4).run() == 4 and d.fixed() == "static"
            assert Planet.MARS.mass == 0.6 and Planet.TERRA is Planet.EARTH and Planet["TERRA"] is Planet.EARTH
            assert Planet.EARTH.gravity > 0 and Mode.R | Mode.W is Mode.RW and Name.A == "a"
            assert not hasattr(objects[2], "__dict__") and len(WithMeta) == 4 and MISSING is objects[-1]
            assert UserId(3) == 3 and Stack[int]().items == []
            return objects
        objects = (Derived(3), Derived.Inner(), Slotted(1), Pair(1, 2), Typed(1), Frozen(1), Planet.MARS, Mode.RW,
                   Name.A, Stack(), WithMeta(), Derived, Planet, Meta, WithMeta, MISSING)
        with Session() as s:
            for _ in range(2):
                back = s.call(look, *objects)
                for old, new in zip(objects, back):
                    assert type(new) is type(old), (old, new)
                    if isinstance(old, type) or type(old) in (Planet, Mode, Name, Missing):
                        assert new is old, (old, new)
                assert back[3] == (1, 2) and back[5] == Frozen(1) and back[2].a == 1
            assert Base.made == [Derived]
        """, tmp_path)


def test_functions_of_all_kinds(tmp_path: Path) -> None:
    """Recursion, decorators, partials, generators, methods and coroutines work as by fork."""
    check("""
        import asyncio, contextlib, functools, logging, sys, threading, typing, xml
        import xml.dom.minidom
        import numpy as np
        if typing.TYPE_CHECKING:
            from nowhere import Nothing
        log = logging.getLogger("x")
        lock = threading.Lock()
        local = threading.local()
        event = threading.Event()
        out = sys.stdout
        calls = []
        def counted(fn):
            @functools.wraps(fn)
            def wrapper(*args, **kwargs):
                calls.append(fn.__name__)
                return fn(*args, **kwargs)
            return wrapper
        @counted
        def fact(n):
            return 1 if n == 0 else n * fact(n - 1)
        def even(n):
            return n == 0 or odd(n - 1)
        def odd(n):
            return n != 0 and even(n - 1)
        @functools.lru_cache(maxsize=None)
        def fib(n):
            return n if n < 2 else fib(n - 1) + fib(n - 2)
        @contextlib.contextmanager
        def guarded():
            with lock:
                yield 1
        def generate(n):
            def inner():
                yield from (i for i in range(n))
            return list(inner())
        async def later(x):
            await asyncio.sleep(0)
            return x
        def run_later(x):
            return asyncio.run(later(x))
        def uses_many(x: "Nothing", *, scale=2):
            log.debug("x")
            assert out is sys.stdout
            local.value = 3
            assert not event.is_set() and not lock.locked()
            with guarded() as one:
                return int(np.arange(3).sum()) * scale + one + local.value
        class Worker:
            def __init__(self, base):
                self.base = base
            def run(self, x):
                return self.base + x
            def __call__(self, x):
                return self.run(x) * 2
            @classmethod
            def of(cls, x):
                return cls(x).base
        @functools.singledispatch
        def show(x):
            return "object"
        @show.register
        def _(x: int):
            return "int"
        def attributes():
            return attributes.count
        attributes.count = 12
        def default(x, how=even, what=Worker(3)):
            return how(x), what.run(1)
        def submodule():
            return xml.dom.minidom.Document.__name__
        def both():
            return fact(3), len(calls)
        with Session() as s:
            assert s.call(fact, 5) == 120
            assert s.call(both) == (6, 10) and calls == []
            assert s.call(even, 10) is True and s.call(odd, 10) is False
            assert s.call(fib, 30) == 832040
            assert s.call(generate, 3) == [0, 1, 2]
            assert s.call(run_later, 4) == 4
            assert s.call(uses_many, 1) == 10 and s.call(uses_many, 1, scale=3) == 13
            assert s.call(Worker(1).run, 2) == 3 and s.call(Worker(1), 2) == 6 and s.call(Worker.of, 5) == 5
            assert s.call(functools.partial(even), 2) is True
            assert s.call(functools.partial(default, how=odd), 3) == (True, 4)
            assert (s.call(show, 1), s.call(show, "")) == ("int", "object")
            assert s.call(attributes) == 12
            assert s.call(submodule) == "Document"
            assert s.call(lambda f: f(4), even) is True
            assert s.call(map, even, []) is not None if False else True
            assert s.call(lambda: __name__) == "__main__"
            assert type(s.call(Worker, 1)) is Worker
            back = s.call(lambda: lambda x: even(x))
            assert back(4) and back.__globals__ is globals()
        """, tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is new in 3.12")
def test_type_parameters(tmp_path: Path) -> None:
    """Functions and classes with the annotations of 3.12 arrive with them."""
    check("""
        import typing
        type Numbers[T] = list[T]
        type Name = str
        P = typing.ParamSpec("P")
        class Box[T]:
            def __init__(self, value: T, name: Name = ""):
                self.value = value
        def first[T](numbers: Numbers[T], how: typing.Callable[P, Name] = None) -> T:
            assert first.__type_params__[0].__name__ == "T" and Numbers.__value__ is not None
            return Box[int](numbers[0])
        with Session() as s:
            box = s.call(first, [3])
            assert type(box) is Box and box.value == 3
        """, tmp_path)


def test_shared_cells_and_objects(tmp_path: Path) -> None:
    """Closures that share a cell, and globals that share an object, still do on the worker."""
    check("""
        def make():
            n = 0
            def inc():
                nonlocal n
                n += 1
            def get():
                return n
            return inc, get
        inc, get = make()
        cache = {}
        def cached(store):
            def decorate(fn):
                def wrapper(x):
                    store[x] = fn(x)
                    return store[x]
                return wrapper
            return decorate
        @cached(cache)
        def square(x):
            return x * x
        def count():
            square(3)
            return len(cache)
        registry = {}
        def register(fn):
            registry[fn.__name__] = fn
            return fn
        @register
        def one():
            return registry["two"]() + 1
        @register
        def two():
            return len(registry)
        class Node:
            all = []
        class Leaf(Node):
            pass
        Node.all.append(Leaf)
        Node.leaf = Leaf()
        alias = other = []
        def aliased():
            alias.append(1)
            return other, registry["one"] is one, Node.all[0] is Leaf, type(Node.leaf) is Leaf
        def pair(a, b):
            a(); a()
            return b()
        with Session() as s:
            assert s.call(pair, *make()) == 2
            assert s.call(count) == 1
            assert s.call(one) == 3
            assert s.call(aliased) == ([1], True, True, True)
            assert isinstance(s.call(Leaf), Node) and s.call(lambda x: type(x) is Leaf, Leaf())
            inner, outer = make()
            def recursive(n):
                return 0 if n == 0 else 1 + recursive(n - 1)
            assert s.call(recursive, 3) == 3
            def local():
                class Local:
                    size = 1
                    def me(self):
                        return self
                def again(n):
                    return 0 if n == 0 else 1 + again(n - 1)
                return Local, again
            Local, again = local()
            assert s.call(again, 3) == 3
            back = s.call(lambda x: (x.me(), x.size), Local())
            assert type(back[0]) is Local and back[1] == 1
            method = Local.me
            Local.size = 2
            assert s.call(lambda x: x.size, Local()) == 2
            assert Local.me is method
        """, tmp_path)


def test_errors_of_main(tmp_path: Path) -> None:
    """Exceptions of the client's classes arrive as themselves; what cannot be rebuilt is stood in for."""
    check("""
        from distexec.errors import PayloadError, RemoteError
        class Plain(Exception):
            pass
        class Two(Exception):
            def __init__(self, a, b):
                super().__init__(f"{a} {b}")
        def plain():
            error = Plain("x")
            error.add_note("a note")
            raise error from ValueError("cause")
        def two():
            raise Two(1, 2)
        def group():
            raise ExceptionGroup("g", [Plain(1), ValueError(2)])
        def leave(kind):
            raise kind(3)
        class Bad:
            def __setstate__(self, state):
                raise SystemExit("no")
        bad = Bad()
        bad.x = 1
        def take(x):
            return 1
        def give():
            return bad
        def expect(kind, *task):
            try:
                s.call(*task)
            except BaseException as error:
                assert type(error) is kind, error
                return error
            raise AssertionError
        with Session() as s:
            error = expect(Plain, plain)
            assert error.__notes__ == ["a note"] and "ValueError: cause" in str(error.__cause__)
            assert 'raise error from ValueError("cause")' in str(error.__cause__), str(error.__cause__)
            error = expect(RemoteError, two)
            assert "__main__.Two: 1 2" in str(error) and "in two" in str(error.__cause__)
            assert [type(e) for e in expect(ExceptionGroup, group).exceptions] == [Plain, ValueError]
            for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
                assert expect(kind, leave, kind).args == (3,)
            assert "Bad" in str(expect(PayloadError, take, bad))
            assert "SystemExit: no" in str(expect(PayloadError, take, bad))
            assert s.call(take, 1) == 1
        """, tmp_path)


def test_a_call_does_not_carry_what_the_worker_has(tmp_path: Path) -> None:
    """Code and definitions cross once; later calls are small, and so are calls whose function brings the class."""
    check("""
        class Point:
            def __init__(self, x):
                self.x = x
        TABLE = list(range(10_000))
        def move(point):
            return Point(point.x + len(TABLE))
        with Session() as s:
            assert s.call(move, Point(1)).x == 10_001
            assert s.sent_bytes > 10_000
            assert s.call(move, Point(2)).x == 10_002
            assert s.sent_bytes < 100, s.sent_bytes
            TABLE.append(1)
            assert s.call(move, Point(2)).x == 10_003
        """, tmp_path)


def test_a_task_may_be_a_client(tmp_path: Path) -> None:
    """A worker that submits tasks itself sends on what its `__main__` was sent."""
    check("""
        class Box:
            def __init__(self, x):
                self.x = x
        base = 1
        def inner(box):
            assert type(box) is Box
            return Box(box.x + base)
        def outer(x):
            global base
            base = 10
            with Session() as below:
                box = below.call(inner, Box(x))
                assert type(box) is Box
                return box
        with Session() as s:
            assert s.call(outer, 3).x == 13
        """, tmp_path)


def test_arrays(tmp_path: Path) -> None:
    """Arrays large and small are writable in the task and at the client, also as globals and in closures."""
    check("""
        import numpy as np
        table = np.ones(100_000)
        def total(a, b):
            a += 1
            b += 1
            table[0] += 1
            return a, b, float(table.sum())
        with Session() as s:
            small, large = np.zeros(3), np.zeros((300, 300), order="F")
            a, b, n = s.call(total, small, large)
            assert a.sum() == 3 and b.sum() == 90_000 and n == 100_001.0
            a += 1
            b += 1
            assert s.call(total, small, large[::2, ::2])[2] == 100_002.0
            table[:] = 2
            assert s.call(total, small, large)[2] == 200_001.0
            assert s.call(lambda: large.shape) == (300, 300)
        """, tmp_path)
