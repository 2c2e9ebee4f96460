"""The `distexec` command: what it prints, with which exit code; never a traceback for what a user got wrong."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from distexec import __version__
from distexec.cli import main
from tests.agents import ROOT, AgentProcess

SECRET = "8f1c2e5a9b7d4460a3c1e8f2b5d79064"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a secret."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def run(*arguments: str) -> int:
    """Run the command in this process; what it would end with."""
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


# ---- secrets


def test_secret_new_and_show(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`secret new` makes a private file once and says where; `secret show` prints what is in it, and nothing else."""
    path = home / "distexec" / "secret"
    assert run("secret", "new") == 0
    said = capsys.readouterr()
    assert str(path) in said.out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text().strip()
    assert text not in said.out + said.err
    assert run("secret", "show") == 0
    assert capsys.readouterr() == (text + "\n", "")


def test_secret_new_never_overwrites(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second `secret new` leaves the first and says so."""
    run("secret", "new")
    path = home / "distexec" / "secret"
    before = path.read_bytes()
    capsys.readouterr()
    assert run("secret", "new") == 2
    said = capsys.readouterr()
    assert str(path) in said.err
    assert "exists" in said.err
    assert said.out == ""
    assert path.read_bytes() == before


def test_secret_in_another_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--file names another place, for both."""
    path = home / "deep" / "down" / "key"
    assert run("secret", "new", "--file", str(path)) == 0
    assert str(path) in capsys.readouterr().out
    assert run("secret", "show", "--file", str(path)) == 0
    assert capsys.readouterr().out.strip() == path.read_text().strip()
    assert run("secret", "new", "--file", str(home / "deep" / "down" / "key")) == 2


def test_secret_show_prefers_the_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`secret show` prints what would be used: the variable before the file, in any of its forms."""
    run("secret", "new")
    capsys.readouterr()
    monkeypatch.setenv("DISTEXEC_SECRET", SECRET)
    assert run("secret", "show") == 0
    from distexec.auth import Secret

    assert Secret.parse(capsys.readouterr().out.strip()) == Secret.parse(SECRET)


def test_secret_show_without_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a secret the text says where it was looked for and how to make one."""
    assert run("secret", "show") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "DISTEXEC_SECRET" in said.err
    assert str(home / "distexec" / "secret") in said.err
    assert "distexec secret new" in said.err


def test_secret_show_refuses_an_open_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that others can read is not used."""
    run("secret", "new")
    path = home / "distexec" / "secret"
    path.chmod(0o644)
    capsys.readouterr()
    assert run("secret", "show") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"chmod 600 {path}" in said.err


def test_secret_in_a_place_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    """A file in an impossible place is named, without a traceback."""
    assert run("secret", "new", "--file", "/proc/no/secret") == 1
    assert "/proc/no" in capsys.readouterr().err
    assert run("secret", "show", "--file", "/no/such/file") == 1
    assert "/no/such/file" in capsys.readouterr().err


# ---- nodes


def test_nodes(shared_agent: AgentProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`nodes` tells of each what it offers, or why it is missing; the exit code says whether all are there."""
    monkeypatch.setenv("DISTEXEC_SECRET", shared_agent.secret)
    assert run("nodes", shared_agent.address) == 0
    head, row = capsys.readouterr().out.splitlines()
    for column in ("address", "state", "name", "slots", "busy", "version", "python", "cpu"):
        assert column in head
    assert row.split()[:5] == [shared_agent.address, "up", "shared", "2", "0"]
    assert __version__ in row
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in row

    with AgentProcess(slots=1, name="stranger") as stranger, socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        assert run("nodes", shared_agent.address, stranger.address, nobody) == 1
        _, up, refused, gone = capsys.readouterr().out.splitlines()
    assert " up " in up
    assert stranger.address in refused
    assert "secret" in refused
    assert nobody in gone
    assert "listens" in gone or "refused" in gone


def test_nodes_from_the_variable(shared_agent: AgentProcess, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments `nodes` asks those in $DISTEXEC_NODES."""
    monkeypatch.setenv("DISTEXEC_SECRET", shared_agent.secret)
    monkeypatch.setenv("DISTEXEC_NODES", f"{shared_agent.address}, local")
    assert run("nodes") == 0
    assert "shared" in capsys.readouterr().out


def test_nodes_that_never_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A node that takes the connection and says nothing is given up after --timeout."""
    monkeypatch.setenv("DISTEXEC_SECRET", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert run("nodes", address, "--timeout", "0.3") == 1
    out = capsys.readouterr().out
    assert address in out
    assert "0.3 s" in out or "in time" in out


@pytest.mark.parametrize(("arguments", "text"), [
    (["127.0.0.1:port"], "127.0.0.1:port"),
    (["no-such-host.invalid"], "no-such-host.invalid"),
    (["127.0.0.1", "--secret-file", "/no/such/file"], "/no/such/file"),
    (["127.0.0.1", "--timeout", "0"], "--timeout"),
    (["127.0.0.1", "--timeout", "soon"], "--timeout"),
])
def test_nodes_bad_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
                             text: str) -> None:
    """A bad argument of `nodes` gets one message that names it."""
    monkeypatch.setenv("DISTEXEC_SECRET", SECRET)
    assert run("nodes", *arguments) in (1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert text in said.err


def test_nodes_without_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a secret `nodes` says what is missing."""
    assert run("nodes", "127.0.0.1") == 2
    assert "DISTEXEC_SECRET" in capsys.readouterr().err


# ---- the programs themselves


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """No command, an unknown one, and --version, --help: as every program does."""
    assert run() == 2
    assert run("fly") == 2
    assert "fly" in capsys.readouterr().err
    assert run("--version") == 0
    assert __version__ in capsys.readouterr().out
    for command in ([], ["secret"], ["nodes"]):
        assert run(*command, "--help") == 0
    assert "secret" in capsys.readouterr().out


def test_closed_pipe(shared_agent: AgentProcess) -> None:
    """Output into a pipe that nobody reads ends without a traceback."""
    environ = os.environ | {"DISTEXEC_SECRET": shared_agent.secret, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", "import sys; from distexec.cli import main; sys.exit(main())", "nodes",
                           shared_agent.address], env=environ, stdout=write, stderr=subprocess.PIPE, text=True, timeout=30,
                          check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
