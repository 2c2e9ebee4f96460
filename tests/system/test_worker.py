"""Laws of a worker process, heard over a bare socketpair."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from distexec.errors import PayloadError, RemoteError
from distexec.memory import shared_file
from distexec.messages import (
    Bye,
    FromWorker,
    Options,
    Outcome,
    OutcomeKind,
    Ready,
    Returned,
)
from distexec.outbox import BlockingLink
from distexec.protocol import HEADER_BYTES, FrameDecoder
from distexec.worker import PAGE_BYTES, WorkerPage
from tests.system import chores
from tests.system.rig import ROOT, Caller, await_arrival, gate, open_gate


class Bare(Caller):
    """A worker process and our end of its link and page."""

    def __init__(self, *flags: str, outputs: bool = False) -> None:
        super().__init__()
        ours, theirs = socket.socketpair()
        page_fd = shared_file()
        os.ftruncate(page_fd, PAGE_BYTES)
        self.page = WorkerPage(page_fd)
        fds = [theirs.fileno(), page_fd]
        if outputs:
            self.outputs = (shared_file(), shared_file())
            fds += self.outputs
        code = ("import sys; from distexec import worker\n"
                f"status = worker.serve({fds[0]}, {fds[1]}, outputs={tuple(fds[2:]) or None})\n"
                "worker.leave(); sys.exit(status)")
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", code], cwd=ROOT, pass_fds=fds,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        theirs.close()
        os.close(page_fd)
        self.sock = ours
        self.link = BlockingLink(ours, FromWorker)
        self.frames: list[list[Any]] = []

    def send(self, *messages: Any) -> None:
        """Send messages in one frame."""
        self.link.send(messages)

    def hear(self, count: int = 1) -> list[Any]:
        """Wait for so many messages; return all there are."""
        heard: list[Any] = []
        while len(heard) < count:
            self.frames.append(self.link.receive())
            heard += self.frames[-1]
        return heard

    def count_frames(self, count: int) -> int:
        """Wait for so many messages; return in how many frames they came, by the lengths in the stream."""
        decoder, stream, heard = FrameDecoder(cast("Any", FromWorker)), b"", 0
        while heard < count:
            data = self.sock.recv(1 << 16)
            stream += data
            heard += len(decoder.feed(data))
        frames = 0
        while stream:
            stream = stream[HEADER_BYTES + int.from_bytes(stream[:HEADER_BYTES]):]
            frames += 1
        return frames

    def ask(self, fn: Any, *args: Any) -> Any:
        """Have a call done; return its value or exception."""
        self.send(*self.call(fn, *args))
        return self.result(self.hear()[0])

    def end(self) -> tuple[int, bytes, bytes]:
        """Close the link; return how the process ended and what it printed."""
        self.link.close()
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def bare() -> Iterator[Bare]:
    """A worker that said it is ready."""
    with bare_worker() as worker:
        yield worker


@contextlib.contextmanager
def bare_worker(*flags: str, outputs: bool = False) -> Iterator[Bare]:
    """Start a worker, and see to it that it ends."""
    worker = Bare(*flags, outputs=outputs)
    try:
        assert worker.hear() == [Ready(worker.process.pid)]
        yield worker
    finally:
        worker.process.kill()
        worker.end()
        for fd in worker.outputs if outputs else ():
            os.close(fd)


def learn(worker: Bare, fn: Any, *args: Any) -> None:
    """Run a function a few times, so that the worker knows it as quick."""
    for _ in range(3):
        worker.ask(fn, *args)


def test_value_comes_back(bare: Bare) -> None:
    """An outcome names its task, holds the value, and says which process took how long."""
    bare.send(*bare.call(chores.double, 21))
    outcome = bare.hear()[0]
    assert (outcome.session, outcome.seq, outcome.attempt, outcome.kind) == (1, 1, 1, OutcomeKind.VALUE)
    assert bare.result(outcome) == 42
    assert outcome.pid == bare.process.pid
    assert 0 < outcome.run_ns < 10**9
    assert outcome.ends is None


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_whatever_is_raised_arrives_as_itself(bare: Bare, error: BaseException) -> None:
    """Every exception, those that end a program included, is the task's outcome and leaves the worker well."""
    raised = bare.ask(chores.fail, error)
    assert type(raised) is type(error)
    assert raised.args == error.args
    assert "in fail" in str(raised.__cause__)
    assert "worker.py" not in str(raised.__cause__)
    assert bare.ask(chores.double, 1) == 2


def test_unpicklable_value_keeps_the_pickling_error(bare: Bare) -> None:
    """A value that cannot be pickled fails its task with pickle's own exception."""
    bare.send(*bare.call(chores.lock))
    outcome = bare.hear()[0]
    assert outcome.kind == OutcomeKind.ERROR
    error = bare.result(outcome)
    assert isinstance(error, TypeError)
    assert "lock" in str(error)


