"""Who is told, and when, that modules were imported again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distexec.reloads import Reloads, watch

watch.install()


class Listener:
    """Somebody who wants to know."""

    is_stale = False


@pytest.fixture
def listener() -> Listener:
    """One that listens."""
    listener = Listener()
    watch.listen(listener)
    return listener


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and was not yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "whimsical.py").write_text("import sys\nif hasattr(sys, 'hook'): sys.hook()\n")
    yield "whimsical"
    sys.modules.pop("whimsical", None)
    watch.again.pop("whimsical", None)
    watch._loaded.discard("whimsical")


def test_first_import(listener: Listener, module: str) -> None:
    """A module that is imported for the first time is no news."""
    reloads = Reloads()
    importlib.import_module(module)
    assert not listener.is_stale
    assert reloads.look() == ([], False)


def test_reload(listener: Listener, module: str) -> None:
    """A reload is told once to everybody who listens."""
    loaded = importlib.import_module(module)
    reloads = Reloads()
    importlib.reload(loaded)
    assert listener.is_stale
    assert reloads.look() == ([module], False)
    assert reloads.look() == ([], False)
    importlib.reload(loaded)
    assert reloads.look() == ([module], False)


def test_deleted_and_imported(listener: Listener, module: str) -> None:
    """A module that was thrown away and imported again is another."""
    importlib.import_module(module)
    reloads = Reloads()
    del sys.modules[module]
    assert reloads.look() == ([], False)
    importlib.import_module(module)
    assert listener.is_stale
    assert reloads.look() == ([module], False)


def test_what_never_exists(listener: Listener) -> None:
    """Looking in vain again and again changes nothing."""
    reloads = Reloads()
    for _ in range(3):
        with pytest.raises(ImportError):
            importlib.import_module("no_such_module_here")
    assert reloads.look() == ([], False)


def test_before_it_began_to_listen(module: str) -> None:
    """What was reloaded before is how things were."""
    importlib.reload(importlib.import_module(module))
    assert Reloads().look() == ([], False)


def test_in_the_middle_of_a_reload(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while a module is reloaded sees it then, or is told to look again."""
    loaded = importlib.import_module(module)
    reloads = Reloads()
    seen = []
    monkeypatch.setattr(sys, "meta_path", [watch, _Looking(lambda: seen.append(reloads.look())), *sys.meta_path[1:]])
    importlib.reload(loaded)
    assert seen == [([], True)]
    assert reloads.look() == ([module], False)


class _Looking:
    def __init__(self, look: object) -> None:
        self._look = look

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Look while the import is under way."""
        self._look()  # type: ignore[operator]


def test_listeners_are_not_kept() -> None:
    """A listener that nobody else refers to is gone."""
    import gc
    import weakref
    listener = Listener()
    reference = weakref.ref(listener)
    watch.listen(listener)
    del listener
    gc.collect()
    assert reference() is None
