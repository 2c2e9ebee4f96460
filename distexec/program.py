"""Programs as calls: an executable or script, found on the node or brought along, run for its exit code and output.

    submit(Program("./tool"), "-x") ── with its bytes ──► worker: a file ──► process ──► CompletedProcess

The rule: what is brought along runs with exactly the bytes that the file had at `submit`; what a program starts ends
with it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

__all__ = ["Program"]

_brought: dict[bytes, str] = {}
"""Where this process has put programs, by the digest of name, mode and content."""


class Program:
    """An executable or script: `executor.submit(Program("simulate"), "-n", 3)` gives a `subprocess.CompletedProcess`.

    Args:
        path: a name without a slash is looked for on the node, in its PATH. With a slash and a file here, that file is
            brought along, its mode kept, as it is when it is submitted; without a file here, it is the path of one there.
        env: variables on top of the task's.
        cwd: the directory to run in, on the node; None: the task's.
        timeout: seconds after which it is ended, with all it started, and the call raises `subprocess.TimeoutExpired`.
        stdin: what it reads, bytes, or str with `text`; None: nothing.
        text: stdout and stderr are str instead of bytes.

    Arguments of the call become the program's, numbers and paths as text. An exit code other than 0 is no error: see
    `CompletedProcess.returncode`, negative for a signal. Both outputs are held in memory. Raises FileNotFoundError,
    PermissionError or OSError that name the node if it cannot be started there; a future's `kill()` ends all it started.
    """

    def __init__(self, path: str | os.PathLike[str], *, env: Mapping[str, str] | None = None,
                 cwd: str | os.PathLike[str] | None = None, timeout: float | None = None,
                 stdin: bytes | str | None = None, text: bool = False) -> None:
        self.path = os.fspath(path)
        if not isinstance(self.path, str) or not self.path or "\0" in self.path:
            raise ValueError(f"{path!r} cannot be the path of a program")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        if stdin is not None and isinstance(stdin, str) is not text:
            raise TypeError(f"stdin must be {'str' if text else 'bytes'} with text={text}, not {type(stdin).__name__}")
        self.env = {str(name): str(value) for name, value in (env or {}).items()}
        self.cwd = None if cwd is None else os.fspath(cwd)
        self.timeout, self.stdin, self.text = timeout, stdin, text
        self._mode = 0
        self._content: bytes | None = None  # on the node: what was brought along

    def __repr__(self) -> str:
        return f"<Program {self.path!r}>"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self._content is None and os.sep in self.path and os.path.isfile(self.path):
            with open(self.path, "rb") as file:
                state["_mode"] = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                state["_content"] = file.read()
            if not state["_mode"] & 0o111:
                raise PermissionError(errno.EACCES, "it is to be run as a program and is not executable; see to it with "
                                      "chmod +x", self.path)
        return state

    def __call__(self, *args: object) -> subprocess.CompletedProcess[Any]:
        """Run it here with these arguments."""
        if self._content is None and os.sep not in self.path:
            path = shutil.which(self.path, path=self.env.get("PATH"))
            if path is None:
                raise FileNotFoundError(errno.ENOENT, f"no such program {_where()}; install it there, or give the path of a "
                                        "file here, which is brought along", self.path)
        else:
            path = self.path if self._content is None else self._bring()
        command = [path, *(os.fspath(arg) if isinstance(arg, os.PathLike) else str(arg) for arg in args)]
        try:
            process = subprocess.Popen(
                command, env={**os.environ, **self.env}, cwd=self.cwd, text=self.text, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, stdin=subprocess.DEVNULL if self.stdin is None else subprocess.PIPE)
        except OSError as error:
            raise self._explained(error) from error
        return self._wait(process, [self.path, *command[1:]])

    def _wait(self, process: subprocess.Popen[Any], command: list[str]) -> subprocess.CompletedProcess[Any]:
        from distexec.descent import end_tree

        with process:
            try:
                out, err = process.communicate(self.stdin, self.timeout)
            except subprocess.TimeoutExpired:
                end_tree(process.pid)
                out, err = process.communicate()
                raise subprocess.TimeoutExpired(command, self.timeout or 0.0, out, err) from None
            except BaseException:
                end_tree(process.pid)
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _bring(self) -> str:
        """Put what was brought along into a file, once in this process; give its path."""
        import xxhash

        assert self._content is not None, "the caller looks"
        name = os.path.basename(self.path)
        key = xxhash.xxh3_128_digest(self._content) + f"{self._mode:o}/{name}".encode()
        path = _brought.get(key)
        if path is None or not os.path.isfile(path):
            path = os.path.join(tempfile.mkdtemp(prefix="program-", dir=_home()), name)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode | stat.S_IWUSR)
            with open(fd, "wb") as file:
                file.write(self._content)
            os.chmod(path, self._mode)
            _brought[key] = path
        return path

    def _explained(self, error: OSError) -> OSError:
        """Say where it could not be started, and what may help."""
        if error.filename is not None and error.filename == self.cwd:
            text = f"no directory to run {self.path!r} in {_where()}: {error.strerror}"
        elif error.errno == errno.ENOEXEC:
            text = f"{error.strerror} {_where()}: made for another kind of machine, or a script without a #! line"
        elif error.errno == errno.ENOENT and self._content is not None:
            text = f"what its #! line names is not {_where()}"
        else:
            text = f"{error.strerror} {_where()}"
        return OSError(error.errno, text, self.path)


def _where() -> str:
    from distexec.task import current_task

    task = current_task()
    return "on this machine" if task is None else f"on node {task.node!r}"


def _home() -> str | None:
    """The session's directory, which goes with it; None: the temporary directory."""
    from distexec import worker

    this = worker.this_worker
    if this is None or not this.home:
        return None
    os.makedirs(this.home, 0o700, exist_ok=True)
    return this.home