def test_unpicklable_exception_is_stood_in_for(bare: Bare) -> None:
    """An exception that cannot be pickled arrives as RemoteError."""
    assert isinstance(bare.ask(_raise_local), RemoteError)


def _raise_local() -> None:
    import threading

    raise ValueError(threading.Lock())


def test_undecodable_call_fails_alone(bare: Bare) -> None:
    """A call that cannot be unpickled is a PAYLOAD outcome of its task; the next one runs."""
    run = bare.call(chores.double, 1)
    bare.send(run[0], type(run[1])(1, 7, 1, 1, b"\x80\x05no pickle"))
    outcome = bare.hear()[0]
    assert (outcome.seq, outcome.kind) == (7, OutcomeKind.PAYLOAD)
    assert isinstance(bare.result(outcome), PayloadError)
    assert bare.ask(chores.double, 2) == 4


def test_undecodable_function_fails_every_task_of_it(bare: Bare) -> None:
    """A function that cannot be unpickled is a PAYLOAD outcome, each time."""
    define, run = bare.call(chores.double, 1)
    bare.send(type(define)(1, 1, b"cno_such_module\nf\n."), run, run)
    outcomes = bare.hear(2)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.PAYLOAD] * 2
    assert "no_such_module" in str(bare.result(outcomes[1]))


def test_quick_tasks_share_frames(bare: Bare) -> None:
    """The outcomes of a batch of quick tasks come in order, many to a frame."""
    learn(bare, chores.double, 1)
    first = bare.seq + 1
    bare.frames.clear()
    bare.send(*[message for _ in range(500) for message in bare.call(chores.double, 1)])
    assert [outcome.seq for outcome in bare.hear(500)] == list(range(first, first + 500))
    assert len(bare.frames) < 250


def test_outcomes_go_before_a_task_of_unknown_length(bare: Bare, tmp_path: Path) -> None:
    """What is done is not held back by a function never run before."""
    path = gate(tmp_path)
    learn(bare, chores.double, 1)
    bare.send(*bare.call(chores.double, 4), *bare.call(chores.wait_for, path))
    assert bare.result(bare.hear()[0]) == 8
    await_arrival(path)
    open_gate(path)
    assert bare.result(bare.hear()[0]) == path


def test_outcomes_go_though_a_quick_task_takes_long(bare: Bare, tmp_path: Path) -> None:
    """What is done is not held back by a function that was always quick and now is not."""
    path = gate(tmp_path)
    learn(bare, chores.double, 1)
    learn(bare, chores.wait_for, None)
    bare.send(*bare.call(chores.double, 4), *bare.call(chores.wait_for, path))
    await_arrival(path)
    assert bare.result(bare.hear()[0]) == 8
    open_gate(path)
    assert bare.result(bare.hear()[0]) == path


def test_solo_outcomes_go_one_by_one(bare: Bare) -> None:
    """With options.solo every outcome has a frame to itself, however quick the tasks; without, many share one."""
    learn(bare, chores.double, 1)
    for options, fewest, most in ((None, 1, 40), (Options(solo=True), 50, 50)):
        bare.send(*[message for _ in range(50) for message in bare.call(chores.double, 1, options=options)])
        assert fewest <= bare.count_frames(50) <= most


def test_forking_task_finds_one_thread(tmp_path: Path) -> None:
    """A task that forks while outcomes wait does so in a process without other threads, and is not warned of any."""
    with bare_worker("-Wdefault") as bare:
        learn(bare, chores.double, 1)
        learn(bare, chores.threads_after_fork, None)
        for _ in range(20):
            messages = [message for _ in range(50) for message in bare.call(chores.double, 1)]
            bare.send(*messages, *bare.call(chores.threads_after_fork, "fork"))
            assert bare.result(bare.hear(51)[-1]) == 1
        bare.send(Bye(""))
        bare.process.wait(30)
        assert bare.end()[2] == b""


def test_outcomes_go_before_a_fork(bare: Bare, tmp_path: Path) -> None:
    """What is done when a quick task forks and then takes long is not held back: no flusher is left to send it."""
    path = gate(tmp_path)
    learn(bare, chores.double, 1)
    learn(bare, _fork_and_wait, None)
    bare.send(*bare.call(chores.double, 4), *bare.call(_fork_and_wait, path))
    await_arrival(path)
    assert bare.result(bare.hear()[0]) == 8
    open_gate(path)
    bare.hear()


def _fork_and_wait(path: str | None) -> None:
    if path is not None:
        chores.threads_after_fork("fork")
        chores.wait_for(path)


def test_forked_child_does_not_speak(bare: Bare) -> None:
    """A child that comes back out of the task neither sends an outcome nor runs the tasks behind it."""
    bare.send(*bare.call(chores.fork_and_return), *bare.call(chores.double, 1), *bare.call(chores.double, 2))
    outcomes = bare.hear(3)
    assert [bare.result(outcome) for outcome in outcomes] == [False, 2, 4]
    assert bare.ask(chores.double, 3) == 6


