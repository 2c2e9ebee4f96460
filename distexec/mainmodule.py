"""What the two ends agree on about the client's `__main__`, and the worker's half of it.

A payload that relies on `__main__` is a *bundle*: definitions of globals, then an ordinary pickle that names them.

    b"M" + pickle([definition…], pickle of the function or call)      definition: name, version, is_first, pickle, …

A session has one `__main__` on each worker. The rule: a definition is applied if its name is unbound there, or if the
client changed it since the version that this worker has. So what an initializer or a task sets stays as they set it.
A global that cannot be sent or rebuilt stays unbound, and is an error only for a task that looks it up.

The second half of the module is what pickles made by `byvalue` call, by name, to rebuild functions, cells and classes.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import itertools
import marshal
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

PROTOCOL = 5

BUNDLE = ord("M")
"""First byte of a bundle; a plain pickle begins with 0x80."""

VERSIONS_PER_LIFE = 1 << 40
"""Versions set apart for each life of a durable session's client. Smaller: one life might use the next one's."""

IN_BAND_BYTES = 16 << 10
"""A buffer below this stays inside its pickle. Smaller: thousands of little arrays become thousands of message fields.
Larger: it is copied once more on either side."""

MAIN_NAMES = ("__main__", "__mp_main__")
"""What `__main__` is called; the second by multiprocessing, in a child that it spawned."""

Buffer = bytes | bytearray | memoryview
Namespace = dict[str, Any]

_versions = itertools.count(1)  # of all sessions, so that none can be mistaken for an older one


def next_version() -> int:
    """Give a version that no definition has."""
    return next(_versions)


def begin_life(life: int) -> None:
    """Go on with a session whose workers may know definitions of `life` earlier lives of its client."""
    global _versions
    _versions = itertools.count(max(next(_versions), VERSIONS_PER_LIFE * life + 1))


def keep_large(buffers: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    """Give a buffer callback for pickle that puts large buffers into the list and leaves small ones in band."""

    def is_in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < IN_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    return is_in_band


class Definition(NamedTuple):
    """A global of the client's `__main__`, as it travels (as a plain tuple)."""

    name: str
    version: int  # grows whenever the client is seen to have changed the global; unique in the session
    is_first: bool  # the client has not changed it since the session first used it
    data: bytes | None  # None: it cannot be pickled, and `problem` says why
    buffer_count: int  # how many of the payload's buffers are its own; definitions come before the call
    problem: str


def pack_bundle(definitions: Sequence[Definition], data: bytes) -> bytes:
    """Put definitions in front of the pickle that relies on them."""
    return b"M" + pickle.dumps(([tuple(definition) for definition in definitions], data), PROTOCOL)


def without_definitions(data: Buffer) -> bytes:
    """Give what comes after a bundle's definitions; other pickles as they are."""
    if data[0] != BUNDLE:
        return bytes(data)
    inner: bytes = pickle.loads(memoryview(data)[1:])[1]
    return inner


