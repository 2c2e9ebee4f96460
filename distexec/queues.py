"""Tasks in the order in which they are to run: by priority, and nested calls before others, the deepest first.

    Queue: one order                Broods ── (priority, depth) ──> Brood, a Queue for the calls of one parent

Pure. Rule: a task says itself whether it is queued, so that it is removed in O(1), and skipped where it still stands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from .messages import Run

__all__ = ["Brood", "Broods", "Queue"]


class Queued(Protocol):
    """What a queue must know of a task."""

    queued: bool
    run: Run
    shuns: frozenset[Any]


Q = TypeVar("Q", bound=Queued)


class Queue(Generic[Q]):
    """Tasks by priority, then first come first served. Removal is lazy: a task that left has `queued` False."""

    __slots__ = ("_levels", "_plain", "_stale", "count")

    def __init__(self) -> None:
        self._plain: deque[Q] = deque()  # priority 0, where nearly all tasks are
        self._levels: list[tuple[int, deque[Q]]] = [(0, self._plain)]  # highest priority first; few
        self._stale = 0  # entries whose task is gone
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Q]:
        if self._stale:
            self._compact()  # a task that left and came back stands there twice
        return (task for _, level in self._levels for task in level if task.queued)

    def _level(self, task: Q) -> deque[Q]:
        if task.run.options is None:
            return self._plain
        priority = task.run.options.priority
        for position, (known, level) in enumerate(self._levels):
            if known == priority:
                return level
            if known < priority:
                self._levels.insert(position, (priority, deque()))
                return self._levels[position][1]
        self._levels.append((priority, deque()))
        return self._levels[-1][1]

    def push(self, task: Q) -> None:
        """Add behind its equals."""
        task.queued = True
        self.count += 1
        (self._plain if task.run.options is None else self._level(task)).append(task)

    def push_front(self, task: Q) -> None:
        """Add before its equals: it has waited already."""
        task.queued = True
        self.count += 1
        self._level(task).appendleft(task)

    def peek(self) -> Q | None:
        """Show the task that `pop` would give."""
        for _, level in self._levels:
            while level:
                task = level[0]
                if task.queued:
                    return task
                level.popleft()
                self._stale -= 1
        return None

    def pop(self) -> Q:
        """Remove and give the first task; there must be one."""
        for _, level in self._levels:
            while level:
                task = level.popleft()
                if task.queued:
                    task.queued = False
                    self.count -= 1
                    return task
                self._stale -= 1
        raise AssertionError("pop from an empty queue")

    def pop_youngest(self) -> Q:
        """Remove and give the task that would run last; there must be one."""
        for _, level in reversed(self._levels):
            while level:
                task = level.pop()
                if task.queued:
                    task.queued = False
                    self.count -= 1
                    return task
                self._stale -= 1
        raise AssertionError("pop from an empty queue")

    def discard(self, task: Q) -> None:
        """Take out a task wherever it stands, in O(1) amortised."""
        task.queued = False
        self.count -= 1
        self._stale += 1
        if self._stale > 64 and self._stale > self.count:
            self._compact()

    def purge(self) -> None:
        """Forget the tasks that left, one of which is about to be put into another queue."""
        if self._stale:
            self._compact()

    def _compact(self) -> None:
        """Drop the entries of tasks that are gone; of one that left and came back, the first entry counts."""
        seen: set[int] = set()
        for _, level in self._levels:
            alive = [task for task in level if task.queued and not (id(task) in seen or seen.add(id(task)))]  # type: ignore[func-returns-value]
            level.clear()
            level.extend(alive)
        self._levels = [(priority, level) for priority, level in self._levels if level or level is self._plain]
        self._stale = 0


class Brood(Queue[Q]):
    """The queued calls of one task that have one priority and may run on the same nodes."""

    __slots__ = ("ancestors", "broods", "place")

    def __init__(self, broods: Broods[Q], place: Hashable, ancestors: tuple[int, ...]) -> None:
        super().__init__()
        self.broods, self.place, self.ancestors = broods, place, ancestors

    def push(self, task: Q) -> None:
        """Add behind its equals."""
        self.broods.count += 1
        super().push(task)

    def push_front(self, task: Q) -> None:
        """Add before its equals."""
        self.broods.count += 1
        super().push_front(task)

    def pop(self) -> Q:
        """Remove and give the first task."""
        self.broods.count -= 1
        return super().pop()

    def pop_youngest(self) -> Q:
        """Remove and give the last task."""
        self.broods.count -= 1
        return super().pop_youngest()

    def discard(self, task: Q) -> None:
        """Take out a task wherever it stands."""
        self.broods.count -= 1
        super().discard(task)


class Broods(Generic[Q]):
    """The queued nested calls: of the highest priority first, then the deepest, then those of the parent that was first.

    A brood that has become empty is forgotten when a search meets it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._levels: dict[tuple[int, int], dict[Hashable, Brood[Q]]] = {}  # by (priority, depth)

    def __iter__(self) -> Iterator[Brood[Q]]:
        for level in self._levels.values():
            yield from level.values()

    def of(self, task: Q) -> Brood[Q]:
        """Give the brood that a nested task belongs in."""
        options = task.run.options
        assert options is not None, "a nested task has ancestors"
        level = self._levels.setdefault((options.priority, len(options.ancestors)), {})
        place = task.shuns or options.node
        brood = level.get((options.ancestors[-1], place))
        if brood is None:
            brood = level[options.ancestors[-1], place] = Brood(self, place, options.ancestors)
        return brood

    def first(self, suits: Callable[[Brood[Q]], bool], *, deepest: bool = False) -> Brood[Q] | None:
        """Find the first brood that suits; `deepest`: whatever its priority."""
        for key in sorted(self._levels, key=(lambda key: key[::-1]) if deepest else None, reverse=True):
            level, found, empty = self._levels[key], None, []
            for name, brood in level.items():
                if not brood.count:
                    empty.append(name)
                elif suits(brood):
                    found = brood
                    break
            for name in empty:
                del level[name]
            if not level:
                del self._levels[key]
            if found is not None:
                return found
        return None