def test_revoked_tasks_are_handed_back(bare: Bare, tmp_path: Path) -> None:
    """Revoked tasks are not run but returned, in their place among the outcomes; those after them run."""
    path = gate(tmp_path)
    bare.send(*bare.call(chores.wait_for, path), *bare.call(chores.double, 2), *bare.call(chores.double, 3),
              *bare.call(chores.double, 4))
    await_arrival(path)
    bare.page.revoke(2, 3)
    assert bare.page.started == 1
    open_gate(path)
    first, returned, last = bare.hear(3)
    assert first.seq == 1
    assert returned == Returned(1, [(2, 1), (3, 1)])
    assert bare.result(last) == 8
    assert bare.page.started == 4


def test_large_value_without_buffers_travels_beside_the_message(bare: Bare) -> None:
    """A pickle too large for a message becomes the first buffer, in a file that comes with it."""
    bare.send(*bare.call(bytes, 20_000_000))
    segment, outcome = bare.hear(2)
    assert outcome.data == b""
    assert outcome.buffers == (segment.blob,)
    fd = bare.link.received_fds.popleft()
    assert os.fstat(fd).st_size == segment.blob.size_bytes > 20_000_000
    os.close(fd)


def test_output_is_written_after_each_task(bare: Bare) -> None:
    """What a task printed has left the process when its outcome comes, a line or not."""
    bare.ask(chores.say, "no newline", "nor here")
    assert os.read(bare.process.stdout.fileno(), 100) == b"no newline"  # type: ignore[union-attr]
    assert os.read(bare.process.stderr.fileno(), 100) == b"nor here"  # type: ignore[union-attr]


def test_captured_output_has_ends() -> None:
    """An outcome says where the captured streams ended after its task, if they moved."""
    with bare_worker(outputs=True) as bare:
        bare.send(*bare.call(chores.say, "abc", "x"), *bare.call(chores.double, 1), *bare.call(chores.say, "de"))
        assert [outcome.ends for outcome in bare.hear(3)] == [(3, 1), None, (5, 1)]
        assert os.pread(bare.outputs[0], 10, 0) == b"abcde"
        assert os.pread(bare.outputs[1], 10, 0) == b"x"


def test_task_may_close_its_streams(bare: Bare) -> None:
    """A task that closes or replaces sys.stdout does not harm the worker."""
    bare.ask(exec, "import sys; sys.stdout.close(); sys.stderr = None")
    assert bare.ask(chores.double, 1) == 2


def test_bye_ends_like_an_interpreter(bare: Bare, tmp_path: Path) -> None:
    """After Bye, and the tasks before it, what was registered with atexit runs; the exit code is 0."""
    bare.send(*bare.call(chores.leave_mark_at_exit, str(tmp_path / "mark")), Bye(""))
    assert isinstance(bare.hear()[0], Outcome)
    assert bare.process.wait(30) == 0
    assert (tmp_path / "mark").read_text() == "ended"


def test_worker_ends_with_its_pool(bare: Bare, tmp_path: Path) -> None:
    """When the link closes the worker ends at once, without running what was registered with atexit."""
    bare.ask(chores.leave_mark_at_exit, str(tmp_path / "mark"))
    assert bare.end() == (0, b"", b"")
    assert not (tmp_path / "mark").exists()


def test_crash_is_explained(bare: Bare) -> None:
    """A fatal signal leaves the Python stack on the page, and what was printed before it."""
    bare.ask(print_error, "last words")
    bare.send(*bare.call(os.kill, bare.process.pid, signal.SIGSEGV))
    code, _, err = bare.end() if bare.process.wait(30) else (0, b"", b"")
    assert (code, err) == (-signal.SIGSEGV, b"last words\n")
    assert bare.page.words.printed == "last words\n"
    assert "Segmentation fault" in bare.page.words.stacks


def print_error(text: str) -> None:
    print(text, file=sys.stderr)


def test_childs_crash_is_its_own(bare: Bare) -> None:
    """A child that a task forks tells its crash where its parent prints, and leaves nothing on the page."""
    assert bare.ask(crash_in_child) == -signal.SIGSEGV
    _, _, err = bare.end()
    assert b"printed by a child\nFatal Python error: Segmentation fault" in err
    assert (bare.page.words.printed, bare.page.words.stacks) == ("", "")


def crash_in_child() -> int:
    child = os.fork()
    if child == 0:
        print("printed by a child", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGSEGV)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_stderr_is_what_it_was(bare: Bare) -> None:
    """sys.stderr of a task is the descriptor that every program has, with its encoding and line by line."""
    assert bare.ask(describe_stderr) == (2, False, sys.__stderr__.encoding, "backslashreplace", True)


def describe_stderr() -> tuple[object, ...]:
    stream = sys.stderr
    return stream.fileno(), stream.isatty(), stream.encoding, stream.errors, stream.line_buffering
