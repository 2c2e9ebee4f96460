"""The journal alone: what was written is there again, and whatever is wrong with the file is said and left as it is."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from distexec.errors import JournalError
from distexec.journal import CANCELLED, Function, Journal, NodeRow, Result, Submission
from distexec.messages import BlobRef, Options, OutcomeKind, SessionSpec

ROOT = Path(__file__).parents[2]
LARGE = bytes(range(256)) * 8192
REF = BlobRef(b"d" * 16, len(LARGE))


def no_blob(ref: BlobRef) -> memoryview:
    raise AssertionError(f"{ref} was not to be read")


def submission(seq: int, key: bytes = b"") -> Submission:
    return Submission(seq, 1, b"call %d" % seq, (), None, 3, key)


def result(seq: int, kind: int = OutcomeKind.VALUE) -> Result:
    return Result(seq, kind, b"value %d" % seq, (), 7, "n1", 1)


def filled(path: Path) -> Path:
    """A journal of three calls, the first ended."""
    journal = Journal(path)
    calls = [submission(1, b"k1"), submission(2, b"k2"), submission(3)]
    journal.write([Function(1, b"fn", ())], calls, [result(1)], no_blob)
    journal.close()
    return path


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    """Calls, outcomes, functions, nodes, values by name; numbers go on; the file is the owner's alone."""
    path = filled(tmp_path / "run.db")
    assert path.stat().st_mode & 0o777 == 0o600
    journal = Journal(path)
    assert not journal.created
    assert journal.index() == [(1, b"k1", 0), (2, b"k2", None), (3, b"", None)]
    assert journal.unfinished() == [submission(2, b"k2"), submission(3)]
    assert journal.result(1) == result(1)
    assert journal.result(2) is None
    assert journal.function(1) == Function(1, b"fn", ())
    assert journal.last() == (3, 1)
    journal.set_nodes([NodeRow("b:1", None, True), NodeRow("a:1", 2, True)])
    journal.set_nodes([NodeRow("b:1", 4, True)])
    assert journal.nodes() == [NodeRow("b:1", 4, True), NodeRow("a:1", 2, True)]
    journal.free_nodes(["a:1"])
    assert journal.nodes() == [NodeRow("b:1", 4, False), NodeRow("a:1", 2, True)]
    journal.free_nodes()
    assert journal.nodes() == [NodeRow("b:1", 4, False), NodeRow("a:1", 2, False)]
    journal.set(spec=SessionSpec(argv=("x",)), life=3)
    assert journal.get_as("spec", SessionSpec) == SessionSpec(argv=("x",))
    assert (journal.get("life"), journal.get("nothing", 5)) == (3, 5)
    journal.close()


def test_options_and_large_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options come back as they were; a large buffer is stored once, in pieces."""
    monkeypatch.setattr("distexec.journal.PIECE_BYTES", 1 << 20)
    journal = Journal(tmp_path / "run.db")
    calls = [Submission(seq, 1, b"", (REF, b"small"), Options(2.0, 1, "n", True), 0, b"") for seq in (1, 2)]
    journal.write([], calls, [Result(1, 0, b"", (REF,), 1, "n", 1)], lambda ref: memoryview(LARGE))
    assert journal.unfinished() == calls[1:]
    assert journal.blob(REF) == LARGE
    assert journal._db.execute("SELECT count(*) FROM blobs").fetchone() == (2,)
    with pytest.raises(JournalError, match="damaged"):
        journal.blob(BlobRef(b"e" * 16, 5))
    journal.close()


def test_many_rows(tmp_path: Path) -> None:
    """Any number of rows, whatever its divisors."""
    journal = Journal(tmp_path / "run.db")
    rows = [submission(seq) for seq in range(1, 3334)]
    journal.write([], rows, [result(seq, CANCELLED) for seq in range(1, 3000)], no_blob)
    assert journal.unfinished() == rows[2999:]
    assert list(journal.results(range(1, 3100))) == list(range(1, 3000))
    journal.close()


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A batch that fails half way leaves nothing."""
    journal = Journal(tmp_path / "run.db")
    with pytest.raises(AssertionError):
        journal.write([], [submission(1), Submission(2, 1, b"", (REF,), None, 3, b"")], [], no_blob)
    assert journal.index() == []
    journal.close()


def test_a_killed_writer_loses_nothing_it_was_told_is_written(tmp_path: Path) -> None:
    """kill -9 → what `write` returned for is there, without any repair by hand."""
    path = tmp_path / "run.db"
    code = f"""
from distexec.journal import *
journal = Journal({str(path)!r})
for seq in range(1, 100000):
    journal.write([], [Submission(seq, 1, b"x" * 1000, (), None, 3, b"")], [], None)
    print(seq, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line == "500\n":
                writer.send_signal(signal.SIGKILL)
                told = 500
            told = int(line)
    journal = Journal(path)
    assert journal.last()[0] in (told, told + 1)
    journal.close()


def test_a_call_made_anew_replaces_the_older(tmp_path: Path) -> None:
    """Of calls with one key the last counts; those without a key all do."""
    journal = Journal(tmp_path / "run.db")
    journal.write([], [submission(1, b"k"), submission(2), submission(3)], [result(1, OutcomeKind.TIMEOUT)], no_blob)
    journal.write([], [submission(4, b"k")], [], no_blob)
    assert journal.calls() == [(2, b"", None), (3, b"", None), (4, b"k", None)]
    journal.close()


# ---- what is refused


def refusal(path: Path, **arguments: bool) -> str:
    """What opening says; the file is left as it was."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(JournalError) as caught:
        Journal(path, **arguments)
    assert before is None or path.read_bytes() == before
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_journal_in_use(tmp_path: Path) -> None:
    """By another process: it is named; by this one: it is said; once they let go it opens."""
    path = filled(tmp_path / "run.db")
    journal = Journal(path)
    assert "in use by another executor of this process" in refusal(path)
    code = f"from distexec.journal import Journal\ntry: Journal({str(path)!r})\nexcept Exception as error: print(error)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    assert f"in use by process {os.getpid()}" in said
    journal.write([], [submission(9)], [], no_blob)
    journal.close()
    Journal(path).close()


