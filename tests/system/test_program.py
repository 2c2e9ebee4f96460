"""Programs as calls, and `distexec run`: brought along or found, what they say, how they end, and that nothing stays."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from distexec import ClusterExecutor, Program, TaskKilled
from distexec.cli import main
from tests.leaks import wait_until
from tests.system.conftest import Make

WAIT_S = 60.0


def script(directory: Path, text: str, mode: int = 0o755) -> Path:
    """Write a shell script."""
    path = directory / "tool.sh"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(mode)
    return path


def is_running(marker: str) -> bool:
    """Whether a process has this among its arguments."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_what_is_brought_along_runs_as_it_was_at_submit(make: Make, tmp_path: Path) -> None:
    """Arguments, environment, input, both outputs, exit code; a changed file is another program."""
    executor = make(1)
    tool = script(tmp_path, 'echo "one $1 $COLOUR"; cat; echo bad >&2; exit 3\n')
    program = Program(tool, env={"COLOUR": "red"}, stdin="input\n", text=True)
    first = executor.submit(program, 5)
    assert first.result(WAIT_S).returncode == 3
    script(tmp_path, "echo two\n")
    second = executor.submit(program)
    tool.unlink()
    done = first.result(WAIT_S)
    assert (done.stdout, done.stderr, done.args[1:]) == ("one 5 red\ninput\n", "bad\n", ["5"])
    assert second.result(WAIT_S).stdout == "two\n"


def test_what_is_found_on_the_node(make: Make) -> None:
    """A name is looked for there; bytes unless `text`."""
    done = make(1).submit(Program("echo"), "a", 1).result(WAIT_S)
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.args, done.returncode, done.stdout) == (["echo", "a", "1"], 0, b"a 1\n")


def test_a_time_limit_ends_what_it_started(make: Make) -> None:
    """`timeout` raises as subprocess does, with what was said until then, and leaves no process."""
    program = Program("sh", timeout=1.0)
    future = make(1).submit(program, "-c", "echo begun; sleep 4711.25 & sleep 4711.25")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        future.result(WAIT_S)
    assert caught.value.output == b"begun\n"
    assert not is_running("4711.25")


def test_kill_ends_what_it_started(make: Make) -> None:
    """`future.kill()` ends the program and its children."""
    future = make(1).submit(Program("sh"), "-c", "sleep 4712.25 & sleep 4712.25")
    assert wait_until(lambda: is_running("4712.25"), WAIT_S)
    future.kill()
    with pytest.raises(TaskKilled):
        future.result(WAIT_S)
    assert wait_until(lambda: not is_running("4712.25"), WAIT_S)


@pytest.mark.parametrize(("program", "kind", "word"), [
    (Program("no-such-program"), FileNotFoundError, "install it there"),
    (Program("/no/such/program"), FileNotFoundError, "on node"),
    (Program("ls", cwd="/no/such/directory"), FileNotFoundError, "no directory to run"),
    (Program("/etc/passwd"), PermissionError, "chmod"),
])
def test_what_cannot_be_started(make: Make, program: Program, kind: type[OSError], word: str) -> None:
    """The error says what, where, and what may help; the executor goes on."""
    executor = make(1)
    with pytest.raises(kind, match=word):
        executor.submit(program).result(WAIT_S)
    assert executor.submit(abs, -1).result(WAIT_S) == 1


def test_scripts_that_cannot_run(make: Make, tmp_path: Path) -> None:
    """No #! line; an interpreter that is not there."""
    executor = make(1)
    path = tmp_path / "bare"
    path.write_text("echo x\n")
    path.chmod(0o755)
    with pytest.raises(OSError, match="without a #! line"):
        executor.submit(Program(path)).result(WAIT_S)
    path.write_text("#!/no/such/interpreter\n")
    with pytest.raises(FileNotFoundError, match="what its #! line names"):
        executor.submit(Program(path)).result(WAIT_S)


def test_bad_arguments() -> None:
    """They are refused where they are given."""
    with pytest.raises(ValueError, match="timeout"):
        Program("x", timeout=0)
    with pytest.raises(TypeError, match="stdin"):
        Program("x", stdin="text")
    with pytest.raises(ValueError, match="path"):
        Program("")


# ---- distexec run


def test_run_once_per_set(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Each set is a run; output is whole, exit codes are told, the exit code says if any failed."""
    tool = script(tmp_path, 'echo "$1:$2"; exit $2\n')
    (tmp_path / "more").write_text("# no set\n\n0\n")
    assert main(["run", "-a", "0", "-a", "7", "--args-file", str(tmp_path / "more"), "--slots", "2", str(tool), "x"]) == 1
    out, err = capfdbinary.readouterr()
    assert sorted(out.split()) == [b"x:0", b"x:0", b"x:7"]
    assert b"x 7: exit code 7 on node 'local'" in err
    assert b"3 runs: 2 succeeded, 1 failed" in err


def test_run_with_files_and_prefix(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """`--file` is there under its name; `--prefix` marks each line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("a\nb")
    assert main(["run", "--file", "data.txt", "--prefix", "--slots", "1", "cat", "data.txt"]) == 0
    assert capfdbinary.readouterr() == (b"[local:1] a\n[local:1] b\n", b"")


@pytest.mark.parametrize(("arguments", "code", "word"), [
    (["-a", "'x", "echo"], 2, "No closing quotation"),
    (["--file", "no-such-file", "echo"], 2, "no such file"),
    (["--args-file", "no-such-file", "echo"], 1, "No such file"),
    (["--slots", "0", "echo"], 2, "max_workers"),
    (["no-such-program"], 1, "install it there"),
    (["--timeout", "-1", "echo"], 2, "timeout"),
])
def test_run_with_mistakes(arguments: list[str], code: int, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A line that says what is wrong, and no traceback."""
    assert main(["run", *arguments]) == code
    said = capfd.readouterr().err
    assert word in said
    assert "Traceback" not in said


def test_views_run_programs(make: Make, tmp_path: Path) -> None:
    """`options(timeout=)` ends a program like any task."""
    executor: ClusterExecutor = make(1)
    future = executor.options(timeout=1).submit(Program("sh"), "-c", "sleep 4713.25 & sleep 4713.25")
    with pytest.raises(TimeoutError):
        future.result(WAIT_S)
    assert wait_until(lambda: not is_running("4713.25"), WAIT_S)
    assert not os.listdir(tmp_path)
