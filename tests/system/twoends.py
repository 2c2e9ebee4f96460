"""A client and one worker process, joined by two pipes: all of `payload` and nothing else of the package.

`Session` is for scripts that are somebody's `__main__`; `python -m tests.system.twoends` is the worker.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from distexec.messages import OutcomeKind
from distexec.payload import CallPacker, CallUnpacker


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message."""
    body = msgspec.msgpack.encode(message)
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read one message; None at the end."""
    header = stream.read(4)
    if not header:
        return None
    return msgspec.msgpack.decode(stream.read(struct.unpack(">I", header)[0]))


class Session:
    """A session with one worker: `call` runs a function there, waits, and gives what it returns or raises."""

    def __init__(self, initializer: Callable[..., object] | None = None, *initargs: Any) -> None:
        self.packer = CallPacker()
        self._process = subprocess.Popen([sys.executable, "-m", "tests.system.twoends"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)
        self.defined: set[bytes] = set()
        self.sent_bytes = 0  # by the last call
        if initializer is not None:
            self.call(initializer, *initargs)

    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one task."""
        return self.wait(self.submit(fn, *args, **kwargs))

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Pack one task, as it is now."""
        code, code_buffers, key = self.packer.pack_function(fn)
        data, buffers = self.packer.pack_call(args, kwargs, key)
        define = None
        if key not in self.defined:
            self.defined.add(key)
            define = code, [bytes(buffer) for buffer in code_buffers]
        return [key, define, data, [bytes(buffer) for buffer in buffers]]

    def wait(self, task: list[Any]) -> Any:
        """Have it run, and give what it returns or raises."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.sent_bytes = len(task[2]) + (len(task[1][0]) if task[1] else 0)
        send(self._process.stdin, task)
        reply = receive(self._process.stdout)
        assert reply is not None, "the worker died"
        kind, data, buffers = reply
        value, error = self.packer.unpack_outcome(OutcomeKind(kind), data, buffers)
        if error is not None:
            raise error
        return value

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(20)


def work() -> None:
    """Be the worker until the client closes the pipe."""
    unpacker = CallUnpacker()
    functions: dict[bytes, Callable[..., Any]] = {}
    definitions: dict[bytes, Any] = {}
    calls, outcomes, sys.stdout = sys.stdin.buffer, sys.stdout.buffer, sys.stderr
    unpacker.install_main()
    while (task := receive(calls)) is not None:
        key, define, data, buffers = task
        large: list[memoryview] = []
        kind = OutcomeKind.PAYLOAD
        try:
            if define:
                definitions[key] = define
            if key not in functions:
                functions[key] = unpacker.load_function(*definitions[key])
            args, kwargs = unpacker.load_call(data, buffers)
            kind = OutcomeKind.ERROR
            value = functions[key](*args, **kwargs)
            data, large = unpacker.pack_value(value)
            kind = OutcomeKind.VALUE
        except BaseException as error:
            data = unpacker.pack_error(error)
        send(outcomes, [int(kind), data, [bytes(buffer) for buffer in large]])


if __name__ == "__main__":
    work()
