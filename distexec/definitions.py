"""The client's half of `__main__`: which of its globals a payload relies on, and whether they changed.

    function, call ──► pickle by `byvalue` ──needs, uses──► globals ──their definitions' needs, uses──► more globals
                                └──────────────────────── bundle ◄───────────────┘

Each global has a current definition with a version. The rule: whatever could have changed since is looked at again for
every payload, because a task is the value at `submit`. A definition has *witnesses* where that can be done by comparing
objects (code, constants, attributes of classes); mutable data is pickled plainly and the digest compared; what even
that cannot do is pickled as for sending.
"""

from __future__ import annotations

import pickle
import types
from abc import ABCMeta, _get_dump  # type: ignore[attr-defined]
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import CellType, FunctionType, ModuleType
from typing import Any

from distexec import byvalue, mainmodule
from distexec.byvalue import CachedFunction, DefinitionPickler, MainScope, Pickler
from distexec.mainmodule import MAIN_NAMES, PROTOCOL, Buffer, Definition, Namespace, digest

KEPT_PAYLOADS = 1024
"""How many packed functions are remembered. Smaller: more are bundled anew. Larger: more of their bytes are kept."""

Packed = tuple[bytes, list[memoryview]]
Needs = dict[str, Namespace]
_UNBOUND = object()


@dataclass(slots=True)
class _Global:
    """One global of the client's `__main__` as it was last looked at."""

    name: str
    home: Namespace
    value: Any
    digest: bytes
    data: bytes | None = None
    buffers: list[memoryview] = field(default_factory=list)  # only while a payload is made: they lock the user's memory
    needs: Needs = field(default_factory=dict)
    uses: Needs = field(default_factory=dict)
    witnesses: list[Witness] | None = None
    error: BaseException | None = None  # why it has no data
    version: int = 0
    is_first: bool = True

    def define(self, problem: str) -> Definition:
        return Definition(self.name, self.version, self.is_first, self.data, len(self.buffers), problem)


@dataclass(slots=True)
class _Function:
    """A function or class of `__main__` that was packed; the reference keeps its id from being used again."""

    fn: object
    home: Needs  # the global that it is or lies in
    versions: list[int]  # of all it relies on
    packed: tuple[bytes, list[memoryview], bytes]


