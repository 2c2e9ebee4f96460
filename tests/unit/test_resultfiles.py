"""A worker's files for large results: used again only when the pool says so, and never too many."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from distexec import resultfiles
from distexec.messages import Free
from distexec.resultfiles import ResultFiles
from distexec.shipping import digest_of

MIB = 1 << 20


@pytest.fixture
def files() -> Iterator[ResultFiles]:
    files = ResultFiles()
    yield files
    files.close()


def put(files: ResultFiles, content: bytes) -> tuple[int, int]:
    """Put and check; return the arena's number and the inode."""
    segment, fd = files.put(content)
    try:
        assert os.pread(fd, len(content), 0) == content
        assert segment.blob.digest == digest_of(content)
        assert (segment.blob.size_bytes, segment.offset) == (len(content), 0)
        return segment.arena, os.fstat(fd).st_ino
    finally:
        os.close(fd)


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_used_again_once_given_back(files: ResultFiles) -> None:
    """Not before; then under another number, so that what is said of its former use does not concern the next."""
    first, inode = put(files, b"1" * MIB)
    second, other = put(files, b"2" * MIB)
    assert inode != other
    files.take_back(Free(first, True))
    third, again = put(files, b"3" * (MIB - 5))
    assert again == inode
    assert len({first, second, third}) == 3
    files.take_back(Free(first, True))  # said of the first use
    assert put(files, b"4" * MIB)[1] not in (inode, other)


def test_a_file_that_a_fork_may_see_is_never_used_again(files: ResultFiles) -> None:
    """The pool says so, and its descriptor is closed."""
    before = count_descriptors()
    arena, _ = put(files, b"1" * MIB)
    files.take_back(Free(arena, False))
    assert count_descriptors() == before


def test_a_small_result_does_not_take_the_memory_of_a_large_one(files: ResultFiles) -> None:
    """A file is given to what needs at least a part of it."""
    arena, inode = put(files, b"1" * (9 * MIB))
    files.take_back(Free(arena, True))
    assert put(files, b"2" * MIB)[1] != inode
    assert put(files, b"3" * (9 * MIB))[1] == inode


def test_descriptors_and_memory_are_bounded(files: ResultFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many results are held by others, few files are kept; what is said of the others is ignored."""
    monkeypatch.setattr(resultfiles, "KEPT_BYTES", 10 * MIB)
    before = count_descriptors()
    arenas = [put(files, bytes([number]) * MIB)[0] for number in range(100)]
    assert count_descriptors() - before <= resultfiles.KEPT_COUNT
    for size in (4, 4, 4, 4):
        put(files, b"x" * (size * MIB))
    assert count_descriptors() - before <= 2
    for arena in arenas:
        files.take_back(Free(arena, True))
    arena, _ = put(files, b"h" * (11 * MIB))
    assert arena == 0
    assert count_descriptors() - before <= 2


def test_idle_memory_is_given_up(files: ResultFiles) -> None:
    """Arena 0 means all that is free, and nothing else."""
    before = count_descriptors()
    first, _ = put(files, b"1" * MIB)
    put(files, b"2" * MIB)
    files.take_back(Free(first, True))
    files.take_back(Free(0, False))
    assert count_descriptors() == before + 1
    assert repr(files) == "<ResultFiles: 1 kept, 0 free>"
    files.close()
    assert count_descriptors() == before


def test_failure_leaves_no_descriptor(files: ResultFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory the result fails and nothing is left of the attempt."""
    def refuse(*_: object) -> int:
        raise OSError(28, "no space")

    before = count_descriptors()
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="no space"):
        files.put(b"1" * MIB)
    assert count_descriptors() == before
