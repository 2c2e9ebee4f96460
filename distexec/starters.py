"""How worker processes come to be and end: forked by the session's template, or as those of a multiprocessing context.

    Pool ── start, end, close ──► TemplateStarter ── link ──► template ── fork ──► worker
         ◄── born, died ──        ContextStarter ── context.Process.start() ─────► worker

The rule: every worker that was started is reported dead exactly once, with its exit code or signal where anybody can
know them, and nothing that a starter started outlives its `close`. All methods run on the I/O thread.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol, cast

from msgspec import structs

from distexec import descent, forking, payload, template, worker
from distexec.confinement import User
from distexec.errors import describe_exit
from distexec.forking import Init
from distexec.limits import Limits
from distexec.messages import BlobRef, Buffers, Segment, SessionSpec
from distexec.shipping import BlobStore
from distexec.transport import Link, Loop

CLOSING_S = descent.GRACE_S + 3.0
"""For a template to end after its link was closed. Shorter: a slow machine sees it killed with work undone."""

DRAIN_S = 0.005
"""Between two looks whether a dead process's socket still holds something. Longer: its loss is reported later."""

ORPHANS_S = 0.2
"""Between two looks for what a killed template left. Longer: the dead stay listed as zombies."""

_SECRET_VARIABLES = ("DISTEXEC_SECRET",)


class Exit(NamedTuple):
    """How a worker process ended, as far as it is known."""

    exitcode: int | None = None
    signal: int = 0
    reason: str = ""
    failure: bytes = b""  # the packed exception that kept it from starting
    is_bystander: bool = False  # it was killed because the template was
    peak_bytes: int = 0  # the most memory it had resident; 0: unknown


class Starter(Protocol):
    """What a pool needs of either kind."""

    def start(self, number: int, link: socket.socket, page_fd: int, outputs: tuple[int, int] | None) -> None:
        """Start worker `number`; the descriptors remain the caller's. OSError if they cannot be passed on."""

    def end(self, number: int) -> None:
        """Kill worker `number` and all that descends from it."""

    def close(self, on_closed: Callable[[], object]) -> None:
        """End what is left, then call `on_closed()`."""


class Terms(NamedTuple):
    """On what terms an operator lets a session's processes run here."""

    user: User | None = None  # whose they are; None: ours
    limits: Limits = Limits()
    init: Init | None = None  # what every session here begins with


OUR_TERMS = Terms()
"""A client's own."""

Born = Callable[[int, int], object]  # number, pid
Died = Callable[[int, Exit], object]

_templates: set[int] = set()  # the processes of all living templates; I/O thread
_reaps_orphans = False


class TemplateStarter:
    """Starts workers by a template, and a template when there is none (any more)."""

    def __init__(self, loop: Loop, spec: SessionSpec, store: BlobStore, born: Born, died: Died,
                 terms: Terms = OUR_TERMS) -> None:
        self._loop, self._spec, self._store, self._born, self._died = loop, spec, store, born, died
        self._terms = terms
        self._pids: dict[int, int] = {}  # of living workers, by number; 0 until known
        self._template: TemplateProcess | None = None
        self._on_closed: Callable[[], object] | None = None

    @property
    def pid(self) -> int:
        """The template's process, 0 if there is none."""
        return self._template.pid if self._template else 0

    def relocate(self, spec: SessionSpec) -> None:
        """Start templates so from now on."""
        self._spec = spec

    def start(self, number: int, link: socket.socket, page_fd: int, outputs: tuple[int, int] | None) -> None:
        """Ask the template to fork a worker, after starting a template if need be."""
        if self._template is None:
            try:
                self._template = TemplateProcess(
                    self._loop, self._spec, self._store, self._terms, self._on_report, self._on_gone)
            except OSError as error:
                self._died(number, Exit(reason=f"no process for the session could be started: {error}"))
                return
        self._template.tell(forking.Fork(number, outputs is not None), [link.fileno(), page_fd, *(outputs or ())])
        self._pids[number] = 0

    def end(self, number: int) -> None:
        """Have the template kill the worker and its descendants."""
        if self._template is not None and number in self._pids:
            self._template.tell(forking.End(number))

    def close(self, on_closed: Callable[[], object]) -> None:
        """Let the template go; it kills what is left."""
        self._on_closed = on_closed
        if self._template is None:
            on_closed()
        else:
            self._template.close()

    def _on_report(self, report: forking.Forked | forking.Exited) -> None:
        if isinstance(report, forking.Forked):
            self._pids[report.number] = report.pid
            self._born(report.number, report.pid)
        elif self._pids.pop(report.number, None) is not None:
            self._died(report.number, Exit(report.exitcode, report.signal, report.reason, peak_bytes=report.peak_bytes))

    def _on_gone(self, exitcode: int | None) -> None:
        """The template ended: as asked, or with workers left, which must not outlive their guardian."""
        self._template = None
        left, self._pids = self._pids, {}
        how = describe_exit(exitcode if exitcode is None or exitcode >= 0 else None, max(0, -(exitcode or 0)))
        for number, pid in left.items():
            if pid:
                descent.end_tree(pid)
            reason = f"the process that it was forked from {how}, and it was killed too"
            self._died(number, Exit(reason=reason, is_bystander=True))
        if _reaps_orphans:
            self._end_orphans()
        if self._on_closed is not None:
            self._on_closed()


    def _end_orphans(self) -> None:
        if descent.end_orphans(_templates):
            self._loop.call_later(ORPHANS_S, self._end_orphans)


