"""The prepared state of one session on an agent: what it needs is fetched, what becomes of it is said upward.

    Open, Renew ──► blobs of the setup's arguments fetched ──► the pool's generation goes on
    CleanUp ──────► workers leave, cleanup ──► Cleaned, upward     an older generation's failed cleanup: Cleaned at once

Rule: what a cut link interrupts is begun, or said, again on the next. I/O thread.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any, Protocol

from msgspec import structs

from .dispatcher import Dispatcher
from .ledger import Session
from .messages import BlobRef, Cleaned, Evidence, Open, SessionSpec
from .pool import Pool
from .scheduler import Scheduler
from .shipping import BlobStore
from .transfers import fetch
from .transport import Loop

__all__ = ["REFETCH_S", "ROOM_S", "Upkeep"]

REFETCH_S = 0.2
"""Pause before a blob is asked for again that the other end did not have, or for which there was no room."""

ROOM_S = 10.0
"""How long a task, or a session, waits for that. Longer: it waits where it cannot run. Shorter: others would have made
room in time."""

_log = logging.getLogger("distexec")


class Landlord(Protocol):
    """What this needs of the agent."""

    name: str
    loop: Loop
    store: BlobStore
    scheduler: Scheduler
    dispatcher: Dispatcher
    grace_s: float


class Lodger(Protocol):
    """What this needs of the session's tenancy."""

    opened: Open
    session: Session | None
    uplink: Any
    pool: Pool


class Upkeep:
    """All that is said above."""

    def __init__(self, agent: Landlord, tenancy: Lodger) -> None:
        self._agent, self._tenancy = agent, tenancy
        self._missing: SessionSpec | None = None  # whose blobs are on their way
        self._failing_since: float | None = None
        self._is_cleaning = False
        self._last: Cleaned | None = None  # of the present generation
        self._said: dict[int, Cleaned] = {}  # by generation

    # ---- what setup needs

    def prepare(self, spec: SessionSpec) -> None:
        """Fetch what a spec refers to, and then let the pool go on."""
        self._failing_since = None
        has_refs = any(isinstance(each, BlobRef) for each in (*spec.initializer_buffers, *spec.setup_buffers))
        self._missing = spec if has_refs else None
        self.fetch()

    def fetch(self) -> None:
        """Begin to fetch, for the first time or again."""
        spec = self._missing
        if spec is not None:
            buffers = (*spec.initializer_buffers, *spec.setup_buffers)
            fetch(self._tenancy.uplink.transfers, self._agent.store, buffers, partial(self._got, spec),
                  partial(self._failed, spec))

    def _got(self, spec: SessionSpec) -> None:
        if self._missing is spec:
            self._missing = None
            self._tenancy.pool.blobs_came()
        for ref in (*spec.initializer_buffers, *spec.setup_buffers):
            if isinstance(ref, BlobRef):
                self._agent.store.release(ref)

    def _failed(self, spec: SessionSpec, reason: str) -> None:
        session = self._tenancy.session
        if self._missing is not spec or not self._tenancy.uplink.link.is_open:
            return  # without a link the next one fetches it
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > ROOM_S and session is not None:
            self._missing = None
            reason = f"the arguments of its setup could not be brought there: {reason}"
            evidence = Evidence(self._agent.name, reason=reason)
            self._agent.dispatcher.call(self._agent.scheduler.start_failed, session, evidence, b"")
        else:
            self._agent.loop.call_later(REFETCH_S, self.fetch)

    # ---- the end

    def clean_up(self) -> None:
        """Let the workers leave, clean up as long as it takes, and then say so."""
        if self._is_cleaning:
            return
        self._is_cleaning = True
        self._tenancy.pool.on_end = self._ended
        self._tenancy.pool.close(self._agent.grace_s)

    def cleaned(self, cleaned: Cleaned) -> None:
        """Learn how a generation was cleaned up."""
        if self._is_cleaning and cleaned.generation == self._tenancy.opened.spec.generation:
            self._last = cleaned  # said once nothing is left of the others either
        elif cleaned.evidence is not None:
            self._say(cleaned)

    def _ended(self) -> None:
        self._say(self._last or Cleaned(0, self._tenancy.opened.spec.generation))

    def say_again(self) -> None:
        """Say on a new link what the client may not have heard."""
        for cleaned in list(self._said.values()):
            self._say(cleaned)

    def _say(self, cleaned: Cleaned) -> None:
        self._said[cleaned.generation] = cleaned
        session, link = self._tenancy.session, self._tenancy.uplink.link
        if session is not None and session.upstream is not None and link.is_open:
            link.send([structs.replace(cleaned, session=session.uplink_no)])
