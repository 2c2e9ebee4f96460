"""What is kept of blobs that nobody needs: how much, which, how long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distexec.blobcache import BlobCache
from distexec.messages import BlobRef
from distexec.shipping import BlobStore

SIZE = 4096


@pytest.fixture
def store() -> Iterator[BlobStore]:
    """A store, in which nothing may be left."""
    store = BlobStore()
    yield store
    assert "0 blobs" in repr(store)
    store.close()


def put(store: BlobStore, number: int, size: int = SIZE) -> BlobRef:
    """Put a blob of this number."""
    return store.put(number.to_bytes(8, "big") * (size // 8))


def test_the_least_recently_used_goes_first(store: BlobStore) -> None:
    """Room for three; the first is used again → a fourth displaces the second."""
    cache = BlobCache(store, 3 * SIZE)
    refs = [put(store, number) for number in range(4)]
    for ref in refs[:3]:
        cache.keep("owner", ref)
    assert store.retain_if_here(refs[0])
    cache.keep("owner", refs[0])
    assert [store.references(ref) for ref in refs] == [1, 1, 1, 1]
    cache.keep("owner", refs[3])
    assert [store.has(ref) for ref in refs] == [True, False, True, True]
    assert cache.size_bytes == 3 * SIZE
    cache.end("owner")


def test_what_is_larger_than_all_is_not_kept(store: BlobStore) -> None:
    """It would displace everything and then itself."""
    cache = BlobCache(store, SIZE)
    small = put(store, 1)
    cache.keep("owner", small)
    cache.keep("owner", put(store, 2, 2 * SIZE))
    assert store.has(small)
    cache.end("owner")


def test_new_ones_displace_each_other(store: BlobStore) -> None:
    """Room for two that are new: a stream of them displaces neither what came twice, nor takes more memory.

    One that comes back after it was given up counts as having come twice.
    """
    cache = BlobCache(store, 10 * SIZE, new_bytes=2 * SIZE)
    twice = [put(store, number) for number in (1, 1)]
    for ref in twice:
        cache.keep("owner", ref)
    stream = [put(store, number) for number in range(10, 20)]
    for ref in stream:
        cache.keep("owner", ref)
    assert store.has(twice[0])
    assert [store.has(ref) for ref in stream] == [False] * 8 + [True] * 2
    cache.keep("owner", put(store, 10))
    for number in range(20, 30):
        cache.keep("owner", put(store, number))
    assert store.has(stream[0])
    assert cache.size_bytes == 4 * SIZE
    cache.end("owner")


def test_the_newest_is_kept_though_it_is_large(store: BlobStore) -> None:
    """Larger than all that are new may be together: until the next one comes."""
    cache = BlobCache(store, 10 * SIZE, new_bytes=2 * SIZE)
    large, next_one = put(store, 1, 5 * SIZE), put(store, 2)
    cache.keep("owner", large)
    assert store.has(large)
    cache.keep("owner", next_one)
    assert [store.has(ref) for ref in (large, next_one)] == [False, True]
    cache.end("owner")


def test_owners(store: BlobStore) -> None:
    """The same blob of two owners counts twice, and goes with the second."""
    cache = BlobCache(store, 10 * SIZE)
    ref = put(store, 1)
    store.retain(ref)
    cache.keep("one", ref)
    cache.keep("two", ref)
    cache.end("one")
    assert store.has(ref)
    cache.end("two")
    assert not store.has(ref)


def test_none_that_are_new(store: BlobStore) -> None:
    """Only what comes back is kept."""
    cache = BlobCache(store, 10 * SIZE, new_bytes=0)
    for number in range(3):
        cache.keep("owner", put(store, number))
    assert cache.size_bytes == 0
    again = put(store, 1)
    cache.keep("owner", again)
    assert store.has(again)
    cache.end("owner")


def test_room_is_made_before_it_is_taken(store: BlobStore) -> None:
    """A blob on its way displaces what it would displace anyway, and nothing if there is room."""
    cache = BlobCache(store, 3 * SIZE)
    refs = [put(store, number) for number in range(2)]
    for ref in refs:
        cache.keep("owner", ref)
    cache.make_room(SIZE)
    assert cache.size_bytes == 2 * SIZE
    cache.make_room(2 * SIZE)
    assert [store.has(ref) for ref in refs] == [False, True]
    cache.make_room(100 * SIZE)
    assert cache.size_bytes == 0


def test_scarce_memory(store: BlobStore) -> None:
    """All is given up when little is free, nothing otherwise."""
    cache = BlobCache(store, 3 * SIZE)
    cache.keep("owner", put(store, 1))
    cache.relieve(50, 100)
    assert cache.size_bytes == SIZE
    cache.relieve(2, 100)
    assert cache.size_bytes == 0


def test_old_ones_go(store: BlobStore) -> None:
    """Unused for a minute → gone; what was used since stays."""
    now = 0.0
    cache = BlobCache(store, 9 * SIZE, clock=lambda: now)
    old, young = put(store, 1), put(store, 2)
    cache.keep("owner", old)
    cache.keep("owner", young)
    now = 50.0
    assert store.retain_if_here(young)
    cache.keep("owner", young)
    now = 61.0
    cache.expire(60.0)
    assert [store.has(ref) for ref in (old, young)] == [False, True]
    cache.end("owner")


def test_banned(store: BlobStore) -> None:
    """Dropped and banned: not kept again until it is allowed."""
    cache = BlobCache(store, 9 * SIZE)
    ref = put(store, 1)
    cache.keep("owner", ref)
    cache.drop("owner", [ref], ban=True)
    assert not store.has(ref)
    cache.keep("owner", put(store, 1))
    assert not store.has(ref)
    cache.allow([ref])
    cache.keep("owner", put(store, 1))
    assert store.has(ref)
    cache.drop("owner", [ref])