def test_no_file(tmp_path: Path) -> None:
    """A missing file that must exist, a missing directory, a directory, a link: said, and nothing is made."""
    assert "no such file" in refusal(tmp_path / "none.db", must_exist=True)
    assert "no directory" in refusal(tmp_path / "none" / "run.db")
    assert "cannot be opened" in refusal(tmp_path)
    link = tmp_path / "link.db"
    link.symlink_to(filled(tmp_path / "run.db"))
    assert "symbolic link" in refusal(link)
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path / "pipe")


def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    """Readable by others, or owned by another: refused."""
    path = filled(tmp_path / "run.db")
    path.chmod(0o640)
    assert f"chmod 600 {path}" in refusal(path)
    path.chmod(0o600)
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
        assert "belongs to user 12345" in refusal(path)


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_files_of_somebody_else_beside_it(tmp_path: Path, suffix: str) -> None:
    """SQLite would believe what stands in them: a link, one that others own or can write is refused, and stays."""
    path = filled(tmp_path / "run.db")
    journal = Journal(path)
    journal.set(life=7)
    beside = Path(f"{path}{suffix}")
    planted = Path(f"{path}-wal").read_bytes()
    journal.close()
    assert list(tmp_path.iterdir()) == [path]
    beside.write_bytes(planted)
    beside.chmod(0o666)
    assert f"chmod 600 {beside}" in refusal(path)
    beside.chmod(0o600)
    if os.getuid() == 0:
        os.chown(beside, 12345, -1)
        assert "belongs to user 12345" in refusal(path)
    beside.unlink()
    beside.symlink_to(tmp_path / "elsewhere")
    assert f"{beside} beside the journal cannot be opened" in refusal(path)
    assert set(tmp_path.iterdir()) == {path, beside}
    beside.unlink()
    os.mkfifo(beside)
    assert "regular file" in refusal(path)


def test_the_log_of_a_killed_process_is_used(tmp_path: Path) -> None:
    """One's own -wal file is no stranger's: what it has counts, and nothing else lies about meanwhile."""
    path = filled(tmp_path / "run.db")
    code = f"import os; from distexec.journal import Journal; Journal({str(path)!r}).set(life=7); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert {each.name for each in tmp_path.iterdir()} == {"run.db", "run.db-wal"}
    journal = Journal(path)
    assert journal.get("life") == 7
    journal.close()
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_journal(tmp_path: Path) -> None:
    """Text, another program's database, a damaged one: named, and left as it is."""
    path = tmp_path / "run.db"
    path.write_text("not a database at all, but long enough to look like one" * 100)
    path.chmod(0o600)
    assert "damaged or no journal" in refusal(path)
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE other(x)")
    other.close()
    path.chmod(0o600)
    assert "no journal of distexec" in refusal(path)
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside what is somebody else's"


def test_a_damaged_journal(tmp_path: Path) -> None:
    """Bytes overwritten in the middle: an error that says so when they are met, not a wrong answer."""
    path = filled(tmp_path / "run.db")
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(JournalError, match="damaged"):
        Journal(path).index()


@pytest.mark.parametrize(("name", "value", "said"), [("format", 99, "format 99"), ("python", "2.7", "Python 2.7")])
def test_another_version(tmp_path: Path, name: str, value: object, said: str) -> None:
    """Another format or Python minor: refused, naming both."""
    path = filled(tmp_path / "run.db")
    journal = Journal(path)
    journal.set(**{name: value})
    journal.close()
    assert said in refusal(path)


def test_a_full_disk(tmp_path: Path) -> None:
    """The file cannot grow: an error that says what is safe and what to do; what was there is still there."""
    path = filled(tmp_path / "run.db")
    journal = Journal(path)
    journal._db.execute("PRAGMA max_page_count=12")
    with pytest.raises(JournalError, match="the disk is full; what was recorded is safe") as caught:
        journal.write([], [Submission(9, 1, LARGE[:200_000], (), None, 3, b"")], [], no_blob)
    assert f"distexec recover {path}" in str(caught.value)
    journal.close()
    journal = Journal(path)
    assert [seq for seq, _, _ in journal.index()] == [1, 2, 3]
    journal.close()


def test_a_forked_child_leaves_the_journal_alone(tmp_path: Path) -> None:
    """A child that gives up its parent's journal and ends normally takes neither the lock nor the log with it."""
    path = tmp_path / "run.db"
    code = f"""
import os, sys
from distexec.journal import *
journal = Journal({str(path)!r})
journal.write([], [Submission(1, 1, b"", (), None, 3, b"")], [], None)
child = os.fork()
if child == 0:
    journal.abandon()
    del journal
    sys.exit(0)
os.waitpid(child, 0)
journal.write([], [Submission(2, 1, b"", (), None, 3, b"")], [], None)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    journal = Journal(path)
    assert [seq for seq, _, _ in journal.index()] == [1, 2]
    journal.close()
