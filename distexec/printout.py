"""What tasks print, at the client: kept for their futures, and shown as the program's own output.

    node, own worker ── task, stream, bytes ──► Printout ──► Printed ── future.stdout, future.stderr
                                                   └─ lines ──► Echo ──► sys.stdout, sys.stderr

Rule: when a future is done, all that its last attempt printed is with it, and was shown. What a task prints costs a bounded
memory, and the futures of a session together keep a bounded one; tasks that print nothing cost nothing.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Literal, Protocol

from .echo import Echo
from .future import ClusterFuture
from .ledger import Session, Task
from .messages import Lost, Outcome, Stream
from .printed import Lines, Printed
from .transport import Loop

__all__ = ["LOCAL", "EchoMode", "Printout", "captures", "check_output"]

EchoMode = bool | Literal["prefix"]

KEPT_TOTAL_BYTES = 256 << 20
"""Kept for the futures of one executor that have ended. Larger: futures that nobody asks hold more. Smaller: those asked
late have less to tell."""

LOCAL = "local"
"""The name of the node that is this machine's own workers."""

SMALL_BYTES = 8 << 10
"""Not worth an account."""

PROMPT_S = 0.3
"""How long a line may be unfinished before its beginning is shown. Larger: a prompt, or a row of dots, is seen late.
Smaller: lines of different tasks are mixed more often."""


def check_output(echo: object, capture: object) -> None:
    """Raise ValueError for what cannot be meant."""
    if not isinstance(echo, bool) and echo != "prefix":
        raise ValueError(f'echo must be True, False or "prefix", not {echo!r}')
    if not isinstance(capture, bool | None):
        raise ValueError(f"capture must be True, False or None, not {capture!r}")


def captures(echo: EchoMode, capture: bool | None) -> bool | None:
    """Say what `capture` means: lines with a prefix are ours to print, local workers' too."""
    return True if capture is None and echo == "prefix" else capture


class Source(Protocol):
    """Whose tasks print: the root."""

    loop: Loop
    session: Session


class _Printing:
    """A task that has printed and not ended."""

    __slots__ = ("lines", "node", "printed", "seq")

    def __init__(self, seq: int, attempt: int, node: str) -> None:
        self.seq, self.node = seq, node
        self.printed = Printed(attempt)
        self.lines = {Stream.STDOUT: Lines(), Stream.STDERR: Lines()}


