"""What a user can get wrong, and what is said then: the kind of error, the thing that is wrong, and the remedy."""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distexec import AuthenticationFailed, ClusterExecutor, IncompatibleNode, NodeSpec, NoNodes, PayloadError, RemoteError
from tests.agents import AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.conftest import Make

WAIT_S = 20.0
SECRET = "8f1c2e5a9b7d4460a3c1e8f2b5d79064"


# ---- the constructor


@pytest.mark.parametrize(("arguments", "kind", "text"), [
    ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
    ({"max_workers": -3}, ValueError, "max_workers must be greater than 0"),
    ({"max_workers": 1.5}, TypeError, "max_workers"),
    ({"max_workers": "4"}, TypeError, "max_workers"),
    ({"retries": -1}, ValueError, "retries must be 0 or more"),
    ({"retries": None}, TypeError, "retries"),
    ({"node_timeout": 0}, ValueError, "node_timeout"),
    ({"node_timeout": -1}, ValueError, "node_timeout"),
    ({"node_timeout": float("nan")}, ValueError, "node_timeout"),
    ({"node_timeout": "soon"}, TypeError, "node_timeout"),
    ({"nodes_timeout": -1}, ValueError, "nodes_timeout"),
    ({"max_pending": 0}, ValueError, "max_pending"),
    ({"initializer": 3}, TypeError, "initializer must be a callable"),
    ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child"),
    ({"max_tasks_per_child": "1"}, TypeError, "max_tasks_per_child"),
    ({"mp_context": "spawn"}, TypeError, "mp_context"),
    ({"nodes": []}, ValueError, "names no node"),
    ({"nodes": ["local", 3]}, TypeError, "3"),
    ({"nodes": [NodeSpec("local", -1)]}, ValueError, "local.*0 or more"),
    ({"nodes": ["127.0.0.1:notaport"]}, ValueError, "127.0.0.1:notaport"),
    ({"nodes": ["127.0.0.1:99999"]}, ValueError, "99999"),
    ({"nodes": ["[::1"]}, ValueError, r"\[::1"),
    ({"nodes": [""]}, ValueError, "address"),
    ({"nodes": ["no-such-host.invalid"]}, ValueError, "no-such-host.invalid"),
    ({"nodes": ["127.0.0.1"], "secret": "short"}, ValueError, "128|hex|base64"),
    ({"nodes": ["127.0.0.1"], "secret": "abcd" * 4}, ValueError, "128 or more"),
    ({"nodes": ["127.0.0.1"], "secret": b"15 bytes are few"[:15]}, ValueError, "128 or more"),
    ({"env": {"A": None}}, TypeError, "env"),
    ({"env": ["A"]}, TypeError, "env"),
])
def test_constructor_refuses(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """What cannot be meant is refused by the constructor, at once, and the text names it."""
    with pytest.raises(kind, match=text):
        ClusterExecutor(**({"nodes": "local"} | {"secret": SECRET} | arguments))


def test_inherited_initargs_beside_a_node() -> None:
    """What only a child process can inherit is refused beside a remote node; the text names the object."""
    import multiprocessing

    with pytest.raises(ValueError, match=r"Lock.*remote node.*Manager"):
        ClusterExecutor(nodes=["127.0.0.1"], secret=SECRET, initializer=deeds.double, initargs=(multiprocessing.Lock(),))


def test_no_secret() -> None:
    """A remote node without any secret is refused; the text says the three places where it can be."""
    with pytest.raises(ValueError, match=r"secret=.*DISTEXEC_SECRET.*distexec secret new"):
        ClusterExecutor(nodes=["127.0.0.1"])
    with pytest.raises(ValueError, match="DISTEXEC_SECRET"), ClusterExecutor(1, nodes="local") as executor:
        executor.add_node("127.0.0.1")


@pytest.fixture
def secret_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The per-user secret file, with a secret in it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "distexec" / "secret"
    path.parent.mkdir(mode=0o700)
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match="secret") as caught:
        ClusterExecutor(nodes=["127.0.0.1"])
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_secret_file_of_everybody(secret_file: Path) -> None:
    """A secret file that others can read is refused, with the command that helps."""
    for mode in (0o644, 0o640, 0o604, 0o666):
        secret_file.chmod(mode)
        assert f"chmod 600 {secret_file}" in refused(secret_file)


def test_secret_file_that_is_a_link(secret_file: Path) -> None:
    """A link is not followed."""
    secret_file.rename(secret_file.with_name("elsewhere"))
    secret_file.symlink_to(secret_file.with_name("elsewhere"))
    assert "symbolic link" in refused(secret_file)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_secret_file_of_somebody_else(secret_file: Path) -> None:
    """Another user's file is refused."""
    os.chown(secret_file, 12345, 12345)
    assert "belongs to user 12345" in refused(secret_file)


@pytest.mark.parametrize("content", ["", "\n", "abc123\n", "not a secret at all\n", "\x00\xff"])
def test_secret_file_without_a_secret(secret_file: Path, content: str) -> None:
    """A file that holds no secret, or one that is too short, is refused."""
    secret_file.write_text(content)
    refused(secret_file)


