"""Asks nodes how they are, over control links: for `distexec nodes`."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .messages import Bye, Load, Message, Role, ToControl
from .report import layout
from .transport import Link, Loop

if TYPE_CHECKING:
    from .auth import Secret


class Answer(NamedTuple):
    """What one node said, or why it said nothing."""

    address: str
    state: str  # up, or refused
    name: str = ""
    version: str = ""
    python: str = ""
    platform: str = ""
    load: Load | None = None
    problem: str = ""


class Answers(NamedTuple):
    """All answers; prints as a table."""

    nodes: tuple[Answer, ...]

    def __str__(self) -> str:
        rows = [("address", "state", "name", "slots", "busy", "sessions", "cpu", "free memory", "version", "python",
                 "problem")]
        for node in self.nodes:
            load = node.load
            told = ("",) * 5 if load is None else (
                str(load.slots), str(load.busy), str(load.sessions), f"{load.cpu_percent:.0f} %",
                f"{load.memory_free_bytes / 2**30:.1f}/{load.memory_total_bytes / 2**30:.1f} GiB")
            rows.append((node.address, node.state, node.name, *told, node.version, node.python, node.problem))
        return layout(rows)


def survey(targets: Sequence[tuple[str, Sequence[tuple[Any, ...]]]], secret: Secret, timeout_s: float) -> Answers:
    """Dial every target (text, resolved addresses) at once and wait for the answers, at most `timeout_s` seconds."""
    from .handshake import Credentials
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    credentials = Credentials(secret, f"distexec-nodes-{os.getpid()}", secrets.token_bytes(16), python, __version__)
    loop = Loop("distexec-survey")
    answers: dict[str, Answer] = {}
    done = threading.Event()

    def answered(answer: Answer) -> None:
        answers.setdefault(answer.address, answer)
        if len(answers) == len({text for text, _ in targets}):
            done.set()

    def ask(text: str, addresses: Sequence[tuple[Any, ...]]) -> None:
        def on_messages(link: Link, messages: list[Message]) -> None:
            hello = link.hello
            for message in messages:
                if isinstance(message, Load) and hello is not None:
                    problem = "" if hello.python == python else f"programs of this Python {python} cannot use it"
                    answered(Answer(text, "up", hello.name, hello.version, hello.python, hello.platform, message, problem))
                    link.send([Bye("asked and answered")])
                    link.close()

        loop.dial(addresses, Role.CONTROL, credentials, ToControl, lambda link: None,
                  lambda error: answered(Answer(text, "refused", problem=str(error))), on_messages,
                  lambda link, reason: answered(Answer(text, "refused", problem=reason)), timeout_s)

    for text, addresses in targets:
        ask(text, addresses)
    loop.start()
    done.wait(timeout_s + 0.5)
    loop.stop()
    return Answers(tuple(answers.get(text, Answer(text, "refused", problem="no answer in time")) for text, _ in targets))
