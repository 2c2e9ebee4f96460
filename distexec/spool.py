"""A program's own directory for files, which goes with it; what a killed one had to leave, the next one removes.

The rule: a directory whose lock somebody holds is in use; one that can be locked belongs to nobody any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "distexec-agent-"


def make_directory(parent: str | None, prefix: str) -> tuple[str, int]:
    """Make a private directory as `spool` does, for whoever removes it itself; it is in use while the descriptor is open.

    Raises OSError if it cannot be made.
    """
    path, fd = _make(Path(parent or tempfile.gettempdir()), prefix)
    return str(path), fd


@contextmanager
def spool(parent: str | None) -> Iterator[str]:
    """Make a private directory below `parent` (None: the temporary directory), and remove it in the end.

    Raises OSError if it cannot be made.
    """
    directory = Path(parent or tempfile.gettempdir())
    clear(directory, PREFIX)
    path, fd = _make(directory, PREFIX)
    try:
        yield str(path)
    finally:
        remove_tree(path)  # what cannot be removed now, the next one tries
        os.close(fd)


def remove_tree(path: str | Path) -> None:
    """Remove a directory and all in it, as far as possible, also what was made unreadable by its owner."""
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.isdir(path) or os.geteuid() == 0:  # root was not kept out
        return
    with suppress(OSError):  # gone, or another's
        os.chmod(path, 0o700)
    for directory, inner, _ in os.walk(path):
        for name in inner:
            with suppress(OSError):
                if not os.path.islink(os.path.join(directory, name)):
                    os.chmod(os.path.join(directory, name), 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        except OSError as error:
            raise OSError(error.errno, f"no directory for sessions can be made in {parent}: {error.strerror}; see to it, or "
                          "name another one with --spool") from error
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if path.is_dir():  # else another one cleared up between these two lines
            return path, fd
        os.close(fd)


def clear(parent: str | Path, prefix: str) -> None:
    """Remove directories whose names begin so and that belong to nobody any more."""
    for path in Path(parent).glob(prefix + "*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or gone: not ours to remove
        try:
            if os.fstat(fd).st_uid == os.getuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(path)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(fd)
