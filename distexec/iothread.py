"""One I/O thread for all links of a process: readiness, calls from other threads, timers. It knows no message.

    selector ─► callbacks of the ready descriptors;  waker ─► idle hooks, then call_soon calls;  heap ─► timers

Rules: callbacks run on the I/O thread, never with a lock held; one that raises is logged and the thread goes on.
Finalizers may only set flags and `wake` it. In a forked child nothing of it may be used; its descriptors are closed
there at once.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import select
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

__all__ = ["LINGER_S", "READ_BYTES", "IoThread", "Tenant", "Timer"]

READ_BYTES = 256 << 10
"""The receive buffer, one for all links of a thread. Smaller: more calls under load. Larger: it falls out of the
cache."""

LINGER_S = 2.0
"""How long what closes may take to get rid of what was sent before. Then the rest is dropped: the peer is not
reading."""

STOPPED = "this end was stopped"

_log = logging.getLogger("distexec")
_threads: weakref.WeakSet[IoThread] = weakref.WeakSet()


class Tenant(Protocol):
    """What lives on an I/O thread and has descriptors: links, listeners, connections in the making."""

    def close(self, reason: str) -> object:
        """Begin to end; leave `tenants` within `LINGER_S`."""

    def finish(self, reason: str) -> object:
        """End now."""

    def abandon(self) -> object:
        """Close the descriptors, in a forked child, and call nobody."""


class Timer:
    """A call to be made later by the I/O thread, once."""

    __slots__ = ("_call", "due")

    def __init__(self, due: float, call: Callable[[], object]) -> None:
        self.due, self._call = due, call

    def cancel(self) -> None:
        """Do not make the call, if it has not begun. Any thread, any number of times."""
        self._call = _nothing

    @property
    def is_cancelled(self) -> bool:
        """Whether the call was made or cancelled."""
        return self._call is _nothing

    def fire(self) -> None:
        """Make the call. For the loop."""
        call, self._call = self._call, _nothing
        call()

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


def _nothing() -> None:
    """Stand in for a call that was made or cancelled, so that what it referred to is let go at once."""


class IoThread:
    """A thread that waits for descriptors, calls and timers. `transport.Loop` adds the links.

    Args:
        name: the thread's name.

    `idle_hooks` are called on the I/O thread after every `wake`: for flags that finalizers set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.idle_hooks: list[Callable[[], object]] = []
        self.tenants: set[Tenant] = set()  # I/O thread
        self.is_stopping = False
        self.scratch = memoryview(bytearray(READ_BYTES))  # I/O thread; valid until the next read of any tenant
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers: list[Timer] = []  # I/O thread
        self._timers_limit = 64
        self._callbacks: dict[int, Callable[[int], object]] = {}  # by descriptor; I/O thread
        self._changed: set[int] = set()  # descriptors no longer watched since the poller spoke last; I/O thread
        self._is_woken = False  # a wake-up is under way: saves call_soon the system call
        self._stop_by = 0.0
        self._ended = threading.Event()
        self._open()
        _threads.add(self)

    def _open(self) -> None:
        # The thread too: in a forked child of Python 3.13 even one that was never started cannot be any more.
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._poller: _Epoll | _Selector = _Epoll() if hasattr(select, "epoll") else _Selector()  # I/O thread
        self._callbacks.clear()
        self._waker_in, self._waker_out = socket.socketpair()
        self._waker_in.setblocking(False)
        self._waker_out.setblocking(False)
        self.select(self._waker_in, selectors.EVENT_READ, self._on_woken)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {len(self.tenants)} tenants>"

    # ---- any thread

    def start(self) -> None:
        """Start the I/O thread. What was adopted or scheduled before begins now."""
        self._thread.start()

    def stop(self) -> None:
        """End everything on the loop and join its thread, unless called on it.

        Links get at most `LINGER_S` to hand over what was already sent. Any thread, any number of times.
        """
        if not self._thread.ident:
            self.is_stopping = True
            self._end()
            return
        self.call_soon(self._begin_stop)
        if not self.is_current():
            self._thread.join()

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Have the I/O thread call `fn(*args)` in its next round; calls keep their order. After `stop` nothing
        happens."""
        if self._ended.is_set():
            return
        self._calls.append((fn, args))
        if not self._is_woken and not self.is_current():
            self._is_woken = True
            self.wake()

    def call_later(self, delay_s: float, fn: Callable[..., object], *args: Any) -> Timer:
        """Have the I/O thread call `fn(*args)` after `delay_s` seconds, unless the returned timer is cancelled. Any
        thread."""
        timer = Timer(time.monotonic() + delay_s, (lambda: fn(*args)) if args else fn)
        self.run_here(self._arm, timer)
        return timer

    def wake(self) -> None:
        """Make the I/O thread go round once. Takes no lock, so finalizers and weakref callbacks may call it."""
        with contextlib.suppress(OSError):  # full: it will go round anyway; closed: there is no thread to wake
            self._waker_out.send(b"\0")

    def is_current(self) -> bool:
        """Whether the caller runs on the I/O thread."""
        return threading.get_ident() == self._thread.ident

    def run_here(self, fn: Callable[..., object], *args: Any) -> None:
        """Call `fn(*args)` at once on the I/O thread, from elsewhere by `call_soon`."""
        if self.is_current():
            fn(*args)
        else:
            self.call_soon(fn, *args)

    def watch(self, fileobj: FileDescriptorLike, callback: Callable[[], object]) -> None:
        """Call `callback()` whenever the descriptor is readable, until `unwatch`. Any thread."""
        self.run_here(self.select, fileobj, selectors.EVENT_READ, lambda _events: callback())

    def unwatch(self, fileobj: FileDescriptorLike) -> None:
        """Undo `watch`, before the descriptor is closed. Off the I/O thread it takes effect in the loop's next
        round."""
        self.run_here(self.unselect, fileobj)

    # ---- I/O thread

    def select(self, fileobj: FileDescriptorLike, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(events)` when the descriptor is ready; replaces what was asked for it before. I/O thread."""
        if self._ended.is_set():
            return
        fd = _number(fileobj)
        self._poller.watch(fd, events, is_new=fd not in self._callbacks)
        self._callbacks[fd] = callback

    def unselect(self, fileobj: FileDescriptorLike) -> None:
        """Stop watching the descriptor, if it was watched. I/O thread."""
        fd = _number(fileobj)
        if self._callbacks.pop(fd, None) is not None:  # else it was never watched
            self._changed.add(fd)
            self._poller.forget(fd)

    def guard(self, fn: Callable[..., object], *args: Any) -> bool:
        """Call `fn(*args)`, log what escapes it, and say whether nothing did."""
        try:
            fn(*args)
        except BaseException:  # SystemExit too: a callback of the user's must not end everybody's I/O
            self.log_unexpected()
            return False
        return True

    def log_unexpected(self) -> None:
        """Log the exception being handled, as one that nobody expected."""
        _log.exception("distexec: unexpected error on I/O thread %s", self.name)

    def _run(self) -> None:
        poll, callbacks, changed = self._poller.poll, self._callbacks, self._changed
        while not (self.is_stopping and self._is_done()):
            try:
                ready = poll(self._timeout_s())
            except OSError:  # somebody closed descriptors that are not his; without a poller there is nothing to do
                _log.critical("distexec: the selector of I/O thread %s is gone", self.name, exc_info=True)
                break
            changed.clear()
            for fd, events in ready:
                if fd in changed or fd not in callbacks:
                    continue  # an earlier callback closed it
                try:  # as `guard` does; here for speed
                    callbacks[fd](_EVENTS[events])
                except BaseException:
                    self.log_unexpected()
            if self._calls:
                self._run_calls()
            if self._timers and self._timers[0].due <= time.monotonic():
                self._run_timers()
        self._end()

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            fn, args = self._calls.popleft()
            self.guard(fn, *args)

    def _timeout_s(self) -> float | None:
        if self._calls:
            return 0.0
        return max(0.0, self._timers[0].due - time.monotonic()) if self._timers else None

    def _on_woken(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):  # a second wake-up was read together with the first
            self._waker_in.recv(4096)
        self._is_woken = False  # before the calls are looked at: who appends from now on wakes again
        for hook in self.idle_hooks:
            self.guard(hook)

    def _arm(self, timer: Timer) -> None:
        if len(self._timers) >= self._timers_limit:  # cancelled ones leave in bulk: none costs more than O(log n)
            self._timers = [other for other in self._timers if not other.is_cancelled]
            self._timers_limit = max(64, 2 * len(self._timers))
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, timer)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            self.guard(heapq.heappop(self._timers).fire)

    def _begin_stop(self) -> None:
        if self.is_stopping:
            return
        self.is_stopping = True
        self._stop_by = time.monotonic() + LINGER_S
        self._arm(Timer(self._stop_by, _nothing_more))
        for tenant in list(self.tenants):
            self.guard(tenant.close, STOPPED)

    def _is_done(self) -> bool:
        return not self.tenants or time.monotonic() >= self._stop_by

    def _end(self) -> None:
        self._run_calls()  # what was begun this moment is ended like the others
        for tenant in list(self.tenants):
            self.guard(tenant.finish, STOPPED)
        self._ended.set()
        self._poller.close()
        self._waker_in.close()
        self._waker_out.close()

    def abandon(self) -> None:
        """Close the descriptors in a forked child, where they would keep connections of the parent open, and do no
        more; a thread that was not started yet may be the child's own."""
        self._poller.close()
        self._waker_in.close()
        self._waker_out.close()
        for tenant in self.tenants:
            self.guard(tenant.abandon)
        if not self._thread.ident and not self.is_stopping:
            self._open()


