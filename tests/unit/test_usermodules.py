"""Which modules are the user's own, and what is taken of them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import sys
import types
import zipfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from distexec import usermodules
from distexec.messages import BlobRef
from distexec.reloads import watch
from distexec.usermodules import find, is_library, is_own, pack_module, paths_elsewhere

watch.install()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path; what is imported from it is forgotten afterwards."""
    directory = tmp_path / "place"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    before = set(sys.modules)
    yield directory
    for name in set(sys.modules) - before:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(path: Path, text: str = "") -> Path:
    """Write a file, and make its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(name: str, scratch: Path, *, forced: bool = False) -> list[str]:
    """The paths that are taken of a module; it must be the user's own."""
    packed = pack_module(name, lambda: str(scratch), forced=forced)
    assert packed.is_own
    assert packed.problem == ""
    return [file.path for file in packed.tree]


@pytest.mark.parametrize(("path", "expected"), [
    (os.__file__, True),
    (importlib.util.__file__, True),
    ("/home/me/.venv/lib/python3.11/site-packages/numpy", True),
    ("/usr/lib/python3/dist-packages/six.py", True),
    ("/home/me/project", False),
    ("/home/me/site-packages-of-mine/x.py", False),
    (os.path.dirname(os.__file__) + "-mine/x.py", False),
])
def test_libraries(path: str, expected: bool) -> None:
    """What was installed, or came with Python, is no module of the user's, wherever it lies."""
    assert is_library(path) is expected


def test_entries_for_nodes() -> None:
    """Of sys.path a node hears only where things are installed: neither our directories nor our standard library."""
    path = ["", "/home/me/project", os.path.dirname(os.__file__), "/v/lib/python3.11/site-packages"]
    assert paths_elsewhere(path) == ("/v/lib/python3.11/site-packages",)


@pytest.mark.parametrize("name", ["os", "sys", "json", "pytest", "msgspec", "distexec", "__main__", "no_such_module_here"])
def test_not_own(name: str, tmp_path: Path) -> None:
    """The standard library, what is installed, distexec itself and what does not exist are not the user's own."""
    assert not is_own(name)
    assert not pack_module(name, lambda: str(tmp_path)).is_own


def test_names_that_are_none(tmp_path: Path) -> None:
    """What cannot be a module's name is looked for nowhere."""
    assert not pack_module("../etc/passwd", lambda: str(tmp_path)).is_own


def test_a_file(place: Path, tmp_path: Path) -> None:
    """A module is its file, and nothing else that lies there; it is not imported for that."""
    write(place / "lonely.py", "raise AssertionError('imported')")
    write(place / "other.py")
    assert is_own("lonely")
    assert names("lonely", tmp_path) == ["lonely.py"]
    assert "lonely" not in sys.modules


def test_a_package(place: Path, tmp_path: Path) -> None:
    """A package is all that lies in its directory, data included; caches, histories and environments are left out."""
    for path in ("pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/deep.py", "pkg/data/table.csv", "pkg/__pycache__/x.pyc",
                 "pkg/.git/config", "pkg/env/pyvenv.cfg", "pkg/env/lib/x.py"):
        write(place / path)
    assert names("pkg", tmp_path) == ["pkg/__init__.py", "pkg/data/table.csv", "pkg/sub/__init__.py", "pkg/sub/deep.py"]


def test_what_is_no_file(place: Path, tmp_path: Path) -> None:
    """Sockets, pipes and links that lead nowhere, such as editors leave, do not keep a package from being sent."""
    write(place / "odd/__init__.py")
    os.mkfifo(place / "odd/pipe")
    (place / "odd/.#lock").symlink_to("me@here.1:2")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(place / "odd/socket"))
        assert names("odd", tmp_path) == ["odd/__init__.py"]


def test_link_that_leads_out(place: Path, tmp_path: Path) -> None:
    """A link to a file outside is an error that names it."""
    write(tmp_path / "outside.txt", "secret")
    write(place / "leaky/__init__.py")
    (place / "leaky/link.txt").symlink_to(tmp_path / "outside.txt")
    packed = pack_module("leaky", lambda: str(tmp_path))
    assert "link.txt" in packed.problem
    assert not packed.tree


