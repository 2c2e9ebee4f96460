"""The pool's side of a prepared process: started when the first worker is wanted, watched, asked to clean up, ended.

    prepare ──► guardian (a template) ── fork ──► prepared process: init file, setup ──► state_ready, state_failed
    start, end ──────────────────────────────────► it forks and kills workers ─────────► born, died
    close ───────────────────────────────────────► it cleans up, and leaves ───────────► state_cleaned, on_closed

The rule: setup takes as long as it takes, and so does cleanup while somebody waits for it; whatever they do to their
process, its end is noticed, and with it goes all that descends from it. All methods run on the I/O thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol, cast

from msgspec import structs

from distexec.capture import Capture
from distexec.descent import end_tree
from distexec.errors import describe_exit
from distexec.forking import End, Exited, Fork, Forked
from distexec.messages import Cleaned, CleanUp, Evidence, SessionFailed, SessionSpec, Stream
from distexec.prepared import FromPrepared, Prepared
from distexec.shipping import BlobStore
from distexec.starters import CLOSING_S, Born, Died, Exit, TemplateProcess, Terms, drain
from distexec.template import Branch
from distexec.transport import Link, Loop, Timer

BUSY_S = 0.1
"""Between two looks at what setup or cleanup prints."""

CALM_S = 1.0
"""The same between the two, when only threads that setup started can print. Smaller: sessions with a setup wake us more."""

FORCE_S = 1.0
"""For a prepared process that closed its link to end."""


class Host(Protocol):
    """Who is told how the preparation goes."""

    def state_ready(self) -> object:
        """Setup has run: workers can be started."""

    def state_failed(self, evidence: Evidence, data: bytes) -> object:
        """Setup has not succeeded; `data` is the packed exception, if it raised one."""

    def state_gone(self) -> object:
        """The process is no more, though nobody closed it; another one can be prepared."""

    def state_wrote(self, stream: Stream, data: bytes) -> object:
        """Setup or cleanup printed this. Only where output is captured."""

    def state_cleaned(self, cleaned: Cleaned) -> object:
        """The cleanup has ended, by itself or with its process."""


class PreparedStarter:
    """Starts workers from the process in which a session's setup ran; `start` is for when `is_ready`."""

    def __init__(self, loop: Loop, spec: SessionSpec, store: BlobStore, born: Born, died: Died, terms: Terms, host: Host, *,
                 captures: bool) -> None:
        self.loop, self.spec, self.store, self.terms = loop, spec, store, terms
        self.born, self.died, self.host = born, died, host
        self._captures = captures
        self._state: _State | None = None
        self._on_closed: Callable[[], object] | None = None

    @property
    def pid(self) -> int:
        """The prepared process, 0 if there is none or it is not known yet."""
        return self._state.pid if self._state else 0

    @property
    def is_ready(self) -> bool:
        """Whether workers can be started."""
        return self._state is not None and self._state.is_ready

    def relocate(self, spec: SessionSpec) -> None:
        """Prepare so the next time."""
        self.spec = spec

    def prepare(self) -> None:
        """Begin to prepare, if nobody has; `state_ready` or `state_failed` follows."""
        if self._state is not None:
            return
        try:
            self._state = _State(self, captures=self._captures)
        except OSError as error:
            self.host.state_failed(Evidence("", reason=f"no process for the session's setup could be started: {error}"), b"")

    def start(self, number: int, link: socket.socket, page_fd: int, outputs: tuple[int, int] | None) -> None:
        """Have the prepared process fork a worker."""
        assert self._state is not None, "the pool asks only while it is ready"
        self._state.start(number, [link.fileno(), page_fd, *(outputs or ())], captured=outputs is not None)

    def end(self, number: int) -> None:
        """Have it kill a worker and its descendants."""
        if self._state is not None:
            self._state.end(number)

    def close(self, on_closed: Callable[[], object], limit_s: float | None = None) -> None:
        """Have it clean up, for `limit_s` seconds at most, and leave; no worker is left."""
        self._on_closed = on_closed
        if self._state is None:
            on_closed()
        else:
            self._state.close(limit_s)

    def hurry(self, limit_s: float) -> None:
        """Let what is being cleaned up take no longer than this from now on."""
        if self._state is not None:
            self._state.limit(limit_s)

    def state_gone(self) -> None:
        """Learn that the process and its guardian are no more."""
        self._state = None
        if self._on_closed is not None:
            self._on_closed()
        else:
            self.host.state_gone()


