"""What the processes of tasks may open and write. Imports little, because every template does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

MIN_OPEN_FILES = 64
"""Smaller: a worker cannot hold its link, its page and the arguments of a task."""


class Limits(Struct, frozen=True, array_like=True, gc=False):
    """What a process may do, as `setrlimit` has it; 0: what its parent may."""

    open_files: int = 0
    file_bytes: int = 0

    def apply(self) -> None:
        """Limit this process and its children."""
        if not self.open_files and not self.file_bytes:
            return
        import resource

        if self.open_files:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            most = self.open_files if hard == resource.RLIM_INFINITY else min(self.open_files, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if self.file_bytes:  # the soft limit alone: large results are files too, see `unlimited_files`
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            most = self.file_bytes if hard == resource.RLIM_INFINITY else min(self.file_bytes, hard)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))


@contextmanager
def unlimited_files() -> Iterator[None]:
    """Let this process write larger files for a moment: what holds a result is no file of the task's."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