def test_secret_file_works(secret_file: Path) -> None:
    """A good per-user file is used without a word."""
    with AgentProcess(slots=1, secret=SECRET) as agent, ClusterExecutor(nodes=[agent.address]) as executor:
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


# ---- nodes


def test_nobody_listens() -> None:
    """With nodes_timeout, work for nodes where nobody listens fails with NoNodes that names each and says why."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with ClusterExecutor(nodes=[address], secret=SECRET, nodes_timeout=0.5) as executor:
        future = executor.submit(deeds.double, 1)
        with pytest.raises(NoNodes, match=f"{address}.*(listen|refused).*distexec-agent"):
            future.result(WAIT_S)
        assert isinstance(future.exception(), BrokenExecutor)
        assert executor.nodes()[0].state == "connecting"
        assert address in executor.nodes()[0].problem


def test_somebody_else_listens() -> None:
    """A server that is no distexec agent is named as such."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with ClusterExecutor(nodes=[address], secret=SECRET, nodes_timeout=0.5) as executor:
            future = executor.submit(deeds.double, 1)
            connection, _ = server.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            with pytest.raises(NoNodes, match=address):
                future.result(WAIT_S)
            connection.close()


def test_wrong_secret(shared_agent: AgentProcess) -> None:
    """When every node refuses the secret, work fails at once with AuthenticationFailed, also what is submitted later."""
    executor = ClusterExecutor(nodes=[shared_agent.address], secret=SECRET)
    with executor:
        future = executor.submit(deeds.double, 1)
        with pytest.raises(AuthenticationFailed, match=r"secret.*DISTEXEC_SECRET") as caught:
            future.result(WAIT_S)
        assert shared_agent.address in str(caught.value)
        with pytest.raises(AuthenticationFailed, match="secret"):
            executor.submit(deeds.double, 1)
        assert executor.nodes()[0].state == "refused"
        assert "broken" in repr(executor)


def test_wrong_secret_at_one_of_two(shared_agent: AgentProcess) -> None:
    """A node that refuses the secret does not keep the others from working."""
    with AgentProcess(slots=1, name="stranger") as stranger, \
            ClusterExecutor(nodes=[stranger.address, shared_agent.address], secret=shared_agent.secret) as executor:
        assert [future.result(WAIT_S) for future in [executor.submit(deeds.double, n) for n in range(20)]] == [
            2 * n for n in range(20)]
        assert wait_until(lambda: [node.state for node in executor.nodes()] == ["refused", "up"])
        assert "secret" in executor.nodes()[0].problem


def test_another_python(shared_agent: AgentProcess) -> None:
    """When every node runs another Python minor version, work fails at once and both versions are named."""
    import distexec.executor

    real = distexec.executor.find_credentials

    def other(*args: Any, **kwargs: Any) -> Any:
        import dataclasses

        return dataclasses.replace(real(*args, **kwargs), python="3.7")  # type: ignore[type-var]

    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    with mock.patch.object(distexec.executor, "find_credentials", other), \
            ClusterExecutor(nodes=[shared_agent.address], secret=shared_agent.secret) as executor, \
            pytest.raises(IncompatibleNode, match=f"Python {ours}.*3.7") as caught:
        executor.submit(deeds.double, 1).result(WAIT_S)
    assert shared_agent.address in str(caught.value)


# ---- calls and values


def test_unpicklable_argument(make: Make) -> None:
    """An argument that cannot be pickled fails its own future with its own error, and nothing else."""
    with make(1) as executor:
        futures = [executor.submit(deeds.double, deeds.Unpicklable()), executor.submit(deeds.double, 4)]
        with pytest.raises(TypeError, match="cannot pickle this on purpose"):
            futures[0].result(WAIT_S)
        assert futures[1].result(WAIT_S) == 8


def test_unpicklable_result(make: Make) -> None:
    """A result that cannot be pickled fails its future with its own error."""
    with make(1) as executor:
        with pytest.raises(TypeError, match="cannot pickle this on purpose"):
            executor.submit(deeds.make_unpicklable).result(WAIT_S)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


def test_unloadable_argument(make: Make) -> None:
    """An argument that cannot be loaded at the worker fails its future with PayloadError; the cause says why."""
    with make(1) as executor:
        future = executor.submit(deeds.double, deeds.PicklesOnce())
        with pytest.raises(PayloadError, match="no way back") as caught:
            future.result(WAIT_S)
        assert isinstance(caught.value, BrokenProcessPool)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8
        assert future.attempts == 1


@pytest.mark.parametrize("call", [lambda: (deeds.make_pickles_once,), lambda: (deeds.return_for, os.getpid())])
def test_unloadable_result(make: Make, call: Callable[[], tuple[Any, ...]]) -> None:
    """A result that cannot be loaded at the client fails its future with PayloadError; the I/O thread goes on."""
    with make(1) as executor:
        with pytest.raises(PayloadError, match=r"no way back|not in this process"):
            executor.submit(*call()).result(WAIT_S)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


