"""Pickles what plain `pickle` cannot: functions and classes by value, and those of `__main__` in the session's terms.

A subclass of cloudpickle's pickler. It differs in what `__main__` means: code from there refers to *the* `__main__` of
the process that loads it, shares its globals instead of bringing copies, and classes and functions that are globals of
`__main__` go by name. Which names a pickle relies on is noted (`needs`), so that `definitions` can send them along. The
rule: nothing is pickled by value that both ends can look up.

Functions keep their file name and lines (remote tracebacks show them) and the cells they share.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import io
import marshal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from distexec import mainmodule
from distexec.mainmodule import MAIN_NAMES, PROTOCOL, Namespace, keep_large

CachedFunction = type(functools.lru_cache(len))

_GLOBAL_OPERATIONS = frozenset(
    ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
"""LOAD_NAME: what the body of a class inside a function uses."""

_OWN_TO_MAIN = frozenset(("__name__", "__builtins__", "__spec__", "__loader__", "__package__"))
"""Globals that every `__main__` has of its own."""

Reduced = Any  # what reducers return: a name, a tuple, or NotImplemented


class MainScope:
    """Where the client's `__main__` is: that module's dict, and dicts that code was run in under its name.

    A notebook or `exec(code, {"__name__": "__main__"})` makes the latter; they are found when one of their functions is
    met, and all of them become the one `__main__` of the worker.
    """

    def __init__(self) -> None:
        self.adopted: list[Namespace] = []

    def namespaces(self) -> Iterator[Namespace]:
        """List the dicts, that of `sys.modules["__main__"]` first."""
        yield mainmodule.main_globals()
        yield from self.adopted

    def owns(self, namespace: Namespace) -> bool:
        """Say whether this is such a dict, and remember it if so."""
        if namespace is mainmodule.main_globals() or any(namespace is known for known in self.adopted):
            return True
        if namespace.get("__name__") not in MAIN_NAMES:
            return False
        self.adopted.append(namespace)
        return True

    def find(self, obj: Any) -> tuple[Namespace, str] | None:
        """Give the dict and the dotted name under which a function or class of `__main__` can be looked up."""
        name: object = getattr(obj, "__qualname__", None)
        if getattr(obj, "__module__", None) not in MAIN_NAMES or not isinstance(name, str):
            return None
        if isinstance(obj, FunctionType):
            self.owns(obj.__globals__)
        for namespace in self.namespaces():
            if lookup(namespace, name) is obj:
                return namespace, name
        return None


def lookup(namespace: Namespace, qualname: str) -> Any:
    """Look up a dotted name in a dict; None if there is nothing."""
    top, *inner = qualname.split(".")
    found = namespace.get(top)
    for name in inner:
        found = getattr(found, name, None)
    return found


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles one function, call, value or exception; then `needs` and `is_by_value` say what came up."""

    def __init__(self, scope: MainScope, *, in_band: bool = False) -> None:
        self.file = io.BytesIO()
        self.buffers: list[memoryview] = []
        super().__init__(self.file, protocol=PROTOCOL, buffer_callback=None if in_band else keep_large(self.buffers))
        self.scope = scope
        self.needs: dict[str, Namespace] = {}  # globals the pickle cannot be loaded without
        self.uses: dict[str, Namespace] = {}  # globals that its functions look up when they run
        self.is_by_value = False
        self._strangers: dict[int, Namespace] = {}  # by id of a dict that is no module's: its stand-in in the pickle

    def run(self, obj: Any) -> tuple[bytes, list[memoryview]]:
        """Give the pickle and its large buffers."""
        self.dump(obj)
        return self.file.getvalue(), self.buffers

    # ---- which way an object goes

    def reducer_override(self, obj: Any) -> Reduced:
        """Called by pickle for everything but the plainest types."""
        kind = type(obj)
        if kind is FunctionType or kind is CachedFunction:
            return self._reduce_function(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind.__module__ in MAIN_NAMES or kind.__module__ == "typing":
            return self._reduce_instance(obj)
        if isinstance(obj, io.IOBase):
            return _reduce_file(obj)
        return NotImplemented

    def _reduce_function(self, obj: Any) -> Reduced:
        found = self.scope.find(obj)
        if found is not None:
            return self._reduce_main(obj, *found)
        return NotImplemented if is_importable(obj) else self._function_by_value(obj)

    def _reduce_class(self, cls: type) -> Reduced:
        found = self.scope.find(cls)
        if found is not None:
            return self._reduce_main(cls, *found)
        return self._class_by_value(cls, super().reducer_override(cls))

    def _reduce_main(self, obj: Any, namespace: Namespace, qualname: str) -> Reduced:
        """Refer to a global of `__main__` by name."""
        self.needs[qualname.partition(".")[0]] = namespace
        if namespace is mainmodule.main_globals():
            return NotImplemented  # pickle's own way
        return mainmodule.main_attribute, (qualname,)

    def _reduce_instance(self, obj: Any) -> Reduced:
        """Note the global that an object like a sentinel may give as its pickle: its reducer returns just a name."""
        kind = type(obj)
        if kind.__module__ == "typing":
            return _reduce_type_name(obj) if getattr(obj, "__module__", None) in MAIN_NAMES else NotImplemented
        if (kind.__reduce__, kind.__reduce_ex__) != _PLAIN_REDUCERS:
            for namespace in self.scope.namespaces():
                for name, value in list(namespace.items()):
                    if value is obj:
                        self.needs[name] = namespace
        return NotImplemented

    # ---- functions

    def _function_by_value(self, obj: Any) -> Reduced:
        self.is_by_value = True
        if type(obj) is CachedFunction:
            own = {name: value for name, value in vars(obj).items() if name != "__wrapped__"}
            settings = obj.cache_parameters()
            return mainmodule.make_cached, (obj.__wrapped__, settings["maxsize"], settings["typed"]), own
        captured: Namespace = {}
        namespace, is_shared = self._namespace_of(obj)
        used = {name: obj.__globals__[name] for name in global_names(obj.__code__) if name in obj.__globals__}
        if not is_shared:
            captured = used
        code = obj.__code__
        special = {name: getattr(obj, name) for name in _special_attributes(obj)}
        state = special, vars(obj), captured, submodules_used(code, [*used.values(), *cell_contents(obj)])
        return (mainmodule.make_function, (code, namespace, obj.__closure__), state, None, None,
                mainmodule.set_function)

    def _namespace_of(self, obj: FunctionType) -> tuple[Any, bool]:
        """Choose the globals the function will have, and say whether they exist where it is loaded."""
        home = obj.__globals__
        if self.scope.owns(home):
            for name in global_names(obj.__code__):
                if name not in _OWN_TO_MAIN:
                    self.uses[name] = home
            return _GlobalsOf(None), True
        module_name = home.get("__name__")
        module = sys.modules.get(module_name) if isinstance(module_name, str) else None
        if (module is not None and vars(module) is home and getattr(module, "__spec__", None) is not None
                and not _is_sent_by_value(module)):
            return _GlobalsOf(module_name), True
        kept = ("__name__", "__package__", "__path__", "__file__")
        stand_in = self._strangers.setdefault(id(home), {name: home[name] for name in kept if name in home})
        return stand_in, False

    # ---- classes

    def _class_by_value(self, cls: type, reduced: Reduced) -> Reduced:
        """Take cloudpickle's way of making a class, but see that it is made once and completed once per version."""
        if not isinstance(reduced, tuple) or len(reduced) != 6:
            return reduced  # by reference
        self.is_by_value = True
        make, args, attributes, _, _, set_state = reduced
        attributes[0].pop("__slotnames__", None)  # a cache that pickling an instance leaves
        identity = args[-2]
        mainmodule.track_class(identity, cls)
        members: dict[str, dict[str, Any]] = {}
        if issubclass(cls, Enum):
            bases = args[0]
            args = (*args[:3], {name: member.value for name, member in cls.__members__.items()}, *args[4:])
            for name, member in cls.__members__.items():
                attributes[0].pop(name, None)
                own = {key: value for key, value in vars(member).items() if key not in _MEMBER_INTERNALS}
                if own:
                    members[name] = own
        else:
            bases = args[2]
            if typing.NamedTuple in bases:  # a function that makes a class, and would make one without fields
                bases = cls.__bases__
                args = (*args[:2], bases, *args[3:])
            if "__slots__" in vars(cls):
                args[3].setdefault("__slots__", vars(cls)["__slots__"])
        state = identity, self._class_version(cls, identity), set_state, attributes, members
        return mainmodule.make_class, (identity, make, args, bases), state, None, None, mainmodule.set_class

    def _class_version(self, cls: type, identity: str) -> int | None:
        return _local_class_version(cls, identity)

    dispatch_table: dict[type, Callable[[Any], Reduced]]


class DefinitionPickler(Pickler):
    """Pickles one global of `__main__`: what bears its name by value, other globals by name.

    The worker's `__main__` is to have the client's shape, so an object that is another global's value is not copied;
    and what a process cannot hand over but each has of its own (locks and the like) is made anew.
    """

    def __init__(self, scope: MainScope, name: str, namespace: Namespace) -> None:
        super().__init__(scope)
        self.name, self.namespace = name, namespace
        self.value = namespace[name]
        self._names: dict[int, str] = {}  # of other globals whose values have an identity that matters
        for other, value in list(namespace.items()):  # other threads may be setting globals
            if type(value) not in NO_IDENTITY and other not in _OWN_TO_MAIN and not _goes_by_name(value, namespace):
                self._names.setdefault(id(value), other)

    def persistent_id(self, obj: Any) -> str | None:
        """Called by pickle for every object; a name here makes it a reference to that global."""
        name = self._names.get(id(obj))
        if name is None or name == self.name or self.namespace.get(name) is not obj:
            return None
        self.needs[name] = self.namespace
        return name

    def reducer_override(self, obj: Any) -> Reduced:
        """As above, but the global itself must not be reduced to its own name."""
        if obj is self.value and type(obj).__module__ in MAIN_NAMES and not isinstance(obj, type):
            reduced = obj.__reduce_ex__(PROTOCOL)
            if isinstance(reduced, str):
                return copyreg.__newobj__, (type(obj),), getattr(obj, "__dict__", None)  # type: ignore[attr-defined]
            return reduced
        return super().reducer_override(obj)

    def _reduce_main(self, obj: Any, namespace: Namespace, qualname: str) -> Reduced:
        top, _, inner = qualname.partition(".")
        if namespace is not self.namespace or top != self.name:
            return super()._reduce_main(obj, namespace, qualname)
        reduced = (self._class_by_value(obj, self._class_as_from_main(obj))
                   if isinstance(obj, type) else self._function_by_value(obj))
        if inner or not isinstance(reduced, tuple):
            return reduced
        make, args, *rest = reduced
        return mainmodule.bind, (self.name, make, args), *rest

    def _class_as_from_main(self, cls: type) -> Reduced:
        module = sys.modules.get(cls.__module__)
        if cls.__module__ == "__main__" or module is None or _is_sent_by_value(module):
            return cloudpickle.Pickler.reducer_override(self, cls)
        cloudpickle.register_pickle_by_value(module)  # to it, `__mp_main__` is a module like others
        try:
            return cloudpickle.Pickler.reducer_override(self, cls)
        finally:
            cloudpickle.unregister_pickle_by_value(module)

    def _class_version(self, cls: type, identity: str) -> int | None:
        return None


class _GlobalsOf:
    """Pickles as the dict of a module at the other end; None: of its `__main__`."""

    def __init__(self, module: str | None) -> None:
        self._module = module

    def __reduce__(self) -> Reduced:
        if self._module is None:
            return mainmodule.main_globals, ()
        return mainmodule.module_globals, (self._module,)


_PLAIN_REDUCERS: tuple[Any, ...] = object.__reduce__, object.__reduce_ex__

_NOWHERE = MainScope()


def dumps(value: Any, error: Exception, *, in_band: bool = False) -> tuple[bytes, list[memoryview]]:
    """Pickle a value that plain pickle refused with `error`; that is raised if it cannot be done this way either."""
    try:
        return Pickler(_NOWHERE, in_band=in_band).run(value)
    except Exception:  # the first failure is what a user of plain pickle would see
        raise error from None


# ---- what is where


def is_importable(obj: Any) -> bool:
    """Say whether a function or class is what its module has under its name, so that pickle needs no more than that."""
    name, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(name, str) or not isinstance(qualname, str) or name in MAIN_NAMES:
        return False
    module = sys.modules.get(name)
    return module is not None and not _is_sent_by_value(module) and lookup(vars(module), qualname) is obj


def _is_sent_by_value(module: ModuleType) -> bool:
    """Say whether the user asked cloudpickle to send this module's functions and classes by value."""
    asked = cloudpickle.list_registry_pickle_by_value()
    if not asked:
        return False
    parts = module.__name__.split(".")
    return any(".".join(parts[:count]) in asked for count in range(1, len(parts) + 1))


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """List the globals that code may look up, set or delete, also in functions and classes inside it."""
    names = {instruction.argval: None for instruction in dis.get_instructions(code)
             if instruction.opname in _GLOBAL_OPERATIONS}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(global_names(constant)))
    return tuple(names)