class Definitions:
    """Packs what plain pickle cannot, with the definitions it relies on; one per session, any thread may use it.

    No lock: user code runs inside (`__reduce__`). Versions come from one counter, so no two contents share one; if two
    threads look at a changing global at once, the later to finish wins, and the next look puts it right.
    """

    def __init__(self, *, is_nested: bool = False) -> None:
        self._is_nested = is_nested  # made in a worker: the client alone changes globals where they are bound already
        self._scope = MainScope()
        self._globals: dict[str, _Global] = {}
        self._functions: dict[int, _Function] = {}  # by id
        self._shipped: dict[bytes, dict[str, int]] = {}  # key of a function -> versions that travel with it

    @property
    def has_namespaces(self) -> bool:
        """Say whether `__main__` is more than that module here, so that `load` must be used."""
        return bool(self._scope.adopted)

    def load(self, data: Buffer, buffers: Sequence[Buffer]) -> Any:
        """Unpickle an outcome that may name globals of adopted namespaces."""
        return _ClientUnpickler(self._scope, data, buffers).load()

    def pack_function(self, fn: Any, error: Exception | None = None) -> tuple[bytes, list[memoryview], bytes]:
        """As `CallPacker.pack_function`; `error`: why plain pickle failed, to be raised if this does too."""
        known = self._functions.get(id(fn))
        if known is not None:
            home = known.home
        else:
            found = self._scope.find(fn) if isinstance(fn, (FunctionType, CachedFunction, type)) else None
            if found is None:
                pickler = self._run(fn, error)
                return self._keyed(*self._bundle(pickler.packed, {**pickler.needs, **pickler.uses}, pickler.needs))
            home = {found[1].partition(".")[0]: found[0]}
        relied_on = self._collect(home)
        versions = [item.version for item in relied_on]
        if known is not None and known.versions == versions and not any(item.buffers for item in relied_on):
            return known.packed
        pickler = self._run(fn, error)
        packed = self._keyed(*self._assemble(pickler.packed, relied_on, home))
        _remember(self._functions, id(fn), _Function(fn, home, versions, packed))
        return packed

    def pack_call(self, call: Any, known: bytes | None, error: Exception | None = None) -> Packed:
        """As `CallPacker.pack_call`, for arguments that plain pickle refused with `error`."""
        pickler = self._run(call, error)
        return self._complete(pickler, pickler.packed, known)

    def complete_call(self, call: Any, known: bytes | None, data: bytes, buffers: list[memoryview]) -> Packed:
        """As `CallPacker.pack_call`, for arguments whose plain pickle names `__main__`, or seems to."""
        pickler = self._run(call, None)
        return self._complete(pickler, pickler.packed if pickler.is_by_value else (data, buffers), known)

    def _complete(self, pickler: _RootPickler, packed: Packed, known: bytes | None) -> Packed:
        wanted = {**pickler.needs, **pickler.uses}
        if not wanted:
            return packed
        shipped = self._shipped.get(known, {}) if known is not None else {}
        data, buffers, _ = self._bundle(packed, wanted, pickler.needs, shipped)
        return data, buffers

    def _run(self, obj: Any, error: Exception | None) -> _RootPickler:
        pickler = _RootPickler(self._scope)
        try:
            pickler.packed = pickler.run(obj)
        except Exception:
            if error is not None:  # what a user of plain pickle would see
                raise error from None
            raise
        return pickler

    def _keyed(self, data: bytes, buffers: list[memoryview],
               versions: dict[str, int]) -> tuple[bytes, list[memoryview], bytes]:
        key = digest(data, buffers)
        if versions:
            _remember(self._shipped, key, versions)
        return data, buffers, key

    def _bundle(self, packed: Packed, wanted: Needs, needs: Needs,
                shipped: dict[str, int] | None = None) -> tuple[bytes, list[memoryview], dict[str, int]]:
        return self._assemble(packed, self._collect(wanted), needs, shipped or {})

    def _assemble(self, packed: Packed, relied_on: list[_Global], needs: Needs,
                  shipped: dict[str, int] | None = None) -> tuple[bytes, list[memoryview], dict[str, int]]:
        """Put the definitions of `relied_on`, except those already `shipped`, in front of a pickle."""
        data, buffers = packed
        items = [item for item in relied_on if not shipped or shipped.get(item.name) != item.version]
        if not items:
            return data, buffers, {}
        for item in items:
            if item.data is None and item.name in needs:
                raise _unsendable(item, relied_on)
        definitions = [item.define(_problem(item, relied_on) if item.data is None else "") for item in items]
        if self._is_nested:
            definitions = [each._replace(version=0, is_first=True) for each in definitions]
        bundle = mainmodule.pack_bundle(definitions, data)
        return (bundle, [buffer for item in items for buffer in item.buffers] + buffers,
                {item.name: item.version for item in items})

    # ---- globals

    def _collect(self, wanted: Needs) -> list[_Global]:
        """List the globals that the wanted ones rely on, and they themselves, as they are now."""
        found: dict[str, _Global] = {}
        ahead = list(wanted.items())
        seen = set(wanted)
        while ahead:
            name, home = ahead.pop()
            item = self._look_at(name, home)
            if item is None:
                continue  # the client has no such global either
            found[name] = item
            for more in (item.needs, item.uses):
                for other in more.items():
                    if other[0] not in seen:
                        seen.add(other[0])
                        ahead.append(other)
        return [found[name] for name in sorted(found)]

    def _look_at(self, name: str, home: Namespace) -> _Global | None:
        value = home.get(name, _UNBOUND)
        if value is _UNBOUND:
            return None
        known = self._globals.get(name)
        if (known is not None and known.value is value and known.home is home
                and known.witnesses is not None and _hold(known.witnesses)):
            return known
        item = self._make(name, home, value)
        known = self._globals.setdefault(name, item)
        if known is not item and known.digest == item.digest:
            item.version, item.is_first = known.version, known.is_first
        else:
            item.version, item.is_first = mainmodule.next_version(), known is item
        self._globals[name] = item if not item.buffers else _without_buffers(item)
        return item

    def _make(self, name: str, home: Namespace, value: Any) -> _Global:
        pickler = DefinitionPickler(self._scope, name, home)
        try:
            data, buffers = pickler.run(value)
        except (Exception, SystemExit) as error:  # told by whoever cannot do without this global
            return _Global(name, home, value, b"unsendable", witnesses=[], error=error)  # until it is another object
        pickler.needs.pop(name, None)
        witnesses = find_witnesses(value, name, home, self._scope)
        return _Global(name, home, value, digest(data, buffers), data, buffers, pickler.needs, pickler.uses, witnesses)


