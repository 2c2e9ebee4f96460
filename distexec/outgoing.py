"""What one session's tasks print on an agent, on its way to their client.

    pool ── task, stream, bytes ──► Outgoing ── Output, with the offset ──► link above
                                       └─ kept, as much as a future keeps, until the task's end is acknowledged

Rule: what a task printed is said before its outcome. A link that is cut loses none of what is kept, a client that does not
read costs a bounded memory, and whatever is left out shows as a gap between two offsets.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from .ledger import Session
from .messages import Message, Output, Record, Resume, SessionSpec, Stream
from .printed import KEPT_BYTES, Printed

__all__ = ["OUTPUT_BACKLOG_BYTES", "Outgoing"]

OUTPUT_BACKLOG_BYTES = 32 << 20
"""Unsent to a client above which what its tasks print is left out. Larger: one that does not read keeps more of our memory.
Smaller: a burst is lost on a slow way."""

KEPT_TOTAL_BYTES = 32 << 20
"""Kept of all tasks of a session until they are acknowledged; beyond that, far less is of the oldest."""

SWEEP_NOTES = 64


class Sink(Protocol):
    """What is needed of a link."""

    @property
    def pending_bytes(self) -> int:
        """Bytes in line."""

    def queue(self, messages: list[Message]) -> object:
        """Put messages in line."""

    def flush(self) -> object:
        """Write what is in line."""


class _Note:
    """What an attempt printed, and up to where that was said on the present link."""

    __slots__ = ("counted_bytes", "printed", "said")

    def __init__(self, attempt: int) -> None:
        self.printed = Printed(attempt)
        self.said = {Stream.STDOUT: 0, Stream.STDERR: 0}
        self.counted_bytes = 0


class Outgoing:
    """The output and the log records of one session's tasks. I/O thread."""

    def __init__(self, spec: SessionSpec) -> None:
        self.suit(spec)
        self._notes: dict[int, _Note] = {}  # by task
        self._whole: deque[_Note] = deque()  # not shrunk, the oldest first
        self._kept_bytes = 0
        self._sweep_at = SWEEP_NOTES
        self._lost_records = 0

    def __repr__(self) -> str:
        return f"<Outgoing: {len(self._notes)} tasks, {self._kept_bytes:,} bytes kept>"

    def suit(self, spec: SessionSpec) -> None:
        """Learn what the client wants to have, now that it may have changed its mind."""
        self._is_live = spec.echo  # else a future's share is all
        self._is_wanted = spec.echo or spec.is_captured

    @property
    def is_busy(self) -> bool:
        """Whether anything is kept."""
        return bool(self._notes)

    def wrote(self, session: Session, seq: int, stream: Stream, data: bytes) -> None:
        """A task, or nobody's task (0), printed this."""
        if not self._is_wanted:
            return
        link = _way(session)
        note = self._note(session, seq)
        if note is None:  # its end was told already: what it left running prints on
            if self._is_live and link is not None and link.pending_bytes <= OUTPUT_BACKLOG_BYTES:
                link.queue([Output(session.uplink_no, seq, stream, data)])
                link.flush()
            return
        printed, said = note.printed, note.said
        offset = printed.count(stream)
        printed.add(stream, data)
        self._account(note)
        if link is None:
            return
        if self._is_live and said[stream] == offset and link.pending_bytes <= OUTPUT_BACKLOG_BYTES:
            link.queue([Output(session.uplink_no, seq, stream, data, printed.attempt, offset)])
            said[stream] = offset + len(data)
            link.flush()
        elif self._is_live or said[stream] < KEPT_BYTES:
            self._say(session, link, seq, note, OUTPUT_BACKLOG_BYTES)

    def finish(self, session: Session, seq: int) -> None:
        """The task ends: say what is left to be said of it."""
        note, link = self._notes.get(seq), _way(session)
        if note is not None and link is not None:
            self._say(session, link, seq, note, 2 * OUTPUT_BACKLOG_BYTES)

    def finish_all(self, session: Session) -> None:
        """A worker died: do so of all tasks, for any of them may have been its."""
        for seq in self._notes:
            self.finish(session, seq)

    def acknowledged(self, seqs: list[int], attempts: list[int]) -> None:
        """The root knows these ends; `attempts`, if given, only those of just these."""
        for index, seq in enumerate(seqs):
            note = self._notes.get(seq)
            if note is not None and (not attempts or note.printed.attempt == attempts[index]):
                self._forget(seq)

    def resume(self, session: Session, resume: Resume) -> None:
        """Another link is there, and the two ends agree what is left: say all of that again, ahead of the outcomes."""
        for seq in (*resume.ack, *(seq for seq, _ in resume.drop)):
            self._forget(seq)
        upstream: Any = session.upstream
        if upstream is None:
            return
        for seq, note in self._notes.items():
            note.said = dict.fromkeys(note.said, 0)
            self._say(session, upstream.link, seq, note, 2 * OUTPUT_BACKLOG_BYTES)

    def logged(self, session: Session, record: Record) -> None:
        """Pass on what a task logged; what there is no room for, or nobody to tell, is counted."""
        link = _way(session)
        if link is None or link.pending_bytes > OUTPUT_BACKLOG_BYTES:
            self._lost_records += 1
            return
        lost, self._lost_records = record.lost + self._lost_records, 0
        link.queue([Record(session.uplink_no, record.seq, record.attempt, record.level, record.name, record.text,
                           record.data, lost)])
        link.flush()

    # ---- what is kept

    def _note(self, session: Session, seq: int) -> _Note | None:
        task = session.tasks.get(seq)
        if task is None:
            return None
        note = self._notes.get(seq)
        if note is None or note.printed.attempt != task.run.attempt:
            self._forget(seq)
            if len(self._notes) >= self._sweep_at:
                self._sweep(session)
            note = self._notes[seq] = _Note(task.run.attempt)
            self._whole.append(note)
        return note

    def _account(self, note: _Note) -> None:
        size = note.printed.size_bytes
        self._kept_bytes += size - note.counted_bytes
        note.counted_bytes = size
        while self._kept_bytes > KEPT_TOTAL_BYTES and len(self._whole) > 1:
            oldest = self._whole.popleft()
            if oldest.counted_bytes:  # else it was forgotten
                oldest.printed.shrink()
                self._kept_bytes += oldest.printed.size_bytes - oldest.counted_bytes
                oldest.counted_bytes = oldest.printed.size_bytes

    def _forget(self, seq: int) -> None:
        note = self._notes.pop(seq, None)
        if note is not None:
            self._kept_bytes -= note.counted_bytes
            note.counted_bytes = 0
            while self._whole and not self._whole[0].counted_bytes:
                self._whole.popleft()

    def _sweep(self, session: Session) -> None:
        """Forget attempts whose end nobody is told, because newer ones took their place."""
        for seq in list(self._notes):
            if seq not in session.tasks and seq not in session.unacked:
                self._forget(seq)
        self._sweep_at = max(SWEEP_NOTES, 2 * len(self._notes))

    def _say(self, session: Session, link: Sink, seq: int, note: _Note, limit_bytes: int) -> None:
        for stream, said in note.said.items():
            for offset, piece in note.printed.pieces(stream, said):
                if link.pending_bytes > limit_bytes:
                    break
                link.queue([Output(session.uplink_no, seq, stream, piece, note.printed.attempt, offset)])
                note.said[stream] = offset + len(piece)
        link.flush()


def _way(session: Session) -> Sink | None:
    """Give the link above, if there is one and it does not wait for the two ends to agree what is left."""
    upstream: Any = session.upstream
    return None if upstream is None or session.reconciling else upstream.link
