"""What a machine's operator grants tasks: another system user, and limits of what a process may open and write.

    distexec-agent --user, --max-open-files, --max-file-size ──► every template, and so all below it

The rule: who may not have the user asked for hears it when the agent starts, not in its first session.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

CHECK_S = 60.0
"""For an interpreter to start as another user. Shorter: a busy machine is taken for a closed one."""

_FOREIGN = ("XDG_", "SUDO_")  # beginnings of variables that name the directories of one user


class User(NamedTuple):
    """A system user that tasks run as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def start_as(self) -> dict[str, Any]:
        """The arguments of `subprocess.Popen` that start a process as this user."""
        return {"user": self.uid, "group": self.gid, "extra_groups": list(self.groups)}

    def environ(self, environ: Mapping[str, str], asked_for: Collection[str] = ()) -> dict[str, str]:
        """Give the environment of a process of this user, made of ours; what was asked for is left as it is."""
        told = {name: value for name, value in environ.items() if not name.startswith(_FOREIGN) or name in asked_for}
        own = {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}
        return {**told, **{name: value for name, value in own.items() if name not in asked_for}}


def find_user(name: str) -> User:
    """Look up a system user. ValueError, with the remedy, if there is none or this process may not become it."""
    import pwd

    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ValueError(f"there is no user {name!r} on this machine; make one (useradd --system {name}), or name another"
                         ) from None
    if os.geteuid() not in (0, found.pw_uid):
        raise ValueError(f"only root may run tasks as {name!r}; start distexec-agent as root, or as {name!r} without --user")
    groups = os.getgrouplist(name, found.pw_gid) if os.geteuid() == 0 else os.getgroups()
    return User(name, found.pw_uid, found.pw_gid, tuple(groups), found.pw_dir)


def open_to(user: User, spool: str) -> None:
    """Let the user through our spool directory, where it can list nothing, and see that it can work here.

    Raises OSError, saying what is closed to it, if it cannot.
    """
    os.chmod(spool, 0o711)
    directory = tempfile.mkdtemp(prefix="check-", dir=spool)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = (f"import os, sys; sys.path.insert(0, {root!r}); os.chdir({directory!r}); open('file', 'w').close(); "
            "import distexec.template")
    try:
        own_directory(user, directory)
        done = subprocess.run([sys.executable, "-c", code], **user.start_as, cwd="/", env=user.environ(os.environ),
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_S, check=False)
        why = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        done, why = None, str(error)
    finally:
        _remove(directory)
    if done is None or done.returncode:
        raise OSError(f"user {user.name!r} cannot run tasks here: {why}; it must be able to read {sys.executable} and "
                      f"{root}, and to reach {spool} (--spool)")


def own_directory(user: User, directory: str) -> None:
    """Give a directory of ours to the user, and to nobody else."""
    os.chown(directory, user.uid, user.gid, follow_symlinks=False)
    os.chmod(directory, 0o700)


def _remove(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)
