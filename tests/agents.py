"""Agents for tests: real `distexec-agent` processes on loopback or on another host of `tests.netns`, with a secret and
directories of their own."""

from __future__ import annotations

import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests import leaks

ROOT = Path(__file__).parents[1]
START_S = 30.0
STOP_S = 20.0
_ADDRESS = re.compile(r"listening on (\d+(?:\.\d+){3}:\d+)")


@dataclass
class AgentProcess:
    """An agent, by default on a free loopback port, started on entering the `with` block and stopped on leaving it.

    `prefix` stands before its command: it is how a process is started on another host. `python` runs it; "": this one does.
    """

    slots: int = 2
    name: str = "agent"
    secret: str = field(default_factory=lambda: secrets.token_hex(32))
    arguments: tuple[str, ...] = ()
    address: str = ""
    listen: str = "127.0.0.1:0"
    prefix: tuple[str, ...] = ()
    python: str = ""

    def __enter__(self) -> AgentProcess:
        self._log = tempfile.NamedTemporaryFile(prefix="pytest-of-agent-", suffix=".log")
        self._home = tempfile.TemporaryDirectory(prefix="pytest-of-agent-")
        environ = os.environ | {
            "DISTEXEC_SECRET": self.secret, "XDG_CONFIG_HOME": self._home.name, "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self.process = subprocess.Popen(
            [*self.prefix, self.python or sys.executable, "-c",
             "import sys; from distexec.cli import agent_main; sys.exit(agent_main())",
             "--listen", self.listen, "--slots", str(self.slots), "--name", self.name, "--spool", self._home.name,
             *self.arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, env=environ)
        leaks.own(self.process.pid)
        try:
            self.address = self._read_address()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        leaks.disown(self.process.pid)
        self._log.close()
        self._home.cleanup()

    def log(self) -> str:
        """What the agent wrote to its standard error so far."""
        return Path(self._log.name).read_text(errors="replace")

    def _read_address(self) -> str:
        """Wait for the line that says it is ready, and take the address from it."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + START_S
        said = ""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while "\n" not in said or not _ADDRESS.search(said):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"the agent said nothing for {START_S} s; its log:\n{self.log()}")
                piece = os.read(self.process.stdout.fileno(), 4096).decode()
                if not piece:
                    raise ChildProcessError(f"the agent ended with code {self.process.wait()}; its log:\n{self.log()}")
                said += piece
        found = _ADDRESS.search(said)
        assert found is not None
        return found.group(1)
