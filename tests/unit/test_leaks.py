"""The leak check itself: what a test leaves is named, what belongs to a fixture is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading

import pytest

from tests import leaks


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "wait_until", lambda condition: condition())


def test_a_clean_test_leaves_nothing() -> None:
    """Nothing done, nothing found."""
    assert leaks.Footprint().leaks() == []


def test_orphans_are_found() -> None:
    """A grandchild whose parent died is found by its command line, and not when a fixture owns it."""
    before = leaks.Footprint()
    leave_one = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0); print(p.pid)"
    with subprocess.Popen([sys.executable, "-c", leave_one], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        assert [line for line in before.leaks() if str(pid) in line]
        leaks.own(pid)
        assert not [line for line in before.leaks() if str(pid) in line]
        leaks.disown(pid)
    os.waitpid(pid, 0)
    assert before.leaks() == []


def test_threads_sockets_and_files_are_found() -> None:
    """A thread is named, sockets beyond the allowance are counted, a file in the temporary directory is named."""
    before = leaks.Footprint()
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="left over")
    thread.start()
    sockets = [socket.socket() for _ in range(leaks.DESCRIPTOR_ALLOWANCE + 1)]
    with tempfile.NamedTemporaryFile(prefix="distexec") as file:
        found = before.leaks()
        assert "thread 'left over'" in found
        assert f"file {file.name}" in found
        assert any("sockets open" in line for line in found)
    for sock in sockets:
        sock.close()
    go.set()
    thread.join()
    assert before.leaks() == []
