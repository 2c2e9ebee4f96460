"""The secret file: where it is looked for, how it is made, and which files are not trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from distexec.auth import Secret
from distexec.secretfile import UnsafeSecretFile, create_secret, load_secret, read_secret, secret_path

ONE, TWO, THREE, FOUR = (Secret(bytes(range(start, start + 32))) for start in (0, 40, 80, 120))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without a secret."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("DISTEXEC_SECRET", raising=False)
    return tmp_path


def write(path: Path, secret: Secret, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(secret.text + "\n")
    path.chmod(mode)
    return path


def test_path_honours_xdg(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is under $XDG_CONFIG_HOME if that is an absolute path, else under ~/.config."""
    assert secret_path() == home / ".config/distexec/secret"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert secret_path() == home / ".config/distexec/secret"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    assert secret_path() == home / "xdg/distexec/secret"


def test_order_of_sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit comes before a named file, that before the variable, that before the user's file; without any, None."""
    assert load_secret() is None
    write(secret_path(), FOUR)
    assert load_secret() == FOUR
    monkeypatch.setenv("DISTEXEC_SECRET", THREE.text)
    assert load_secret() == THREE
    named = write(home / "named", TWO)
    assert load_secret(file=named) == TWO
    for explicit in (ONE, ONE.key, ONE.text):
        assert load_secret(explicit, named) == ONE


def test_empty_variable_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty $DISTEXEC_SECRET is as good as none."""
    monkeypatch.setenv("DISTEXEC_SECRET", "")
    assert load_secret() is None


def test_errors_name_their_source(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad secret says where it came from, and is not quoted."""
    monkeypatch.setenv("DISTEXEC_SECRET", "abcdef")
    with pytest.raises(ValueError, match=r"\$DISTEXEC_SECRET.*bits") as caught:
        load_secret()
    assert "abcdef" not in str(caught.value)
    bad = home / "bad"
    bad.write_text("abcdef")
    bad.chmod(0o600)
    with pytest.raises(ValueError, match=f"{bad}.*bits"):
        load_secret(file=bad)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_secret(file=home / "missing")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe" * 20, b"a" * 5000])
def test_other_content_is_refused(home: Path, content: bytes) -> None:
    """An empty, binary or large file holds no secret."""
    path = home / "file"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ValueError, match="distexec secret new"):
        read_secret(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666])
def test_files_open_to_others_are_refused(home: Path, mode: int) -> None:
    """Any right of group or others spoils the file; the message says how to mend it."""
    path = write(home / "file", ONE, mode)
    with pytest.raises(UnsafeSecretFile, match=f"chmod 600 {path}"):
        read_secret(path)
    path.chmod(0o600)
    assert read_secret(path) == ONE
    path.chmod(0o400)
    assert read_secret(path) == ONE


def test_links_are_not_followed(home: Path) -> None:
    """A link is refused even if the file it names is good."""
    link = home / "link"
    link.symlink_to(write(home / "file", ONE))
    with pytest.raises(UnsafeSecretFile, match="symbolic link"):
        read_secret(link)


def test_only_regular_files(home: Path) -> None:
    """A directory or a pipe is refused, and reading a pipe does not wait."""
    os.mkfifo(home / "pipe", 0o600)
    for path in (home, home / "pipe"):
        with pytest.raises(UnsafeSecretFile, match="not a regular file"):
            read_secret(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_of_others_are_refused(home: Path) -> None:
    """A file that another user owns, and so can change, is refused, by root too."""
    path = write(home / "file", ONE)
    os.chown(path, 12345, 0)
    with pytest.raises(UnsafeSecretFile, match="belongs to user 12345"):
        read_secret(path)


def test_created_secret_is_private_and_found() -> None:
    """A new file is 0600 in a 0700 directory, whatever the umask, and is then loaded."""
    before = os.umask(0)
    try:
        path = create_secret()
    finally:
        os.umask(before)
    assert path == secret_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    secret = load_secret()
    assert secret is not None
    assert len(secret.key) == 32


def test_created_secrets_differ(home: Path) -> None:
    """Two secrets are never the same."""
    assert read_secret(create_secret(home / "a")) != read_secret(create_secret(home / "b"))


def test_nothing_is_overwritten(home: Path) -> None:
    """An existing file, and the target of a link in its place, stay as they are."""
    path = create_secret()
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="not overwritten"):
        create_secret()
    assert path.read_bytes() == content
    (home / "link").symlink_to(home / "target")
    with pytest.raises(FileExistsError):
        create_secret(home / "link")
    assert not (home / "target").exists()
