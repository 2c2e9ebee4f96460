"""Machines of their own for tests: network namespaces on one switch, whose cables can be pulled.

    host "client" ── port ─┐
    host "one"    ── port ─┤  switch: a namespace with a bridge; nothing of the machine's own network is touched
    host "two"    ── port ─┘

The test itself runs `inside` one of the hosts, so what it starts is there too; other programs are started with the
host's `prefix`. Names carry the pid of their maker: namespaces of makers that are gone are removed by the next.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

PREFIX = "distexec-test-"
NAMES = Path("/run/netns")
SUBNET = "198.18.0."
"""Of the range set aside for testing networks (RFC 2544); it exists only inside the namespaces."""

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def namespaces(pid: int | None = None) -> set[str]:
    """Name the test namespaces there are: of one maker, or of all."""
    start = PREFIX if pid is None else f"{PREFIX}{pid}-"
    return {path.name for path in NAMES.glob(f"{start}*")}


def require() -> None:
    """Skip the test where there can be no namespaces, saying what it needs."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (iproute2) for network namespaces")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    probe = f"{PREFIX}{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs to make network namespaces: {made.stderr.strip()}")
    _ip("netns", "del", probe)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _remove_stale() -> None:
    for name in namespaces():
        pid = name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)  # another run may be faster


@dataclass(frozen=True)
class Host:
    """One machine: its address, and the words before a command that is to run there."""

    name: str
    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What makes a command run on this host; the process started is the command's own."""
        return "ip", "netns", "exec", self.namespace


class Network:
    """Hosts on one switch; made on entering the `with` block, gone with it."""

    def __init__(self, *names: str) -> None:
        self._start = f"{PREFIX}{os.getpid()}-"
        self._switch = f"{self._start}switch"
        self.hosts = {name: Host(name, self._start + name, f"{SUBNET}{number}")
                      for number, name in enumerate(names, start=1)}

    def __enter__(self) -> Network:
        _remove_stale()
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for host in self.hosts.values():
                self._plug(host)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in namespaces(os.getpid()):
            _ip("netns", "del", name)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def _plug(self, host: Host) -> None:
        _ip("netns", "add", host.namespace)
        _ip("-n", self._switch, "link", "add", "name", host.name, "type", "veth",
            "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", self._switch, "link", "set", "dev", host.name, "master", "bridge", "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")

    def pull(self, name: str) -> None:
        """Pull the cable of a host: no byte passes, and nobody is told; the host itself sees its carrier go."""
        _ip("-n", self._switch, "link", "set", "dev", name, "down")

    def plug(self, name: str) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", "dev", name, "up")

    def isolate(self, name: str) -> None:
        """Have the switch forward nothing to or from a host, whose carrier stays."""
        _ip("-n", self._switch, "link", "set", "dev", name, "nomaster")

    def rejoin(self, name: str) -> None:
        """Undo `isolate`."""
        _ip("-n", self._switch, "link", "set", "dev", name, "master", "bridge")

    @contextmanager
    def inside(self, name: str) -> Iterator[Host]:
        """Move this thread, and all that it starts meanwhile, to a host."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        away = os.open(NAMES / self[name].namespace, os.O_RDONLY)
        try:
            _enter(away)
            yield self[name]
        finally:
            _enter(home)
            os.close(away)
            os.close(home)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")
