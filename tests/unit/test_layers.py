"""The layers of the package: imports point down, and the lower layers know no socket, thread, clock or chance."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distexec"

LAYERS = {
    "errors": 0, "messages": 0, "auth": 0,
    "protocol": 1, "handshake": 1, "gate": 1, "scheduler": 1, "uplinks": 1, "downlinks": 1, "fates": 1, "ledger": 1,
    "placement": 1, "kin": 1, "queues": 1, "quarantine": 1, "shares": 1, "recovery": 1, "keys": 1,
    "journal": 2, "durable": 4, "sessions": 2, "reopening": 4, "calls": 4, "control": 4, "poolplan": 4,
    "nested": 3, "offspring": 4, "taskoptions": 2,
    "reloads": 2, "usermodules": 2, "imports": 3, "clientmodules": 4, "nodemodules": 4,
    "payload": 1, "byvalue": 1, "mainmodule": 1, "definitions": 1, "report": 1,
    "address": 2, "iothread": 2, "link": 2, "tls": 2, "opening": 2,
    "memorywatch": 2, "cpus": 2, "limits": 2, "confinement": 2, "renewal": 4, "upkeep": 4,
    "descent": 3, "forking": 3, "prepared": 3, "preparation": 3, "generations": 3,
    "trees": 2, "diskthread": 2, "filetransfers": 2, "depot": 2, "taskfiles": 3, "clientfiles": 4, "nodefiles": 4,
    "downloads": 4,
    "transport": 2, "secretfile": 2, "shipping": 2, "transfers": 2, "memory": 2, "discovery": 2, "stats": 2,
    "lastwords": 2, "capture": 3, "outbox": 3, "resultfiles": 3, "worker": 3, "template": 3, "starters": 3, "pool": 3,
    "workerport": 3,
    "dispatcher": 3, "future": 3, "mapping": 3,
    "task": 3, "program": 3, "batchrun": 4, "partials": 3, "shared": 3, "blobcache": 2, "values": 4, "published": 4,
    "arguments": 4, "executor": 4, "root": 4, "supply": 4, "nodes": 4, "nodeagent": 4, "tenancy": 4, "hub": 4, "survey": 4,
    "spool": 2,
    "printed": 1, "logrecords": 3, "printout": 4, "outgoing": 4, "logbook": 4,
    "echo": 2, "cli": 5, "__init__": 5, "__main__": 5,
}
"""Every module's layer; a module that is not here has no place yet, and its test says so."""

IMPURE_MODULES = {"asyncio", "random", "secrets", "select", "selectors", "socket", "ssl", "subprocess",
                  "multiprocessing", "threading", "time", "uuid"}
IMPURE_NAMES = {("os", "urandom"), ("os", "getrandom"), ("os", "fork"), ("os", "open"), ("os", "pipe"), ("os", "kill"),
                ("datetime", "now")}
PURE_LAYERS = {0, 1}

PICKLERS = {"pickle", "cloudpickle", "_pickle"}
PICKLE_USERS = {"payload", "byvalue", "mainmodule", "definitions", "keys"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports_of(module: str) -> Iterator[str]:
    """The dotted names a module imports, wherever in it."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = f"distexec.{origin}".rstrip(".")
            if origin == "distexec":
                yield from (f"distexec.{alias.name}" for alias in node.names)
            else:
                yield origin


def siblings_of(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    return {name.split(".")[1] for name in imports_of(module) if name.startswith("distexec.")} & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module: str) -> None:
    """A new module is given its layer here, on purpose."""
    assert module in LAYERS


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """No module imports from a layer above its own."""
    upwards = {name for name in siblings_of(module) if LAYERS[name] > LAYERS[module]}
    assert not upwards


def test_no_cycles() -> None:
    """Modules of one layer may import each other only in one direction."""
    list(TopologicalSorter({module: siblings_of(module) for module in MODULES if module != "__init__"}).static_order())


@pytest.mark.parametrize("module", [module for module in MODULES if LAYERS.get(module) in PURE_LAYERS])
def test_lower_layers_are_pure(module: str) -> None:
    """Layers 0 and 1 import no socket, thread, clock, process or random source."""
    impure = {name for name in imports_of(module) if name.split(".")[0] in IMPURE_MODULES}
    assert not impure
    used = {(node.value.id, node.attr) for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    assert not used & IMPURE_NAMES


@pytest.mark.parametrize("module", [module for module in MODULES if module not in PICKLE_USERS])
def test_only_payload_unpickles(module: str) -> None:
    """Nobody but the payload layer imports a pickler, so nobody else can be made to unpickle."""
    assert not {name for name in imports_of(module) if name.split(".")[0] in PICKLERS}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_sleeps(module: str) -> None:
    """The package waits on conditions and selectors, never for a time to pass."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    sleeps = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "sleep"]
    assert not sleeps


def test_the_page_has_the_same_table() -> None:
    """ARCHITECTURE.md names every module, once, in its layer."""
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    named: dict[str, int] = {}
    for row in re.findall(r"^\| (\d) \| (.*) \|$", page, re.MULTILINE):
        for module in re.findall(r"`(\w+)`", row[1]):
            assert module not in named, f"{module} is named twice"
            named[module] = int(row[0])
    assert named == {module: LAYERS[module] for module in MODULES if not module.startswith("__")}
