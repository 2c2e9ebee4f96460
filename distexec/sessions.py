"""What a node tells of the sessions it holds, and how that is shown."""

from __future__ import annotations

from hashlib import blake2b

from .ledger import Session
from .messages import BlobRef, Outcome, SessionRow, Sessions
from .report import layout

__all__ = ["label_of", "session_row", "sessions_table"]


def label_of(id: bytes) -> str:
    """Give what a session is called in listings: nobody can act on it by that."""
    return blake2b(id, digest_size=6).hexdigest()


def session_row(session: Session, patience_s: float, now: float) -> SessionRow:
    """Describe a session that is kept `patience_s` seconds without its client."""
    absent_s = -1.0 if session.orphaned_at is None else now - session.orphaned_at
    size_bytes = sum(map(_size, (message for message, _ in session.unacked.values() if isinstance(message, Outcome))))
    return SessionRow(label_of(session.id), session.opened.spec.name, absent_s, session.busy,
                      len(session.tasks) - session.busy, len(session.unacked), size_bytes,
                      patience_s if absent_s < 0 else max(0.0, patience_s - absent_s))


def _size(outcome: Outcome) -> int:
    return len(outcome.data) + sum(each.size_bytes if isinstance(each, BlobRef) else len(each) for each in outcome.buffers)


def sessions_table(answers: dict[str, tuple[str, Sessions] | str]) -> str:
    """Show what nodes answered, one line per session; nodes without one, or without an answer, have a line as well."""
    rows: list[tuple[str, ...]] = [("node", "session", "name", "client", "running", "waiting", "outcomes", "size",
                                    "kept for")]
    for address, answer in answers.items():
        if isinstance(answer, str):
            rows.append((address, f"no answer: {answer}", *[""] * 7))
        elif not answer[1].rows:
            rows.append((answer[0], "none", *[""] * 7))
        else:
            rows += [_cells(answer[0], row) for row in answer[1].rows]
    return layout(rows)


def _cells(node: str, row: SessionRow) -> tuple[str, ...]:
    client = "connected" if row.absent_s < 0 else f"away {_duration(row.absent_s)}"
    kept = "" if row.absent_s < 0 else _duration(row.left_s)
    return (node, row.label, row.name, client, str(row.running), str(row.waiting), str(row.outcomes),
            f"{row.size_bytes / 2**20:.1f} MiB", kept)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
