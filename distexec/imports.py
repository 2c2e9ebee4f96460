"""Finds the client's own modules in the processes of a session on a node, when something imports them.

    import x ──► Finder ── Ask ──► the agent ── Find ──► the client         once per node and module
                        ◄─ Told ──          ◄─ Found ──                    its files are in the code directory now

The rule: the client is asked before this machine looks for a top-level module itself, so that nothing here takes the place
of what is the client's own. What it does not have is looked for here as usual; what it has and cannot send is an error.
Every question has a connection of its own, so any thread may ask, and any child that a task forked. Imports little,
because every session pays for it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from msgspec import Struct

from distexec.outbox import BlockingLink

__all__ = ["Ask", "Finder", "Told", "explain", "install"]


class Ask(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Worker to agent: is this top-level module the client's own? If so, bring it into `directory`, the asker's for code."""

    name: str
    directory: str


class Told(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Agent to worker: the module is the client's own, and in the directory, or cannot be had, for `problem`; or it is not.

    Then `problem` is what to say if it is not found here either.
    """

    is_own: bool
    problem: str = ""


RESERVED = frozenset(sys.stdlib_module_names) | frozenset(sys.builtin_module_names) | {
    "__main__", "__mp_main__", "distexec", "distexec_init", "msgspec", "xxhash", "cloudpickle",
    "sitecustomize", "usercustomize"}
"""What is never asked for: each machine has its own."""


class Finder:
    """An entry of `sys.meta_path`, before all others. `server`: the agent's address for questions of this session."""

    def __init__(self, server: str, directory: str, node: str) -> None:
        self.server, self.directory, self.node = server, directory, node
        self.told: dict[str, Told] = {}  # what is not to be asked again

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  _target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a top-level module that is the client's own. ModuleNotFoundError, with the reason, if it cannot be had."""
        if path is not None or name in RESERVED or not name.isidentifier():
            return None
        told = self.told.get(name) or self._ask(name)
        if not told.is_own:
            return None
        listed: Any = sys.path_importer_cache.get(self.directory)
        if listed is not None:
            listed.invalidate_caches()  # the directory may look as old as when it was listed
        spec = PathFinder.find_spec(name, [self.directory])
        # A namespace may have more parts on this machine; the usual way finds them all.
        return spec if spec is not None and spec.loader is not None else None

    def _ask(self, name: str) -> Told:
        try:
            told = ask(self.server, Ask(name, self.directory))
        except (OSError, EOFError) as error:
            raise ModuleNotFoundError(f"the agent of node {self.node!r} could not be asked for module {name!r}: {error}",
                                      name=name) from error
        if told.is_own and told.problem:
            raise ModuleNotFoundError(f"module {name!r} could not be brought to node {self.node!r}: {told.problem}",
                                      name=name)
        self.told[name] = told
        return told


def ask(server: str, question: Ask) -> Told:
    """Ask the agent, and wait as long as it takes. Raises OSError or EOFError if nobody is there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(None)  # whatever a task made the default
        sock.connect(server)
        link = BlockingLink(sock, Told)
        link.send([question])
        while True:
            for told in link.receive():
                return told  # type: ignore[no-any-return]


_finder: Finder | None = None


def install(server: str, directory: str, node: str) -> None:
    """Have this process and those forked from it find the client's own modules."""
    global _finder
    _finder = Finder(server, directory, node)
    sys.meta_path.insert(0, _finder)


def explain(error: BaseException) -> None:
    """Add to the ImportErrors among an exception and its causes where it was looked, and why in vain."""
    finder = _finder
    if finder is None:
        return
    for each in _chain(error):
        if isinstance(each, ModuleNotFoundError) and each.name:
            note = _explain(finder, each.name)
            if note:
                each.add_note(note)


def _explain(finder: Finder, name: str) -> str:
    top = name.partition(".")[0]
    told = finder.told.get(top)
    if told is None:
        return ""  # the error itself says why, or it was made by somebody else
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    here = f"node {finder.node!r} ({sys.platform}, {version}, {sys.executable})"
    if told.is_own:
        return (f"{top!r} is the client's own and is on {here}, but {name!r} is not among what came with it and can be "
                "imported there: a compiled extension needs the platform it was made for, and a file must have been there "
                "when the module was first asked for")
    if told.problem:
        return f"looked for on {here}: {told.problem}"
    return f"looked for on {here}: it is not the client's own, and not installed in {', '.join(filter(None, sys.path))}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            todo += [each.__cause__, each.__context__]
