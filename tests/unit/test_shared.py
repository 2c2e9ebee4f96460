"""A handle is a pickle whose large parts are in the store already."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import pytest

from distexec import mainmodule, shared
from distexec.blobcache import BlobCache
from distexec.calls import put_by
from distexec.messages import BlobRef
from distexec.payload import CallPacker, CallUnpacker
from distexec.shared import Shares
from distexec.shipping import BlobStore

MIB = 1 << 20


class Home:
    """A root, whose I/O thread is the test: `run` does what it would do later."""

    def __init__(self) -> None:
        self.packer, self.store = CallPacker(), BlobStore()
        self.cache = BlobCache(self.store, 1 << 30)
        self.due: list[Any] = []
        self.kept: list[BlobRef] = []
        self.unshared: list[bytes] = []
        self.shares = Shares(self)

    def later(self, seconds: float, function: Any) -> None:
        """Note it."""
        self.due.append(function)

    def wake(self) -> None:
        """`run` looks anyway."""

    def forget_code(self, refs: Sequence[BlobRef]) -> None:
        """There are no functions."""

    def count_kept(self, ref: BlobRef) -> int:
        """What the test says that workers have."""
        return self.kept.count(ref)

    def unshare(self, name: bytes, refs: Sequence[BlobRef]) -> None:
        """Note it."""
        self.unshared.append(name)

    def run(self, rounds: int = 5) -> None:
        """Let time pass."""
        for _ in range(rounds):
            self.shares.reap()
            due, self.due = self.due, []
            for function in due:
                function()


@pytest.fixture
def home() -> Iterator[Home]:
    """One whose store must be empty in the end."""
    home = Home()
    yield home
    assert "0 blobs" in repr(home.store)
    assert not mainmodule.digests
    home.store.close()


def pack(home: Home, *args: Any) -> tuple[bytes, tuple[Any, ...]]:
    """Pickle a call as `submit` does."""
    data, views = home.packer.pack_call(args, {})
    return put_by(home.store, data, views)


def test_a_call_takes_the_blob_by_its_name(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte is copied or looked at, however often: the call has a reference to the blob that is there."""
    handle = home.shares.share(numpy.ones(MIB, "u1"))
    monkeypatch.setattr(home.store, "put", None)
    calls = [pack(home, [handle], number) for number in range(3)]
    refs = {ref for _, buffers in calls for ref in buffers}
    assert [ref.size_bytes for ref in refs] == [MIB]
    assert home.store.references(next(iter(refs))) == 4
    data, buffers = calls[2]
    (value,), number = CallUnpacker().load_call(data, [bytearray(home.store.view(ref)) for ref in buffers])[0]
    assert (value.sum(), number) == (MIB, 2)
    for _, buffers in calls:
        home.store.release_all(buffers)
    handle.free()
    home.run()


def test_another_store_copies(home: Home) -> None:
    """In a call of another executor it is a value like any other."""
    other = Home()
    with home.shares.share(numpy.ones(2 * MIB, "u1")) as handle:
        _, buffers = pack(other, handle)
        assert [other.store.has(ref) for ref in buffers] == [True]
        other.store.release_all(buffers)
    home.run()
    other.store.close()


def test_equal_keys(home: Home) -> None:
    """A function that captured a handle has the same key each time, and another one for another value."""
    one, two = (home.shares.share(numpy.full(MIB, value, "u1")) for value in (1, 2))
    keys = [home.packer.pack_function(lambda value=value: value)[2] for value in (one, one, two)]
    assert keys[0] == keys[1] != keys[2]
    del one, two
    gc.collect()
    home.run()


def test_freed(home: Home) -> None:
    """Once and for all: no pickle, no digests, and workers are told when the last reference is gone."""
    handle = home.shares.share(numpy.ones(MIB, "u1"))
    _, buffers = pack(home, handle)
    handle.free()
    handle.free()
    with pytest.raises(ValueError, match="share the value again"):
        pickle.dumps(handle, 5)
    home.run()
    assert home.unshared == []
    home.cache.keep("owner", buffers[0])  # its task has ended; what is fading is not kept
    home.run()
    assert len(home.unshared) == 1


def test_what_workers_keep_does_not_count(home: Home) -> None:
    """Their references are the ones that are to go."""
    handle = home.shares.share(numpy.ones(MIB, "u1"))
    (ref,) = pack(home, handle)[1]
    home.kept.append(ref)
    handle.free()
    home.run()
    assert len(home.unshared) == 1
    home.store.release(ref)


def test_shared_again_while_it_fades(home: Home) -> None:
    """A call still has it when it is shared anew: workers are not told, until that one goes too."""
    value = numpy.ones(MIB, "u1")
    handle = home.shares.share(value)
    _, buffers = pack(home, handle)
    handle.free()
    home.run(2)
    again = home.shares.share(value)
    home.store.release_all(buffers)
    home.run()
    assert home.unshared == []
    again.free()
    home.run()
    assert len(home.unshared) == 1


def test_a_dropped_handle(home: Home) -> None:
    """The collector is as good as free()."""
    handle = home.shares.share([numpy.ones(MIB, "u1"), "text" * 10_000])
    handle.cycle = handle
    del handle
    gc.collect()
    home.run()
    assert len(home.unshared) == 1


def test_no_memory(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part finds no room: the first is not kept."""
    put, count = home.store.put, 0

    def fail(part: Any) -> BlobRef:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("no memory")
        return put(part)
    monkeypatch.setattr(home.store, "put", fail)
    with pytest.raises(OSError, match="no memory"):
        home.shares.share([numpy.full(MIB, value, "u1") for value in range(3)] + [list(range(10_000))])


# ---- the worker


class Worker:
    """One that notes what it says."""

    def __init__(self) -> None:
        from distexec.memory import Mappings
        self.unpacker, self.mappings = CallUnpacker(), Mappings()
        self.outbox: Any = self
        self.said: list[Any] = []
        self.append = self.said.append


def test_a_worker_keeps_what_it_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two values: the third displaces that which was used longest ago."""
    monkeypatch.setattr(shared, "KEPT_COUNT", 2)
    worker: Any = Worker()
    keeper = shared.Keeper(worker)
    parts = {name: pickle.dumps(([name],)) for name in (b"a", b"b", b"c")}

    def get(name: bytes) -> Any:
        return keeper.get(name, ((b"", 0),), [parts[name]])
    first = get(b"a"), get(b"b")
    assert get(b"a") is first[0]
    get(b"c")
    assert get(b"a") is first[0]
    assert get(b"b") is not first[1]
    keeper.forget([b"a", b"b", b"c", b"d"])
    assert get(b"a") is not first[0]