def reap_orphans() -> None:
    """Say that this program starts nothing but templates, so that what a killed one leaves behind can be told and ended."""
    global _reaps_orphans
    descent.become_reaper()
    _reaps_orphans = True


class TemplateProcess:
    """One template process, from its start to its end."""

    def __init__(self, loop: Loop, spec: SessionSpec, store: BlobStore, terms: Terms, on_report: Callable[[Any], object],
                 on_gone: Callable[[int | None], object], buffers: Buffers | None = None) -> None:
        self._loop, self._on_report, self._on_gone = loop, on_report, on_gone
        self._has_ended = self._is_closed = False
        ours, theirs = socket.socketpair()
        try:
            environ = environment(spec)
            start_as: dict[str, Any] = {}
            if terms.user is not None:
                environ = terms.user.environ(environ, spec.env)
                start_as = {**terms.user.start_as, "cwd": spec.home or "/"}
            self._process = subprocess.Popen(
                template.command(theirs.fileno(), spec), env=environ, stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], start_new_session=True, **start_as)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        _templates.add(self.pid)
        self._exit_fd = watch_exit(loop, self.pid, self._on_exit)
        self._link = loop.adopt(ours, template.FromTemplate, self._on_messages, self._on_closed, fds=True)
        for ref in spec.initializer_buffers if buffers is None else buffers:
            if isinstance(ref, BlobRef):
                fd, offset, _, arena = store.segment(ref)
                self.tell(Segment(ref, arena, offset), [fd])
        self.tell(forking.Prepare(spec, terms.limits, terms.init))

    def tell(self, message: template.ToTemplate, fds: Sequence[int] = ()) -> None:
        self._link.queue([cast("Any", message)], fds)
        self._link.flush()

    def close(self) -> None:
        """End it by closing its link; by force if that does not help."""
        self._link.close("the session is over")
        self._loop.call_later(CLOSING_S, self._force)

    def _force(self) -> None:
        if not self._has_ended:
            descent.end_tree(self.pid)

    def _on_messages(self, _link: Link, messages: list[Any]) -> None:
        for message in messages:
            self._on_report(message)

    def _on_closed(self, _link: Link, _reason: str) -> None:
        self._is_closed = True
        if self._exit_fd is None:
            self._look_for_exit()
        self._finish()

    def _on_exit(self) -> None:
        self._process.wait()
        _templates.discard(self.pid)
        if self._exit_fd is not None:
            self._loop.unwatch(self._exit_fd)
            os.close(self._exit_fd)
        self._has_ended = True
        drain(self._link)
        self._finish()

    def _look_for_exit(self) -> None:
        """Where a process cannot be watched: once it closed its link it has a moment left."""
        if self._process.poll() is None:
            self._loop.call_later(DRAIN_S, self._look_for_exit)
        else:
            self._on_exit()

    def _finish(self) -> None:
        if self._has_ended and self._is_closed:
            self._on_gone(self._process.returncode)


