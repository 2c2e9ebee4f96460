"""Blobs: stored once, counted, their space used again, mapped privately."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distexec import memory, shipping
from distexec.memory import Mappings, map_segment
from distexec.messages import BlobRef
from distexec.shipping import BlobStore, digest_of

MIB = 1 << 20


@pytest.fixture
def store() -> Iterator[BlobStore]:
    store = BlobStore()
    yield store
    store.close()


def open_descriptors() -> set[str]:
    """What the process has open, apart from the directory that is being listed."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return {os.readlink(link) for link in links if os.path.lexists(link)}


def memory_of(store: BlobStore) -> int:
    return sum(os.fstat(arena.fd).st_blocks * 512 for arena in store._arenas)


class TestStore:
    def test_put_names_and_keeps_bytes(self, store: BlobStore) -> None:
        """What is put can be read under its xxh3-128 digest and size."""
        content = os.urandom(3 * MIB + 17)
        ref = store.put(content)
        assert ref == BlobRef(digest_of(content), len(content))
        assert store.has(ref)
        assert store.view(ref) == content
        assert store.view(ref).readonly

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MIB])
    def test_any_size(self, store: BlobStore, size: int) -> None:
        """Sizes at the edges of a page are kept exactly, nothing included."""
        content = os.urandom(size)
        ref = store.put(content)
        segment = store.segment(ref)
        assert store.view(ref) == content
        assert map_segment(segment.fd, segment.offset, segment.size_bytes) == content

    def test_a_typed_buffer_is_taken_as_its_bytes(self, store: BlobStore) -> None:
        """A buffer of another format is stored as the bytes it is made of."""
        view = memoryview(bytes(range(256))).cast("d")
        assert store.view(store.put(view)) == bytes(range(256))

    def test_same_bytes_are_stored_once(self, store: BlobStore) -> None:
        """A second put of the same bytes takes no memory, and as many releases free it as there were puts."""
        content = os.urandom(2 * MIB)
        ref = store.put(content)
        before = memory_of(store)
        assert store.put(bytearray(content)) == ref
        assert memory_of(store) == before
        store.release(ref)
        assert store.view(ref) == content
        store.release(ref)
        assert not store.has(ref)

    def test_beginning_alike_is_not_being_alike(self, store: BlobStore) -> None:
        """Buffers that differ only behind the sampled first page are two blobs."""
        first, second = bytes(MIB), bytes(MIB - 1) + b"x"
        refs = store.put(first), store.put(second)
        assert refs[0] != refs[1]
        assert store.view(refs[0]) == first
        assert store.view(refs[1]) == second

    def test_the_callers_buffer_may_change_after_put(self, store: BlobStore) -> None:
        """The blob is the value at the time of put."""
        content = bytearray(b"a" * MIB)
        ref = store.put(content)
        content[:] = b"b" * MIB
        assert store.view(ref) == b"a" * MIB
        assert store.put(content) != ref

    def test_retain_outlives_release(self, store: BlobStore) -> None:
        """A retained blob stays until the last holder released it."""
        ref = store.put(b"x" * 5000)
        store.retain(ref)
        store.release(ref)
        assert store.has(ref)
        store.release(ref)
        assert not store.has(ref)

    def test_unknown_blobs(self, store: BlobStore) -> None:
        """Asking for a blob that is not there is a KeyError, whatever is asked."""
        ref = BlobRef(b"?" * 16, 5)
        assert not store.has(ref)
        for ask in (store.view, store.segment, store.retain, store.release):
            with pytest.raises(KeyError):
                ask(ref)

    def test_many_blobs_share_a_descriptor(self, store: BlobStore) -> None:
        """A thousand pending arguments must not cost a thousand descriptors."""
        refs = [store.put(i.to_bytes(4, "big") * 1500) for i in range(1000)]
        assert len({store.segment(ref).fd for ref in refs}) == 1
        assert len({store.segment(ref).offset for ref in refs}) == 1000

    def test_offsets_can_be_mapped(self, store: BlobStore) -> None:
        """Every blob starts on a page, as mmap asks."""
        assert all(store.segment(store.put(os.urandom(5000))).offset % memory.GRAIN_BYTES == 0 for _ in range(5))

    def test_space_is_used_again(self, store: BlobStore) -> None:
        """Putting and releasing for ever takes the memory of one blob."""
        for i in range(100):
            store.release(store.put(i.to_bytes(4, "big") * (MIB // 4)))
        assert memory_of(store) <= 2 * MIB
        assert len(store._arenas) == 1

    def test_freed_memory_above_the_spare_goes_back(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond SPARE_BYTES freed space is punched out, and what lives beside it is untouched."""
        monkeypatch.setattr(shipping, "SPARE_BYTES", 2 * MIB)
        refs = [store.put(os.urandom(MIB)) for _ in range(8)]
        kept = bytes(store.view(refs[3]))
        for ref in (*refs[:3], *refs[4:]):
            store.release(ref)
        assert memory_of(store) <= 3 * MIB
        assert store.view(refs[3]) == kept

    def test_trim_gives_everything_free_back(self, store: BlobStore) -> None:
        """After trim only live blobs take memory, and an arena without any is closed."""
        first, second = store.put(os.urandom(MIB)), store.put(os.urandom(MIB))
        store.release(first)
        store.trim()
        assert memory_of(store) == MIB
        store.release(second)
        store.trim()
        assert store._arenas == []

    def test_a_blob_larger_than_an_arena(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It gets an arena of its own, which goes with it and is reported gone."""
        monkeypatch.setattr(shipping, "ARENA_BYTES", MIB)
        gone: list[int] = []
        store = BlobStore(gone.append)
        ref = store.put(bytes(3 * MIB))
        number = store.segment(ref).arena
        store.release(ref)
        assert gone == [number]
        store.close()

    def test_close_leaves_no_descriptor(self) -> None:
        """A closed store holds no file, and releasing what it had is no error."""
        before = open_descriptors()
        store = BlobStore()
        ref = store.put(os.urandom(MIB))
        writer = store.writer(BlobRef(b"d" * 16, 10))
        writer.abandon()
        view = store.view(ref)
        store.close()
        store.release(ref)
        assert open_descriptors() <= before
        assert len(view) == MIB
        with pytest.raises(ValueError, match="closed"):
            store.put(b"late")

    def test_threads_agree(self, store: BlobStore) -> None:
        """Puts and releases from several threads at once leave each blob right and nothing behind."""
        wrong: list[BlobRef] = []

        def work(seed: int) -> None:
            for i in range(60):
                content = bytes([i % 7]) * (20_000 + i % 5)
                ref = store.put(content)
                if store.view(ref) != content:
                    wrong.append(ref)
                store.release(ref)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert store._blobs == {}
        assert store._samples == {}
        assert sum(arena.live_bytes for arena in store._arenas) == 0

    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 40_000)), max_size=40))
    @settings(deadline=None, max_examples=60)
    def test_no_two_blobs_overlap(self, steps: list[tuple[bool, int]]) -> None:
        """After any order of puts and releases each live blob still has its own bytes."""
        store = BlobStore()
        live: list[tuple[BlobRef, bytes]] = []
        try:
            for n, (adds, size) in enumerate(steps):
                if adds or not live:
                    content = n.to_bytes(2, "big") * (size // 2)
                    live.append((store.put(content), content))
                else:
                    store.release(live.pop(size % len(live))[0])
                assert all(store.view(ref) == content for ref, content in live)
        finally:
            store.close()

    def test_no_memory_for_a_put(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A put that fails half-way raises and keeps nothing."""
        def full(fd: int, piece: memoryview, offset: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shipping, "write_at", full)
        with pytest.raises(OSError, match="No space"):
            store.put(bytes(MIB))
        assert sum(arena.live_bytes for arena in store._arenas) == 0

    def test_where_there_is_no_memfd(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
        """Unlinked temporary files do the same work and leave no name behind."""
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        ref = store.put(b"on disk" * 1000)
        assert store.view(ref) == b"on disk" * 1000
        assert os.listdir(str(tmp_path)) == []


class TestAdopt:
    def test_adopts_without_copying(self, store: BlobStore) -> None:
        """A worker's memfd becomes a blob as it is, of any length."""
        fd = os.memfd_create("result")
        os.write(fd, b"r" * 5001)
        ref = store.adopt(fd, 5001)
        assert store.segment(ref).fd == fd
        assert store.view(ref) == b"r" * 5001
        assert ref.digest == digest_of(b"r" * 5001)

    def test_release_closes_its_descriptor(self, store: BlobStore) -> None:
        """An adopted file is closed with its last reference."""
        fd = os.memfd_create("result")
        os.ftruncate(fd, 10)
        store.release(store.adopt(fd, 10))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_adopting_known_bytes_keeps_one_copy(self, store: BlobStore) -> None:
        """If the bytes are here already the file is closed at once."""
        ref = store.put(b"k" * 8192)
        fd = os.memfd_create("result")
        os.write(fd, b"k" * 8192)
        assert store.adopt(fd, 8192) == ref
        assert store.segment(ref).fd != fd
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_too_short_a_file_is_refused(self, store: BlobStore) -> None:
        """A file shorter than said would kill whoever reads its end; it is refused and closed."""
        fd = os.memfd_create("result")
        os.ftruncate(fd, 4096)
        with pytest.raises(ValueError, match="shorter"):
            store.adopt(fd, 5000)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


class TestMapping:
    def test_writable_and_private(self, store: BlobStore) -> None:
        """A task may write to its argument; neither the blob nor another task sees it."""
        ref = store.put(b"a" * 10_000)
        fd, offset, size, _ = store.segment(ref)
        first, second = map_segment(fd, offset, size), map_segment(fd, offset, size)
        first[:3] = b"xyz"
        assert bytes(first[:4]) == b"xyza"
        assert bytes(second[:4]) == b"aaaa"
        assert store.view(ref) == b"a" * 10_000

    def test_needs_no_descriptor(self) -> None:
        """A mapping outlives the descriptor it was made from and keeps none itself."""
        before = open_descriptors()
        fd = os.memfd_create("x")
        os.write(fd, b"m" * 6000)
        view = map_segment(fd, 0, 6000)
        os.close(fd)
        assert view == b"m" * 6000
        assert open_descriptors() == before

    def test_unmapped_with_its_last_view(self) -> None:
        """The mapping goes when nothing made from it is left, and not before."""
        fd = os.memfd_create("to-be-unmapped")
        os.ftruncate(fd, 6000)
        view = map_segment(fd, 0, 6000)
        os.close(fd)
        part = view[10:20]
        del view
        with open("/proc/self/maps") as maps:
            assert "to-be-unmapped" in maps.read()
        assert bytes(part) == bytes(10)
        del part
        with open("/proc/self/maps") as maps:
            assert "to-be-unmapped" not in maps.read()

    def test_failure_is_an_oserror(self) -> None:
        """What cannot be mapped raises and names the size."""
        with pytest.raises(OSError, match="10,000"):
            map_segment(-1, 0, 10_000)

    @pytest.mark.parametrize("kernel_helps", [True, False])
    def test_settled_mappings_survive_reuse(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch,
                                            kernel_helps: bool) -> None:
        """An argument that a task kept is unchanged when the space of its blob is used for another."""
        if not kernel_helps:
            monkeypatch.setattr(memory, "_MADV_POPULATE_WRITE", 9999)
        ref = store.put(b"old" * 5000)
        segment = store.segment(ref)
        mappings = Mappings()
        kept = mappings.map(segment.fd, segment.offset, segment.size_bytes)
        mappings.map(segment.fd, segment.offset, segment.size_bytes)  # dropped at once
        assert mappings.settle() == 1
        store.release(ref)
        assert store.segment(store.put(b"new" * 5000)).offset == segment.offset
        assert kept == b"old" * 5000
        assert mappings.settle() == 0


class TestTake:
    def test_what_was_adopted_is_mapped(self, store: BlobStore) -> None:
        """The bytes of a worker's file are handed over without a copy and outlive the store's reference."""
        fd = os.memfd_create("handed-over")
        os.write(fd, b"r" * 5001)
        view = store.take(store.adopt(fd, 5001))
        assert view == b"r" * 5001
        view[0] = 0
        with open("/proc/self/maps") as maps:
            assert "handed-over" in maps.read()
        assert store._blobs == {}

    @pytest.mark.parametrize("size", [0, 1, 5 * MIB + 3])
    def test_what_lies_in_space_used_again_is_copied(self, store: BlobStore, size: int) -> None:
        """A function that returns its argument gives bytes that stay when the argument's space is used again."""
        content = os.urandom(size)
        ref = store.put(content)
        fd = os.memfd_create("same bytes")
        os.write(fd, content)
        assert store.adopt(fd, size) == ref
        view = store.take(ref)
        store.release(ref)
        store.put(bytes(size))
        assert view == content
        assert not view.readonly


def shared(content: bytes) -> int:
    """A descriptor of a new file with this content."""
    fd = os.memfd_create("on loan")
    os.write(fd, content)
    return fd


class TestLoans:
    """Files that their owner uses again: not before nobody sees them, and never if a forked child may."""

    def test_returned_when_released(self, store: BlobStore) -> None:
        """A file nobody mapped goes back with the last reference."""
        returns: list[bool] = []
        ref = store.adopt(shared(b"r" * 5000), 5000, None, returns.append)
        store.retain(ref)
        store.release(ref)
        assert not returns
        store.release(ref)
        assert returns == [True]

    def test_known_bytes_are_returned_at_once(self, store: BlobStore) -> None:
        """If the same bytes are here already the file is not needed."""
        returns: list[bool] = []
        ref = store.put(b"r" * 5000)
        assert store.adopt(shared(b"r" * 5000), 5000, ref.digest, returns.append) == ref
        assert returns == [True]

    def test_returned_when_the_last_mapping_is_gone(self) -> None:
        """Not while anything made from a mapping lives; the finalizer only wakes somebody, who then reaps."""
        wakes: list[None] = []
        returns: list[bool] = []
        store = BlobStore(wake=lambda: wakes.append(None))
        before = open_descriptors()
        ref = store.adopt(shared(b"r" * 5000), 5000, None, returns.append)
        store.retain(ref)
        first, second = store.take(ref), store.take(ref)
        assert open_descriptors() == before
        part = second[10:20]
        del second
        store.reap()
        assert not wakes
        del first
        assert len(wakes) == 1
        store.reap()
        assert not returns
        assert part == b"r" * 10
        del part
        assert not returns
        store.reap()
        assert returns == [True]
        store.close()

    def test_not_reusable_after_a_fork(self, store: BlobStore) -> None:
        """What was mapped when the process forked may be seen by the child for ever."""
        returns: list[bool] = []
        old = store.take(store.adopt(shared(b"o" * 5000), 5000, None, returns.append))
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        new = store.take(store.adopt(shared(b"n" * 5000), 5000, None, returns.append))
        del new
        store.reap()
        assert returns == [True]
        del old
        store.reap()
        assert returns == [True, False]

    def test_mappings_outlive_the_store(self) -> None:
        """A result is good after its executor was closed, and then wakes nobody."""
        wakes: list[None] = []
        store = BlobStore(wake=lambda: wakes.append(None))
        view = store.take(store.adopt(shared(b"r" * 5000), 5000, None, lambda _: None))
        store.close()
        assert view == b"r" * 5000
        del view
        assert not wakes


class TestWriter:
    def test_pieces_in_order_become_the_blob(self, store: BlobStore) -> None:
        """A blob received in pieces is there once finished, not before."""
        content = os.urandom(10_000)
        ref = BlobRef(digest_of(content), len(content))
        writer = store.writer(ref)
        writer.write(0, content[:6000])
        assert not writer.is_complete
        writer.write(6000, content[6000:])
        assert writer.is_complete
        assert not store.has(ref)
        assert writer.finish() == ref
        assert store.view(ref) == content

    @pytest.mark.parametrize(("offset", "size"), [(1, 10), (0, 101)])
    def test_a_piece_out_of_place_is_refused(self, store: BlobStore, offset: int, size: int) -> None:
        """Gaps and excess are refused when they come."""
        writer = store.writer(BlobRef(b"d" * 16, 100))
        with pytest.raises(ValueError, match="does not follow"):
            writer.write(offset, bytes(size))
        writer.abandon()

    def test_other_bytes_than_named(self, store: BlobStore) -> None:
        """Bytes that do not have the digest never become the blob."""
        ref = BlobRef(digest_of(b"right"), 5)
        writer = store.writer(ref)
        writer.write(0, b"wrong")
        with pytest.raises(ValueError, match="not those"):
            writer.finish()
        assert not store.has(ref)

    def test_received_space_is_used_again(self, store: BlobStore) -> None:
        """What comes in one after the other takes the same memory, for new pages cost more than copying."""
        places = set()
        for content in (b"a" * 5000, b"b" * 5000):
            writer = store.writer(BlobRef(digest_of(content), 5000))
            writer.write(0, content)
            ref = writer.finish()
            places.add(store.segment(ref).offset)
            assert store.view(ref) == content
            store.release(ref)
        assert len(places) == 1

    @pytest.mark.parametrize("keeps", [False, True])
    def test_closing_under_a_writer(self, keeps: bool) -> None:
        """A store closed while a blob comes in keeps the file until the writer is done with it, and then none."""
        before = open_descriptors()
        store = BlobStore(keeps_received=keeps)
        writer = store.writer(BlobRef(b"d" * 16, 100))
        store.close()
        writer.write(0, bytes(50))
        writer.abandon()
        writer.abandon()
        assert open_descriptors() == before

    @pytest.mark.parametrize("size", [-1, 1 << 60])
    def test_absurd_sizes(self, store: BlobStore, size: int) -> None:
        """A size that no file can have is refused, and no descriptor is left."""
        before = open_descriptors()
        with pytest.raises((ValueError, OSError)):
            store.writer(BlobRef(b"d" * 16, size))
        assert open_descriptors() == before