def submodules_used(code: CodeType, values: list[Any]) -> list[str]:
    """List imported submodules (`package.module`) that code reaches as attributes of the packages among `values`."""
    packages = [value.__name__ for value in values if isinstance(value, ModuleType) and hasattr(value, "__path__")]
    found: list[str] = []
    names = _attribute_names(code) if packages else ()
    while packages:
        package = packages.pop()
        for name in names:
            submodule = f"{package}.{name}"
            if submodule in sys.modules and submodule not in found:
                found.append(submodule)
                packages.append(submodule)
    return found


@functools.lru_cache(maxsize=4096)
def _attribute_names(code: CodeType) -> tuple[str, ...]:
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_attribute_names(constant)))
    return tuple(names)


def cell_contents(function: FunctionType) -> list[Any]:
    """List what the cells of a closure hold, leaving out empty ones."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # an empty cell holds nothing that could be of use
            continue
    return contents


def _special_attributes(function: FunctionType) -> list[str]:
    names = ["__name__", "__qualname__", "__module__", "__doc__"]
    optional = ["__defaults__", "__kwdefaults__", "__annotations__", "__type_params__"]
    return names + [name for name in optional if getattr(function, name, None)]


_MEMBER_INTERNALS = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_"))

NO_IDENTITY = frozenset((type(None), bool, int, float, complex, str, bytes, tuple, frozenset, range, ModuleType,
                         types.BuiltinFunctionType))
"""Types of which a copy is as good as the object, or that go by name anyway."""


def _goes_by_name(value: Any, namespace: Namespace) -> bool:
    if not isinstance(value, (FunctionType, CachedFunction, type)):
        return False
    return namespace.get(value.__qualname__) is value or isinstance(value, type)

KEPT_FINGERPRINTS = 256

_fingerprints: dict[str, dict[str, Any]] = {}
"""Attributes of local classes as they were last sent, by cloudpickle's identity. A forgotten one counts as changed."""


