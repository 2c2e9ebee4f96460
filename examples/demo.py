"""What `make demo` does: wordcount.py on two agents of this machine with a fresh secret, and then without any."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROGRAM = Path(__file__).with_name("wordcount.py")
AGENT = Path(sys.executable).with_name("distexec-agent")


@contextlib.contextmanager
def agent(name: str, secret: str) -> Iterator[str]:
    """Run an agent with one slot on a free port of this machine; yields its address once it is ready."""
    process = subprocess.Popen([AGENT, "--listen", "127.0.0.1:0", "--slots", "1", "--name", name, "--drain", "5"],
                               stdout=subprocess.PIPE, text=True, env=os.environ | {"DISTEXEC_SECRET": secret})
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:\d+", ready)
        if not found:
            raise SystemExit(f"The agent {name} did not start: exit code {process.wait()}.")
        print(ready, end="")
        yield found.group()
    finally:
        process.terminate()
        process.communicate()


def count(environ: dict[str, str], answer: Path) -> None:
    """Run the program; its failure is ours."""
    code = subprocess.run([sys.executable, PROGRAM, "--serial-answer", answer], env=environ, check=False).returncode
    if code:
        raise SystemExit(code)


def main() -> None:
    """Run the program on two agents, then in local mode."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTEXEC_")}
    secret = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="distexec-demo-") as directory:
        answer = Path(directory) / "serial.json"
        with agent("left", secret) as left, agent("right", secret) as right:
            print()
            count(environ | {"DISTEXEC_NODES": f"{left},{right}", "DISTEXEC_SECRET": secret}, answer)
        print("\n---- The same program, the same code, without agents ----\n", flush=True)
        count(environ, answer)


if __name__ == "__main__":
    main()