def test_namespace_with_parts_in_two_places(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of a namespace package are taken, but those that were installed."""
    monkeypatch.syspath_prepend(str(tmp_path / "second"))
    monkeypatch.syspath_prepend(str(tmp_path / "lib/site-packages"))
    write(place / "spread/one/__init__.py")
    write(tmp_path / "second/spread/two.py")
    write(tmp_path / "lib/site-packages/spread/three.py")
    assert names("spread", tmp_path) == ["spread/one/__init__.py", "spread/two.py"]


def test_directory_that_is_no_package(place: Path, tmp_path: Path) -> None:
    """A directory without a module in it could be a namespace package; its data stays here."""
    write(place / "results/huge.bin", "x" * 1000)
    assert names("results", tmp_path) == ["results/"]


def test_archive(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and packages in a zip file are extracted, each without the rest."""
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in ("zmod.py", "zpkg/__init__.py", "zpkg/data/x.txt", "znot/__init__.py"):
            archive.writestr(path, "")
    monkeypatch.syspath_prepend(str(tmp_path / "bundle.zip"))
    scratch = tmp_path / "scratch"
    assert names("zmod", scratch) == ["zmod.py"]
    assert names("zpkg", scratch) == ["zpkg/__init__.py", "zpkg/data/x.txt"]


def test_editable_install_by_finder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that a finder maps to a directory of another name is found there, and its submodules elsewhere too."""
    finder = types.ModuleType("__editable___mapped_finder")
    finder.MAPPING = {"mapped": str(tmp_path / "src"),  # type: ignore[attr-defined]
                      "mapped.far": str(tmp_path / "far"), "mapped.file": str(tmp_path / "file")}
    write(tmp_path / "src/__init__.py")
    write(tmp_path / "far/__init__.py")
    write(tmp_path / "file.py")

    class Finder:
        @classmethod
        def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if name != "mapped":
                return None
            return importlib.util.spec_from_file_location(name, tmp_path / "src/__init__.py")

    Finder.__module__ = finder.__name__
    monkeypatch.setitem(sys.modules, finder.__name__, finder)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert is_own("mapped")
    assert names("mapped", tmp_path) == ["mapped/__init__.py", "mapped/far/__init__.py", "mapped/file.py"]


def test_path_that_grew(place: Path, tmp_path: Path) -> None:
    """Directories that a package added to its `__path__` are taken with it."""
    write(place / "grown/__init__.py", f"__path__.append({str(tmp_path / 'more')!r})")
    write(tmp_path / "more/extra.py")
    importlib.import_module("grown")
    assert names("grown", tmp_path) == ["grown/__init__.py", "grown/extra.py"]


def test_made_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without a file cannot be sent, and whoever misses it is told why."""
    monkeypatch.setitem(sys.modules, "conjured", types.ModuleType("conjured"))
    packed = pack_module("conjured", lambda: str(tmp_path))
    assert not packed.is_own
    assert "conjured" in packed.problem


def test_installed_and_asked_for(tmp_path: Path) -> None:
    """What is installed is taken if somebody says so."""
    assert "iniconfig/__init__.py" in names("iniconfig", tmp_path, forced=True)


def test_changed_after_import(place: Path, tmp_path: Path) -> None:
    """A file that is not what was imported is not sent, until it is imported anew."""
    file = write(place / "edited/part.py", "X = 1")
    write(place / "edited/__init__.py")
    module = importlib.import_module("edited.part")
    assert names("edited", tmp_path)
    write(file, "X = 2")
    os.utime(file, ns=(watch.imported_ns("edited.part") + 1,) * 2)
    assert str(file) in pack_module("edited", lambda: str(tmp_path)).problem
    importlib.reload(module)
    assert names("edited", tmp_path)


def test_gone_after_import(place: Path, tmp_path: Path) -> None:
    """A module whose file is not there any more is an error that names it."""
    write(place / "vanishing/__init__.py")
    file = write(place / "vanishing/part.py")
    importlib.import_module("vanishing.part")
    file.unlink()
    assert str(file) in pack_module("vanishing", lambda: str(tmp_path)).problem


def test_large_files_stay_where_they_are(place: Path, tmp_path: Path) -> None:
    """The bytes of a large file are read from it when they are fetched."""
    write(place / "heavy/__init__.py")
    write(place / "heavy/weights.bin", "w" * 200_000)
    packed = pack_module("heavy", lambda: str(tmp_path))
    assert [type(file.content) for file in packed.tree] == [bytes, BlobRef]
    assert [source.path for source in packed.sources] == [str(place / "heavy/weights.bin")]
    assert packed.size_bytes == 200_000


def test_a_finder_that_raises(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finder of somebody else's that fails is told of, and keeps nobody from looking elsewhere."""
    class Broken:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            raise RuntimeError("broken finder")

    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    packed = pack_module("whatever_it_is", lambda: str(tmp_path))
    assert not packed.is_own
    assert "broken finder" in packed.problem


def test_advice() -> None:
    """The distribution that has a module is named with its version here."""
    import msgspec
    assert usermodules.distribution_of("msgspec.json") == f"msgspec=={msgspec.__version__}"
    assert usermodules.distribution_of("no_such_module_here") == ""


def test_found_as_imported(place: Path) -> None:
    """What has been imported is what counts, though another of that name would be found first now."""
    write(place / "twice.py")
    module = importlib.import_module("twice")
    assert find("twice") is module.__spec__
