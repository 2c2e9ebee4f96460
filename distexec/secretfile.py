"""Where the secret of a cluster is found and kept. The rule: a file that somebody else could read or write is
refused."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from .auth import SECRET_BYTES, Secret

__all__ = ["SECRET_VARIABLE", "UnsafeSecretFile", "create_secret", "load_secret", "read_secret", "secret_path"]

SECRET_VARIABLE = "DISTEXEC_SECRET"

MAX_FILE_BYTES = 4096  # a secret is one short line; this is not the file that was meant


class UnsafeSecretFile(ValueError):
    """The secret file is not private to this user; the message names it and the remedy."""


def secret_path() -> Path:
    """Return the per-user file: `distexec/secret` under $XDG_CONFIG_HOME or ~/.config."""
    root = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".config"  # the XDG rules: relative ones do not count
    return base / "distexec" / "secret"


def load_secret(explicit: str | bytes | Secret | None = None,
                file: str | os.PathLike[str] | None = None) -> Secret | None:
    """Find the secret: `explicit`, else `file`, else $DISTEXEC_SECRET, else the per-user file, else None.

    Args:
        explicit: a Secret, its text form, or raw bytes.
        file: must exist when given.

    Raises ValueError that says which of these is wrong and what to do, or OSError for a named file that cannot be read.
    """
    if isinstance(explicit, Secret):
        return explicit
    if explicit is not None:
        return Secret.parse(explicit) if isinstance(explicit, str) else Secret(explicit)
    if file is not None:
        return read_secret(Path(file))
    text = os.environ.get(SECRET_VARIABLE, "")
    if text.strip():
        return _parse(text, f"${SECRET_VARIABLE}")
    try:
        return read_secret(secret_path())
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_secret(path: Path) -> Secret:
    """Read a secret file, opened without following a link and checked through the open descriptor.

    Raises UnsafeSecretFile when it is a link, not a regular file, another user's, or open to others; ValueError when
    its content is not a secret; OSError when it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        if path.is_symlink():
            raise UnsafeSecretFile(f"secret file {path} is a symbolic link; put the file itself there") from None
        raise
    try:
        _check(os.fstat(fd), path)
        content = os.read(fd, MAX_FILE_BYTES + 1)
    finally:
        os.close(fd)
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    if len(content) > MAX_FILE_BYTES or not text.strip():
        raise ValueError(f"secret file {path} holds no secret: make one with `distexec secret new`")
    return _parse(text, f"secret file {path}")


def create_secret(path: str | os.PathLike[str] | None = None) -> Path:
    """Write a new random secret to `path` (None: the per-user file) and return the path.

    The file is created with mode 0600, its directory, if missing, with 0700. Raises FileExistsError, naming the file,
    rather than overwrite: nodes that hold the old secret would be locked out.
    """
    path = secret_path() if path is None else Path(path)
    _make_private_directory(path.parent)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise FileExistsError(f"secret file {path} exists and is not overwritten; remove it first if every node is "
                              "to get a new secret") from None
    with os.fdopen(fd, "w") as file:
        file.write(Secret(secrets.token_bytes(SECRET_BYTES)).text + "\n")
    return path


def _parse(text: str, source: str) -> Secret:
    try:
        return Secret.parse(text)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _check(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeSecretFile(f"secret file {path} is not a regular file")
    if not hasattr(os, "getuid"):
        return  # Windows keeps such files private by the profile directory's rights; modes say nothing there
    if status.st_uid != os.getuid():
        raise UnsafeSecretFile(f"secret file {path} belongs to user {status.st_uid}, not to user {os.getuid()} that "
                               f"runs this process; copy it: install -m 600 {path} <your own file>")
    if status.st_mode & 0o077:
        raise UnsafeSecretFile(f"secret file {path} is open to other users (mode {stat.S_IMODE(status.st_mode):03o}): "
                               f"chmod 600 {path}")


def _make_private_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
