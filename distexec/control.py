"""What an agent answers to who looks after nodes: which sessions it holds, and that it has dropped one.

Rule: whoever proves the secret is told of a session no more than lets its owner know it again; to drop it takes its token.
"""

from __future__ import annotations

import logging
import time
from hmac import compare_digest
from typing import Any, Protocol

from .dispatcher import Dispatcher
from .messages import AskSessions, Drop, Dropped, Message, SessionRow, Sessions
from .scheduler import Scheduler
from .sessions import session_row
from .transport import Link

_log = logging.getLogger("distexec")


class Holder(Protocol):
    """Who holds the sessions: the agent."""

    dispatcher: Dispatcher
    scheduler: Scheduler
    tenancies: dict[bytes, Any]


def answer(holder: Holder, link: Link, messages: list[Message]) -> None:
    """Answer what a control link says; its pings are answered by the transport. I/O thread."""
    for message in messages:
        if isinstance(message, AskSessions):
            link.send([Sessions(tuple(_rows(holder)))])
        elif isinstance(message, Drop):
            link.send([Dropped(_drop(holder, link, message))])


def _rows(holder: Holder) -> list[SessionRow]:
    scheduler, now = holder.scheduler, time.monotonic()
    with holder.dispatcher.lock:
        return [session_row(session, scheduler.patience_s(session), now) for session in scheduler.sessions]


def _drop(holder: Holder, link: Link, message: Drop) -> int:
    """End a session for who has its token; count what it had."""
    tenancy = holder.tenancies.get(message.id)
    if tenancy is None or tenancy.session is None:
        return -1
    if not compare_digest(tenancy.opened.token, message.token):
        _log.warning("%s wanted to drop a session without its token", link.name)
        return -1
    with holder.dispatcher.lock:
        count = len(tenancy.session.tasks) + len(tenancy.session.unacked)
    client = tenancy.session.upstream
    holder.dispatcher.call(holder.scheduler.close_session, tenancy.session)
    if client is not None:  # it would wait for ever: so it opens its sessions again, and learns which of them is new
        client.link.close("a session was dropped by who has its token")
    return count
