"""Memory that is mapped: files without names, views of them, and how a process makes a view its own.

    shared_file() ──descriptor──► map_segment: private and writable, for workers and clients
                              └─► map_memory: shared, for the store that fills it

The rule: a mapping lives as long as anything made from its view, and needs no descriptor. Workers import this module;
what is slow to import is imported when needed.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["COPY_BYTES", "GRAIN_BYTES", "Mappings", "advise", "map_memory", "map_segment", "new_memory", "shared_file",
           "whole_pages", "write_at"]

COPY_BYTES = 512 << 10
"""Copied, then hashed while the processor's cache still holds it. Larger: the hash reads from memory again."""

GRAIN_BYTES = mmap.ALLOCATIONGRANULARITY
"""What offsets of mappings are multiples of."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14, not in the mmap module: private copies of all pages in one call


def map_segment(fd: int, offset: int, size_bytes: int) -> memoryview:
    """Map part of a file, private and writable: pages are shared until written to, and writes stay in this process.

    The mapping lives as long as the memoryview or anything made from it, and needs no descriptor: `fd` may be closed.
    `offset` must be page-aligned. Raises OSError if the file cannot be mapped.
    """
    return map_memory(fd, offset, size_bytes, mmap.MAP_PRIVATE)


def new_memory(size_bytes: int) -> memoryview:
    """Return memory of this process alone, zeroed."""
    view = map_memory(-1, 0, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        advise(view, mmap.MADV_HUGEPAGE)  # new small pages take longer to get than to fill
    return view


def map_memory(fd: int, offset: int, size_bytes: int, flags: int,
               unmapped: Callable[[], object] | None = None) -> memoryview:
    """Map part of a file, or memory, with these flags; `unmapped` is called, in a finalizer, once the mapping is gone."""
    if size_bytes == 0:
        return memoryview(bytearray())
    # Not mmap.mmap: before Python 3.13 it keeps a descriptor per mapping, and a list of 1,000 arrays would run out.
    ctypes, libc = _libc()
    address = libc.mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {size_bytes:,} bytes: {os.strerror(ctypes.get_errno())}")
    pages = (ctypes.c_ubyte * size_bytes).from_address(address)
    # Objects made from it may still be read while the interpreter ends; the kernel unmaps what is left.
    weakref.finalize(pages, _unmap, libc.munmap, address, size_bytes, unmapped).atexit = False
    return memoryview(pages).cast("B")


def _unmap(munmap: Callable[[int, int], object], address: int, size_bytes: int,
           unmapped: Callable[[], object] | None) -> None:
    munmap(address, size_bytes)
    if unmapped is not None:
        unmapped()


@cache
def _libc() -> tuple[Any, Any]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return ctypes, libc


class Mappings:
    """The segments mapped for one task; `settle` gives those the task still holds at its end pages of their own."""

    def __init__(self) -> None:
        self._live: list[weakref.ref[Any]] = []

    def __repr__(self) -> str:
        return f"<Mappings: {sum(ref() is not None for ref in self._live)} live>"

    def map(self, fd: int, offset: int, size_bytes: int) -> memoryview:
        """As `map_segment`, and remember the mapping."""
        view = map_segment(fd, offset, size_bytes)
        if size_bytes:
            self._live.append(weakref.ref(view.obj))
        return view

    def hand_over(self, view: memoryview, other: Mappings) -> bool:
        """Let another keep account of the mapping that a view is of; False if it is none of these."""
        for at, ref in enumerate(self._live):
            if ref() is view.obj:
                other._live.append(self._live.pop(at))
                return True
        return False

    def settle(self) -> int:
        """Copy the pages of every mapping still referenced; afterwards the blobs may be released. Returns how many."""
        held = [pages for ref in self._live if (pages := ref()) is not None]
        for pages in held:
            _own_pages(memoryview(pages).cast("B"))
        self._live.clear()
        return len(held)


def _own_pages(view: memoryview) -> None:
    if not advise(view, _MADV_POPULATE_WRITE):  # an older kernel: write to every page ourselves
        for at in range(0, len(view), GRAIN_BYTES):
            view[at] = view[at]


def advise(mapped: memoryview, advice: int, offset: int = 0, size_bytes: int = -1) -> bool:
    """Tell the kernel about part of a mapping (madvise); False if it does not want to know."""
    ctypes, libc = _libc()
    length = len(mapped) if size_bytes < 0 else size_bytes
    return bool(libc.madvise(ctypes.addressof(mapped.obj) + offset, length, advice) == 0)


def whole_pages(size_bytes: int) -> int:
    """Round up to whole pages, one at least."""
    return max(1, -(-size_bytes // GRAIN_BYTES)) * GRAIN_BYTES


def shared_file() -> int:
    """Open a file that has no name and lives in memory, or in the temporary directory where there is no such thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("distexec")
    import tempfile  # slow to import, and not needed on Linux

    fd, path = tempfile.mkstemp(prefix="distexec-")
    os.unlink(path)
    return fd


def write_at(fd: int, source: memoryview, offset: int) -> None:
    """Write all of it; a system call makes new pages without faults, and lets other threads run meanwhile."""
    while len(source):
        done = os.pwrite(fd, source, offset)
        source, offset = source[done:], offset + done