def _local_class_version(cls: type, identity: str) -> int:
    """Number the states of a class that has no name in `__main__`; only the process where it comes from changes them.

    A class is taken for unchanged if its attributes are the same objects and of kinds that do not change inside.
    """
    if mainmodule.is_received(identity):
        return mainmodule.class_version(identity)
    now, before = dict(vars(cls)), _fingerprints.pop(identity, None)
    if before is None:
        is_same = False
    else:
        is_same = len(now) == len(before) and all(
            name in before and before[name] is value and _is_steady(name, value) for name, value in now.items())
    if len(_fingerprints) >= KEPT_FINGERPRINTS:
        del _fingerprints[next(iter(_fingerprints))]
    _fingerprints[identity] = now
    return mainmodule.class_version(identity) if is_same else mainmodule.bump_class(identity)


def _is_steady(name: str, value: Any) -> bool:
    return name.startswith("__") or type(value) in NO_IDENTITY or hasattr(type(value), "__get__")


# ---- types that need a reducer


def _reduce_code(code: CodeType) -> Reduced:
    try:
        marshalled = marshal.dumps(code, 2)  # from version 3 on the bytes depend on reference counts
    except ValueError:  # constants of kinds that version 2 does not know
        marshalled = marshal.dumps(code)
    return mainmodule.make_code, (marshalled,)