class MainModule:
    """A worker's `__main__` for its session: what it is made of, and which versions it has."""

    def __init__(self) -> None:
        self._displaced: ModuleType | None = None  # kept, because an unreferenced module's globals are cleared
        self._versions: dict[str, int] = {}
        self._problems: dict[str, pickle.PickleError] = {}  # globals that are missing here, and why
        self._pending: dict[str, tuple[Definition, Sequence[Buffer]]] = {}
        self._bound: set[str] = set()  # the pending ones that exist already, though perhaps half made
        self._depths: dict[str, int] = {}  # how often each is being loaded, one inside the other

    def install(self, file: str | None = None) -> ModuleType:
        """Put an empty `__main__` into `sys.modules`."""
        module = ModuleType("__main__")
        namespace = vars(module)
        del namespace["__doc__"]  # unbound, so that the client's is used
        namespace["__builtins__"] = builtins
        if file is not None:
            namespace["__file__"] = file
        self._displaced = sys.modules.get("__main__")
        for name in MAIN_NAMES:
            sys.modules[name] = module
        return module

    def load(self, bundle: Buffer, buffers: Sequence[Buffer]) -> Any:
        """Apply a bundle's definitions and rebuild what comes after them."""
        definitions, data = pickle.loads(memoryview(bundle)[1:])
        start = self._note(map(Definition._make, definitions), buffers)
        try:
            while self._pending:
                with suppress(pickle.UnpicklingError):  # noted in _problems; who uses it is told
                    self._define(next(iter(self._pending)))
        finally:
            self._pending, self._bound, self._depths = {}, set(), {}
        try:
            return pickle.loads(data, buffers=buffers[start:])
        except AttributeError as error:
            for name, problem in self._problems.items():
                if f"'{name}'" in str(error):
                    raise problem from error
            raise

    def _note(self, definitions: Iterator[Definition], buffers: Sequence[Buffer]) -> int:
        """Choose the definitions that this `__main__` needs; give the number of buffers that belong to all of them."""
        namespace, start = main_globals(), 0
        for definition in definitions:
            own = buffers[start:start + definition.buffer_count]
            start += definition.buffer_count
            name, version = definition.name, definition.version
            known = self._versions.get(name, 0)
            is_first = definition.is_first and (not known or known // VERSIONS_PER_LIFE == version // VERSIONS_PER_LIFE)
            if name in namespace and (is_first or version <= known):
                self._versions[name] = max(version, known)
                continue
            if definition.data is not None:
                self._pending[name] = definition, own
            else:
                self._do_without(name, pickle.PicklingError(definition.problem))
                self._versions[name] = max(version, known)
        return start

    def _do_without(self, name: str, problem: pickle.PickleError) -> None:
        main_globals().pop(name, None)  # a stale value would be worse than none
        self._pending.pop(name, None)
        self._problems[name] = problem

    def _define(self, name: str) -> None:
        definition, buffers = self._pending[name]
        assert definition.data is not None
        depth = self._depths.get(name, 0)
        self._depths[name] = depth + 1
        try:
            if depth > 1:
                raise RecursionError("it is needed to make itself")
            value = _DefinitionUnpickler(self, definition.data, buffers).load()
        except Exception as error:
            problem = pickle.UnpicklingError(
                f"global {name!r} of __main__ could not be rebuilt: {type(error).__name__}: {error}")
            self._do_without(name, problem)
            raise problem from error
        finally:
            self._depths[name] = depth
        main_globals()[name] = value
        self._versions[name] = max(definition.version, self._versions.get(name, 0))
        self._problems.pop(name, None)
        self._pending.pop(name, None)

    def require(self, name: str) -> None:
        """See that a pending definition exists before another one refers to it.

        Where two need each other, one is met half made. If not even that exists (a class whose base lists it), it is
        made in a second, inner load, and the outer one ends up with the same object.
        """
        if name in self._pending and name not in self._bound:
            self._define(name)
        if name in self._problems and name not in main_globals():
            raise self._problems[name]

    def bind(self, name: str, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Called by definitions: make a function or class and let it be found at once, before it is complete."""
        value = main_globals()[name] = make(*args)
        self._bound.add(name)
        return value

    def explain(self, exc: BaseException) -> BaseException:
        """Give the exception to report for `exc`: another one when the reason is a global that is missing here."""
        name = exc.name if isinstance(exc, NameError) else None
        if name in self._problems and name not in main_globals():
            return self._problems[name]
        return exc


class _DefinitionUnpickler(pickle.Unpickler):
    """Loads one definition, and before it those that it refers to."""

    def __init__(self, main: MainModule, data: bytes, buffers: Sequence[Buffer]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._main = main

    def find_class(self, module: str, name: str) -> Any:
        if module in MAIN_NAMES:
            self._main.require(name.partition(".")[0])
        elif module == __name__:
            if name == "bind":
                return self._main.bind
            if name == "main_attribute":
                return self._main_attribute
        return super().find_class(module, name)

    def persistent_load(self, name: str) -> Any:
        """Called by pickle where an object is another global's value."""
        self._main.require(name)
        return main_globals()[name]

    def _main_attribute(self, name: str) -> Any:
        self._main.require(name.partition(".")[0])
        return main_attribute(name)


# ---- what pickles call


def bind(name: str, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Stand in pickles for `MainModule.bind`, which replaces it when they are loaded."""
    raise AssertionError("definitions of globals are loaded by MainModule only")


def main_globals() -> Namespace:
    """Give the dict of this process's `__main__`."""
    return vars(sys.modules["__main__"])


def module_globals(name: str) -> Namespace:
    """Give the dict of an importable module, whose functions made by value run in it."""
    return vars(importlib.import_module(name))


def main_attribute(qualname: str) -> Any:
    """Look up a dotted name in `__main__`."""
    return functools.reduce(getattr, qualname.split("."), sys.modules["__main__"])


def make_code(marshalled: bytes) -> types.CodeType:
    """Rebuild a code object; both ends run the same Python minor version."""
    code: types.CodeType = marshal.loads(marshalled)
    return code


def make_cell() -> types.CellType:
    """Make the empty cell of a closure; `set_cell` follows when it is known to everybody who shares it."""
    return types.CellType()


def set_cell(cell: types.CellType, contents: tuple[Any]) -> None:
    """Fill the cell of a closure."""
    cell.cell_contents, = contents


def make_function(code: types.CodeType, namespace: Namespace, closure: tuple[types.CellType, ...] | None) -> Any:
    """Make a function that `set_function` completes."""
    namespace.setdefault("__builtins__", builtins)
    return FunctionType(code, namespace, None, None, closure)


def set_function(function: FunctionType, state: tuple[dict[str, Any], dict[str, Any], Namespace, list[str]]) -> None:
    """Complete a function: its special attributes, its own ones, globals if it brings them, submodules it uses."""
    special, own, captured, submodules = state
    for name, value in special.items():
        setattr(function, name, value)
    function.__dict__.update(own)
    function.__globals__.update(captured)
    for submodule in submodules:
        importlib.import_module(submodule)


def make_cached(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    """Make an `lru_cache` with nothing in it."""
    return functools.lru_cache(maxsize, typed)(function)


_classes: WeakValueDictionary[str, type] = WeakValueDictionary()
"""Classes made by value, or sent from here, under cloudpickle's identities for them: one object per identity."""

_class_versions: dict[str, int] = {}
"""Which version of them this process has, where they have no name in `__main__`."""

_received: set[str] = set()
"""Those that come from elsewhere."""


def track_class(identity: str, cls: type) -> None:
    """Remember a class that is sent by value, so that it is found if it comes back."""
    _classes[identity] = cls


def is_received(identity: str) -> bool:
    """Say whether a class comes from another process, whose business its versions are."""
    return identity in _received


def class_version(identity: str) -> int:
    """Say which version of a class this process has; 0: it never sent it."""
    return _class_versions.get(identity, 0)


def bump_class(identity: str) -> int:
    """Give the next version to a class that was changed here."""
    version = _class_versions[identity] = class_version(identity) + 1
    return version


def make_class(identity: str, make: Callable[..., type], args: tuple[Any, ...], bases: tuple[Any, ...]) -> type:
    """Find a class by its identity, or make it, empty, without running the hooks that its definition once ran."""
    cls = _classes.get(identity)
    if cls is None:
        with _quiet_bases(bases):
            cls = _classes[identity] = make(*args)
    return cls


def set_class(cls: type, state: tuple[str, int | None, Callable[..., Any], Any, dict[str, dict[str, Any]]]) -> None:
    """Complete a class, unless this process has it in the same version already.

    A class that is a global of `__main__` comes without a version (None), as that of its definition was looked at.
    """
    identity, version, set_state, attributes, members = state
    if version is not None:
        if class_version(identity) >= version:
            return
        _class_versions[identity] = version
        _received.add(identity)
    set_state(cls, attributes)
    for name, own in members.items():  # of an enum
        vars(cls.__members__[name]).update(own)  # type: ignore[attr-defined]


@contextmanager
def _quiet_bases(bases: tuple[Any, ...]) -> Iterator[None]:
    """Keep `__init_subclass__` of the user's base classes from running again.

    It ran when the class statement did; what it changed travels as state, and its keyword arguments are not known.
    """
    noisy = {cls: vars(cls)["__init_subclass__"]
             for base in types.resolve_bases(bases) for cls in base.__mro__
             if "__init_subclass__" in vars(cls) and (cls.__module__ in MAIN_NAMES or "<locals>" in cls.__qualname__)}
    for cls in noisy:
        type.__setattr__(cls, "__init_subclass__", classmethod(_ignore_subclass))
    try:
        yield
    finally:
        for cls, hook in noisy.items():
            type.__setattr__(cls, "__init_subclass__", hook)


def _ignore_subclass(cls: type, /, **kwargs: Any) -> None:
    """Stands in for `__init_subclass__`."""


def digest(data: bytes, buffers: Sequence[Buffer] = ()) -> bytes:
    """Name a pickle and its buffers by 16 bytes (xxh3-128)."""
    from xxhash import xxh3_128

    state = xxh3_128(data)
    for buffer in buffers:
        state.update(digest_known(buffer) or buffer)
    return state.digest()


# ---- buffers that were put by before


digests: dict[int, bytes] = {}
"""By id of a view, the digest of its bytes, which do not change while it is here: it saves looking at them again."""


def digest_known(buffer: Buffer) -> bytes | None:
    """Give the digest of a buffer that pickle made from a view in `digests`; None for others."""
    return digests.get(id(buffer.obj)) if digests and type(buffer) is memoryview else None


def apart(view: memoryview) -> pickle.PickleBuffer:
    """Wrap a view so that a pickle leaves its bytes to a buffer."""
    return pickle.PickleBuffer(view)