class _RootPickler(Pickler):
    """Pickles a function or a call, which may need definitions."""

    packed: Packed


class _ClientUnpickler(pickle.Unpickler):
    def __init__(self, scope: MainScope, data: Buffer, buffers: Sequence[Buffer]) -> None:
        import io

        super().__init__(io.BytesIO(data), buffers=buffers)
        self._scope = scope

    def find_class(self, module: str, name: str) -> Any:
        if module in MAIN_NAMES:
            for namespace in self._scope.namespaces():
                found = byvalue.lookup(namespace, name)
                if found is not None:
                    return found
        return super().find_class(module, name)


def _plain_digest(value: Any) -> bytes:
    buffers: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(value, PROTOCOL, buffer_callback=buffers.append)
    except (Exception, SystemExit):  # then there is no quick way to compare it
        return b""
    return digest(data, [buffer.raw() for buffer in buffers])


def _without_buffers(item: _Global) -> _Global:
    return _Global(item.name, item.home, item.value, item.digest, item.data, [], item.needs, item.uses, None,
                   item.error, item.version, item.is_first)


def _problem(item: _Global, relied_on: Iterable[_Global]) -> str:
    users = (other.name for other in relied_on if other is not item and item.name in {**other.uses, **other.needs})
    user = next(users, None)
    captured = f" captured by function {user}" if user else ""
    return f"cannot send global {item.name!r}{captured}: {type(item.error).__name__}: {item.error}"


def _unsendable(item: _Global, relied_on: Iterable[_Global]) -> Exception:
    """Make the error for a global that a pickle cannot do without, of the type that pickling it gave if that can be."""
    text = _problem(item, relied_on)
    error = TypeError(text) if isinstance(item.error, TypeError) else pickle.PicklingError(text)
    error.__cause__ = item.error
    return error


def _remember(kept: dict[Any, Any], key: Any, value: Any) -> None:
    if len(kept) >= KEPT_PAYLOADS:
        kept.pop(next(iter(kept)), None)
    kept[key] = value


# ---- witnesses: what must still be so for a definition to be current

Witness = tuple[Callable[[Any, Any], bool], Any, Any]
"""A test, what it looks at, and what it found before."""


def _hold(witnesses: Iterable[Witness]) -> bool:
    for test, subject, before in witnesses:  # noqa: SIM110 - twice as quick as all(), and there are many
        if not test(subject, before):
            return False
    return True


def find_witnesses(value: Any, name: str, home: Namespace, scope: MainScope) -> list[Witness] | None:
    """List what must still be so for the pickle of `value` to be what it is now; None: comparing cannot tell."""
    search = _WitnessSearch(name, home, scope)
    return search.witnesses if search.covers(value) else None