def _reduce_type_name(obj: Any) -> Reduced:
    """What only annotations name, and pickle takes for globals of `__main__`, is made again."""
    kind = type(obj)
    if kind is typing.NewType:
        return kind, (obj.__name__, obj.__supertype__), {"__module__": obj.__module__}
    if kind is typing.ParamSpec or kind is typing.TypeVarTuple:
        return kind, (obj.__name__,)
    if kind.__name__ == "TypeAliasType":
        parameters = {"type_params": obj.__type_params__}
        return copyreg.__newobj_ex__, (kind, (obj.__name__, obj.__value__), parameters)  # type: ignore[attr-defined]
    return NotImplemented


def _reduce_cell(cell: CellType) -> Reduced:
    try:
        contents = cell.cell_contents
    except ValueError:  # empty, and so will be its copy
        return mainmodule.make_cell, ()
    return mainmodule.make_cell, (), (contents,), None, None, mainmodule.set_cell  # (None) would mean: no state


def _reduce_file(file: io.IOBase) -> Reduced:
    """The standard streams are each process's own; the contents of other files are not sent behind the user's back."""
    for name in ("stdin", "stdout", "stderr"):
        if file is getattr(sys, name):
            return getattr, (sys, name)
    if isinstance(file, io.TextIOWrapper):  # cloudpickle would read it and send what it holds
        raise TypeError(f"cannot pickle {type(file).__name__!r} object")
    return NotImplemented