_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_IN, _OUT = 1, 4  # as epoll and poll have them
_EVENTS = [(_READ if events & ~_OUT else 0) | (_WRITE if events & ~_IN else 0) for events in range(1 << 6)]
"""What is ready, by what epoll reported: errors and hang-ups are news for readers and writers."""


class _Epoll:
    """Which descriptors are ready, by Linux's epoll itself: the layer of `selectors` costs microseconds a round."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.close = self._epoll.close
        self.poll = partial(self._epoll.poll, maxevents=256)  # waits for what is ready: descriptors and epoll's events

    def watch(self, fd: int, events: int, *, is_new: bool) -> None:
        """Report the descriptor when it is ready for `events`, instead of what was asked for before."""
        mask = (_IN if events & _READ else 0) | (_OUT if events & _WRITE else 0)
        if not is_new:
            try:
                self._epoll.modify(fd, mask)
                return
            except FileNotFoundError:
                pass  # it was closed unnoticed, and this is another of the same number
        self._epoll.register(fd, mask)

    def forget(self, fd: int) -> None:
        """Report it no more."""
        with contextlib.suppress(OSError):  # closed before: the system has forgotten it
            self._epoll.unregister(fd)


class _Selector:
    """The same, for systems without epoll."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.close = self._selector.close

    def watch(self, fd: int, events: int, *, is_new: bool) -> None:
        """Report the descriptor when it is ready for `events`, instead of what was asked for before."""
        if is_new:
            self._selector.register(fd, events)
        else:
            self._selector.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Report it no more."""
        self._selector.unregister(fd)

    def poll(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Wait for what is ready: descriptors and events as epoll would report them."""
        return [(key.fd, (_IN if events & _READ else 0) | (_OUT if events & _WRITE else 0))
                for key, events in self._selector.select(timeout_s)]


def _number(fileobj: FileDescriptorLike) -> int:
    return fileobj if isinstance(fileobj, int) else fileobj.fileno()


def _nothing_more() -> None:
    """Do nothing at the deadline of `stop`: going round is enough."""


def _abandon_in_child() -> None:
    for thread in list(_threads):
        thread.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
