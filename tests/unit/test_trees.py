"""Trees of files: what is packed is placed again, and nothing ever outside the directory that was meant."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec import trees
from distexec.messages import BlobRef, File
from distexec.trees import STORED_NS, FileWriter, Folder, Placing, Source, check_path, copy_file, pack, place, split

LARGE = b"large " * (trees.INLINE_BYTES // 6 + 1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A directory to write into, with a neighbour that must not be touched."""
    (tmp_path / "target").mkdir()
    (tmp_path / "outside").mkdir()
    with Folder(str(tmp_path / "target")) as folder:
        yield folder
    assert not list((tmp_path / "outside").iterdir()), "something was written outside"


def ref_of(content: bytes) -> BlobRef:
    from distexec.shipping import digest_of
    return BlobRef(digest_of(content), len(content))


def found(directory: Path) -> dict[str, bytes]:
    """All files below a directory, hidden and temporary ones included."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TestPaths:
    @pytest.mark.parametrize("path", ["a", "a/b", "a/b/", "..a", "a..", "ä/ö", ".hidden", "a b", "x" * 255])
    def test_relative_paths_pass(self, path: str) -> None:
        """What leads downwards is taken apart."""
        assert "/".join(check_path(path)) == path.rstrip("/")

    @pytest.mark.parametrize("path", [
        "", "/", "..", "../a", "a/..", "a/../b", "/etc/passwd", "a//b", "./a", "a/.", ".", "a\0b", "C:", "C:/x", "c:\\x",
        "\ud800", "x/" * 3000 + "x", "//server/share"])
    def test_others_are_refused(self, path: str) -> None:
        """Each with its reason, and nothing is opened."""
        with pytest.raises(ValueError, match="cannot be a file's name"):
            check_path(path)

    @given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\0", "C:"])).map("/".join))
    def test_whatever_passes_stays_inside(self, path: str) -> None:
        """No string that is accepted names anything outside."""
        try:
            parts = check_path(path)
        except ValueError:
            return
        assert os.path.normpath("/root/" + "/".join(parts)).startswith("/root/")
        assert not {"..", ".", ""} & set(parts)


class TestPack:
    def test_a_directory_goes_and_comes_back(self, tmp_path: Path, folder: Folder) -> None:
        """pack → place: contents, modes and empty directories; large files by their digest."""
        source = tmp_path / "source"
        (source / "sub" / "deep").mkdir(parents=True)
        (source / "empty").mkdir()
        (source / "a.txt").write_text("a")
        (source / "sub" / "run.sh").write_text("#!/bin/sh\n")
        (source / "sub" / "run.sh").chmod(0o750)
        (source / "sub" / "deep" / "large").write_bytes(LARGE)
        tree, sources = pack(str(source))
        assert [file.path for file in tree] == ["a.txt", "empty/", "sub/deep/large", "sub/run.sh"]
        assert [each.ref for each in sources] == [ref_of(LARGE)]
        place(tree, folder, Placing(lambda ref: sources[0].path))
        target = tmp_path / "target"
        assert found(target) == {"a.txt": b"a", "sub/run.sh": b"#!/bin/sh\n", "sub/deep/large": LARGE}
        assert stat.S_IMODE((target / "sub" / "run.sh").stat().st_mode) == 0o750
        assert (target / "empty").is_dir()

    def test_names_and_skip(self, tmp_path: Path) -> None:
        """Only what is named, and not what is skipped."""
        for name in ("pkg/a.py", "pkg/__pycache__/a.pyc", "other.py", "third.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text(name)
        tree, _ = pack(str(tmp_path), ["pkg", "other.py"], skip=lambda path, is_directory: path.endswith("__pycache__"))
        assert [file.path for file in tree] == ["other.py", "pkg/a.py"]

    def test_links_that_stay_inside_are_followed(self, tmp_path: Path) -> None:
        """A link is what it leads to."""
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "a").write_text("a")
        (tmp_path / "alias").symlink_to("real")
        (tmp_path / "b").symlink_to("real/a")
        tree, _ = pack(str(tmp_path))
        assert {file.path: file.content for file in tree} == {"alias/a": b"a", "b": b"a", "real/a": b"a"}

    @pytest.mark.parametrize("target", ["/etc/passwd", "/etc", "../secret", "nowhere"])
    def test_links_that_lead_out_are_refused(self, tmp_path: Path, target: str) -> None:
        """Else whatever the link leads to would travel."""
        (tmp_path / "secret").write_text("secret")
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "link").symlink_to(target)
        with pytest.raises(OSError, match="leads out of"):
            pack(str(tmp_path / "source"))

    def test_a_directory_in_itself(self, tmp_path: Path) -> None:
        """A loop of links ends with an error."""
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "again").symlink_to(tmp_path)
        with pytest.raises(OSError, match="that it is in"):
            pack(str(tmp_path))

    def test_devices_pipes_and_sockets_are_refused(self, tmp_path: Path) -> None:
        """Reading them might never end."""
        os.mkfifo(tmp_path / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            for path in (tmp_path / "pipe", Path("/dev/zero")):
                with pytest.raises(OSError, match="device, pipe or socket"):
                    pack(str(path.parent), [path.name])
            with pytest.raises(OSError, match="No such device"):
                pack(str(tmp_path), ["socket"])

    def test_one_that_changes_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is read again, and refused if it goes on changing."""
        path = tmp_path / "busy"
        path.write_bytes(LARGE)
        real, left = os.pread, 1

        def pread(fd: int, size: int, offset: int) -> bytes:
            nonlocal left
            if left and not offset:
                left -= 1
                path.write_bytes(LARGE + bytes(left))
            return real(fd, size, offset)

        monkeypatch.setattr(os, "pread", pread)
        (file,), _ = pack(str(tmp_path), ["busy"])
        assert file.content == ref_of(LARGE)
        left = 5
        with pytest.raises(OSError, match="changes while it is read"):
            pack(str(tmp_path), ["busy"])

    def test_a_source_that_changed_is_not_opened(self, tmp_path: Path) -> None:
        """Nor one that was replaced by another of the same size."""
        path = tmp_path / "large"
        path.write_bytes(LARGE)
        _, (source,) = pack(str(tmp_path))
        os.close(source.open())
        (tmp_path / "new").write_bytes(LARGE)
        os.utime(tmp_path / "new", ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
        (tmp_path / "new").replace(path)
        with pytest.raises(OSError, match="was changed"):
            source.open()

    def test_what_is_known_is_not_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unless it changed, or was so young that it may change and look the same."""
        path = tmp_path / "file"
        path.write_bytes(LARGE)
        known: trees.Known = {}
        pack(str(tmp_path), known=known)
        assert not known, "it is too young"
        os.utime(path, (1, 1))
        first, _ = pack(str(tmp_path), known=known)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", None)
            assert pack(str(tmp_path), known=known)[0] == first
        path.write_bytes(LARGE[::-1])
        assert pack(str(tmp_path), known=known)[0] != first

    def test_totals_and_parts(self, tmp_path: Path) -> None:
        """What is more than a message holds becomes references, or several messages."""
        for number in range(200):
            (tmp_path / f"{number:03}").write_bytes(bytes(40_000))
        tree, sources = pack(str(tmp_path))
        inline = [file for file in tree if isinstance(file.content, bytes)]
        assert len(inline) == trees.MESSAGE_BYTES // 40_035
        assert len(sources) == 200 - len(inline)
        whole, sources = pack(str(tmp_path), total_bytes=None)
        parts = list(split(whole))
        assert not sources
        assert tuple(file for part in parts for file in part) == whole
        assert len(parts) == 2
        assert not list(split(()))


class TestPlace:
    @pytest.mark.parametrize("path", ["../outside/x", "/tmp/x", "a/../../outside/x", "a\0b", "", "link/x", "link"])
    def test_nothing_is_written_elsewhere(self, tmp_path: Path, folder: Folder, path: str) -> None:
        """Neither by its name nor by links that lie there."""
        (tmp_path / "target" / "link").symlink_to(tmp_path / "outside")
        with pytest.raises((ValueError, OSError)):
            place((File(path, 0o644, b"x"),), folder)
        assert found(tmp_path / "target") == {}

    def test_a_link_in_the_place_of_a_file(self, tmp_path: Path, folder: Folder) -> None:
        """It is not written through."""
        (tmp_path / "victim").write_text("victim")
        (tmp_path / "target" / "x").symlink_to(tmp_path / "victim")
        with pytest.raises(FileExistsError, match="is a link"):
            place((File("x", 0o644, b"evil"),), folder)
        assert (tmp_path / "victim").read_text() == "victim"

    def test_devices_and_directories_are_not_replaced(self, tmp_path: Path, folder: Folder) -> None:
        """Somebody needs them."""
        os.mkfifo(tmp_path / "target" / "pipe")
        (tmp_path / "target" / "dir").mkdir()
        for name in ("pipe", "dir"):
            with pytest.raises(FileExistsError, match="is not replaced"):
                place((File(name, 0o644, b"x"),), folder)

    def test_a_file_is_replaced_at_once(self, tmp_path: Path, folder: Folder) -> None:
        """Who has the old one open goes on with it."""
        (tmp_path / "target" / "x").write_text("old")
        with (tmp_path / "target" / "x").open() as old:
            place((File("x", 0o600, b"new"),), folder)
            assert old.read() == "old"
        assert (tmp_path / "target" / "x").read_text() == "new"

    def test_special_bits_are_not_taken_over(self, tmp_path: Path, folder: Folder) -> None:
        """setuid above all."""
        place((File("x", 0o6755, b"x"),), folder)
        assert stat.S_IMODE((tmp_path / "target" / "x").stat().st_mode) == 0o755

    def test_links_to_shared_files(self, tmp_path: Path, folder: Folder) -> None:
        """Large files are linked to, small and executable ones copied; one that was written to is refused."""
        stored = tmp_path / "stored"
        stored.write_bytes(LARGE)
        stored.chmod(0o444)
        os.utime(stored, ns=(STORED_NS, STORED_NS))
        ref = ref_of(LARGE)
        tree = (File("exe", 0o755, ref), File("large", 0o644, ref))
        place(tree, folder, Placing(lambda _: str(stored), len(LARGE)))
        assert (tmp_path / "target" / "large").samefile(stored)
        assert not (tmp_path / "target" / "exe").samefile(stored)
        assert stat.S_IMODE((tmp_path / "target" / "exe").stat().st_mode) == 0o755
        place(tree[1:], folder, Placing(lambda _: str(stored), len(LARGE) + 1))
        assert not (tmp_path / "target" / "large").samefile(stored)
        stored.chmod(0o644)
        stored.write_bytes(LARGE[::-1])
        with pytest.raises(OSError, match="a task wrote to"):
            place(tree[1:], folder, Placing(lambda _: str(stored), len(LARGE)))
        with pytest.raises(ValueError, match="its digest"):
            place(tree[:1], folder, Placing(lambda _: str(stored), len(LARGE)))


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With files that have no name until they are whole, and on systems without."""
    if request.param == "named":
        monkeypatch.setattr(trees, "_TMPFILE", 0)
    return str(request.param)


@pytest.mark.usefixtures("way")
class TestWriter:
    def test_pieces_become_a_file(self, tmp_path: Path, folder: Folder) -> None:
        """It appears once it is whole."""
        writer = FileWriter(folder, "a/b", 0o640, ref_of(b"onetwo"), mtime_ns=STORED_NS)
        writer.write(0, b"one")
        assert not (tmp_path / "target" / "a" / "b").exists()
        writer.write(3, b"two")
        assert writer.is_complete
        writer.finish()
        assert found(tmp_path / "target") == {"a/b": b"onetwo"}
        assert (tmp_path / "target" / "a" / "b").stat().st_mtime_ns == STORED_NS

    def test_a_lying_digest(self, tmp_path: Path, folder: Folder) -> None:
        """Nothing is left of it, and what was there stays."""
        (tmp_path / "target" / "x").write_text("old")
        writer = FileWriter(folder, "x", 0o644, BlobRef(bytes(16), 3))
        writer.write(0, b"new")
        with pytest.raises(ValueError, match="not those that its digest names"):
            writer.finish()
        assert found(tmp_path / "target") == {"x": b"old"}

    def test_size_lies(self, tmp_path: Path, folder: Folder) -> None:
        """More than was said is not written, less is not believed."""
        writer = FileWriter(folder, "x", 0o644, ref_of(b"123"))
        for offset, piece in ((0, b"1234"), (1, b"1"), (-1, b"1")):
            with pytest.raises(ValueError, match="does not follow"):
                writer.write(offset, piece)
        writer.write(0, b"12")
        with pytest.raises(ValueError, match="digest"):
            writer.finish()
        assert found(tmp_path / "target") == {}

    def test_an_abandoned_file(self, tmp_path: Path, folder: Folder) -> None:
        """No trace, and no descriptor."""
        before = len(os.listdir("/proc/self/fd"))
        writer = FileWriter(folder, "x", 0o644, ref_of(b"123"))
        writer.write(0, b"1")
        writer.abandon()
        writer.abandon()
        assert found(tmp_path / "target") == {}
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_link_that_appears_meanwhile(self, tmp_path: Path, folder: Folder) -> None:
        """Between the opening and the end the place was taken by a link: it is not followed."""
        writer = FileWriter(folder, "sub/x", 0o644, ref_of(b"123"))
        writer.write(0, b"123")
        (tmp_path / "target" / "sub" / "x").symlink_to(tmp_path / "outside" / "y")
        with pytest.raises(FileExistsError):
            writer.finish()

    def test_a_directory_that_is_exchanged_meanwhile(self, tmp_path: Path, folder: Folder) -> None:
        """What was opened is written into, wherever its name leads by then."""
        writer = FileWriter(folder, "sub/x", 0o644, ref_of(b"123"))
        (tmp_path / "target" / "sub").rename(tmp_path / "target" / "moved")
        (tmp_path / "target" / "sub").symlink_to(tmp_path / "outside")
        writer.write(0, b"123")
        writer.finish()
        assert found(tmp_path / "target") == {"moved/x": b"123"}

    def test_many_writers_of_one_name(self, tmp_path: Path, folder: Folder) -> None:
        """The last one wins, and at no moment is there a mixture."""
        contents = [bytes([number]) * 300_000 for number in range(8)]

        def write(content: bytes) -> None:
            for _ in range(5):
                with open(os.path.join(str(tmp_path), str(content[0])), "wb") as file:
                    file.write(content)
                fd = os.open(file.name, os.O_RDONLY)
                copy_file(fd, FileWriter(folder, "x", 0o644, ref_of(content)))
                os.close(fd)

        threads = [threading.Thread(target=write, args=(content,)) for content in contents]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if (tmp_path / "target" / "x").exists():
                assert (tmp_path / "target" / "x").read_bytes() in contents
        assert [path.name for path in (tmp_path / "target").iterdir()] == ["x"]


def test_source_names_what_is_wrong(tmp_path: Path) -> None:
    """A file that is gone is named."""
    (tmp_path / "x").write_bytes(LARGE)
    _, (source,) = pack(str(tmp_path))
    assert isinstance(source, Source)
    (tmp_path / "x").unlink()
    with pytest.raises(FileNotFoundError, match="x"):
        source.open()