class ContextStarter:
    """Starts workers as processes of a multiprocessing context, so that what only inheritance carries reaches them.

    A template is their guardian: it forks nothing, but ends them and what their tasks started when this process dies.
    """

    def __init__(self, loop: Loop, spec: SessionSpec, store: BlobStore, context: BaseContext, initializer: Call | None,
                 born: Born, died: Died) -> None:
        self._loop, self._store, self._context, self._initializer = loop, store, context, initializer
        self._born, self._died = born, died
        self._environ = environment(spec) if spec.environ else {}
        self._place = spec.label, spec.home, spec.node, spec.log_levels
        self._guardian: TemplateProcess | None = None
        self._processes: dict[int, Any] = {}
        self._exit_fds: dict[int, int] = {}
        self._on_closed: Callable[[], object] | None = None

    def start(self, number: int, link: socket.socket, page_fd: int, outputs: tuple[int, int] | None) -> None:
        """Start the process; whatever pickling its arguments raises is reported as its death."""
        if self._guardian is None:
            self._guardian = TemplateProcess(
                self._loop, SessionSpec(environ=self._environ, home=self._place[1]), self._store, OUR_TERMS,
                _nothing_to_report, self._on_guardian_gone)
        ours, theirs = socket.socketpair()
        _lifelines.add(ours)
        try:
            self._start(number, (link, theirs, [Descriptor(fd) for fd in (page_fd, *(outputs or ()))]))
            self._guardian.tell(template.Watch(self._processes[number].pid), [ours.fileno()])
        except Exception as error:  # the user's objects may raise anything; start_failed tells whoever waits
            reason = f"the worker process could not be started: {type(error).__name__}: {error}"
            self._died(number, Exit(reason=reason, failure=payload.CallUnpacker().pack_error(error)))
        finally:
            _lifelines.discard(ours)
            ours.close()
            theirs.close()

    def _start(self, number: int, arguments: tuple[Any, ...]) -> None:
        process = self._context.Process(  # type: ignore[attr-defined]
            target=run_in_context, args=(*arguments, self._environ, self._initializer, *self._place),
            name=f"distexec-worker-{number}")
        process.start()
        self._processes[number] = process
        self._born(number, process.pid)
        exit_fd = watch_exit(self._loop, process.pid, partial(self._on_exit, number))
        if exit_fd is None:
            self._loop.watch(process.sentinel, partial(self._on_exit, number))
        else:
            self._exit_fds[number] = exit_fd

    def end(self, number: int) -> None:
        """Kill the worker and its descendants."""
        if number in self._processes:
            descent.end_tree(self._processes[number].pid)

    def close(self, on_closed: Callable[[], object]) -> None:
        """Kill what is left, and let the guardian go."""
        for number in list(self._processes):
            self.end(number)
        self._on_closed = on_closed
        if self._guardian is None:
            on_closed()
        else:
            self._guardian.close()

    def _on_guardian_gone(self, _exitcode: int | None) -> None:
        """As asked; or it was killed, which breaks its workers' lifelines, and so kills them."""
        self._guardian = None
        if self._on_closed is not None:
            self._on_closed()

    def _on_exit(self, number: int) -> None:
        process = self._processes.pop(number)
        exit_fd = self._exit_fds.pop(number, None)
        self._loop.unwatch(process.sentinel if exit_fd is None else exit_fd)
        if exit_fd is not None:
            os.close(exit_fd)
        process.join()
        code = process.exitcode
        if code is not None:  # else the program itself waited for all its children, and has the code
            process.close()
        self._died(number, Exit(code if code is None or code >= 0 else None, max(0, -(code or 0))))


def _nothing_to_report(_report: object) -> None:
    """Take a guardian's reports, of which there are none: it forks nothing."""


Call = tuple[Callable[..., object], tuple[Any, ...]]

_lifelines: set[socket.socket] = set()
"""Lifelines' ends on their way to a guardian, all pools together."""


