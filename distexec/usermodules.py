"""Which modules are the user's own, and what they consist of: the files that another machine needs to import them.

    name ─► its spec, in sys.modules or by the finders ─► own? ─► places: directories, files, parts of archives ─► Tree

The rule: what was installed (site-packages, the standard library) is never the user's own, wherever it lies; all else that
is made of files is. Nothing is imported to find that out, and a module that is not what this program has imported any more
is not sent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, all_suffixes
from importlib.util import spec_from_file_location
from typing import Any, NamedTuple

from msgspec import structs

from .messages import File, Tree
from .reloads import watch
from .trees import Source, pack

__all__ = ["Packed", "distribution_of", "find", "is_extension", "is_here", "is_library", "is_own", "pack_module",
           "paths_elsewhere", "top_of"]

LARGE_BYTES = 64 << 20
"""A package above this is sent, and the user told: data may lie in it that no task needs."""

_LIBRARIES = ("site-packages", "dist-packages")
_LEFT_OUT = frozenset({"__pycache__", ".git", ".hg", ".svn", ".bzr", ".tox", ".nox", ".mypy_cache", ".pytest_cache",
                       ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", "node_modules"})
_NEVER = frozenset({"__main__", "__mp_main__", "distexec"})
_STANDARD = tuple({os.path.dirname(os.path.abspath(os.__file__)), os.path.dirname(os.path.realpath(os.__file__))})


class Packed(NamedTuple):
    """A module for the way: its files, where the bytes of large ones are, or why it cannot be sent."""

    is_own: bool
    tree: Tree = ()
    sources: tuple[Source, ...] = ()
    problem: str = ""
    size_bytes: int = 0


def is_library(path: str) -> bool:
    """Whether what lies there was installed, by whatever program, or came with Python."""
    parts = path.split(os.sep)
    if any(name in parts for name in _LIBRARIES):
        return True
    return any(path == directory or path.startswith(directory + os.sep) or _is_archive_of(path, directory)
               for directory in _STANDARD)


def _is_archive_of(path: str, directory: str) -> bool:
    version = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return path.startswith(os.path.join(os.path.dirname(directory), version))


def paths_elsewhere(path: Iterable[str]) -> tuple[str, ...]:
    """Keep those entries of our sys.path that another machine may use as its own: where things are installed."""
    return tuple(entry for entry in path if any(name in entry.split(os.sep) for name in _LIBRARIES))


def top_of(name: str) -> str:
    """Give the top-level module that a module belongs to."""
    return name.partition(".")[0]


# ---- finding


def find(name: str) -> ModuleSpec | None:
    """Find a top-level module, imported or not, without importing anything."""
    module = sys.modules.get(name)
    if module is not None:
        spec = getattr(module, "__spec__", None)
        file = getattr(module, "__file__", None)
        return spec_from_file_location(name, file) if spec is None and file else spec
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if finder is watch or find_spec is None:
            continue
        spec = find_spec(name, None)
        if spec is not None:
            return spec  # type: ignore[no-any-return]
    return None


def is_here(name: str) -> bool:
    """Whether the top-level module that a module belongs to can be imported here, as far as the finders know."""
    try:
        return top_of(name) in sys.modules or find(top_of(name)) is not None
    except Exception:  # of a finder that is not ours; only advice depends on it
        return True


def places_of(name: str, spec: ModuleSpec) -> list[str]:
    """List where a top-level module lies: its file, or its directories, those that were added later included."""
    if spec.submodule_search_locations is None:
        return [spec.origin] if spec.has_location and spec.origin else []
    places = []
    if spec.has_location and spec.origin:
        places.append(os.path.dirname(spec.origin))
    for each in (spec.submodule_search_locations, getattr(sys.modules.get(name), "__path__", ())):
        places += [os.path.abspath(place) for place in each]
    return [place for place in dict.fromkeys(places) if os.path.exists(place) or _archive(place) is not None]


def is_own(name: str) -> bool:
    """Whether a module, of any depth, is the user's own."""
    top = top_of(name)
    if top in _NEVER:
        return False
    spec = find(top)
    return spec is not None and any(not is_library(place) for place in [*places_of(top, spec), *_elsewhere(top).values()])