class _State:
    """One prepared process and its guardian, from their start to their end."""

    def __init__(self, starter: PreparedStarter, *, captures: bool) -> None:
        self._starter, self._loop = starter, starter.loop
        self.pid = 0
        self.is_ready = self._has_prepared = self._is_cleaning = self._is_closing = self._is_closed = False
        self._has_cleaned = not starter.spec.has_cleanup
        self._pids: dict[int, int] = {}  # of living workers, by number; 0 until known
        self._exit: Exit | None = None
        self._failure: SessionFailed | None = None
        self._limit: Timer | None = None
        self._printed = Capture() if captures else None
        self._link: Link
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                spec = starter.spec
                self._template = TemplateProcess(
                    self._loop, spec, starter.store, starter.terms, self._on_report, self._on_gone,
                    buffers=(*spec.initializer_buffers, *spec.setup_buffers))
            except OSError:
                ours.close()
                if self._printed is not None:
                    self._printed.close()
                raise
            self._link = self._loop.adopt(ours, cast("Any", FromPrepared), self._on_messages, self._on_closed, fds=True)
            outputs = self._printed.fds if self._printed is not None else ()
            self._template.tell(Branch(bool(outputs)), [theirs.fileno(), *outputs])
        if self._printed is not None:
            self._printed.expect(0)
            self._loop.call_later(BUSY_S, self._look)

    # ---- what the pool asks

    def start(self, number: int, fds: list[int], *, captured: bool) -> None:
        self._pids[number] = 0
        self._link.queue([cast("Any", Fork(number, captured))], fds)
        self._link.flush()

    def end(self, number: int) -> None:
        if number in self._pids:
            self._link.send([cast("Any", End(number))])

    def close(self, limit_s: float | None) -> None:
        self._is_closing = True
        if self.is_ready and not self._is_closed:
            self._is_cleaning = True
            self._link.send([CleanUp(0, self._starter.spec.generation)])
            if limit_s is not None or self._has_cleaned:
                self.limit(CLOSING_S if limit_s is None else limit_s)
        else:
            self._template.close()

    def limit(self, limit_s: float) -> None:
        if self._limit is not None:
            self._limit.cancel()
        self._limit = self._loop.call_later(limit_s, self._force, limit_s)

    def _force(self, limit_s: float) -> None:
        if not self._has_cleaned:
            self._cleaned(Evidence("", self.pid, reason=f"cleanup was ended after the {limit_s:g} s that were left for it"))
        self._template.close()

    # ---- what the process says

    def _on_messages(self, _link: Link, messages: list[Any]) -> None:
        for message in messages:
            match message:
                case Forked(number, pid):
                    self._pids[number] = pid
                    self._starter.born(number, pid)
                case Exited():
                    if self._pids.pop(message.number, None) is not None:
                        self._starter.died(message.number, Exit(message.exitcode, message.signal, message.reason,
                                                                peak_bytes=message.peak_bytes))
                case Prepared():
                    self.is_ready = self._has_prepared = True
                    self._read()
                    if not self._is_closing:
                        self._starter.host.state_ready()
                case SessionFailed():
                    self._failure = message
                case Cleaned():
                    self._cleaned(message.evidence, message.data)

    def _cleaned(self, evidence: Evidence | None, data: bytes = b"") -> None:
        self._read()
        if not self._has_cleaned:
            self._has_cleaned = True
            self._starter.host.state_cleaned(Cleaned(0, self._starter.spec.generation, evidence, data))
        self.limit(CLOSING_S)  # to leave, if anything that setup started keeps it

    def _look(self) -> None:
        """Read what is printed, more often while setup or cleanup runs."""
        if self._printed is not None:
            self._read()
            self._loop.call_later(CALM_S if self.is_ready and not self._is_cleaning else BUSY_S, self._look)

    def _read(self) -> None:
        for _, stream, data in self._printed.rest() if self._printed is not None else ():
            self._starter.host.state_wrote(stream, data)

    # ---- its end

    def _on_closed(self, _link: Link, _reason: str) -> None:
        self._is_closed = True
        self.is_ready = False
        if self._exit is None and not self._is_closing:
            self._loop.call_later(FORCE_S, self._end_process)
        self._finish()

    def _end_process(self) -> None:
        if self._exit is None:
            self._template.tell(End(0))

    def _on_report(self, report: Forked | Exited) -> None:
        if isinstance(report, Forked):
            self.pid = report.pid
        else:
            self._ended(Exit(report.exitcode, report.signal, report.reason, peak_bytes=report.peak_bytes))

    def _on_gone(self, exitcode: int | None) -> None:
        """The guardian ended: after the process, or first, and then the process must not outlive it."""
        if self._exit is None:
            for pid in (self.pid, *self._pids.values()) if exitcode != 0 else ():  # else it has seen to that itself
                if pid:
                    end_tree(pid)
            self._ended(Exit(reason="was killed, because the process that guards it was"))
        self._loop.call_soon(self._wait_finished)

    def _wait_finished(self) -> None:
        """Say that both are gone, once the link was read to its end."""
        if self._is_closed:
            self._starter.state_gone()
        else:
            self._loop.call_later(BUSY_S / 10, self._wait_finished)

    def _ended(self, how: Exit) -> None:
        if self._exit is None:
            self._exit = how
            drain(self._link)
            self._finish()

    def _finish(self) -> None:
        """The process has ended and all it said was heard: tell of those that end with it, then let its guardian go."""
        how = self._exit
        if how is None or not self._is_closed:
            return
        self._read()
        text = how.reason or describe_exit(how.exitcode, how.signal)
        tail = self._printed.tail() if self._printed is not None else ""
        if self._printed is not None:
            self._printed.close()
            self._printed = None
        for number in list(self._pids):
            del self._pids[number]
            reason = f"the process that it was forked from {text}, and it was killed too"
            self._starter.died(number, Exit(reason=reason, is_bystander=True))
        if self._limit is not None:
            self._limit.cancel()
        self._tell_end(Evidence("", self.pid, how.exitcode, how.signal, text, tail))
        self._template.close()

    def _tell_end(self, end: Evidence) -> None:
        """Say what the end of the process means, if it came too early."""
        if self._failure is not None:
            told = self._failure.evidence
            self._starter.host.state_failed(structs.replace(end, pid=told.pid, reason=told.reason), self._failure.data)
        elif not self._has_prepared and not self._is_closing:
            self._starter.host.state_failed(structs.replace(end, reason=f"setup did not end: its process {end.reason}"), b"")
        elif self._is_cleaning and not self._has_cleaned:
            self._has_cleaned = True
            end = structs.replace(end, reason=f"cleanup did not end: its process {end.reason}")
            self._starter.host.state_cleaned(Cleaned(0, self._starter.spec.generation, end))
