"""By what a call is found again in the journal, when a program is run once more.

    (module, qualified name, code and constants) + arguments + how many such calls came before  ──►  key

Functions count by what they are made of: code, constants, defaults, what their closures hold; not by file names or line
numbers. What a function calls does not count, nor do modules. Arguments count by their plain pickle, in which functions,
classes of `__main__` and sets are replaced by what is the same in every process. Pure; it pickles and never unpickles.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import lru_cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from xxhash import xxh3_128_digest

from distexec.mainmodule import MAIN_NAMES, PROTOCOL, digest

__all__ = ["CallKeys", "named_key"]

KEPT_FUNCTIONS = 4096
"""How many functions' digests are remembered. Smaller: a program with more of them computes some anew."""

_PLAIN = frozenset((type(None), bool, int, float, str, bytes))
_NAMED, _COMPUTED = b"k", b"c"  # first byte of a key: given by the user, or computed
_CachedFunction = type(lru_cache(len))


def named_key(name: str) -> bytes:
    """Make the key of a call that was named with `options(key=)`."""
    return _NAMED + name.encode("utf-8", "surrogatepass")


def name_of(key: bytes) -> str | None:
    """Give what the user called a call; None if its key was computed."""
    return key[1:].decode("utf-8", "surrogatepass") if key[:1] == _NAMED else None


class CallKeys:
    """The computed keys of one run of a program: equal calls are told apart by their order."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        # By id, which the reference keeps from being used again.
        self._functions: dict[int, tuple[Any, CodeType, object, bytes]] = {}

    def call_of(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
        """Name a call by what it does: equal for equal ones; None if there is no name that another process would give it."""
        try:
            known = self._functions.get(id(fn))
            if known is not None and known[1] is known[0].__code__ and known[2] is known[0].__defaults__:
                return known[3] + _of_arguments(args, kwargs)
            return self._function(fn) + _of_arguments(args, kwargs)
        except (Exception, SystemExit):  # what a user's __reduce__ raises; pickling the call itself will tell
            return None

    def next_of(self, call: bytes) -> bytes:
        """Give the key of the next such call. One thread at a time."""
        count = self._counts[call] = self._counts.get(call, -1) + 1
        return _COMPUTED + call + count.to_bytes(8, "big")

    def _function(self, fn: Callable[..., Any]) -> bytes:
        found = xxh3_128_digest(_bytes_of(fn))
        if type(fn) is FunctionType and not (fn.__closure__ or fn.__kwdefaults__) and all(
                type(value) in _PLAIN for value in fn.__defaults__ or ()):
            if len(self._functions) >= KEPT_FUNCTIONS:
                self._functions.pop(next(iter(self._functions)), None)
            self._functions[id(fn)] = fn, fn.__code__, fn.__defaults__, found
        return found


def _of_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    if not kwargs:
        for value in args:
            if type(value) not in _PLAIN:
                break
        else:
            return xxh3_128_digest(pickle.dumps(args, PROTOCOL))
    buffers: list[pickle.PickleBuffer] = []
    data = _pickled((args, kwargs), buffers)
    return digest(data, [buffer.raw() for buffer in buffers])


class _StablePickler(pickle.Pickler):
    """Pickles a value for its digest alone: what differs from process to process is replaced."""

    def __init__(self, file: Any, buffers: list[pickle.PickleBuffer], seen: set[int]) -> None:
        super().__init__(file, PROTOCOL, buffer_callback=buffers.append)
        self._seen = seen  # functions and classes being looked at, which may refer to themselves

    def persistent_id(self, obj: Any) -> Any:
        """Replace sets, whose order is chance, and functions and classes, whose pickle is only their name."""
        kind = type(obj)
        if kind in _PLAIN:
            return None
        if kind is set or kind is frozenset:
            return "set", sorted(xxh3_128_digest(_bytes_of(each, self._seen)) for each in obj)
        if kind is FunctionType:
            return "function", *self._once(obj, _parts_of_function)
        if kind is _CachedFunction:
            return "cached", obj.__wrapped__
        if kind is MethodType:
            return "method", obj.__func__, obj.__self__
        if isinstance(obj, type) and obj.__module__ in MAIN_NAMES:
            return "class", *self._once(obj, _parts_of_class)
        if kind is ModuleType or (kind is BuiltinFunctionType and isinstance(obj.__self__, ModuleType)):
            return "name", getattr(obj, "__module__", ""), obj.__name__
        return None

    def _once(self, obj: Any, parts_of: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
        name = _module_of(obj), obj.__qualname__
        if id(obj) in self._seen:
            return name
        self._seen.add(id(obj))
        try:
            return *name, xxh3_128_digest(_bytes_of(parts_of(obj), self._seen))
        finally:
            self._seen.discard(id(obj))


def _bytes_of(value: Any, seen: set[int] | None = None) -> bytes:
    buffers: list[pickle.PickleBuffer] = []
    data = _pickled(value, buffers, seen)
    return data + digest(b"", [buffer.raw() for buffer in buffers]) if buffers else data


def _pickled(value: Any, buffers: list[pickle.PickleBuffer], seen: set[int] | None = None) -> bytes:
    from io import BytesIO

    file = BytesIO()
    _StablePickler(file, buffers, set() if seen is None else seen).dump(value)
    return file.getvalue()


def _module_of(obj: Any) -> str:
    return "__main__" if obj.__module__ in MAIN_NAMES else str(obj.__module__)


def _parts_of_function(function: FunctionType) -> tuple[Any, ...]:
    return (_parts_of_code(function.__code__), function.__defaults__, function.__kwdefaults__,
            [_contents(cell) for cell in function.__closure__ or ()])


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ("empty cell",)


def _parts_of_code(code: CodeType) -> tuple[Any, ...]:
    """List what makes a function do what it does; constants with their types, for 1 == 1.0 == True."""
    return ("code", code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames, code.co_freevars,
            code.co_cellvars, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags,
            [_constant(value) for value in code.co_consts])


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _parts_of_code(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, frozenset):
        return "frozenset", sorted(repr(_constant(each)) for each in value)
    return type(value).__name__, repr(value)


def _parts_of_class(cls: type) -> tuple[Any, ...]:
    """List what a class of `__main__` does; what its instances hold is in their own pickles."""
    members: list[tuple[str, Any]] = []
    for name, value in sorted(vars(cls).items()):
        if isinstance(value, (staticmethod, classmethod)):
            members.append((name, value.__func__))
        elif isinstance(value, property):
            members.append((name, (value.fget, value.fset, value.fdel)))
        elif isinstance(value, (FunctionType, *_PLAIN)) and name not in _CHANCE:
            members.append((name, value))
    return list(cls.__bases__), members


_CHANCE = frozenset(("__module__", "__doc__", "__firstlineno__", "__static_attributes__"))
"""Attributes of classes that say where and how they are written."""
