"""A program's own directory for files, which goes with it; what a killed one had to leave, the next one removes.

The rule: a directory whose lock somebody holds is in use; one that can be locked belongs to nobody any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "distexec-agent-"


@contextmanager
def spool(parent: str | None) -> Iterator[str]:
    """Make a private directory below `parent` (None: the temporary directory), and remove it in the end.

    Raises OSError if it cannot be made.
    """
    directory = Path(parent or tempfile.gettempdir())
    _clear(directory)
    path, fd = _make(directory)
    try:
        yield str(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now, the next one tries
        os.close(fd)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise OSError(error.errno, f"no directory for sessions can be made in {parent}: {error.strerror}; see to it, or "
                          "name another one with --spool") from error
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if path.is_dir():  # else another one cleared up between these two lines
            return path, fd
        os.close(fd)


def _clear(parent: Path) -> None:
    """Remove what belongs to nobody any more."""
    for path in parent.glob(PREFIX + "*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or gone: not ours to remove
        try:
            if os.fstat(fd).st_uid == os.getuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(fd)