class Printout:
    """The output of one executor's tasks. All but `close` and `give_up` on the I/O thread."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.mode: EchoMode = True
        self._capture: bool | None = None
        self._echoes = {Stream.STDOUT: Echo("stdout"), Stream.STDERR: Echo("stderr")}
        self.printing: dict[int, _Printing] = {}  # by task
        self._unfinished: dict[Stream, _Printing | None] = dict.fromkeys(self._echoes)  # whose line the stream is in
        self._is_prompt_armed = False
        self._kept: deque[tuple[weakref.ref[Printed], int]] = deque()  # of ended tasks, the oldest first
        self._kept_bytes = 0
        self._gone: deque[int] = deque()  # sizes of those nobody holds any more; a finalizer takes no lock

    def __repr__(self) -> str:
        return f"<Printout: {len(self.printing)} tasks print, {self._kept_bytes:,} bytes kept>"

    def configure(self, mode: EchoMode, capture: bool | None) -> None:
        """Say, before anything is printed, what is shown how; and whether it is kept (None: of nodes alone)."""
        self.mode, self._capture = mode, capture

    def captures(self, node: str) -> bool:
        """Whether what is printed there is kept for futures."""
        return self._capture if self._capture is not None else node != LOCAL

    # ---- what is printed

    def take(self, node: str, seq: int, stream: Stream, data: bytes, attempt: int | None = None,
             offset: int | None = None) -> None:
        """Hear what a task printed on a node.

        Args:
            seq: 0: no task did.
            attempt: None: the present one; 0: one that has ended, as has one that is not the present one.
            offset: of the data in what the attempt printed to the stream; None: next.
        """
        task = self._source.session.tasks.get(seq)
        if task is None or (attempt is not None and attempt != task.run.attempt):
            if self.mode:
                self._show(stream, _whole_lines(data) if self.mode == "prefix" else data, node, seq)
            return
        printing = self._of(task, node)
        data, missing = printing.printed.add(stream, data, offset)
        if not self.mode:
            return
        if missing:
            self._finish_line(printing, stream)
            note = f"[distexec: node {node!r}: {missing:,} bytes printed there are missing before this line]\n"
            self._echoes[Stream.STDERR].write(note.encode())
        lines = printing.lines[stream]
        ready = lines.add(data)
        if ready:
            self._show_lines(printing, stream, ready)
        if lines.is_waiting and not self._is_prompt_armed:
            self._is_prompt_armed = True
            self._source.loop.call_later(PROMPT_S, self._show_prompts)

    def ended(self, ended: Iterable[tuple[Task, Outcome | Lost]]) -> None:
        """Hear which tasks have ended, before their futures do."""
        if not self._source.loop.is_current():  # tasks that were queued, which at most in an earlier attempt have printed
            self._source.loop.call_soon(self.ended, list(ended))
            return
        for task, _ in ended:
            printing = self.printing.pop(task.run.seq, None)
            if printing is None:
                continue
            self._finish(printing)
            if printing.printed.attempt == task.run.attempt:
                self._account(printing.printed)
            elif isinstance(task.owner, ClusterFuture):
                task.owner.printed = None  # the last attempt printed nothing

    def close(self) -> None:
        """Show what is left, and wait until the reader has it, or `give_up` was called. Nothing more is taken."""
        for printing in list(self.printing.values()):
            self._finish(printing)
        self.printing.clear()
        for echo in self._echoes.values():
            echo.close()

    def give_up(self) -> None:
        """Wait no more for who reads. Any thread."""
        for echo in self._echoes.values():
            echo.give_up()

    def _of(self, task: Task, node: str) -> _Printing:
        seq, attempt = task.run.seq, task.run.attempt
        printing = self.printing.get(seq)
        if printing is None or printing.printed.attempt != attempt:
            if printing is not None:
                self._finish(printing)
            printing = self.printing[seq] = _Printing(seq, attempt, node)
            if isinstance(task.owner, ClusterFuture) and self.captures(node):
                task.owner.printed = printing.printed
        return printing

    # ---- what is shown

    def _finish(self, printing: _Printing) -> None:
        """Show the line that an attempt began and will not end."""
        for stream in self._echoes:
            self._finish_line(printing, stream)
            if self._unfinished[stream] is printing:
                self._unfinished[stream] = None
                if self.mode == "prefix":
                    self._echoes[stream].write(b"\n")

    def _finish_line(self, printing: _Printing, stream: Stream) -> None:
        rest = printing.lines[stream].rest()
        if rest and self.mode:
            self._show_lines(printing, stream, rest)

    def _show_prompts(self) -> None:
        self._is_prompt_armed = False
        for printing in self.printing.values():
            for stream in self._echoes:
                self._finish_line(printing, stream)

    def _show_lines(self, printing: _Printing, stream: Stream, data: bytes) -> None:
        if self.mode != "prefix":
            self._echoes[stream].write(data)
            return
        before = self._unfinished[stream]
        self._show(stream, data, printing.node, printing.seq, is_going_on=before is printing)
        self._unfinished[stream] = None if data.endswith((b"\n", b"\r")) else printing

    def _show(self, stream: Stream, data: bytes, node: str, seq: int, *, is_going_on: bool = False) -> None:
        if self.mode == "prefix":
            data = _prefixed(data, f"[{node}:{seq}] " if seq else f"[{node}] ", is_going_on=is_going_on)
            if not is_going_on and self._unfinished[stream] is not None:
                data = b"\n" + data
                self._unfinished[stream] = None
        self._echoes[stream].write(data)

    # ---- what is kept

    def _account(self, printed: Printed) -> None:
        """Keep far less of the oldest when futures that nobody asks come to too much."""
        size = printed.size_bytes
        if size <= SMALL_BYTES:
            return
        gone = self._gone
        self._kept.append((weakref.ref(printed, lambda _: gone.append(size)), size))
        self._kept_bytes += size
        while gone:
            self._kept_bytes -= gone.popleft()
        while self._kept and (self._kept_bytes > KEPT_TOTAL_BYTES or self._kept[0][0]() is None):
            reference, size = self._kept.popleft()
            oldest = reference()
            if oldest is not None:
                oldest.shrink()
                self._kept_bytes -= size


def _whole_lines(data: bytes) -> bytes:
    return data if data.endswith((b"\n", b"\r")) else data + b"\n"


def _prefixed(data: bytes, prefix: str, *, is_going_on: bool) -> bytes:
    """Put a prefix before each line, but for the first if that goes on."""
    lines = enumerate(data.splitlines(keepends=True))
    return b"".join([line if is_going_on and not index else prefix.encode() + line for index, line in lines])
