"""Nested calls where they become tasks: at the root, which pickles and unpickles nothing of theirs.

    Submit, from a task ──► function known or new, arguments shared ──► Task of the session ──► its end answers who made it

Rule: what a call brought is in the store until the call has ended, and not longer. `take` is called without the dispatcher's
lock, on the thread that heard the news.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

from .calls import Code
from .dispatcher import Dispatcher
from .kin import Called, News, Spent, ancestors_of
from .ledger import Session, Task
from .messages import BlobRef, Define, Evidence, Options, Run, Submit
from .scheduler import Scheduler
from .shipping import BlobStore

__all__ = ["NESTED", "NestedCalls"]


class _Nested:
    """The owner of nested calls, which have no future here: who made them is answered."""

    def claim(self) -> bool:
        """They are run whenever that is possible."""
        return True

    def cancel(self) -> bool:
        """Only who made them can give them up."""
        return False

    def conclude(self, _value: Any, _error: BaseException | None, _run_ns: int = -1) -> None:
        """Nobody waits here."""


NESTED = _Nested()


class Home(Protocol):
    """Whose tasks they become: the root."""

    code: Code
    dispatcher: Dispatcher
    scheduler: Scheduler
    session: Session
    store: BlobStore
    seqs: itertools.count[int]
    retries: int
    done: dict[str, int]

    def settled(self) -> None:
        """Learn that something has ended, which may have been the last."""


class NestedCalls:
    """The calls that one root's tasks make."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def take(self, news: list[News]) -> None:
        """Act on what the scheduler says of nested calls."""
        home = self._home
        for each in news:
            if isinstance(each, Called):
                self._make(each.parent, each.submit)
            elif isinstance(each, Spent):
                home.store.release_all(each.buffers)
            else:
                home.store.release_all(each.task.run.buffers)
                home.done[each.task.node] = home.done.get(each.task.node, 0) + 1
        home.settled()

    def _make(self, parent: Task, submit: Submit) -> None:
        home = self._home
        refs = [ref for ref in (*submit.function_buffers, *submit.buffers) if isinstance(ref, BlobRef)]
        try:
            for ref in refs:
                home.store.share(ref)  # local workers map it
        except OSError as error:
            home.store.release_all(refs)
            reason = f"there is no memory at the client for what it was given: {error}"
            home.dispatcher.call(home.scheduler.refuse_nested, parent, submit, Evidence("", reason=reason))
            return
        definition = home.code.take_over(submit.key, submit.function, submit.function_buffers)
        if not home.dispatcher.call(self._take_in, parent, submit, self._task(parent, submit, definition), definition):
            home.store.release_all(submit.buffers)

    def _task(self, parent: Task, submit: Submit, definition: Define) -> Task:
        home = self._home
        retries = home.retries if submit.retries < 0 else submit.retries
        asked = submit.options or Options()
        options = Options(asked.timeout_s, asked.priority, asked.node, retries == 0, ancestors_of(parent))
        run = Run(home.session.no, next(home.seqs), 1, definition.fn, submit.data, submit.buffers, options)
        return Task(run, home.session, NESTED, retries)

    def _take_in(self, parent: Task, submit: Submit, task: Task, definition: Define, now: float) -> bool:
        if definition.fn not in task.session.code:
            self._home.scheduler.define(task.session, definition)
        return self._home.scheduler.submit_nested(parent, submit, task, now)
