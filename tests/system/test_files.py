"""Files that calls and nodes are given, and that tasks send: what arrives, what is refused, what is left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distexec import ClusterExecutor, NodeSpec, WorkerLost
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds, filework
from tests.system.conftest import Make, make_local
from tests.system.proxy import Proxy
from tests.system.rig import await_arrival, gate, open_gate

WAIT_S = 30.0
MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for each test."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def files_below(directory: Path | str) -> list[str]:
    """Everything below, temporary files included."""
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*")
                  if path.is_symlink() or not path.is_dir())


# ---- directories of tasks


class TestTaskDirectory:
    def test_each_attempt_has_its_own(self, make: Make) -> None:
        """private, not the working directory, and gone with all in it before the outcome is heard."""
        with make() as executor:
            seen = set()
            for _ in range(3):
                directory, mode, is_cwd = executor.submit(filework.own_directory).result(WAIT_S)
                assert mode == 0o700
                assert not is_cwd
                assert not os.path.exists(directory)
                seen.add(directory)
            assert len(seen) == 3

    def test_a_task_that_raises(self, make: Make, tmp_path: Path) -> None:
        """Its directory goes as well."""
        with make() as executor:
            future = executor.submit(filework.fail_with_directory)
            with pytest.raises(ValueError, match="tasks/") as raised:
                future.result(WAIT_S)
            assert not os.path.exists(str(raised.value))

    def test_a_worker_that_is_killed(self, make: Make, tmp_path: Path) -> None:
        """What it could not remove its pool does."""
        with make() as executor:
            with pytest.raises(WorkerLost):
                executor.options(retries=1).submit(filework.die_with_directory, str(tmp_path / "note")).result(WAIT_S)
            directories = (tmp_path / "note").read_text().splitlines()
            assert len(set(directories)) == 2
            assert wait_until(lambda: not any(map(os.path.exists, directories)))

    def test_outside_a_task(self, make: Make) -> None:
        """A context that was kept does not make directories for others."""
        with make(1) as executor:
            kept = executor.submit(filework.keep_context).result(WAIT_S)
            assert "has ended" in executor.submit(filework.use_kept_context).result(WAIT_S)
            assert not os.path.exists(kept)


# ---- files of calls


class TestTaskFiles:
    def test_a_task_finds_its_files(self, make: Make, here: Path, tmp_path: Path) -> None:
        """relative paths are kept, others by their last component; modes too; the directory goes with the task."""
        (here / "sub").mkdir()
        (here / "sub" / "run.sh").write_text("#!/bin/sh\n")
        (here / "sub" / "run.sh").chmod(0o755)
        (here / "a.txt").write_text("a")
        (here / "large").write_bytes(b"L" * 3 * MIB)
        (tmp_path / "elsewhere").write_text("e")
        with make() as executor:
            view = executor.options(files=["sub", "a.txt", "large", tmp_path / "elsewhere", "../elsewhere"])
            assert view.submit(filework.tree).result(WAIT_S) == {
                "a.txt": (0o644, b"a"), "elsewhere": (0o644, b"e"), "large": (0o444, b"L" * 64),
                "sub/run.sh": (0o755, b"#!/bin/sh\n")}
            directory = view.submit(filework.cwd).result(WAIT_S)
            assert "/tasks/" in directory
            assert not os.path.exists(directory)
            assert "/tasks/" not in executor.submit(filework.cwd).result(WAIT_S)
            assert list(view.map(filework.read, ["a.txt"] * 3)) == [b"a"] * 3
            assert [f.result(WAIT_S) for f in [view.submit(filework.read, "a.txt") for _ in range(20)]] == [b"a"] * 20

    @pytest.mark.parametrize("size", [10, 5000, 2 * MIB])
    def test_each_call_sees_its_own_version(self, make: Make, here: Path, tmp_path: Path, size: int) -> None:
        """changed in place, and only then run: the first call has the first version."""
        with make(1) as executor:
            executor.wait_for_slots(1, WAIT_S)
            executor.set_slots(executor.nodes()[0].name, 1)
            door = gate(tmp_path)
            view = executor.options(files="data")
            (here / "data").write_bytes(b"1" * size)
            first = view.submit(filework.read, "data", door)
            await_arrival(door)
            (here / "data").write_bytes(b"2" * size)
            second = view.submit(filework.read, "data")
            (here / "data").write_bytes(b"3" * size)
            third = view.submit(filework.read, "data")
            (here / "data").unlink()
            open_gate(door)
            assert first.result(WAIT_S) == b"1" * size
            assert second.result(WAIT_S) == b"2" * size
            assert third.result(WAIT_S) == b"3" * size

    def test_a_file_that_is_missing(self, make: Make) -> None:
        """The call that names it raises, the next one works."""
        with make() as executor:
            with pytest.raises(FileNotFoundError, match="nowhere"):
                executor.options(files="nowhere").submit(filework.cwd)
            with pytest.raises(OSError, match="device, pipe or socket"):
                executor.options(files="/dev/zero").submit(filework.cwd)
            with pytest.raises(TypeError, match="files must be a path"):
                executor.options(files=[3])  # type: ignore[list-item]
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8

    def test_who_writes_to_a_shared_file(self, make: Make, here: Path) -> None:
        """does not change it for those that come after."""
        (here / "large").write_bytes(b"L" * 2 * MIB)
        with make(1) as executor:
            view = executor.options(files="large")
            view.submit(filework.overwrite, "large").exception(WAIT_S)
            assert view.submit(filework.read, "large").result(WAIT_S) == b"L" * 2 * MIB

    def test_it_needs_no_copy_for_each_task(self, make: Make, here: Path) -> None:
        """A large file lies once on each machine."""
        (here / "large").write_bytes(b"L" * 2 * MIB)
        with make(1) as executor:
            view = executor.options(files="large")
            links = [view.submit(os.stat, "large").result(WAIT_S) for _ in range(3)]
            assert len({each.st_ino for each in links}) == 1
            assert links[0].st_nlink == 2

    def test_durable_and_nested_calls_refuse(self, tmp_path: Path, here: Path) -> None:
        """with the reason and what to do instead."""
        (here / "x").write_text("x")
        with make_local(1, durable=tmp_path / "journal") as executor, pytest.raises(ValueError, match="durable session"):
            executor.options(files="x").submit(filework.cwd)
        with make_local(1) as executor:
            assert "calls made by the client" in executor.submit(filework.nest_with_files, executor).result(WAIT_S)
            with pytest.raises(ValueError, match="calls made by the client"):
                executor.submit(filework.take, executor.options(files="x")).result(WAIT_S)


# ---- files that tasks send


class TestDeliveries:
    def test_a_file_arrives(self, make: Make, here: Path) -> None:
        """by its own name or another, below the directory for it; its mode is kept; the path is returned."""
        with make(downloads="results") as executor:
            path, there = executor.submit(filework.send, b"content", mode=0o640).result(WAIT_S)
            assert path == str(here / "results" / "file.out")
            assert not os.path.exists(there)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
            executor.submit(filework.send, b"a" * MIB, 40, "deep/er/b.bin", 0o755).result(WAIT_S)
            executor.submit(filework.send, b"", 1, "empty").result(WAIT_S)
            assert files_below("results") == ["deep/er/b.bin", "empty", "file.out"]
            assert (here / "results" / "deep" / "er" / "b.bin").read_bytes() == b"a" * 40 * MIB
            assert (here / "results" / "file.out").read_bytes() == b"content"

    def test_the_working_directory_by_default(self, make: Make, here: Path) -> None:
        """as it was when the executor was made; a second file of the name takes the place of the first."""
        with make() as executor:
            os.chdir("/")
            for content in (b"one", b"two"):
                executor.submit(filework.send, content).result(WAIT_S)
                assert (here / "file.out").read_bytes() == content

    def test_many_at_once(self, make: Make, here: Path) -> None:
        """from threads of tasks, and from several tasks; the same bytes under several names."""
        with make() as executor:
            names = [f"many/{number}" for number in range(20)]
            assert executor.submit(filework.send_in_threads, 20).result(WAIT_S) == sorted(str(here / name) for name in names)
            futures = [executor.submit(filework.send, b"same" * 100_000, 1, f"same/{number}") for number in range(20)]
            for future in futures:
                future.result(WAIT_S)
            assert {path.read_bytes() for path in (here / "same").iterdir()} == {b"same" * 100_000}
            assert len(files_below(here)) == 40

    @pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a\0b", "", "sub/", "link/x", "link", "pipe", "dir",
                                      "C:x"])
    def test_nothing_is_written_elsewhere(self, make: Make, here: Path, tmp_path: Path, name: str) -> None:
        """Every such name is an error of the one task."""
        (tmp_path / "outside").mkdir()
        (here / "link").symlink_to(tmp_path / "outside")
        (here / "dir").mkdir()
        os.mkfifo(here / "pipe")
        with make() as executor:
            error = executor.submit(filework.send, b"evil", 1, name).exception(WAIT_S)
            assert isinstance(error, (ValueError, OSError)), error
            assert files_below(tmp_path / "outside") == []
            assert files_below(here) == ["link", "pipe"]
            assert executor.submit(filework.send, b"good", 1, "good").result(WAIT_S)[0] == str(here / "good")

    def test_what_is_no_file_is_not_sent(self, make: Make, tmp_path: Path) -> None:
        """directories, devices, pipes, nothing."""
        os.mkfifo(tmp_path / "pipe")
        with make() as executor:
            for path, text in [(str(tmp_path), "a directory"), ("/dev/zero", "a device"), (str(tmp_path / "pipe"), "pipe"),
                               (str(tmp_path / "nothing"), "No such file")]:
                with pytest.raises(OSError, match=text):
                    executor.submit(filework.send_path, path).result(WAIT_S)

    def test_a_file_that_changes_meanwhile(self, make: Make, tmp_path: Path, here: Path) -> None:
        """It is refused, or was whole: nothing half-written stays."""
        path = tmp_path / "growing"
        path.write_bytes(bytes(8 * MIB))
        with make() as executor:
            error = executor.submit(filework.growing, str(path)).exception(WAIT_S)
            assert error is None or "changed while" in str(error), error
            assert files_below(here) == ([] if error else ["growing"])

    def test_from_a_forked_child(self, make: Make) -> None:
        """A clear error there."""
        with make() as executor:
            assert executor.submit(filework.send_from_child).result(WAIT_S).startswith("RuntimeError")

    def test_downloads_that_cannot_be(self, make: Make, here: Path) -> None:
        """The task hears it."""
        (here / "file").write_text("x")
        with make(downloads=here / "file") as executor, pytest.raises(OSError, match="file"):
            executor.submit(filework.send, b"x").result(WAIT_S)

    def test_a_disk_that_is_full(self, make: Make, small_disk: Path) -> None:
        """The task hears it, nothing is left of it, and the next one finds room."""
        with make(downloads=small_disk) as executor:
            with pytest.raises(OSError, match="No space left"):
                executor.submit(filework.send, b"x" * MIB, 20).result(WAIT_S)
            assert files_below(small_disk) == []
            executor.submit(filework.send, b"x" * MIB, 5).result(WAIT_S)
            assert files_below(small_disk) == ["file.out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    if os.geteuid():
        pytest.skip("only root mounts")
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


# ---- files of nodes


class TestPlaced:
    def test_depends_are_there_before_the_first_task(self, shared_agent: AgentProcess, here: Path, tmp_path: Path) -> None:
        """relative paths are kept; also for the initializer, and for one node alone."""
        (here / "conf").mkdir()
        (here / "conf" / "a.ini").write_text("a")
        (here / "large").write_bytes(b"L" * 2 * MIB)
        (tmp_path / "other").write_text("o")
        with ClusterExecutor(nodes=[NodeSpec(shared_agent.address, depends=[tmp_path / "other"])],
                             secret=shared_agent.secret, depends=["conf", "large"], initializer=filework.read,
                             initargs=("conf/a.ini",)) as executor:
            found = executor.submit(filework.tree).result(WAIT_S)
            assert {name: content for name, (_, content) in found.items()} == {
                "conf/a.ini": b"a", "large": b"L" * 64, "other": b"o"}
            directory = executor.submit(filework.cwd).result(WAIT_S)
        assert wait_until(lambda: not os.path.exists(directory))

    def test_a_changed_file_is_sent_anew(self, shared_agent: AgentProcess, here: Path) -> None:
        """at the next session."""
        for content in (b"one" * 100_000, b"two" * 100_000):
            (here / "data").write_bytes(content)
            with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret, depends="data") as executor:
                assert executor.submit(filework.read, "data").result(WAIT_S) == content

    def test_send_file(self, shared_agent: AgentProcess, here: Path) -> None:
        """there when it returns; by name; twice; a directory; before and after the first task."""
        (here / "a").write_text("1")
        (here / "dir").mkdir()
        (here / "dir" / "b").write_text("b")
        with ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret) as executor:
            assert executor.submit(filework.cwd).result(WAIT_S) == str(here), "as long as there is nothing else"
            executor.send_file("a")
            assert executor.submit(filework.read, "a").result(WAIT_S) == b"1"
            (here / "a").write_text("2")
            executor.send_file("a", shared_agent.name)
            assert executor.submit(filework.read, "a").result(WAIT_S) == b"2"
            executor.send_file(here / "a", name="x/y")
            executor.send_file("dir", name="moved")
            assert sorted(executor.submit(filework.tree).result(WAIT_S)) == ["a", "moved/b", "x/y"]
            with pytest.raises(ValueError, match="cannot be a file's name"):
                executor.send_file("a", name="../x")
            with pytest.raises(FileNotFoundError):
                executor.send_file("nothing")
            with pytest.raises(ValueError, match="no node"):
                executor.send_file("a", node="nobody")

    def test_nodes_that_come_later(self, shared_agent: AgentProcess, here: Path) -> None:
        """They have all that was sent before, with what it was replaced by."""
        (here / "dep").write_bytes(b"dep" * 50_000)
        (here / "late").write_bytes(b"early" * 50_000)
        with AgentProcess(name="second", secret=shared_agent.secret) as second, \
                ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret, depends="dep") as executor:
            executor.send_file("late")
            (here / "late").write_bytes(b"late" * 50_000)
            executor.send_file("late")
            executor.add_node(NodeSpec(second.address, depends=["dep"]))
            there = executor.options(node="second")
            assert there.submit(filework.read, "late").result(WAIT_S) == b"late" * 50_000
            assert there.submit(filework.read, "dep").result(WAIT_S) == b"dep" * 50_000

    def test_locally_nothing_is_sent(self, here: Path, tmp_path: Path) -> None:
        """Local workers are where the program is; what they would not find is refused."""
        (here / "a").write_text("a")
        (tmp_path / "b").write_text("b")
        with make_local(1, depends=["a", tmp_path / "b"]) as executor:
            executor.send_file("a")
            assert executor.submit(filework.read, "a").result(WAIT_S) == b"a"
            with pytest.raises(ValueError, match="local workers"):
                executor.send_file(tmp_path / "b")
            with pytest.raises(FileNotFoundError):
                executor.send_file("nothing")

    def test_depends_that_are_nothing(self) -> None:
        """The constructor says so."""
        with pytest.raises(FileNotFoundError, match="nor a module"):
            make_local(1, depends=["no such thing"])
        with pytest.raises(TypeError, match="depends must name"):
            make_local(1, depends=[3])

    def test_a_depended_file_that_changed(self, shared_agent: AgentProcess, here: Path) -> None:
        """before a node could have it: that node is refused, with the reason."""
        (here / "dep").write_bytes(b"dep" * 50_000)
        executor = ClusterExecutor(nodes="local", depends="dep", secret=shared_agent.secret)
        with executor:
            (here / "dep").write_bytes(b"new" * 50_000)
            executor.add_node(shared_agent.address)
            assert wait_until(lambda: "was changed" in executor.nodes()[1].problem), executor.nodes()
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


class TestFullSpool:
    @pytest.fixture
    def agent(self, tmp_path: Path) -> Iterator[AgentProcess]:
        """An agent whose directory for sessions is on a file system of 12 MiB."""
        if os.geteuid():
            pytest.skip("only root mounts")
        (tmp_path / "spool").mkdir()
        prefix = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=12m none {tmp_path}/spool && exec "$@"', "sh")
        with AgentProcess(slots=1, prefix=prefix, arguments=("--spool", str(tmp_path / "spool"))) as agent:
            yield agent

    def test_only_the_task_fails(self, agent: AgentProcess, here: Path) -> None:
        """whose files do not fit; others go on, and room is made of what nobody needs."""
        (here / "huge").write_bytes(bytes(20 * MIB))
        with ClusterExecutor(nodes=[agent.address], secret=agent.secret, retries=0) as executor:
            with pytest.raises(WorkerLost, match="No space left"):
                executor.options(files="huge").submit(filework.cwd).result(WAIT_S)
            for number in range(4):
                (here / "fits").write_bytes(bytes([number]) * 7 * MIB)
                assert executor.options(files="fits").submit(filework.read, "fits").result(WAIT_S)[0] == number
            with pytest.raises(OSError, match="No space left"):
                executor.submit(filework.send, b"x" * MIB, 20).result(WAIT_S)
            with pytest.raises(OSError, match=r"node 'agent': .*No space left"):
                executor.send_file("huge")
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8

    def test_a_node_without_room_for_depends(self, agent: AgentProcess, here: Path) -> None:
        """It says so, and the executor with no other node breaks with that."""
        (here / "huge").write_bytes(bytes(20 * MIB))
        with ClusterExecutor(nodes=[agent.address], secret=agent.secret, depends="huge") as executor, \
                pytest.raises(WorkerLost, match=r"depends=.*No space left"):
            executor.submit(deeds.double, 4).result(WAIT_S)


# ---- faults


class TestCutLinks:
    def test_a_delivery_survives(self, shared_agent: AgentProcess, here: Path) -> None:
        """cut in the middle, more than once: it is done again."""
        with Proxy(shared_agent.address) as proxy, \
                ClusterExecutor(nodes=[proxy.address], secret=shared_agent.secret, node_timeout=60) as executor:
            future = executor.submit(filework.send, os.urandom(MIB), 48)
            for _ in range(2):
                before = proxy.forwarded
                assert wait_until(lambda before=before: proxy.forwarded > before + 8 * MIB, WAIT_S)  # type: ignore[misc]
                assert not future.done()
                proxy.cut()
                assert files_below(here) == []
                proxy.heal()
            path, _ = future.result(WAIT_S)
            assert os.path.getsize(path) == 48 * MIB
            assert future.attempts == 1
            assert files_below(here) == ["file.out"]

    def test_files_for_tasks_and_nodes_survive(self, shared_agent: AgentProcess, here: Path) -> None:
        """The other way."""
        (here / "task").write_bytes(os.urandom(48 * MIB))
        (here / "node").write_bytes(os.urandom(48 * MIB))
        with Proxy(shared_agent.address) as proxy, \
                ClusterExecutor(nodes=[proxy.address], secret=shared_agent.secret, node_timeout=60) as executor:
            assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
            for act in (lambda: executor.options(files="task").submit(filework.read, "task").result(WAIT_S),
                        lambda: executor.send_file("node", timeout=WAIT_S)):
                results: list[Any] = []
                thread = threading.Thread(target=lambda act=act, results=results: results.append(act()))  # type: ignore[misc]
                before = proxy.forwarded
                thread.start()
                assert wait_until(lambda before=before: proxy.forwarded > before + 8 * MIB, WAIT_S)  # type: ignore[misc]
                proxy.cut()
                proxy.heal()
                thread.join(WAIT_S)
                assert len(results) == 1
            assert results == [None]
            assert executor.submit(os.path.getsize, "node").result(WAIT_S) == 48 * MIB


class TestKilled:
    """In the middle of a transfer nothing half-written is left, wherever the blow falls."""

    @pytest.fixture
    def agent(self, tmp_path: Path) -> Iterator[AgentProcess]:
        (tmp_path / "spool").mkdir()
        with AgentProcess(slots=1, arguments=("--spool", str(tmp_path / "spool"))) as agent:
            yield agent

    @staticmethod
    def stuck(stack: ExitStack, agent: AgentProcess, **kwargs: Any) -> tuple[Proxy, ClusterExecutor]:
        """An executor whose link stops, without being cut, when the test says so."""
        proxy = stack.enter_context(Proxy(agent.address))
        executor = stack.enter_context(
            ClusterExecutor(nodes=[proxy.address], secret=agent.secret, retries=0, node_timeout=600, **kwargs))
        return proxy, executor

    @staticmethod
    def stop_in_the_middle(proxy: Proxy, before: int) -> None:
        assert wait_until(lambda: proxy.forwarded > before + 8 * MIB, WAIT_S)
        proxy.cut(silently=True)

    def test_the_worker(self, agent: AgentProcess, here: Path, tmp_path: Path) -> None:
        """while it sends."""
        with ExitStack() as stack:
            proxy, executor = self.stuck(stack, agent)
            pid = executor.submit(os.getpid).result(WAIT_S)
            future = executor.submit(filework.send, os.urandom(MIB), 64)
            self.stop_in_the_middle(proxy, proxy.forwarded)
            os.kill(pid, signal.SIGKILL)
            proxy.heal()
            assert isinstance(future.exception(WAIT_S), WorkerLost)
            assert wait_until(lambda: files_below(here) in ([], ["file.out"]))
            assert files_below(here) == [] or os.path.getsize("file.out") == 64 * MIB, "whole, or not at all"
            assert wait_until(lambda: not list((tmp_path / "spool").glob("*/*/tasks/*")))

    def test_the_agent_while_it_sends(self, agent: AgentProcess, here: Path, tmp_path: Path) -> None:
        """Nothing at the client; the next agent finds nothing of the session."""
        with ExitStack() as stack:
            proxy, executor = self.stuck(stack, agent)
            future = executor.submit(filework.send, os.urandom(MIB), 64)
            self.stop_in_the_middle(proxy, proxy.forwarded)
            agent.process.kill()
            agent.process.wait()
            proxy.cut()
            proxy.heal()
            assert wait_until(lambda: not files_below(here))
            assert wait_until(lambda: not list((tmp_path / "spool").glob("*/session-*"))), "its guardian removes it"
            executor.kill_workers()
            assert future.exception(WAIT_S)
        assert files_below(here) == []

    def test_the_agent_while_it_receives(self, agent: AgentProcess, here: Path, tmp_path: Path) -> None:
        """Files for a task, and for the node."""
        (here / "large").write_bytes(os.urandom(64 * MIB))
        with ExitStack() as stack:
            proxy, executor = self.stuck(stack, agent)
            executor.submit(deeds.double, 4).result(WAIT_S)
            before = proxy.forwarded
            future = executor.options(files="large").submit(filework.cwd)
            self.stop_in_the_middle(proxy, before)
            (session,) = (tmp_path / "spool").glob("*/session-*")
            left = [name for name in files_below(session) if not name.startswith("code-")]  # modules of the tests are there
            assert left == [], "not even under another name"
            agent.process.kill()
            agent.process.wait()
            executor.kill_workers()
            assert future.exception(WAIT_S)
        assert wait_until(lambda: not list((tmp_path / "spool").glob("*/session-*")))

    @pytest.mark.parametrize("where", ["local", "agent"])
    def test_the_client(self, agent: AgentProcess, here: Path, where: str, tmp_path: Path) -> None:
        """while it receives and while it has files for tasks: no directory of its own is left for long either."""
        program = f"""