class _WitnessSearch:
    """Walks from a global's value to everything that its definition holds by value."""

    def __init__(self, name: str, home: Namespace, scope: MainScope) -> None:
        self.witnesses: list[Witness] = []
        self._name, self._home, self._scope = name, home, scope
        self._seen: set[int] = set()

    def covers(self, value: Any) -> bool:
        """Add the witnesses for `value`; False if it can change without any of them telling."""
        kind = type(value)
        if kind in _UNCHANGING or id(value) in self._seen:
            return True
        if kind is tuple or kind is frozenset:
            return all(map(self.covers, value))
        self._seen.add(id(value))
        if kind is FunctionType:
            return self._covers_function(value)
        if kind is CachedFunction:
            return self._is_elsewhere(value) or self.covers(value.__wrapped__)
        if issubclass(kind, type):
            return self._covers_class(value)
        if kind is staticmethod or kind is classmethod:
            return self.covers(value.__func__)
        if kind is property:
            return all(map(self.covers, (value.fget, value.fset, value.fdel)))
        if kind is cached_property:
            return self.covers(value.func)
        if isinstance(value, Enum):
            return self.covers(kind)
        return kind.__module__ in _UNCHANGING_MODULES or self._covers_data(value)

    def _covers_data(self, value: Any) -> bool:
        now = _plain_digest(value)
        self.witnesses.append((_is_same_data, value, now))
        return now != b""

    def _is_elsewhere(self, obj: Any) -> bool:
        """Say whether a function or class goes by name, which must go on meaning it."""
        found = self._scope.find(obj)
        if found is None:
            return byvalue.is_importable(obj)
        namespace, qualname = found
        top = qualname.partition(".")[0]
        if top == self._name and namespace is self._home:
            return False
        self.witnesses.append((_is_bound, namespace, (top, namespace[top])))
        return True

    def _covers_function(self, function: FunctionType) -> bool:
        if self._is_elsewhere(function) or _comes_with_class(function):
            return True
        state = function.__code__, function.__defaults__, function.__kwdefaults__, function.__closure__
        self.witnesses.append((_is_function_state, function, state))
        return (self.covers(function.__defaults__) and all(map(self._covers_cell, function.__closure__ or ()))
                and self._covers_items(function.__dict__) and self._covers_items(function.__kwdefaults__ or {}))

    def _covers_items(self, mapping: dict[str, Any]) -> bool:
        self.witnesses.append((_are_items, mapping, tuple(mapping.items())))
        return all(map(self.covers, mapping.values()))

    def _covers_cell(self, cell: CellType) -> bool:
        contents = _contents(cell)
        self.witnesses.append((_is_cell_state, cell, contents))
        return contents is _UNBOUND or self.covers(contents)

    def _covers_class(self, cls: type) -> bool:
        if self._is_elsewhere(cls):
            return True
        attributes = vars(cls)
        self.witnesses.append((_are_items, attributes, tuple(attributes.items())))
        self.witnesses.append((_are_bases, cls, cls.__bases__))
        if isinstance(cls, ABCMeta):
            self.witnesses.append((_is_registry, cls, _get_dump(cls)[0]))
        return all(map(self.covers, cls.__bases__)) and all(
            self._covers_attribute(cls, name, value) for name, value in attributes.items())

    def _covers_attribute(self, cls: type, name: str, value: Any) -> bool:
        if isinstance(value, (FunctionType, staticmethod, classmethod)):
            return self.covers(value)
        return (name.startswith("__") or name in _MADE_WITH_CLASS or (issubclass(cls, Enum) and name.startswith("_"))
                or self.covers(value))


_UNCHANGING = frozenset((
    type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented), ModuleType,
    types.BuiltinFunctionType, types.CodeType, types.GetSetDescriptorType, types.MemberDescriptorType,
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GenericAlias,
    types.UnionType, type(vars(namedtuple("_Pair", "x"))["x"])))
"""Types whose objects stay what they are."""

_UNCHANGING_MODULES = frozenset((
    "typing", "dataclasses", "re", "_thread", "logging", "datetime", "decimal", "fractions", "uuid", "pathlib",
    "pathlib._local", "operator", "_contextvars", "ipaddress", "zoneinfo"))
"""Modules whose objects do, or whose changes are not sent (locks, loggers, context variables)."""

_MADE_WITH_CLASS = frozenset(("_abc_impl", "_field_defaults", "_fields", "_is_protocol", "_is_runtime_protocol"))
"""Attributes that class statements and decorators make and nobody sets later."""


def _comes_with_class(function: FunctionType) -> bool:
    """Say whether a class decorator or base made the function: what is in its cells is not the user's."""
    return function.__globals__.get("__name__") in ("abc", "collections", "dataclasses", "enum", "reprlib", "typing")


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _UNBOUND


def _is_bound(namespace: Namespace, before: tuple[str, Any]) -> bool:
    return namespace.get(before[0]) is before[1]


def _is_function_state(function: FunctionType, before: tuple[Any, ...]) -> bool:
    return (function.__code__ is before[0] and function.__defaults__ is before[1]
            and function.__kwdefaults__ is before[2] and function.__closure__ is before[3])


def _is_cell_state(cell: CellType, before: Any) -> bool:
    return _contents(cell) is before


def _are_items(mapping: Any, before: tuple[tuple[str, Any], ...]) -> bool:
    return len(mapping) == len(before) and all(mapping.get(name, _UNBOUND) is value for name, value in before)


def _is_same_data(value: Any, before: bytes) -> bool:
    return _plain_digest(value) == before


def _are_bases(cls: type, before: tuple[type, ...]) -> bool:
    return cls.__bases__ is before or cls.__bases__ == before


def _is_registry(cls: type, before: set[Any]) -> bool:
    registry: set[Any] = _get_dump(cls)[0]
    return registry == before
