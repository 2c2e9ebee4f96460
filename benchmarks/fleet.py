"""What many nodes cost the client: CPU seconds of its process per no-op task under 1 and under 200 agents.

The agents are stand-ins that speak the real protocol over real TLS links but run nothing: each Run is answered at once. They
live together in one other process. Run as `python -m benchmarks.fleet agents COUNT` (prints their ports, ends with its
standard input) or `python -m benchmarks.fleet client PORTS TASKS` (prints seconds per task).
"""

from __future__ import annotations

import os
import pickle
import secrets
import subprocess
import sys
import time
from types import UnionType
from typing import Any

from benchmarks.measures import Numbers
from distexec import ClusterExecutor, __version__
from distexec.auth import Secret
from distexec.handshake import Credentials
from distexec.messages import FromUpstream, Message, Offer, Open, Outcome, OutcomeKind, Run
from distexec.tls import ServerContext, make_server_context
from distexec.transport import Link, Loop

SECRET = secrets.token_hex(32)
SLOTS = 4
NOTHING = pickle.dumps(None)
SIZES = {"1 agent": 1, "200 agents": 200}
"""The fleets that are compared, by the names of their columns."""


def cost_of_fleet(size: str, tasks: int) -> Numbers:
    """Client CPU, microseconds per task, with the agents of a fleet; all the tasks are submitted at once."""
    count = SIZES[size]
    environ = os.environ | {"DISTEXEC_FLEET_SECRET": SECRET}
    command = [sys.executable, "-m", "benchmarks.fleet"]
    with subprocess.Popen([*command, "agents", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=environ) as agents:
        assert agents.stdout is not None
        ports = agents.stdout.readline().strip()
        done = subprocess.run([*command, "client", ports, str(tasks)], env=environ, check=True,
                              stdout=subprocess.PIPE, text=True)
        agents.communicate("")
    return {"cpu_us_per_task": float(done.stdout)}


def _answer(link: Link, messages: list[Message]) -> None:
    answers: list[Message] = []
    for message in messages:
        if isinstance(message, Run):
            answers.append(Outcome(message.session, message.seq, message.attempt, OutcomeKind.VALUE, NOTHING, 1000))
        elif isinstance(message, Open):
            answers.append(Offer(message.session, SLOTS))
    if answers:
        link.send(answers)


def _accept(_link: Link) -> tuple[UnionType, Any, Any]:
    return FromUpstream, _answer, lambda link, reason: None


def _listen(loop: Loop, number: int, context: ServerContext) -> int:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    secret = Secret.parse(os.environ["DISTEXEC_FLEET_SECRET"])
    credentials = Credentials(secret, f"stand-in-{number}", secrets.token_bytes(16), python, __version__, slots=SLOTS)
    return int(loop.listen(("127.0.0.1", 0), credentials, context, _accept).address[1])


def _be_agents(count: int) -> None:
    loop = Loop("stand-ins")
    context = make_server_context()
    print(",".join(str(_listen(loop, number, context)) for number in range(count)), flush=True)
    loop.start()
    sys.stdin.read()
    loop.stop()


def _be_client(ports: list[str], tasks: int) -> None:
    nodes = [f"127.0.0.1:{port}" for port in ports]
    with ClusterExecutor(nodes=nodes, secret=os.environ["DISTEXEC_FLEET_SECRET"]) as executor:
        if not executor.wait_for_slots(SLOTS * len(nodes), 60):
            raise SystemExit(f"only {executor.status().slots} slots came")
        for future in [executor.submit(abs, number) for number in range(100 * len(nodes))]:
            future.result()  # so that the run time is known everywhere
        began = time.process_time()
        for future in [executor.submit(abs, number) for number in range(tasks)]:
            future.result()
        print((time.process_time() - began) / tasks * 1e6)


if __name__ == "__main__":
    if sys.argv[1] == "agents":
        _be_agents(int(sys.argv[2]))
    else:
        _be_client(sys.argv[2].split(","), int(sys.argv[3]))
