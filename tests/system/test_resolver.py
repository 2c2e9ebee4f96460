"""A resolver that takes its time: nobody but the thread that asks it waits, and what it says at last is used."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from distexec import ClusterExecutor, nodes
from tests.agents import AgentProcess
from tests.system import deeds

WAIT_S = 30.0
NAME = "moved.example"


class Resolver:
    """Knows one name: first by an address where nobody is; asked again, it waits for `answer`, then tells the new one."""

    def __init__(self, old: tuple[str, int], new: tuple[str, int]) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()
        self.threads: list[threading.Thread] = []
        self._old, self._new = old, new
        self._getaddrinfo = socket.getaddrinfo

    def getaddrinfo(self, host: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Take the place of socket.getaddrinfo."""
        if host != NAME:
            return self._getaddrinfo(host, *args, **kwargs)
        sockaddr = self._old
        if threading.current_thread() is not threading.main_thread():
            self.threads.append(threading.current_thread())
            self.asked.set()
            assert self.answer.wait(2 * WAIT_S)
            sockaddr = self._new
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", sockaddr)]


def address_of(agent: AgentProcess) -> tuple[str, int]:
    """Where it listens, as sockets want it."""
    host, _, port = agent.address.rpartition(":")
    return host, int(port)


def test_slow_resolver(shared_agent: AgentProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a name is looked up anew, other nodes' tasks run and end; with the answer the node that moved is found."""
    monkeypatch.setattr(nodes, "RESOLVE_EVERY", 1)
    with socket.socket() as silent, AgentProcess(slots=1, name="moved", secret=shared_agent.secret) as moved:
        silent.bind(("127.0.0.1", 0))  # and never listens: nobody else can either
        resolver = Resolver(silent.getsockname(), address_of(moved))
        monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
        with ClusterExecutor(nodes=[f"{NAME}:9730", shared_agent.address], secret=shared_agent.secret) as executor:
            try:
                assert resolver.asked.wait(WAIT_S)
                for number in range(10):  # one after the other: each needs the I/O thread
                    assert executor.submit(deeds.double, number).result(WAIT_S) == 2 * number
                assert not resolver.answer.is_set()
            finally:
                resolver.answer.set()
            assert executor.wait_for_slots(3, WAIT_S)
            assert executor.options(node="moved").submit(deeds.double, 1).result(WAIT_S) == 2
        for thread in resolver.threads:
            thread.join(WAIT_S)
    assert resolver.threads
    assert not [thread for thread in resolver.threads if thread.name == "distexec-io"]