def _elsewhere(top: str) -> dict[str, str]:
    """Find the submodules of a package that are not in its directories, as editable installs can have them, and where."""
    found: dict[str, str] = {}
    for finder in list(sys.meta_path):
        mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", None)
        if isinstance(mapping, dict):
            found |= {name: str(place) for name, place in mapping.items() if str(name).startswith(top + ".")}
    return found


# ---- packing


def pack_module(name: str, scratch: Callable[[], str], *, forced: bool = False) -> Packed:
    """Describe a top-level module for the way. What lies in archives is extracted to `scratch()`, and stays there.

    `forced`: it is taken for the user's own, though it is installed.
    """
    if top_of(name) in _NEVER or not name.isidentifier():
        return Packed(False)
    try:
        spec = find(name)
        if spec is None:
            return Packed(False, problem=_made_here(name))
        places = [place for place in places_of(name, spec) if forced or not is_library(place)]
        further = {inner: place for inner, place in _elsewhere(name).items() if forced or not is_library(place)}
        if not places and not further:
            return Packed(False, problem=_made_here(name))
        packer = _Packer(name, scratch)
        if spec.submodule_search_locations is None:
            packer.add_file(places[0])
        else:
            for place in places:
                packer.add_directory(place, name, is_namespace=not spec.has_location)
            for inner, place in further.items():
                packer.add_further(inner, place)
        changed = _changed(name)
    except (OSError, ValueError) as error:
        return Packed(True, problem=str(error))
    except Exception as error:  # of a finder that is not ours
        return Packed(False, problem=f"the client could not look for it: {type(error).__name__}: {error}")
    if changed:
        return Packed(True, problem=changed)
    return packer.packed()


def _made_here(name: str) -> str:
    module = sys.modules.get(name)
    if module is None or getattr(module, "__file__", None) is not None or name in sys.builtin_module_names:
        return ""
    return (f"the client made module {name!r} while it ran, and has no file of it: put what tasks need into a file that can "
            "be imported")


def _changed(top: str) -> str:
    """Say which file of a package is not what this program imported, if there is one."""
    for name, module in list(sys.modules.items()):
        if top_of(name) != top:
            continue
        spec = getattr(module, "__spec__", None)
        if spec is None or not spec.has_location or not spec.origin:
            continue
        file = _archive(spec.origin) or spec.origin
        try:
            written_ns = os.stat(file).st_mtime_ns
        except OSError:
            return (f"{spec.origin!r} is not there any more, though this program has imported it as {name!r}; start the "
                    "program anew")
        if written_ns > watch.imported_ns(name):
            return (f"{spec.origin!r} was changed after the program had imported it as {name!r}; importlib.reload() it, or "
                    "start the program anew")
    return ""


