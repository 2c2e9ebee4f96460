"""What the tests of workers and pools share: a pool's end of things, played by the test."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distexec.messages import BlobRef, Cleaned, Define, Evidence, Outcome, Run, SessionSpec
from distexec.payload import CallPacker
from distexec.pool import Pool
from distexec.shipping import BlobStore
from distexec.transport import Loop
from distexec.workerport import Worker
from tests import leaks

ROOT = str(Path(__file__).parents[2])


def gate(directory: Path, name: str = "gate") -> str:
    """Make the two named pipes at which `chores.wait_for` waits."""
    for end in (".here", ".go"):
        os.mkfifo(directory / (name + end))
    return str(directory / name)


def await_arrival(path: str) -> None:
    """Return once a task is at the gate."""
    assert Path(path + ".here").read_text() == "here"


def open_gate(path: str) -> None:
    """Let the task at the gate go on."""
    Path(path + ".go").write_text("go")


def content_of(path: Path | str) -> str:
    """Wait for a file and return what is in it."""
    assert leaks.wait_until(Path(path).exists)
    return Path(path).read_text()


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class Caller:
    """Makes the messages that have calls done, and reads what comes back. Functions are defined when first used."""

    def __init__(self, store: BlobStore | None = None) -> None:
        self.store = store
        self.seq = 0
        self._packer = CallPacker()
        self._defines: dict[bytes, Define] = {}
        self._defined: set[tuple[object, bytes]] = set()

    def call(self, fn: Callable[..., Any], *args: Any, options: Any = None, at: object = None) -> list[Any]:
        """Return the messages for one call at a worker: its Run, and before the first of a function its Define."""
        packed, buffers, key = self._packer.pack_function(fn)
        define = self._defines.get(key)
        if define is None:
            define = self._defines[key] = Define(1, len(self._defines) + 1, packed, self._wire(buffers))
        messages = [] if (at, key) in self._defined else [define]
        self._defined.add((at, key))
        data, buffers = self._packer.pack_call(args, {}, key)
        self.seq += 1
        return [*messages, Run(1, self.seq, 1, define.fn, data, self._wire(buffers), options)]

    def result(self, outcome: Outcome) -> Any:
        """Return the value, or the exception, that an outcome holds, and release its blobs."""
        buffers = [self._read(each) for each in outcome.buffers]
        data = outcome.data or buffers.pop(0)
        value, error = self._packer.unpack_outcome(outcome.kind, data, buffers)
        return error if error is not None else value

    def _wire(self, buffers: list[memoryview]) -> tuple[Any, ...]:
        if not buffers:
            return ()
        assert self.store is not None
        return tuple(self.store.put(each) for each in buffers)

    def _read(self, buffer: bytes | BlobRef) -> Any:
        if isinstance(buffer, bytes):
            return buffer
        assert self.store is not None
        return self.store.take(buffer)


class Rig(Caller):
    """A pool on a loop of its own, and the record of what it told its owner."""

    def __init__(self, spec: SessionSpec | None = None, *, capture: bool = False, **options: Any) -> None:
        super().__init__(BlobStore(arena_closed=lambda arena: self.pool.forget_arena(arena)))
        self.events: list[tuple[Any, ...]] = []
        self._changed = threading.Condition()
        self.loop = Loop("rig")
        self.loop.start()
        spec = spec or SessionSpec(path=(ROOT, *sys.path))
        assert self.store is not None
        self.pool = Pool(self.loop, spec, self, store=self.store, capture=capture, node="here", **options)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()
        self.loop.stop()
        assert self.store is not None
        self.store.close()

    # what the pool calls

    def worker_ready(self, worker: Worker) -> None:
        """Pool: ready."""
        self._note("ready", worker)

    def worker_said(self, worker: Worker, messages: list[Any]) -> None:
        """Pool: said."""
        for message in messages:
            self._note("said", worker, message)

    def worker_wrote(self, worker: Worker, seq: int, stream: int, data: bytes) -> None:
        """Pool: wrote."""
        self._note("wrote", worker, seq, stream, data)

    def worker_gone(self, worker: Worker, evidence: Evidence) -> None:
        """Pool: gone."""
        self._note("gone", worker, evidence)

    def start_failed(self, evidence: Evidence, data: bytes, generation: int) -> None:
        """Pool: failed."""
        self._note("failed", evidence, data)

    def state_wrote(self, stream: int, data: bytes) -> None:
        """Pool: setup or cleanup wrote."""
        self._note("state", stream, data)

    def state_cleaned(self, cleaned: Cleaned) -> None:
        """Pool: cleaned up."""
        self._note("cleaned", cleaned)

    def _note(self, *event: Any) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    # what tests call

    def worker(self) -> Worker:
        """Start a worker and return it once it is ready."""
        count = len(self.of("ready"))
        self.pool.start_worker()
        worker: Worker = self.wait("ready", count + 1)[-1][0]
        return worker

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """What happened so far of one kind, in order."""
        return [event[1:] for event in list(self.events) if event[0] == kind]

    def wait(self, kind: str, count: int = 1, timeout_s: float = 30.0) -> list[tuple[Any, ...]]:
        """Wait until so much of one kind happened; return it."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, timeout_s), self.events
        return self.of(kind)

    def send(self, worker: Worker, fn: Callable[..., Any], *args: Any, options: Any = None) -> int:
        """Have a worker do a call; return its seq."""
        worker.queue(self.call(fn, *args, options=options, at=worker))
        worker.flush()
        return self.seq

    def ask(self, worker: Worker, fn: Callable[..., Any], *args: Any) -> Any:
        """Have a worker do a call; return its value or exception."""
        return self.await_result(self.send(worker, fn, *args))

    def await_result(self, seq: int) -> Any:
        """Wait for the outcome of task `seq`; return its value or exception."""
        return self.result(self.await_outcome(seq))

    def await_outcome(self, seq: int) -> Outcome:
        """Wait for the outcome of task `seq`."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._outcomes(seq), 30), self.events
        return self._outcomes(seq)[0]

    def _outcomes(self, seq: int) -> list[Outcome]:
        return [message for _, message in self.of("said") if isinstance(message, Outcome) and message.seq == seq]