import os, sys
from distexec import ClusterExecutor
from tests.system import filework
open("large", "wb").write(os.urandom(5 << 20))
nodes = {[agent.address]!r} if {where!r} == "agent" else "local"
with ClusterExecutor(1, nodes=nodes, secret={agent.secret!r}, downloads="results") as executor:
    executor.options(files="large").submit(filework.cwd).result()
    pid = executor.submit(os.getpid).result()
    executor.submit(filework.send, os.urandom(1 << 20), 2000)
    executor.submit(filework.cwd).add_done_callback(print)
    print(pid, flush=True)
    sys.stdin.read()
"""
        (tmp_path / "temporary").mkdir()
        environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
        with subprocess.Popen([sys.executable, "-c", program], env=environ, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            client.stdout.readline()
            downloads = here / "results"
            assert wait_until(lambda: downloads.is_dir() and is_written_to(client.pid, downloads), WAIT_S)
            client.kill()
            client.wait()
        assert files_below(downloads) == [], "nothing of what was not whole"
        if where == "agent":  # it has no process here that could
            (here / "file").write_bytes(bytes(10_000))
            subprocess.run([sys.executable, "-c", NEXT_CLIENT], env=environ, check=True)
        assert wait_until(lambda: not list((tmp_path / "temporary").glob("distexec-*")), WAIT_S)


NEXT_CLIENT = """
from distexec import ClusterExecutor
from tests.system import filework
with ClusterExecutor(1, nodes="local") as executor:
    executor.options(files="file").submit(filework.cwd).result()
"""


def is_written_to(pid: int, directory: Path) -> bool:
    """Whether a process has a file open below a directory that has no name yet, and something in it."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = f"/proc/{pid}/fd/{name}"
            if os.readlink(link).startswith(str(directory)) and os.path.isfile(link) and os.stat(link).st_size > MIB:
                return True
        except OSError:
            continue  # it was closed while we looked
    return False