class _Packer:
    def __init__(self, name: str, scratch: Callable[[], str]) -> None:
        self._name, self._scratch = name, scratch
        self._files: dict[str, File] = {}
        self._sources: list[Source] = []
        self._size_bytes = 0

    def packed(self) -> Packed:
        tree = tuple(self._files[path] for path in sorted(self._files))
        wanted = {file.content for file in tree}
        sources = tuple(source for source in self._sources if source.ref in wanted)
        return Packed(True, tree, sources, size_bytes=self._size_bytes)

    def add_file(self, path: str) -> None:
        if _archive(path) is not None:
            path = self._extract(path)
        self._add(os.path.dirname(path), os.path.basename(path), "")

    def add_directory(self, path: str, name: str, *, is_namespace: bool = False) -> None:
        if _archive(path) is not None:
            path = self._extract(path)
        inside = name.replace(".", "/") + "/"
        if is_namespace and not _has_modules(path):
            self._files.setdefault(inside, File(inside, 0o755, b""))
        else:
            self._add(path, "", inside)

    def add_further(self, name: str, path: str) -> None:
        """Add a submodule that lies elsewhere: its directory, or its file without the suffix."""
        if os.path.isdir(path):
            self.add_directory(path, name)
            return
        above = name.rpartition(".")[0].replace(".", "/") + "/"
        for candidate in (path, *(path + suffix for suffix in all_suffixes())):
            if os.path.isfile(candidate):
                self._add(os.path.dirname(candidate), os.path.basename(candidate), above)
                return

    def _add(self, root: str, name: str, prefix: str) -> None:
        left = max(0, _left_inline(self._files))
        tree, sources = pack(root, [name], skip=_Skip(root), total_bytes=left)
        by_ref = {source.ref: source for source in sources}
        for file in tree:
            path = prefix + file.path
            if path not in self._files:
                self._files[path] = structs.replace(file, path=path)
                content = file.content
                self._size_bytes += len(content) if isinstance(content, bytes) else content.size_bytes
                if not isinstance(content, bytes):
                    self._sources.append(by_ref[content])

    def _extract(self, path: str) -> str:
        """Extract a part of an archive; give where it is now."""
        from zipfile import BadZipFile, ZipFile

        archive = _archive(path)
        assert archive is not None, "the caller looked"
        inner = os.path.relpath(path, archive).replace(os.sep, "/")
        target = os.path.join(self._scratch(), f"archive-{abs(hash(archive)):x}-{os.stat(archive).st_mtime_ns:x}")
        try:
            with ZipFile(archive) as opened:
                for info in opened.infolist():
                    if info.filename == inner or info.filename.startswith(inner + "/"):
                        opened.extract(info, target)
        except BadZipFile as error:
            raise OSError(f"{archive!r} cannot be read: {error}") from error
        return os.path.join(target, inner)


def _left_inline(files: dict[str, File]) -> int:
    from .trees import MESSAGE_BYTES
    return MESSAGE_BYTES - sum(len(file.content) for file in files.values() if isinstance(file.content, bytes))


class _Skip:
    """Leaves out what is no part of a package: caches, histories, virtual environments, what is no file."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __call__(self, path: str, is_directory: bool) -> bool:
        if path.rpartition("/")[2] in _LEFT_OUT:
            return True
        whole = os.path.join(self._root, path)
        if is_directory:
            return os.path.exists(os.path.join(whole, "pyvenv.cfg"))
        return not os.path.isfile(whole)  # a socket, a pipe, a link that leads nowhere


def _has_modules(path: str) -> bool:
    """Whether anything below a directory can be imported: if not, it is just a directory of that name."""
    skip = _Skip(path)
    for directory, inner, files in os.walk(path):
        if any(file.endswith(tuple(all_suffixes())) for file in files):
            return True
        below = os.path.relpath(directory, path)
        inner[:] = [name for name in inner if not skip(os.path.normpath(os.path.join(below, name)), True)]
    return False


def _archive(path: str) -> str | None:
    """Give the archive that a path leads into, if it does."""
    for above in _parents(path):
        if os.path.isdir(above):
            return None
        if os.path.isfile(above):
            return above if above != path and _is_archive(above) else None
    return None


def _is_archive(path: str) -> bool:
    from zipfile import is_zipfile
    return is_zipfile(path)


def _parents(path: str) -> Iterator[str]:
    while path and path != os.path.dirname(path):
        yield path
        path = os.path.dirname(path)


# ---- advice


def distribution_of(name: str) -> str:
    """Name what is to be installed to have a module, with the version that is installed here: "foo==1.2"; "" if unknown."""
    from importlib import metadata
    found: Any = metadata.packages_distributions().get(top_of(name))
    if not found:
        return ""
    return f"{found[0]}=={metadata.version(found[0])}"


def is_extension(tree: Tree) -> bool:
    """Whether a module is one compiled file."""
    return len(tree) == 1 and tree[0].path.endswith(tuple(EXTENSION_SUFFIXES))
