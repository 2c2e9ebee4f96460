"""Notes when this program's modules were imported, and that some were imported again.

    importlib.reload, or a new import after `del sys.modules[name]` ──► Watch ──► the listeners are stale; they look later

The rule: nothing is paid for it but by imports. An import comes by before it happens, so what came of it is looked at when
somebody needs to know. No lock is taken: imports happen anywhere, in forked children too.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
import weakref
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple, Protocol

__all__ = ["Listener", "Reloads", "Watch", "watch"]


class Listener(Protocol):
    """Who is to look when modules were imported again."""

    is_stale: bool


class Again(NamedTuple):
    """A module that is, or was, imported again: the when-th such event, and what it had been before."""

    when: int
    before: ModuleSpec | None  # None: it was not there any more

    def is_other(self, name: str) -> bool:
        """Whether the module is there now, and is not what it was."""
        spec = getattr(sys.modules.get(name), "__spec__", None)
        return spec is not None and spec is not self.before


class Watch:
    """The first entry of `sys.meta_path`: it finds nothing, and sees what is looked for."""

    def __init__(self) -> None:
        self.again: dict[str, Again] = {}  # the last time of each
        self._began_ns = 0
        self._imported_ns: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._events = itertools.count(1)
        self._listeners: list[weakref.ref[Listener]] = []

    def __repr__(self) -> str:
        return f"<Watch: {len(self.again)} modules were imported again>"

    def install(self) -> None:
        """Begin, once."""
        if not self._began_ns:
            self._began_ns = time.time_ns()
            self._loaded = set(sys.modules)
            sys.meta_path.insert(0, self)

    def listen(self, listener: Listener) -> None:
        """Have a listener, which is not kept alive, learn of what comes."""
        self._listeners = [*(each for each in self._listeners if each() is not None), weakref.ref(listener)]

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None) -> None:
        """See that a module is about to be imported."""
        self._imported_ns[name] = time.time_ns()
        if name not in self._loaded:
            self._loaded.add(name)
            return
        self.again[name] = Again(next(self._events), getattr(sys.modules.get(name), "__spec__", None))
        for each in self._listeners:
            listener = each()
            if listener is not None:
                listener.is_stale = True

    def imported_ns(self, name: str) -> int:
        """Say when a module was imported last, in ns since the epoch; for those before `install`, when that was."""
        return self._imported_ns.get(name, self._began_ns)


watch = Watch()
"""The one of this process."""


class Reloads:
    """Tells a listener which modules are others than when it looked last."""

    def __init__(self) -> None:
        self._seen = max((each.when for each in watch.again.values()), default=0)
        self._busy: dict[str, Again] = {}

    @property
    def has_more(self) -> bool:
        """Whether something came since it was looked last."""
        return any(each.when > self._seen for each in list(watch.again.values()))

    def look(self) -> tuple[list[str], bool]:
        """Give the modules that have changed, and whether some are just being reloaded, and so are to be looked at again."""
        again = {name: each for name, each in list(watch.again.items()) if each.when > self._seen}
        self._seen = max((each.when for each in again.values()), default=self._seen)
        again = {**again, **self._busy}
        changed = [name for name, each in again.items() if each.is_other(name)]
        reloading = getattr(importlib, "_RELOADING", ())
        self._busy = {name: each for name, each in again.items() if name in reloading and name not in changed}
        return changed, bool(self._busy)
