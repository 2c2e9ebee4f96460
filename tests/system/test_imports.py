"""How a process on a node finds modules: whom it asks, what it makes of the answer, what it says when there is none."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from distexec import imports
from distexec.imports import Ask, Finder, Told
from distexec.messages import SessionSpec
from distexec.outbox import BlockingLink
from distexec.starters import local_spec


class Agent:
    """Answers questions as it is told to."""

    def __init__(self, path: str) -> None:
        self.asked: list[Ask] = []
        self.answer: Callable[[Ask], Told | None] = lambda _: Told(False)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(path)
        self._sock.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            sock, _ = self._sock.accept()
            with sock:
                link = BlockingLink(sock, Ask)
                try:
                    messages = link.receive()
                except EOFError:
                    return
                for ask in messages:
                    self.asked.append(ask)
                    told = self.answer(ask)
                    if told is not None:
                        link.send([told])

    def close(self, path: str) -> None:
        """End it."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
        self._thread.join()
        self._sock.close()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """An agent, at the path "agent" of the working directory."""
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    agent = Agent("agent")
    yield agent
    agent.close("agent")


@pytest.fixture
def finder(agent: Agent, tmp_path: Path) -> Finder:
    """A finder that asks the agent; its directory is `code`."""
    (tmp_path / "code").mkdir()
    return Finder("agent", str(tmp_path / "code"), "n1")


@pytest.mark.parametrize("name", ["os", "sys", "json", "distexec", "msgspec", "__main__", "_bisect", "not a name", ""])
def test_never_asked_for(agent: Agent, finder: Finder, name: str) -> None:
    """What each machine has of its own is not asked for, nor what is no name."""
    assert finder.find_spec(name) is None
    assert agent.asked == []


def test_submodules(agent: Agent, finder: Finder) -> None:
    """Parts of packages are found in the package, whoever it is from."""
    assert finder.find_spec("package.part", ["/somewhere"]) is None
    assert agent.asked == []


def test_not_the_clients(agent: Agent, finder: Finder) -> None:
    """What is not the client's is left to the other finders, and asked for once."""
    assert finder.find_spec("numpy") is None
    assert finder.find_spec("numpy") is None
    assert agent.asked == [Ask("numpy", finder.directory)]


def test_the_clients(agent: Agent, finder: Finder, tmp_path: Path) -> None:
    """What is the client's is in the directory now, though that was listed before and looks as it did then."""
    code = tmp_path / "code"
    assert PathFinder.find_spec("mine", [str(code)]) is None
    before = os.stat(code).st_mtime_ns

    def place(_ask: Ask) -> Told:
        (code / "mine.py").write_text("")
        os.utime(code, ns=(before, before))
        return Told(True)

    agent.answer = place
    spec = finder.find_spec("mine")
    assert spec is not None
    assert spec.origin == str(code / "mine.py")


def test_namespaces_are_left_to_all(agent: Agent, finder: Finder, tmp_path: Path) -> None:
    """A namespace package may have parts on the machine as well, which the usual way finds."""
    (tmp_path / "code/space").mkdir()
    agent.answer = lambda _: Told(True)
    assert finder.find_spec("space") is None


def test_trouble(agent: Agent, finder: Finder) -> None:
    """What is the client's and cannot be had is an error with the reason, and asked for again the next time."""
    agent.answer = lambda _: Told(True, "it was changed")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match=r"'mine'.*'n1'.*it was changed") as caught:
            finder.find_spec("mine")
        assert caught.value.name == "mine"
    assert len(agent.asked) == 2


def test_agent_that_is_gone(agent: Agent, finder: Finder) -> None:
    """An agent that hangs up, or is not there, is an error that says so."""
    agent.answer = lambda _: None
    with pytest.raises(ModuleNotFoundError, match="could not be asked"):
        finder.find_spec("mine")
    finder.server = "nowhere"
    with pytest.raises(ModuleNotFoundError, match="could not be asked"):
        finder.find_spec("mine")


def test_default_timeout(agent: Agent, finder: Finder) -> None:
    """A task that gives sockets a time limit does not give one to imports."""
    release = threading.Event()
    agent.answer = lambda _: Told(False) if release.wait(30) else None
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.01)
    try:
        timer = threading.Timer(0.1, release.set)
        timer.start()
        assert finder.find_spec("patient") is None
        timer.join()
    finally:
        socket.setdefaulttimeout(before)


@pytest.fixture
def installed(finder: Finder, monkeypatch: pytest.MonkeyPatch) -> Finder:
    """The finder, in use."""
    monkeypatch.setattr(imports, "_finder", finder)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    return finder


def missing(name: str) -> ModuleNotFoundError:
    """The error of an import."""
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(name)
    return caught.value


def test_explains_what_is_missing(agent: Agent, installed: Finder) -> None:
    """It is said where it was looked for; or what the client has to say of it."""
    error = missing("no_such_module_here")
    imports.explain(error)
    (note,) = error.__notes__
    assert "node 'n1'" in note
    assert sys.executable in note
    assert sys.path[-1] in note
    agent.answer = lambda _: Told(False, "the client made it up")
    error = missing("no_such_module_there")
    imports.explain(error)
    assert "the client made it up" in error.__notes__[0]


def test_explains_causes(agent: Agent, installed: Finder) -> None:
    """So it is when the import's error is the cause of another, whose text shows it."""
    error = missing("no_such_module_here")
    outer = RuntimeError("no plots")
    outer.__cause__ = error
    error.__context__ = outer  # a cycle, as programs can make one
    imports.explain(outer)
    assert error.__notes__


def test_explains_parts(agent: Agent, installed: Finder, tmp_path: Path) -> None:
    """A part that is missing in a package of the client's own is said to be missing there."""
    agent.answer = lambda _: Told(True)
    (tmp_path / "code/brought").mkdir()
    (tmp_path / "code/brought/__init__.py").touch()
    try:
        error = missing("brought._fast")
        imports.explain(error)
        assert "'brought._fast' is not among what came" in error.__notes__[0]
    finally:
        sys.modules.pop("brought", None)


def test_path_of_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers look neither where the agent lies or was started, nor in directories of the client's that are not here."""
    here = str(tmp_path)
    monkeypatch.setattr(sys, "path", ["/where/the/agent/lies", "/installed", ""])
    spec = local_spec(SessionSpec(path=(here, "/no/such/site-packages"), directory=here), "/spare", "/home")
    assert spec.path == (here, "/installed")