def _reduce_context_variable(variable: Any) -> Reduced:
    from contextvars import Context

    try:
        default = {"default": Context().run(variable.get)}
    except LookupError:  # it has none
        default = {}
    return copyreg.__newobj_ex__, (type(variable), (variable.name,), default)  # type: ignore[attr-defined]


def _reduce_weak_mapping(mapping: Any) -> Reduced:
    return type(mapping), (dict(mapping),)


def _make_anew(name: str) -> Callable[[Any], Reduced]:
    import importlib

    module, _, attribute = name.partition(".")
    factory = getattr(importlib.import_module(module), attribute)
    return lambda obj: (factory, ())


def _types_made_anew() -> dict[type, Callable[[Any], Reduced]]:
    import _thread
    from contextvars import ContextVar
    from weakref import WeakKeyDictionary, WeakValueDictionary

    return {
        type(_thread.allocate_lock()): _make_anew("_thread.allocate_lock"),
        _thread.RLock: _make_anew("_thread.RLock"),
        _thread._local: _make_anew("_thread._local"),
        ContextVar: _reduce_context_variable,
        WeakKeyDictionary: _reduce_weak_mapping,
        WeakValueDictionary: _reduce_weak_mapping,
    }


class _Reducers(dict[type, Callable[[Any], Reduced]]):
    """Reducers by type; those that are not here are copyreg's. (A ChainMap does the same, ten times slower.)"""

    def __missing__(self, kind: type) -> Callable[[Any], Reduced]:
        reducer: Callable[[Any], Reduced] = copyreg.dispatch_table[kind]
        return reducer


Pickler.dispatch_table = _Reducers({kind: reducer for kind, reducer in cloudpickle.Pickler.dispatch_table.items()
                                    if copyreg.dispatch_table.get(kind) is not reducer})
Pickler.dispatch_table.update({CodeType: _reduce_code, CellType: _reduce_cell})
DefinitionPickler.dispatch_table = _Reducers(Pickler.dispatch_table | _types_made_anew())
