"""Asks nodes over control links: how they are, which sessions they hold; and has them drop one."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .messages import AskSessions, Bye, Drop, Dropped, Hello, Load, Message, Role, Sessions, ToControl
from .report import layout
from .transport import Link, Loop

if TYPE_CHECKING:
    from .auth import Secret

Targets = Sequence[tuple[str, Sequence[tuple[Any, ...]]]]
"""Nodes as the user named them, and their resolved addresses."""


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


def survey(targets: Targets, secret: Secret, timeout_s: float) -> Answers:
    """Ask every target how it is, all at once; wait for the answers at most `timeout_s` seconds."""
    python = _python()

    def answer(text: str, hello: Hello, load: Message) -> Answer:
        assert isinstance(load, Load), "it was asked for"
        problem = "" if hello.python == python else f"programs of this Python {python} cannot use it"
        return Answer(text, "up", hello.name, hello.version, hello.python, hello.platform, load, problem)

    found = _ask(targets, secret, timeout_s, [], Load, answer)
    return Answers(tuple(each if isinstance(each, Answer) else Answer(text, "refused", problem=each)
                         for text, each in found.items()))


def ask_sessions(targets: Targets, secret: Secret, timeout_s: float) -> dict[str, tuple[str, Sessions] | str]:
    """Ask every target which sessions it holds: gives its name and the answer, or why there is none."""
    def answer(_text: str, hello: Hello, sessions: Message) -> tuple[str, Sessions]:
        assert isinstance(sessions, Sessions), "it was asked for"
        return hello.name, sessions
    return _ask(targets, secret, timeout_s, [AskSessions()], Sessions, answer)


def drop_session(targets: Targets, secret: Secret, timeout_s: float, id: bytes, token: bytes) -> dict[str, int | str]:
    """Have every target drop a session: gives how many calls and outcomes it had (-1: no such session), or why not."""
    def answer(_text: str, _hello: Hello, dropped: Message) -> int:
        assert isinstance(dropped, Dropped), "it was asked for"
        return dropped.count
    return _ask(targets, secret, timeout_s, [Drop(id, token)], Dropped, answer)


def _ask(targets: Targets, secret: Secret, timeout_s: float, question: list[Any], kind: type,
         answer: Callable[[str, Hello, Message], Any]) -> dict[str, Any]:
    """Dial every target at once and put the question: gives what `answer` makes of each, or a text that says why not."""
    from .handshake import Credentials
    credentials = Credentials(secret, f"distexec-{os.getpid()}", secrets.token_bytes(16), _python(), __version__)
    loop = Loop("distexec-survey")
    answers: dict[str, Any] = {}
    done = threading.Event()

    def answered(text: str, told: Any) -> None:
        answers.setdefault(text, told)
        if len(answers) == len({text for text, _ in targets}):
            done.set()

    def ask(text: str, addresses: Sequence[tuple[Any, ...]]) -> None:
        def on_messages(link: Link, messages: list[Message]) -> None:
            for message in messages:
                if isinstance(message, kind) and link.hello is not None:
                    answered(text, answer(text, link.hello, message))
                    link.send([Bye("asked and answered")])
                    link.close()

        loop.dial(addresses, Role.CONTROL, credentials, ToControl, lambda link: link.send(question) if question else None,
                  lambda error: answered(text, str(error)), on_messages, lambda link, reason: answered(text, reason),
                  timeout_s)

    for text, addresses in targets:
        ask(text, addresses)
    loop.start()
    if targets:
        done.wait(timeout_s + 0.5)
    loop.stop()
    return {text: answers.get(text, "no answer in time") for text, _ in targets}


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
