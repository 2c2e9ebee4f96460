"""Looks after journals from a shell: shows one, goes on with it, has nodes drop what they hold of it.

Rule: the program's own code is needed for nothing here; values are fetched and recorded, not looked at.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from .auth import Secret
from .executor import ClusterExecutor, Reopening
from .journal import CANCELLED, LOST, Journal, NodeRow
from .keys import name_of
from .messages import OutcomeKind
from .payload import CallPacker
from .report import layout
from .sessions import label_of

LOOK_S = 1.0
"""How often progress is looked at."""

_KINDS = {None: "unfinished", OutcomeKind.VALUE: "done", OutcomeKind.ERROR: "raised", OutcomeKind.PAYLOAD: "not unpickled",
          OutcomeKind.TIMEOUT: "timed out", OutcomeKind.KILLED: "killed", LOST: "lost", CANCELLED: "cancelled"}


class Summary(NamedTuple):
    """What a journal holds; prints in a few lines."""

    path: str
    name: str
    label: str
    calls: int
    kinds: dict[str, int]
    nodes: tuple[NodeRow, ...]

    @property
    def unfinished(self) -> int:
        """Count the calls that have not ended."""
        return self.kinds.get("unfinished", 0)

    @property
    def is_good(self) -> bool:
        """Whether every call ended with a value."""
        return self.kinds.get("done", 0) == self.calls

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()) or "none yet"
        lines = [f"{self.path}: session {self.label} of {self.name}, {self.calls} calls: {counts}"]
        holders = [row.address for row in self.nodes if row.may_hold and row.address != "local"]
        if self.unfinished and holders:
            lines.append(f"may be held by: {', '.join(holders)}")
        return "\n".join(lines)


class _Unread(CallPacker):
    """Leaves every outcome as it came."""

    def unpack_outcome(self, kind: OutcomeKind, data: Any, buffers: Sequence[Any] = ()) -> tuple[Any, BaseException | None]:
        return None, None


def summary(path: str) -> Summary:
    """Say what a journal holds. Raises JournalError as `Journal` does."""
    journal = Journal(path, must_exist=True)
    try:
        return _summary(journal)
    finally:
        journal.close()


def _summary(journal: Journal) -> Summary:
    found = Counter(_KINDS.get(kind, "unknown") for _, _, kind in journal.calls())
    kinds = {name: found[name] for name in (*_KINDS.values(), "unknown") if found[name]}
    id = journal.get("id")
    return Summary(journal.path, journal.get("name", "nobody"), label_of(id) if id else "none", sum(found.values()), kinds,
                   tuple(journal.nodes()))


def calls_table(path: str) -> str:
    """List every call of a journal: number, key, how it ended, where, and how long it ran."""
    journal = Journal(path, must_exist=True)
    rows = [("call", "key", "state", "node", "run time")]
    try:
        calls = journal.calls()
        results = journal.results([seq for seq, _, kind in calls if kind is not None])
        for seq, key, kind in calls:
            result = results.get(seq)
            took = "" if result is None or result.run_ns < 0 else f"{result.run_ns / 1e9:.3f} s"
            node = "" if result is None else result.node
            rows.append((str(seq), name_of(key) or "", _KINDS.get(kind, "unknown"), node, took))
    finally:
        journal.close()
    return layout(rows)


def go_on(path: str, *, sends: bool, secret: Secret | None, nodes: list[str] | None) -> Summary:
    """Fetch what nodes hold of a journal's session, and unless not `sends` have the rest run too; until all has ended.

    Ctrl-C leaves it as it is then.
    """
    given: dict[str, Any] = {} if nodes is None else {"nodes": nodes}
    before = summary(path).unfinished
    executor = ClusterExecutor._reopened(path, Reopening(_Unread(), asks_all=sends), secret=secret, echo=False, **given)
    with executor:
        executor.shutdown(wait=False)
        done = -1
        while not executor._root.wait_closed(LOOK_S):
            if done != (done := executor.status().done):
                print(f"{done} of {before} calls ended", file=sys.stderr, flush=True)
    return summary(path)


def drop(path: str, secret: Secret | None, timeout_s: float) -> tuple[list[str], bool]:
    """Have the nodes of a journal drop its session: a line for each, and whether all have. The journal stays."""
    from .address import parse_address, resolve
    from .survey import drop_session
    journal = Journal(path, must_exist=True)
    try:
        rows = [row for row in journal.nodes() if row.address != "local" and row.may_hold]
        if not rows or journal.get("id") is None:
            return [f"no node holds anything of {os.path.relpath(path)}"], True
        if secret is None:
            raise ValueError("nodes answer only who proves the secret, and there is none here: set $DISTEXEC_SECRET or name "
                             "--secret-file")
        targets: list[tuple[str, Any]] = []
        answers: dict[str, int | str] = {}
        for row in rows:
            try:
                targets.append((row.address, resolve(parse_address(row.address))))
            except ValueError as error:  # the others are asked all the same
                answers[row.address] = str(error)
        answers |= drop_session(targets, secret, timeout_s, journal.get("id"), journal.get("token"))
        dropped = [address for address, answer in answers.items() if not isinstance(answer, str)]
        journal.set_nodes([NodeRow(row.address, row.slots, False) for row in rows if row.address in dropped])
    finally:
        journal.close()
    return [_told(address, answer) for address, answer in answers.items()], len(dropped) == len(rows)


def _told(address: str, answer: int | str) -> str:
    if isinstance(answer, str):
        return f"{address}: not asked: {answer}"
    return f"{address}: held nothing of it" if answer < 0 else f"{address}: dropped {answer} calls and outcomes"
