"""Peers gone bad, where files are concerned: an agent that wants to write elsewhere at its client, and the reverse."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distexec import ClusterExecutor
from distexec.auth import Secret
from distexec.handshake import Credentials
from distexec.messages import (
    BlobRef,
    Bye,
    Chunk,
    Define,
    Delivered,
    Delivery,
    Fetch,
    File,
    Find,
    Found,
    FromDownstream,
    FromUpstream,
    Lost,
    Message,
    Missing,
    Offer,
    Open,
    Options,
    Outcome,
    OutcomeKind,
    Place,
    Placed,
    Role,
    Run,
    SessionFailed,
    SessionSpec,
    Tree,
)
from distexec.payload import CallPacker, CallUnpacker
from distexec.shipping import digest_of
from distexec.transport import Link, Loop
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import filework
from tests.system.wires import PYTHON, running_loop, server_context

WAIT_S = 20.0
EVIL = ["../x", "/tmp/distexec-test-evil", "a/../../x", "a\0b", "", "a//b", "./a", "..", "link/x", "link", "pipe", "C:\\x",
        "x" * 5000, "y" * 300]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with traps in it, beside one that must stay empty."""
    directory = tmp_path / "here"
    directory.mkdir()
    (tmp_path / "outside").mkdir()
    (directory / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(directory / "pipe")
    monkeypatch.chdir(directory)
    return directory


def all_below(directory: Path) -> list[str]:
    """Everything below, links not followed."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


class BadAgent:
    """Takes one task, and says and sends what it is told to."""

    def __init__(self, loop: Loop, secret: str) -> None:
        credentials = Credentials(Secret.parse(secret), "bad", os.urandom(16), PYTHON, "0.1", 1, "linux-x86_64")
        self.listener = loop.listen(("127.0.0.1", 0), credentials, server_context(), self._accept)
        self.heard: list[Message] = []
        self.link: Link | None = None
        self.contents: dict[bytes, list[Message]] = {}

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.listener.address[1]}"

    def _accept(self, link: Link) -> tuple[Any, Any, Any]:
        return FromUpstream, self._on_messages, lambda *_: None

    def _on_messages(self, link: Link, messages: list[Message]) -> None:
        self.link = link
        for message in messages:
            if isinstance(message, Open):
                link.send([Offer(message.session, 1)])
            elif isinstance(message, Fetch):
                link.send(self.contents.get(message.blob.digest, [Missing(message.blob.digest)]))
        self.heard += messages

    def run(self) -> Run:
        """The task, once it has one."""
        assert wait_until(lambda: any(isinstance(each, Run) for each in self.heard), WAIT_S)
        return next(each for each in self.heard if isinstance(each, Run))

    def deliver(self, number: int, name: str, chunks: list[Message], ref: BlobRef, mode: int = 0o644) -> Delivered:
        """Offer a file and wait for the answer."""
        run = self.run()
        self.contents[ref.digest] = chunks
        assert self.link is not None
        self.link.send([Delivery(run.session, run.seq, run.attempt, number, name, mode, ref)])
        answers: list[Delivered] = []

        def is_answered() -> bool:
            answers[:] = [each for each in self.heard if isinstance(each, Delivered) and each.number == number]
            return bool(answers)

        assert wait_until(is_answered, WAIT_S), f"no answer to {name!r}"
        return answers[0]

    def end(self) -> None:
        """Let the task have ended."""
        run = self.run()
        data, _ = CallUnpacker().pack_value("done")
        assert self.link is not None
        self.link.send([Outcome(run.session, run.seq, run.attempt, OutcomeKind.VALUE, data, 1)])


def ref_of(content: bytes) -> BlobRef:
    return BlobRef(digest_of(content), len(content))


class TestBadAgent:
    @pytest.fixture
    def bad(self) -> Iterator[tuple[BadAgent, str]]:
        secret = os.urandom(32).hex()
        with running_loop("bad") as loop:
            yield BadAgent(loop, secret), secret

    def test_names_that_lead_elsewhere(self, bad: tuple[BadAgent, str], here: Path, tmp_path: Path) -> None:
        """Each is refused, and the session goes on."""
        agent, secret = bad
        good = ref_of(b"good")
        with ClusterExecutor(nodes=[agent.address], secret=secret) as executor:
            future = executor.submit(os.getpid)
            for number, name in enumerate(EVIL):
                answer = agent.deliver(number, name, [Chunk(good.digest, 0, b"good")], good)
                assert answer.error, name
                assert not answer.path
            answer = agent.deliver(100, "good", [Chunk(good.digest, 0, b"good")], good, mode=0o6777)
            assert answer.path == str(here / "good")
            agent.end()
            assert future.result(WAIT_S) == "done"
        assert all_below(here) == ["good", "link", "pipe"]
        assert (here / "good").stat().st_mode & 0o7777 == 0o777
        assert all_below(tmp_path / "outside") == []

    def test_contents_that_lie(self, bad: tuple[BadAgent, str], here: Path) -> None:
        """Another content than its digest says, more, less, none, in the wrong order: refused, and nothing is left."""
        agent, secret = bad
        size = 300_000
        content = os.urandom(size)
        lies: list[tuple[BlobRef, list[Message]]] = []
        for chunks in ([(0, bytes(size))], [(0, content + b"x")], [(0, content[:-1]), (size - 1, b"?")],
                       [(0, content[:100]), (99, content[99:])], [(0, content[:100]), (101, content[101:])]):
            digest = os.urandom(16)
            lies.append((BlobRef(digest, size), [Chunk(digest, offset, data) for offset, data in chunks]))
        lies += [(ref, [Missing(ref.digest, "lost")]) for ref in (BlobRef(os.urandom(16), -1), BlobRef(os.urandom(16), 10))]
        with ClusterExecutor(nodes=[agent.address], secret=secret) as executor:
            future = executor.submit(os.getpid)
            for number, (ref, said) in enumerate(lies):
                assert agent.deliver(number, "lie", said, ref).error
            agent.end()
            assert future.result(WAIT_S) == "done"
        assert all_below(here) == ["link", "pipe"]

    def test_a_task_that_it_does_not_have(self, bad: tuple[BadAgent, str], here: Path) -> None:
        """Of another's tasks, or attempts, no file is taken."""
        agent, secret = bad
        good = ref_of(b"good")
        with ClusterExecutor(nodes=[agent.address], secret=secret) as executor:
            future = executor.submit(os.getpid)
            run = agent.run()
            assert agent.link is not None
            for seq, attempt in ((run.seq + 1, run.attempt), (run.seq, run.attempt + 1)):
                agent.link.send([Delivery(run.session, seq, attempt, 1, "x", 0o644, good)])
            assert wait_until(lambda: sum(isinstance(each, Delivered) for each in agent.heard) == 2)
            assert all(each.error for each in agent.heard if isinstance(each, Delivered))
            agent.end()
            assert future.result(WAIT_S) == "done"
        assert all_below(here) == ["link", "pipe"]


class BadClient:
    """An executor's end of a link, played by the test."""

    def __init__(self, loop: Loop, agent: AgentProcess, spec: SessionSpec) -> None:
        self.heard: list[Message] = []
        self.contents: dict[bytes, list[Message]] = {}
        host, _, port = agent.address.rpartition(":")
        credentials = Credentials(Secret.parse(agent.secret), "bad", os.urandom(16), PYTHON, "0.1")
        links: list[Link] = []
        failures: list[Exception] = []
        loop.dial([(host, int(port))], Role.UPSTREAM, credentials, FromDownstream, links.append, failures.append,
                  self._on_messages, lambda *_: None)
        assert wait_until(lambda: links or failures)
        assert not failures, failures
        self.link = links[0]
        self.link.send([Open(1, os.urandom(16), os.urandom(16), 1.0, 0, spec)])
        assert wait_until(lambda: any(isinstance(each, Offer) for each in self.heard))
        self._packer = CallPacker()
        self._fns = 0

    def _on_messages(self, link: Link, messages: list[Message]) -> None:
        self.heard += messages
        for message in messages:
            if isinstance(message, Fetch):
                link.send(self.contents.get(message.blob.digest, [Missing(message.blob.digest)]))
            elif isinstance(message, Find):
                link.send([Found(message.session, message.number, message.name, is_own=False)])

    def place(self, number: int, tree: Tree) -> Placed:
        """Have files placed and wait for the answer."""
        self.link.send([Place(1, number, tree, is_vital=False)])
        assert wait_until(lambda: any(isinstance(each, Placed) and each.number == number for each in self.heard), WAIT_S)
        return next(each for each in self.heard if isinstance(each, Placed) and each.number == number)

    def run(self, seq: int, fn: Any, *args: Any, files: Tree = ()) -> Outcome | Lost:
        """Have a call made and wait for its end."""
        code, _, _ = self._packer.pack_function(fn)
        self._fns += 1
        data, _ = self._packer.pack_call(args, {})
        self.link.send([Define(1, self._fns, code), Run(1, seq, 1, self._fns, data, (), Options(files=files, solo=True))])
        ends: list[Outcome | Lost] = []

        def has_ended() -> bool:
            ends[:] = [each for each in self.heard if isinstance(each, (Outcome, Lost)) and each.seq == seq]
            return bool(ends)

        assert wait_until(has_ended, WAIT_S), f"task {seq} did not end"
        return ends[0]

    def value(self, seq: int, fn: Any, *args: Any, files: Tree = ()) -> Any:
        """The same, for calls that return."""
        end = self.run(seq, fn, *args, files=files)
        assert isinstance(end, Outcome), end
        value, error = self._packer.unpack_outcome(end.kind, end.data, ())
        if error is not None:
            raise error
        return value


class TestBadClient:
    @contextmanager
    def client(self, agent: AgentProcess) -> Iterator[BadClient]:
        with running_loop("bad") as loop:
            client = BadClient(loop, agent, SessionSpec(path=tuple(sys.path), directory="/nowhere"))
            yield client
            client.link.send([Bye("it is over")])

    def test_places_that_lead_elsewhere(self, shared_agent: AgentProcess, tmp_path: Path) -> None:
        """Each is refused; what a task put into the way is not followed; the session goes on."""
        (tmp_path / "outside").mkdir()
        with self.client(shared_agent) as client:
            client.value(1, os.symlink, str(tmp_path / "outside"), "link")
            client.value(2, os.mkfifo, "pipe")
            for number, name in enumerate(EVIL):
                assert client.place(number, (File(name, 0o644, b"evil"),)).error, name
            assert client.place(100, (File("good", 0o644, b"good"),)) == Placed(1, 100)
            assert client.value(3, Path("good").read_bytes) == b"good"
        assert all_below(tmp_path / "outside") == []

    def test_files_of_tasks_that_lead_elsewhere(self, shared_agent: AgentProcess) -> None:
        """Each is an error of the one task."""
        with self.client(shared_agent) as client:
            for seq, name in enumerate([name for name in EVIL if not name.startswith(("link", "pipe"))], 1):
                with pytest.raises((ValueError, OSError)):
                    client.value(seq, os.getcwd, files=(File(name, 0o644, b"evil"),))
            assert client.value(100, Path("good").read_bytes, files=(File("good", 0o644, b"good"),)) == b"good"

    def test_contents_that_lie(self, shared_agent: AgentProcess) -> None:
        """They are refused for the one task and the one file, and nothing is believed under their digest."""
        content = os.urandom(300_000)
        with self.client(shared_agent) as client:
            lies = [[], [(0, bytes(300_000))], [(0, content + b"x")], [(0, content[:9]), (8, content[8:])]]
            for seq, said in enumerate(lies, 1):
                ref = BlobRef(os.urandom(16), len(content))
                client.contents[ref.digest] = [Chunk(ref.digest, offset, data) for offset, data in said] or [
                    Missing(ref.digest, "for no reason")]
                end = client.run(seq, filework.read, "x", files=(File("x", 0o644, ref),))
                assert isinstance(end, Lost)
                assert "could not be brought" in end.evidence.reason
                assert client.place(seq, (File("x", 0o644, ref),)).error
            good = ref_of(content)
            client.contents[good.digest] = [Chunk(good.digest, at, content[at:at + 200_000]) for at in (0, 200_000)]
            assert client.value(100, filework.read, "x", files=(File("x", 0o644, good),)) == content

    def test_it_leaves_in_between(self, shared_agent: AgentProcess) -> None:
        """A file that never comes holds nobody up but its task."""
        with self.client(shared_agent) as client:
            ref = BlobRef(os.urandom(16), 1 << 30)
            client.contents[ref.digest] = [Chunk(ref.digest, 0, bytes(100_000))]
            code, _, _ = client._packer.pack_function(os.getcwd)
            data, _ = client._packer.pack_call((), {})
            client.link.send([Define(1, 999, code), Run(1, 1, 1, 999, data, (), Options(files=(File("x", 0o644, ref),)))])
            assert wait_until(lambda: any(isinstance(each, Fetch) for each in client.heard))
            assert "/work" in client.value(2, os.getcwd)
            assert not any(isinstance(each, SessionFailed) for each in client.heard)
