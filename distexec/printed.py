"""What one attempt of a task printed, as much of it as is kept; and its division into lines.

    bytes at an offset ──► Printed   the first and the last of each stream, and how much is missing between them
    bytes, in order ─────► Lines     whole lines, the last one once it is ended

Every byte has its offset in what the attempt wrote to the stream, so that what is said twice counts once and what is
missing is known. Pure. The rule: memory is bounded, whatever a task prints.
"""

from __future__ import annotations

from collections.abc import Iterator

from distexec.messages import Stream

__all__ = ["KEPT_BYTES", "Lines", "Printed"]

KEPT_BYTES = 64 << 10
"""Kept of the beginning of a stream, and of its end. Larger: who holds on to many futures holds more memory."""

SHRUNK_BYTES = 4 << 10
"""The same of what nobody asked for while much was kept."""

LINE_BYTES = 64 << 10
"""Of a line, after which it is not waited for its end any more."""


class Printed:
    """Both streams of one attempt. One thread adds; any may read."""

    __slots__ = ("__weakref__", "_err", "_out", "attempt")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self._out, self._err = _Kept(), _Kept()

    def __repr__(self) -> str:
        return f"<Printed by attempt {self.attempt}: {self._out.count:,} and {self._err.count:,} bytes>"

    def add(self, stream: Stream, data: bytes, offset: int | None = None) -> tuple[bytes, int]:
        """Take in what was written at `offset` (None: next); give what of it is new, and how much is missing before that."""
        return self._of(stream).add(data, offset)

    def count(self, stream: Stream) -> int:
        """How many bytes were written, as far as known."""
        return self._of(stream).count

    def text(self, stream: Stream) -> str:
        """What is kept, and a line of ours that says how much is missing where it is."""
        return self._of(stream).text()

    def pieces(self, stream: Stream, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield what is kept from offset `start` on, with the offset of each piece."""
        return self._of(stream).pieces(start)

    @property
    def size_bytes(self) -> int:
        """The memory it takes, about."""
        return self._out.size_bytes + self._err.size_bytes

    def shrink(self) -> None:
        """Keep far less from here on."""
        self._out.shrink()
        self._err.shrink()

    def _of(self, stream: Stream) -> _Kept:
        return self._out if stream == Stream.STDOUT else self._err


class _Kept:
    """One stream: `head` from its beginning; `tail`, up to its end, once something is missing or the head is full."""

    __slots__ = ("_head", "_is_head_over", "_limit", "_tail", "count")

    def __init__(self) -> None:
        self.count = 0
        self._head = self._tail = b""
        self._limit = KEPT_BYTES
        self._is_head_over = False

    # Bytes are replaced, never changed: a reader in another thread finds the old or the new.

    def add(self, data: bytes, offset: int | None) -> tuple[bytes, int]:
        missing = 0
        if offset is not None and offset != self.count:
            if offset < self.count:
                data = data[self.count - offset:]
            else:
                missing = offset - self.count
                self.count, self._tail, self._is_head_over = offset, b"", True
        rest = data
        if not self._is_head_over:
            room = self._limit - len(self._head)
            self._head += rest[:room]
            rest = rest[room:]
            self._is_head_over = len(self._head) >= self._limit
        if rest:
            self._tail = (self._tail + rest)[-self._limit:] if len(rest) < self._limit else rest[-self._limit:]
        self.count += len(data)
        return data, missing

    def text(self) -> str:
        head, tail, count = self._head, self._tail, self.count
        missing = count - len(head) - len(tail)
        if missing <= 0:
            return (head + tail).decode("utf-8", "replace")
        begins, ends = whole_characters(head).decode("utf-8", "replace"), _from_character(tail).decode("utf-8", "replace")
        line_end = "" if begins.endswith("\n") or not begins else "\n"
        return f"{begins}{line_end}[distexec: {missing:,} bytes are left out here]\n{ends}"

    def pieces(self, start: int) -> Iterator[tuple[int, bytes]]:
        head, tail, count = self._head, self._tail, self.count
        if start < len(head):
            yield start, head[start:]
        first = count - len(tail)
        if start < count and tail:
            yield max(start, first), tail[max(0, start - first):]

    def shrink(self) -> None:
        self._limit, self._is_head_over = SHRUNK_BYTES, True
        head, tail = self._head, self._tail
        if not tail and self.count == len(head):
            tail = head[len(head[:SHRUNK_BYTES]):]
        self._head, self._tail = head[:SHRUNK_BYTES], tail[-SHRUNK_BYTES:]

    @property
    def size_bytes(self) -> int:
        return len(self._head) + len(self._tail)


class Lines:
    """Divides one stream of a task into lines."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting = b""

    @property
    def is_waiting(self) -> bool:
        """Whether a line was begun and not given."""
        return bool(self._waiting)

    def add(self, data: bytes) -> bytes:
        """Give what can be shown now: lines, or what was overwritten on one, and a very long one without its end."""
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if end:
            ready, self._waiting = self._waiting + data[:end], data[end:]
        else:
            ready, self._waiting = b"", self._waiting + data
        if len(self._waiting) > LINE_BYTES:
            shown = whole_characters(self._waiting)
            ready, self._waiting = ready + shown, self._waiting[len(shown):]
        return ready

    def rest(self) -> bytes:
        """Give the line that was begun, as it is."""
        rest, self._waiting = self._waiting, b""
        return rest


def whole_characters(data: bytes) -> bytes:
    """Leave out a character of UTF-8 that is not there to its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if length > back else data
        if byte < 0x80:
            break
    return data


def _from_character(data: bytes) -> bytes:
    """Leave out the end of a character whose beginning is not there."""
    start = 0
    while start < min(3, len(data)) and 0x80 <= data[start] < 0xC0:
        start += 1
    return data[start:]
