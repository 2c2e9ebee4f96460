"""Gives nodes the user's own modules, and sees to it that no worker mixes a module with an older self of it.

    Find, from a node ─► packed on the disk thread, once ─► Found, in parts; large files are fetched by digest
    depends= names a module ─► Found, unasked, to each node that is up or comes up
    importlib.reload between two submits ─► the next generation of workers, everywhere (`renewal`)

The rule: what was packed once is what every node gets until the module is imported anew, so late nodes have what early ones
have. A task of an older generation is refused what has changed since.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from . import usermodules
from .messages import Find, Found, Tree
from .reloads import Reloads, watch
from .trees import split
from .usermodules import Packed

if TYPE_CHECKING:
    from .clientfiles import ClientFiles
    from .ledger import Session
    from .payload import CallPacker
    from .transport import Link, Loop

__all__ = ["ClientModules"]

_log = logging.getLogger("distexec")

watch.install()  # before the program imports more


class Station(Protocol):
    """A node, as this sees it."""

    address: str
    link: Link | None
    hello: Any

    @property
    def name(self) -> str:
        """What it is called."""


class Renewals(Protocol):
    """Who prepares workers."""

    def renew_all(self) -> int:
        """Have new ones everywhere, and give their generation."""


class Work(Protocol):
    """What this needs of the root."""

    loop: Loop
    files: ClientFiles
    session: Session
    packer: CallPacker
    is_stale: bool

    @property
    def renewals(self) -> Renewals:
        """Who prepares its workers."""


class ClientModules:
    """All that is said above, for one root."""

    def __init__(self, root: Work) -> None:
        self._root = root
        self._packed: dict[str, Packed] = {}  # disk thread, but for `_look`, which replaces it
        self._lock = threading.Lock()  # guards _reloads and _changes
        self._reloads = Reloads()
        self._changes: list[tuple[int, frozenset[str]]] = []  # generations, and the packages that were new in them
        self._interpreters: dict[str, str] = {}  # by node; I/O thread
        watch.listen(root)

    def __repr__(self) -> str:
        return f"<ClientModules: {len(self._packed)} packed>"

    # ---- I/O thread

    def find(self, node: Station, message: Find) -> None:
        """Answer a node that asks for a module."""
        self._interpreters[node.name] = message.python
        changed = next((generation for generation, names in self._changes
                        if generation > message.generation and message.name in names), None)
        if changed is not None:
            problem = "the program has imported it anew since the task's worker was prepared; submit the task again"
            self._say(node, message.number, message.name, Packed(True, problem=problem))
            return
        self._root.files.traffic.disk.run(partial(self._pack, message.name),
                                          partial(self._say, node, message.number, message.name))

    def node_opened(self, node: Station) -> None:
        """Bring a node whose link is new what it shall have before its first task."""
        for name, only in self._root.files.modules:
            if node.link is not None and only in (None, node.name, node.address):
                node.link.send([Found(self._root.session.no, 0, name, True, (), is_last=False)])
                self._root.files.traffic.disk.run(partial(self._pack, name, forced=True), partial(self._say, node, 0, name))

    def _say(self, node: Station, number: int, name: str, packed: Any) -> None:
        link = node.link
        if link is None:
            return  # it asks again
        if isinstance(packed, Exception):
            packed = Packed(True, problem=f"{type(packed).__name__}: {packed}")
        if usermodules.is_extension(packed.tree) and node.hello is not None and node.hello.platform != _platform():
            packed = Packed(True, problem=f"it is a compiled extension for {_platform()}, and the node is "
                                          f"{node.hello.platform}: build it there, and install it")
        parts: Sequence[Tree] = list(split(packed.tree)) or [()]
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            link.send([Found(self._root.session.no, number, name, packed.is_own, part, packed.problem, is_last)])

    # ---- disk thread

    def _pack(self, name: str, *, forced: bool = False) -> Packed:
        everything = self._packed
        packed = everything.get(name)
        if packed is not None and (packed.is_own or not forced):
            return packed
        is_named = forced or any(name == each for each, _ in self._root.files.modules)
        packed = usermodules.pack_module(name, self._root.files.open, forced=is_named)
        if packed.is_own and not packed.problem:
            for source in packed.sources:
                self._root.files.traffic.register(source.ref, source.open)
            if packed.size_bytes > usermodules.LARGE_BYTES:
                _log.warning("module %r comes to %d MB with all that lies in its directory, and all of it is sent to each "
                             "node that imports it; keep data that tasks do not need elsewhere", name,
                             packed.size_bytes >> 20)
            everything[name] = packed
        return packed

    # ---- any thread

    def look(self) -> None:
        """Have new workers everywhere if modules of the user's own are others than they were."""
        root = self._root
        with self._lock:
            changed, is_busy = self._reloads.look()
            own = frozenset(usermodules.top_of(name) for name in changed if usermodules.is_own(name))
            if own:
                self._packed = {name: packed for name, packed in self._packed.items() if name not in own}
                root.packer.forget_references()
                generation = root.renewals.renew_all()
                self._changes = [*self._changes, (generation, own)]
                _log.info("workers are started anew, for modules were imported anew: %s", ", ".join(sorted(own)))
            root.is_stale = False  # only now, so that nobody else's task passes by; what came meanwhile is seen next
            root.is_stale = is_busy or self._reloads.has_more

    def explain(self, error: BaseException, node: str) -> None:
        """Add to an error of a node's, if it is that a module is missing there, what to install."""
        if not isinstance(error, ModuleNotFoundError) or not error.name:
            return
        python = self._interpreters.get(node, "")
        try:
            wanted = usermodules.distribution_of(error.name) if python else ""
        except Exception:  # metadata that somebody broke; the error itself is what counts
            wanted = ""
        if wanted:
            error.add_note(f"install on node {node!r} what is installed here: {python} -m pip install {wanted!r}")
        elif python and not usermodules.is_here(error.name):
            error.add_note(f"nor can it be imported here; to install it on node {node!r}: {python} -m pip install "
                           f"{usermodules.top_of(error.name)}")


def _platform() -> str:
    import platform
    import sys
    return f"{sys.platform}-{platform.machine()}"
