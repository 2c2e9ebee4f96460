"""Files inside a task: its own directory, the files it was given, and files that it sends to its client.

    task ── Delivery, and the open file ──► pool … client ── path there, or what went wrong ──► socket ──► task

The rule: a task's directory is gone before anybody hears that the task has ended. The answer to a delivery comes by a socket
of its own, so any thread of a task may wait for it, and a pool that goes closes it.
"""

from __future__ import annotations

import itertools
import os
import socket
import stat
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from distexec.depot import Depot
from distexec.messages import Delivered, Delivery, Run
from distexec.spool import remove_tree
from distexec.trees import Folder, check_path, digest_file, open_regular

if TYPE_CHECKING:
    from collections.abc import Callable

    from distexec.outbox import Outbox

__all__ = ["enter_directory", "pack_reply", "remove_left", "send_file", "task_directory",
           "tasks_directory"]

REPLY_CHARS = 4000
"""Of an error's text in an answer, which must fit into a socket's buffer."""

_numbers = itertools.count(1)
_decode = msgspec.msgpack.Decoder(tuple[str, str, int]).decode


class Worker(Protocol):
    """What is used here of the worker that runs the task."""

    current: Run | None
    directory: str  # of the task; "": none was made
    at_end: list[Callable[[], object]]
    outbox: Outbox

    @property
    def home(self) -> str:
        """The session's directory; "": there is none."""


# ---- the task's directory


def task_directory(worker: Worker) -> str:
    """Give the directory of the task that runs, made when first asked for. Raises OSError if it cannot be made."""
    run = worker.current
    assert run is not None, "whoever asks has looked"
    if worker.directory:
        return worker.directory
    if not worker.home:
        raise OSError("no directory for this session's files could be made on this machine; see to its temporary directory")
    path = os.path.join(tasks_directory(worker.home), f"{os.getpid()}-{run.seq}-{run.attempt}")
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    os.mkdir(path, 0o700)
    worker.directory = path
    worker.at_end.append(partial(_leave, worker, path))
    return path


def tasks_directory(home: str) -> str:
    """Say where a session's tasks have their directories."""
    return os.path.join(home, "tasks")


def remove_left(home: str, pid: int) -> None:
    """Remove what a worker left that was killed."""
    directory = tasks_directory(home)
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        if name.startswith(f"{pid}-"):
            remove_tree(os.path.join(directory, name))


def _leave(worker: Worker, path: str) -> None:
    worker.directory = ""
    remove_tree(path)


def enter_directory(worker: Worker, run: Run) -> None:
    """Put the task's files into its directory, and go there until its end. Raises OSError or ValueError."""
    assert run.options is not None, "that is where the files are named"
    path = task_directory(worker)
    with Folder(path) as folder:
        Depot(worker.home).place(run.options.files, folder)
    worker.at_end.append(partial(_return, os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
    os.chdir(path)


def _return(fd: int) -> None:
    os.chdir(fd)
    os.close(fd)


# ---- files for the client


def send_file(worker: Worker, path: str | os.PathLike[str], name: str | None = None) -> str:
    """Send a file to the client and return its path there, once it is there; see `TaskContext.send_file`."""
    run = worker.current
    assert run is not None, "whoever asks has looked"
    path = os.fspath(path)
    name = os.path.basename(path) if name is None else name
    check_path(name)
    if name.endswith("/"):
        raise ValueError(f"{name!r} names a directory; name the file that shall be made")
    fd, status = open_regular(path)
    try:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                delivery = Delivery(run.session, run.seq, run.attempt, next(_numbers), name, stat.S_IMODE(status.st_mode),
                                    digest_file(fd))
                worker.outbox.send_with_fds(delivery, [fd, theirs.fileno()])
            return _wait(ours, path)
    finally:
        os.close(fd)


def _wait(reply: socket.socket, path: str) -> str:
    answer = b""
    while piece := reply.recv(1 << 16):
        answer += piece
    if not answer:
        raise ConnectionError(f"{path!r} was not sent: the session is over, or its client is gone")
    at_client, error, number = _decode(answer)
    if error:
        raise OSError(number, f"{path!r} was not sent: {error}") if number else OSError(f"{path!r} was not sent: {error}")
    return at_client


def pack_reply(answer: Delivered) -> bytes:
    """Put an answer into the bytes that a task waits for."""
    return msgspec.msgpack.encode((answer.path, answer.error[:REPLY_CHARS], answer.errno))