def _let_go_in_child() -> None:
    """In a forked child: a lifeline must break with the guardian, hence nobody else may hold its end."""
    while _lifelines:
        _lifelines.pop().close()


os.register_at_fork(after_in_child=_let_go_in_child)


def die_with_guardian(lifeline: socket.socket) -> None:
    """Have this process killed by the kernel, whatever it is doing, when the other end of the lifeline closes (Linux).

    That end is the guardian's. Not by PR_SET_PDEATHSIG: our parent is another process, or a thread that may end.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before
        os._exit(1)
    lifeline.detach()  # stays open for as long as we live


class Descriptor:
    """A file descriptor that reaches a process of any multiprocessing context as an argument."""

    def __init__(self, fd: int) -> None:
        self._fd: Any = fd

    def take(self) -> int:
        """Return the descriptor, in the process that it was sent to."""
        return self._fd if isinstance(self._fd, int) else cast("int", self._fd.detach())

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing.reduction import DupFd

        return Descriptor, (DupFd(self._fd),)


def run_in_context(link: socket.socket, lifeline: socket.socket, fds: list[Descriptor], environ: dict[str, str],
                   initializer: Call | None, label: str, home: str, node: str, log_levels: dict[str, int]) -> None:
    """Be a worker in a process that multiprocessing started; SystemExit if its initializer raised."""
    die_with_guardian(lifeline)
    os.environ.update(environ)
    for name in _SECRET_VARIABLES:
        os.environ.pop(name, None)
    page_fd, *outputs = [each.take() for each in fds]

    def initialize(_unpacker: payload.CallUnpacker) -> None:
        if initializer is not None:
            function, args = initializer
            function(*args)

    # Last of all: what tasks leave running has nobody who guards it, and multiprocessing first waits for its own.
    Finalize(None, descent.end_offspring, exitpriority=-100)
    try:
        status = worker.serve(link.detach(), page_fd, initializer=initialize,
                              outputs=(outputs[0], outputs[1]) if outputs else None, label=label, home=home,
                              node=node, log_levels=log_levels)
    except KeyboardInterrupt:
        descent.end_offspring()
        os._exit(130)  # Ctrl-C between tasks: the client got it too and decides what happens
    if status:
        sys.exit(status)


def environment(spec: SessionSpec) -> dict[str, str]:
    """Return the environment of a session's processes: the client's, and never the cluster's secret.

    What tells this machine's interpreter where it is installed stays this machine's.
    """
    environ = dict(spec.environ or os.environ)
    for name in _SECRET_VARIABLES:
        environ.pop(name, None)
    if "PYTHONHOME" in os.environ:
        environ["PYTHONHOME"] = os.environ["PYTHONHOME"]
    else:
        environ.pop("PYTHONHOME", None)
    return environ


def watch_exit(loop: Loop, pid: int, callback: Callable[[], object]) -> int | None:
    """Call `callback()` when the process has ended; return the descriptor watched, or None where that cannot be had."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None  # the caller has a second way to notice
    loop.watch(fd, callback)
    return fd


def drain(link: Link) -> None:
    """Close the link of a dead process once all it sent was read, even if its offspring still holds the other end."""
    if link.sock.fileno() < 0:
        return
    if select.select([link.sock], [], [], 0)[0]:
        link.loop.call_later(DRAIN_S, drain, link)
    else:
        link.finish("its process ended")


def local_spec(spec: SessionSpec, spare: str, home: str, *, may_share: bool = True) -> SessionSpec:
    """Make a client's description of itself fit this machine: its own environment, and the paths that exist here too.

    Where the client's working directory does not exist, or not `may_share`, `spare` takes its place. `home` is the session's
    directory here.
    """
    environ = {**os.environ, **spec.env}
    environ.pop("DISTEXEC_SECRET", None)
    directory = spec.directory if may_share and os.path.isdir(spec.directory) else spare
    extra = [entry or directory for entry in spec.path]
    own = sys.path if sys.flags.safe_path else sys.path[1:]  # not where our program lies, or we were started
    path = [entry for entry in extra if entry and entry not in own and os.path.exists(entry)]
    path += [entry for entry in own if entry]
    return structs.replace(spec, path=tuple(path), directory=directory, environ=environ, home=home)
