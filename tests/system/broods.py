"""Functions that make nested calls, for workers to run. Imports little, because workers import it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, as_completed, wait
from pathlib import Path
from typing import Any


def square(number: int) -> int:
    """Return the square of a number."""
    return number * number


def depth(executor: Executor, levels: int) -> int:
    """Count so many levels of calls below this one."""
    return 0 if levels == 0 else 1 + executor.submit(depth, executor, levels - 1).result()


def fibonacci(executor: Executor, number: int) -> int:
    """Compute the Fibonacci number the long way, two calls deep into the next each time."""
    if number < 2:
        return number
    return sum(future.result() for future in [executor.submit(fibonacci, executor, number - less) for less in (1, 2)])


def one_child(executor: Executor, number: int) -> int:
    """Have a child square the number."""
    return executor.submit(square, number).result()


def many(executor: Any, count: int, ordered: bool) -> list[int]:
    """Square numbers by `map`."""
    return list(executor.map(square, range(count), ordered=ordered))


def by_wait(executor: Executor, count: int) -> int:
    """Wait for children as `concurrent.futures.wait` does, one at least each time."""
    pending: set[Future[int]] = {executor.submit(square, number) for number in range(count)}
    total = 0
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        total += sum(future.result() for future in done)
    return total


def by_as_completed(executor: Executor, count: int) -> int:
    """Take children as they end."""
    return sum(future.result() for future in as_completed([executor.submit(square, number) for number in range(count)]))


def chain_by_wait(executor: Executor, levels: int) -> None:
    """Wait for a call that waits for a call, and so on."""
    if levels:
        wait([executor.submit(chain_by_wait, executor, levels - 1)]).done.pop().result()


def chain_by_as_completed(executor: Executor, levels: int) -> None:
    """The same."""
    if levels:
        next(as_completed([executor.submit(chain_by_as_completed, executor, levels - 1)])).result()


def chain_by_map(executor: Any, levels: int) -> None:
    """The same."""
    if levels:
        list(executor.map(chain_by_map, [executor], [levels - 1], ordered=False))


def in_thread(executor: Executor, number: int) -> int:
    """Wait for a child in a thread of one's own."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(executor.submit(square, number).result()))
    thread.start()
    thread.join()
    return found[0]


def in_with_block(executor: Executor, number: int) -> tuple[int, int]:
    """Use the executor in a `with` block, and again after it."""
    with executor:
        future = executor.submit(square, number)
    assert future.done(), "leaving the block waits"
    return future.result(), executor.submit(square, number + 1).result()


def catch(executor: Executor, fn: Callable[..., Any], *args: Any) -> tuple[str, str, bool]:
    """Say what a child raised: type, text, whether it came with the remote traceback."""
    try:
        executor.submit(fn, *args).result()
    except Exception as error:
        return type(error).__name__, str(error), "raise" in str(error.__cause__)
    return "", "", False


def raises(text: str) -> None:
    """Raise ZeroDivisionError."""
    raise ZeroDivisionError(text)


def note(directory: str, name: str) -> None:
    """Leave a file with our pid in it."""
    with open(os.path.join(directory, name), "a") as file:
        file.write(f"{os.getpid()}\n")


def dies(directory: str) -> None:
    """Be killed."""
    note(directory, "child")
    os.kill(os.getpid(), signal.SIGKILL)


def outlives_child(executor: Executor, directory: str) -> str:
    """Have a child that dies each time, and say what became of it."""
    note(directory, "parent")
    return catch(executor, dies, directory)[0]


def sleeps(directory: str) -> None:
    """Say that we are here, and wait for a word that never comes."""
    note(directory, "child")
    threading.Event().wait()


def dies_after_child_began(executor: Executor, directory: str) -> str:
    """Be killed once a child runs; the second time, look whether that child has gone, and return."""
    path = Path(directory, "child")
    if path.exists():
        try:
            os.kill(int(path.read_text().split()[0]), 0)
        except ProcessLookupError:
            return "gone"
        return "still there"
    executor.submit(sleeps, directory)
    while not path.exists() or not path.read_text():
        threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
    return "unreachable"


def waits_for_sleeper(executor: Executor, directory: str) -> None:
    """Wait for a child that never ends."""
    note(directory, "parent")
    executor.submit(sleeps, directory).result()


def leaves_behind(executor: Executor, directory: str, levels: int) -> str:
    """Return without waiting for the call that goes on with this."""
    note(directory, f"level{levels}")
    if levels:
        executor.submit(leaves_behind, executor, directory, levels - 1)
    return "left"


def gives_up(executor: Executor, directory: str) -> bool:
    """Cancel a call that cannot have begun, for its elder sibling has the only other slot."""
    first = executor.submit(sleeps_until, directory, "go")
    second = executor.submit(note, directory, "second")
    wait_until_noted(directory, "begun")
    has_cancelled = second.cancel()
    note(directory, "go")
    first.result()
    return has_cancelled


def sleeps_until(directory: str, name: str) -> None:
    """Say that we have begun, and wait for a file."""
    note(directory, "begun")
    wait_until_noted(directory, name)


def wait_until_noted(directory: str, name: str) -> None:
    """Wait for a file."""
    while not Path(directory, name).exists():
        threading.Event().wait(0.01)


def increment(array: Any) -> Any:
    """Return a larger array of the same size."""
    return array + 1


def with_arrays(executor: Executor, array: Any, times: int) -> Any:
    """Have children add to a large array, one after the other."""
    for _ in range(times):
        array = executor.submit(increment, array).result()
    return array


def collect(executor: Executor, arrays: list[Any]) -> list[Any]:
    """Have children add to large arrays, all at once; keep the results."""
    return [future.result() for future in [executor.submit(increment, array) for array in arrays]]


def fork_meanwhile(executor: Executor, number: int) -> tuple[int, int, str]:
    """Fork while a child is under way: how many threads there were at that moment, and what the fork may do."""
    future = executor.submit(square, number)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            executor.submit(square, number)
        except RuntimeError:
            os.write(writing, b"refused")
        os._exit(0)
    threads = len(os.listdir("/proc/self/task"))
    os.waitpid(pid, 0)
    told = os.read(reading, 100).decode()
    os.close(reading)
    os.close(writing)
    return future.result(), threads, told


def returns_executor(executor: Executor) -> Executor:
    """Give it back."""
    return executor


def sleeps_for_ever() -> None:
    """Wait for what never comes."""
    threading.Event().wait()


def configured(executor: Any, number: int) -> tuple[int, str]:
    """Use options on nested calls: a priority, and a time limit that is passed."""
    try:
        executor.options(timeout=0.2).submit(sleeps_for_ever).result()
    except TimeoutError as error:
        return executor.options(priority=3).submit(square, number).result(), type(error).__name__
    return 0, ""


def exits_in_callback(executor: Executor, number: int) -> int:
    """Raise SystemExit in a callback, and make another call."""
    def callback(_: Any) -> None:
        raise SystemExit("of a callback")

    first = executor.submit(square, number)
    first.add_done_callback(callback)
    return first.result() + executor.submit(square, number).result()


def waits_in_callback(executor: Executor, number: int) -> str:
    """Try to wait in a callback, which runs in the thread that receives."""
    told: list[str] = []
    ready = threading.Event()

    def callback(_: Any) -> None:
        try:
            executor.submit(square, number).result()
        except RuntimeError as error:
            told.append(str(error))
        ready.set()

    executor.submit(square, number).add_done_callback(callback)
    ready.wait()
    return told[0]