def test_unpicklable_exception(make: Make) -> None:
    """An exception that cannot be pickled arrives as RemoteError with its name and text."""
    with make(1) as executor:
        with pytest.raises(RemoteError, match=r"SecretiveError.*the text stays") as caught:
            executor.submit(deeds.raise_secretive).result(WAIT_S)
        assert "raise_secretive" in str(caught.value.__cause__)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


def test_exception_that_cannot_be_made_again(make: Make) -> None:
    """An exception whose constructor cannot be called again still says what it is and what it said."""
    with make(1) as executor:
        future = executor.submit(deeds.raise_picky)
        with pytest.raises(Exception, match="1 and 2") as caught:
            future.result(WAIT_S)
        assert "PickyError" in type(caught.value).__name__ + str(caught.value)
        assert "raise_picky" in str(caught.value.__cause__)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


def test_function_that_is_not_there(make: Make) -> None:
    """A function that the worker cannot find fails its futures, each with a text that names it."""
    import types

    module = types.ModuleType("only_here")
    exec("def lonely(): return 1", vars(module))
    with mock.patch.dict(sys.modules, {"only_here": module}), make(1) as executor:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="only_here"):  # so that it can be told what to install
                executor.submit(module.lonely).result(WAIT_S)
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


def test_not_a_callable(make: Make) -> None:
    """Submitting what is no function fails as it would with ProcessPoolExecutor: in the future."""
    with make(1) as executor, pytest.raises(TypeError, match="not callable"):
        executor.submit(3).result(WAIT_S)  # type: ignore[arg-type]


def test_callback_that_raises(make: Make) -> None:
    """A done callback that raises is logged and disturbs nobody."""
    def bad(_: object) -> None:
        raise RuntimeError("in a callback")

    with make(1) as executor:
        for _ in range(3):
            future = executor.submit(deeds.nap, 0.01, 1)
            future.add_done_callback(bad)
            assert future.result(WAIT_S) == 1
        assert executor.submit(deeds.double, 4).result(WAIT_S) == 8


def test_options_refuse(make: Make) -> None:
    """Options that cannot be meant are refused at once."""
    with make(1) as executor:
        for arguments, text in (({"retries": -1}, "retries"), ({"timeout": 0}, "timeout"), ({"timeout": -1}, "timeout")):
            with pytest.raises(ValueError, match=text):
                executor.options(**arguments)
        for name, value in (("retries", "2"), ("timeout", "2"), ("priority", "high"), ("node", 3)):
            with pytest.raises(TypeError, match=name):
                executor.options(**{name: value})
        with pytest.raises(TypeError):
            executor.options(colour="blue")


# ---- initializers


def test_initializer_raises(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """When the initializer raises everywhere the executor breaks, with what it raised as the cause, and logs it once."""
    with make(2, initializer=deeds.fail, initargs=(LookupError("no licence"),)) as executor:
        futures = [executor.submit(deeds.double, number) for number in range(3)]
        for future in futures:
            with pytest.raises(BrokenProcessPool, match=r"initializer.*no licence"):
                future.result(WAIT_S)
        assert isinstance(future.exception().__cause__, LookupError)  # type: ignore[union-attr]
        with pytest.raises(BrokenProcessPool, match="no licence"):
            executor.submit(deeds.double, 1)
    critical = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert [record.name for record in critical] == ["concurrent.futures"]


def test_initializer_ends_the_process(make: Make) -> None:
    """An initializer that ends its worker breaks the executor, and the error says how it ended."""
    with make(1, initializer=os._exit, initargs=(7,)) as executor, \
            pytest.raises(BrokenProcessPool, match="exited with code 7"):
        executor.submit(deeds.double, 1).result(WAIT_S)


def test_initializer_raises_on_one_node(shared_agent: AgentProcess, caplog: pytest.LogCaptureFixture) -> None:
    """An initializer that fails on one node only takes that node out; the work is done elsewhere."""
    with ClusterExecutor(nodes=["local", shared_agent.address], secret=shared_agent.secret,
                         initializer=fail_below, initargs=(os.getpid(),)) as executor:
        futures = [executor.submit(deeds.nap, 0.02, number) for number in range(40)]
        assert [future.result(WAIT_S) for future in futures] == list(range(40))
        assert {future.node for future in futures[20:]} == {"local"}
        assert wait_until(lambda: "far from home" in executor.nodes()[1].problem), executor.nodes()


def fail_below(pid: int) -> None:
    """Raise unless this process descends from that one."""
    import psutil

    if pid not in [parent.pid for parent in psutil.Process().parents()[:2]]:
        raise LookupError("far from home")


@pytest.fixture(autouse=True)
def within_seconds() -> Iterator[None]:
    """Bad input is answered within seconds."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < WAIT_S


def test_errors_can_be_pickled() -> None:
    """Every error of ours survives a round trip, so that a task may use an executor and raise them."""
    import distexec.errors

    for name in distexec.errors.__all__:
        error = getattr(distexec.errors, name)("what happened")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))


def test_random_secrets_are_good() -> None:
    """What `secrets` gives in the usual forms is taken as a secret."""
    for secret in (secrets.token_hex(16), secrets.token_hex(32), secrets.token_bytes(32)):
        with ClusterExecutor(nodes=["127.0.0.1:1"], secret=secret):
            pass
