"""Where there is no room: for an agent's files, a session's, a task's arguments, a result. Each is told, with what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from distexec import ClusterExecutor, WorkerLost
from distexec.spool import spool
from tests.agents import AgentProcess
from tests.system import deeds
from tests.system.conftest import make_local

WAIT_S = 30.0
LARGE_BYTES = 8 << 20

SMALL_FILES = ("sh", "-c", 'ulimit -f 2048; exec "$@"', "sh")
"""Begins a command that can write files of 1 or 2 MiB at most, files in memory included."""


def test_no_room_for_the_agent(tmp_path: Path) -> None:
    """A spool directory in which nothing can be made is named, with the option that names another."""
    with pytest.raises(OSError, match=r"missing: No such file.*--spool"), spool(str(tmp_path / "missing")):
        pass


def full_directory(path: Path, inodes: int) -> tuple[str, ...]:
    """Begin a command that finds there a file system with room for so many files; skips the test where that cannot be."""
    path.mkdir()
    prefix = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=64k,nr_inodes={inodes} none {path} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("making a file system of its own for a process needs root and the program `unshare`")
    return prefix


def test_no_room_for_a_session(tmp_path: Path) -> None:
    """A session for which the agent can make no directory fails at once, and says where and which option."""
    spool = tmp_path / "spool"
    prefix = full_directory(spool, 2)
    with AgentProcess(prefix=prefix, arguments=("--spool", str(spool))) as agent, \
            ClusterExecutor(nodes=[agent.address], secret=agent.secret) as executor:
        with pytest.raises(WorkerLost, match=r"No space left.*--spool"):
            executor.submit(deeds.double, 1).result(WAIT_S)
        assert str(spool) in agent.log()


def large(size_bytes: int) -> bytes:
    """Return so many bytes."""
    return bytes(size_bytes)


def small_files() -> None:
    """Let this process write files of 1 MiB at most, and nobody lift that."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_no_room_for_a_result() -> None:
    """A result that finds no room is an OSError of its task, with its size and what to do; it is not run again."""
    with make_local(1, initializer=small_files) as executor:
        future = executor.submit(large, LARGE_BYTES)
        with pytest.raises(OSError, match=r"no room on this machine for a result of 8,388,\d+ bytes: .*; return less"):
            future.result(WAIT_S)
        assert future.attempts == 1
        assert executor.submit(large, 1000).result(WAIT_S) == bytes(1000)


def test_no_room_for_arguments() -> None:
    """A task whose arguments find no room on a node waits a while for it, then is lost with the reason; others go on."""
    with AgentProcess(slots=1, prefix=SMALL_FILES) as agent, \
            ClusterExecutor(nodes=[agent.address], secret=agent.secret) as executor:
        refused = executor.options(retries=0).submit(len, os.urandom(LARGE_BYTES))
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
        with pytest.raises(WorkerLost, match=r"8,388,\d+ bytes .*no room"):
            refused.result(WAIT_S)
        assert agent.log().count("could not be fetched") == 1
        assert executor.submit(deeds.double, 1).result(WAIT_S) == 2
