"""Laws of what a session's processes are given, and of walking the tree of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distexec import descent, template
from distexec.messages import SessionSpec
from distexec.starters import environment


def test_main_has_the_scripts_file(tmp_path: Path) -> None:
    """`__main__.__file__` is the client's script, found from its directory, where this machine has it."""
    (tmp_path / "script.py").touch()
    spec = SessionSpec(directory=str(tmp_path), argv=("script.py", "-x"))
    assert template.script_of(spec) == str(tmp_path / "script.py")
    assert template.script_of(SessionSpec(directory="/no/such", argv=("script.py",))) is None
    assert template.script_of(SessionSpec(argv=("-c",))) is None
    assert template.script_of(SessionSpec()) is None


def test_main_has_no_file_for_a_module_of_a_package(tmp_path: Path) -> None:
    """A module run by `-m` out of a package cannot be run by its path, so its path is not offered."""
    for name in ("__init__.py", "module.py"):
        (tmp_path / name).touch()
    assert template.script_of(SessionSpec(argv=(str(tmp_path / "module.py"),))) is None


def test_command_has_the_sessions_warnings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warning filters are the session's, not this process's; it is this interpreter."""
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    command = template.command(7, SessionSpec(warnings=("ignore", "default::UserWarning")))
    assert command[0] == sys.executable
    assert [each for each in command if each.startswith("-W")] == ["-Wignore", "-Wdefault::UserWarning"]
    assert f"main(7, {os.getpid()})" in command[-1]


def test_environment_is_the_sessions_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables come from the session, or from this process if it has none; where Python lives is this machine's."""
    monkeypatch.setenv("DISTEXEC_SECRET", "s")
    monkeypatch.setenv("PYTHONHOME", "/here")
    assert environment(SessionSpec(environ={"A": "1", "PYTHONHOME": "/there", "DISTEXEC_SECRET": "s"})) == {
        "A": "1", "PYTHONHOME": "/here"}
    assert "DISTEXEC_SECRET" not in environment(SessionSpec())
    monkeypatch.delenv("PYTHONHOME")
    assert environment(SessionSpec(environ={"PYTHONHOME": "/there"})) == {}


def test_tree_ends_whole() -> None:
    """Ending a tree ends a process, its children and theirs, and nothing else."""
    script = "sleep 1000 & sh -c 'sleep 1000 & sleep 1000 & echo up; wait' & wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as tree, \
            subprocess.Popen(["sleep", "1000"]) as bystander:
        assert tree.stdout is not None
        assert tree.stdout.readline() == b"up\n"
        assert len(descent._descendants(tree.pid)) >= 4
        descent.end_tree(tree.pid)
        assert tree.wait(10) == -signal.SIGKILL
        assert tree.stdout.read() == b""  # nobody is left who could write to it
        assert bystander.poll() is None
        bystander.kill()


def test_imports_little() -> None:
    """Every session waits for the template's imports before its first result."""
    heavy = {"asyncio", "cloudpickle", "concurrent.futures", "ctypes", "hashlib", "importlib.abc", "inspect", "logging",
             "pathlib", "psutil", "random", "shutil", "ssl", "tempfile"}
    code = ("import sys; sys.modules['typing_extensions'] = None; import distexec.template; "
            f"print(*sorted({heavy!r} & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout
    assert found.split() == []
