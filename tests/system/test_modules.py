"""The user's own modules travel to nodes by themselves, as this program has them, and are never mixed with others."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from distexec import ClusterExecutor, DistexecError, InitializerFailed, NodeSpec, TaskKilled
from distexec.clientmodules import ClientModules
from distexec.messages import Find
from tests import netns
from tests.agents import ROOT, AgentProcess
from tests.leaks import wait_until
from tests.system import deeds
from tests.system.proxy import Proxy

WAIT_S = 30.0

TOOLS = """
import importlib, importlib.util, os, sys, threading

class Point:
    def __init__(self, x):
        self.x = x

def moved(point):
    return Point(point.x + 1)

def get(name, attribute="VALUE"):
    return getattr(importlib.import_module(name), attribute)

def file(name):
    return importlib.import_module(name).__file__

def read(package, path):
    import importlib.resources
    return importlib.resources.files(package).joinpath(path).read_text()

def spec(name):
    found = importlib.util.find_spec(name)
    return None if found is None else found.origin

def tried(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return "missing"
    return "there"

def in_threads(name, count):
    got = []
    threads = [threading.Thread(target=lambda: got.append(get(name))) for _ in range(count)]
    for each in threads: each.start()
    for each in threads: each.join()
    return got

def in_child(name):
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(into, str(get(name)).encode())
        finally:
            os._exit(0)
    os.close(into)
    os.waitpid(pid, 0)
    said = os.read(out, 100).decode()
    os.close(out)
    return said

def listed():
    return sorted(os.listdir(sys.path[0]))

def cached(name):
    return importlib.import_module(name).__cached__

def noted(directory, name):
    from tests.system import deeds
    deeds.note(directory, "asks")
    return get(name)

seen = []

def see(name):
    seen.append(get(name))

def what_was_seen():
    return seen
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of the user's, with `tools` in it; what is imported from it is forgotten afterwards."""
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    before = set(sys.modules)
    write(directory / "tools.py", TOOLS)
    yield directory
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) is None or str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    """One agent."""
    with AgentProcess(name="n1") as agent:
        yield agent


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What nodes ask for: their names and the modules'."""
    asked: list[tuple[str, str]] = []
    find = ClientModules.find

    def noting(self: ClientModules, node: Any, message: Find) -> None:
        asked.append((node.name, message.name))
        find(self, node, message)

    monkeypatch.setattr(ClientModules, "find", noting)
    return asked


def write(path: Path, text: str = "") -> Path:
    """Write a file, and make its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()
    return path


def tools() -> Any:
    """The user's module, imported."""
    return importlib.import_module("tools")


@contextmanager
def cluster(*agents: AgentProcess, **kwargs: Any) -> Iterator[ClusterExecutor]:
    """An executor on agents."""
    nodes = kwargs.pop("nodes", [agent.address for agent in agents])
    with ClusterExecutor(nodes=nodes, secret=agents[0].secret, **kwargs) as executor:
        yield executor


# ---- what travels


def test_modules_and_packages(project: Path, agent: AgentProcess) -> None:
    """Modules, packages, their data and late parts, namespaces and archives are found, in the session's directory."""
    write(project / "lone.py", "VALUE = 'lone'")
    write(project / "pkg/__init__.py")
    write(project / "pkg/data/table.csv", "1,2")
    write(project / "pkg/sub/__init__.py", "from .. import late\nVALUE = late.VALUE")
    write(project / "pkg/late.py", "VALUE = 'late'")
    write(project / "space/inner/thing.py", "VALUE = 'inner'")
    with zipfile.ZipFile(project / "bundle.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "VALUE = 'zipped'")
        archive.writestr("zipped/note.txt", "from the archive")
    sys.path.insert(0, str(project / "bundle.zip"))
    try:
        with cluster(agent) as executor:
            got = [executor.submit(tools().get, name).result(WAIT_S)
                   for name in ("lone", "pkg.sub", "space.inner.thing", "zipped")]
            assert got == ["lone", "late", "inner", "zipped"]
            assert executor.submit(tools().read, "pkg", "data/table.csv").result(WAIT_S) == "1,2"
            assert executor.submit(tools().read, "zipped", "note.txt").result(WAIT_S) == "from the archive"
            where = executor.submit(tools().file, "pkg.sub").result(WAIT_S)
            assert where.startswith(agent._home.name)
            assert executor.submit(tools().cached, "lone").result(WAIT_S).startswith(agent._home.name)
        assert wait_until(lambda: not os.path.exists(where))
    finally:
        sys.path.remove(str(project / "bundle.zip"))


def test_classes_keep_their_identity(project: Path, agent: AgentProcess) -> None:
    """An instance that went there and back is one of the same class; the call names function and class, and has no code."""
    with cluster(agent) as executor:
        point = executor.submit(tools().moved, tools().Point(1)).result(WAIT_S)
        assert type(point) is tools().Point
        assert point.x == 2
        function, _, _ = executor._root.packer.pack_function(tools().moved)
        assert len(function) < 60


def test_asked_once(project: Path, agent: AgentProcess, asked: list[tuple[str, str]]) -> None:
    """A node asks once for a module, however many processes and threads of it import that, and whatever the answer is."""
    write(project / "popular.py", "VALUE = 5")
    with cluster(agent) as executor:
        futures = [executor.submit(tools().in_threads, "popular", 4) for _ in range(6)]
        assert [future.result(WAIT_S) for future in futures] == [[5] * 4] * 6
        for _ in range(6):
            assert executor.submit(tools().tried, "no_such_module_here").result(WAIT_S) == "missing"
    assert sorted(asked) == [("n1", "no_such_module_here"), ("n1", "popular"), ("n1", "tools")]


def test_forked_children_ask_too(project: Path, agent: AgentProcess) -> None:
    """A child that a task forked imports what its parent has not."""
    write(project / "younger.py", "VALUE = 6")
    with cluster(agent) as executor:
        assert executor.submit(tools().in_child, "younger").result(WAIT_S) == "6"
        assert executor.submit(tools().get, "younger").result(WAIT_S) == 6


def test_large_data_travels_beside_the_messages(project: Path, agent: AgentProcess) -> None:
    """A package with more data than a message can hold is there whole."""
    write(project / "bulky/__init__.py")
    write(project / "bulky/large.txt", "x" * 9_000_000)
    for number in range(120):
        write(project / f"bulky/piece{number}.txt", "y" * 60_000)
    with cluster(agent) as executor:
        assert len(executor.submit(tools().read, "bulky", "large.txt").result(WAIT_S)) == 9_000_000
        assert len(executor.submit(tools().read, "bulky", "piece119.txt").result(WAIT_S)) == 60_000


def test_late_node(project: Path, agent: AgentProcess) -> None:
    """A node that comes later gets what the first has, though the file was edited meanwhile."""
    file = write(project / "steady.py", "VALUE = 1")
    importlib.import_module("steady")
    with cluster(agent) as executor:
        assert executor.submit(tools().get, "steady").result(WAIT_S) == 1
        write(file, "VALUE = 2")
        with AgentProcess(name="n2", secret=agent.secret) as second:
            executor.add_node(second.address)
            assert executor.options(node="n2").submit(tools().get, "steady").result(WAIT_S) == 1
            executor.remove_node("n2")


def test_setup_and_initializer(project: Path, agent: AgentProcess) -> None:
    """What runs before the first task finds the user's modules as well."""
    write(project / "early.py", "VALUE = 'early'")
    with cluster(agent, initializer=tools().see, initargs=("early",)) as executor:
        assert executor.submit(tools().what_was_seen).result(WAIT_S) == ["early"]
    nodes = [NodeSpec(agent.address, setup_args=("early",))]
    with cluster(agent, nodes=nodes, setup=tools().see) as executor:
        assert executor.submit(tools().what_was_seen).result(WAIT_S) == ["early"]


def test_depends_on_a_module(project: Path, agent: AgentProcess) -> None:
    """A module named in depends= is there before the first task, and an installed one too."""
    write(project / "wanted/__init__.py")
    with cluster(agent, depends=["wanted", "iniconfig"]) as executor:
        assert set(executor.submit(tools().listed).result(WAIT_S)) >= {"wanted", "iniconfig"}


def test_depends_that_cannot_be_sent(project: Path, agent: AgentProcess) -> None:
    """If it cannot be brought, no task runs there, and the user is told why."""
    write(project / "leaky/__init__.py")
    (project / "leaky/link").symlink_to("/etc/hostname")
    with pytest.raises(DistexecError, match="link"), cluster(agent, depends=["leaky"]) as executor:
        executor.submit(os.getpid).result(WAIT_S)


# ---- a real package, on machines that know nothing of it

OUR_OWN = ("cloudpickle", "cryptography", "cffi", "_cffi_backend*", "pycparser", "msgspec", "netifaces", "_netifaces*",
           "psutil", "xxhash", "typing_extensions.py")
"""What distexec needs, and what that needs."""

FOREIGN = ("hypothesis", "sortedcontainers", "_hypothesis_*.py")
"""A package of other people's in pure Python, with many submodules, late imports and data files; and what it needs."""

PROGRAM = """
import sys
import hypothesis, study
from distexec import ClusterExecutor

if __name__ == "__main__":
    with ClusterExecutor(nodes=sys.argv[1:], retries=0) as executor:
        executor.wait_for_slots(2, 30)
        for node in ("one", "two"):
            answer = executor.options(node=node).submit(study.examine, node).result()
            assert "/session-" in answer.where, answer
            assert type(answer) is study.Answer
            print(answer.node, answer.found, answer.domains)
"""

STUDY = """
from dataclasses import dataclass

@dataclass
class Answer:
    node: str
    found: int
    domains: bool
    where: str

def examine(node):
    import hypothesis
    from hypothesis import find, settings, strategies
    from hypothesis.provisional import domains          # reads its list of top-level domains from a data file
    found = find(strategies.integers(), lambda number: number > 99, settings=settings(database=None))
    domain = find(domains(), lambda _: True, settings=settings(database=None))
    return Answer(node, found, "." in domain, hypothesis.__file__)
"""


def make_interpreter(directory: Path) -> Path:
    """Make an environment in which only distexec is installed, with what it needs; give its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    installed = Path(pytest.__file__).parents[1]
    for pattern in OUR_OWN:
        for path in installed.glob(pattern):
            (site / path.name).symlink_to(path)
    (site / "distexec").symlink_to(ROOT / "distexec")
    return directory / "bin/python"


def bare_environ(home: Path, secret: str) -> dict[str, str]:
    """The environment of a program with an empty home directory."""
    home.mkdir()
    return {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": os.environ["TMPDIR"], "DISTEXEC_SECRET": secret}


def bare_agent(python: Path, host: netns.Host, directory: Path, secret: str) -> AgentProcess:
    """An agent on a host, with an empty home and an interpreter that knows only distexec."""
    variables = [f"{name}={value}" for name, value in bare_environ(directory / f"home-{host.name}", secret).items()]
    return AgentProcess(name=host.name, slots=1, secret=secret, listen=f"{host.address}:9730", python=str(python),
                        prefix=(*host.prefix, "env", "-i", "PYTHONUNBUFFERED=1", *variables))


def test_real_package_on_bare_machines(tmp_path: Path) -> None:
    """A package that lies beside the script runs on two machines where it is not installed, with its data."""
    netns.require()
    python = make_interpreter(tmp_path / "environment")
    project = tmp_path / "project"
    project.mkdir()
    installed = Path(pytest.__file__).parents[1]
    for pattern in FOREIGN:
        for path in installed.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, project / path.name)
    write(project / "program.py", PROGRAM)
    write(project / "study.py", STUDY)
    missing = subprocess.run([str(python), "-c", "import hypothesis"], cwd=tmp_path, capture_output=True, text=True,
                             check=False)
    assert "ModuleNotFoundError" in missing.stderr
    with netns.Network("client", "one", "two") as network, ExitStack() as stack:
        secret = secrets.token_hex(32)
        agents = [stack.enter_context(bare_agent(python, network[name], tmp_path, secret)) for name in ("one", "two")]
        environ = bare_environ(tmp_path / "home-client", secret)
        done = subprocess.run([*network["client"].prefix, str(python), "program.py", *(agent.address for agent in agents)],
                              cwd=project, env=environ, capture_output=True, text=True, check=False, timeout=90)
        assert done.stdout.splitlines() == ["one 100 True", "two 100 True"], done.stderr
    for home in tmp_path.glob("home-*"):
        assert not list(home.iterdir()), "something was written outside the session's directory"


# ---- whose modules count


def test_the_users_own_wins(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is installed on the node nor what lies where its agent was started takes the place of the user's own."""
    for name in ("config", "settings"):
        write(tmp_path / f"node/{name}.py", "VALUE = 'node'")
        write(tmp_path / f"cwd/{name}.py", "VALUE = 'cwd'")
    write(tmp_path / "node/only_there.py", "VALUE = 'installed'")
    write(tmp_path / "cwd/stray.py", "VALUE = 'stray'")
    write(project / "config.py", "VALUE = 'own'")
    write(project / "settings/inner.py", "VALUE = 'own'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "node"))
    monkeypatch.chdir(tmp_path / "cwd")
    with AgentProcess(name="n1") as agent:
        monkeypatch.chdir(tmp_path)
        with cluster(agent) as executor:
            assert executor.submit(tools().get, "config").result(WAIT_S) == "own"
            assert executor.submit(tools().get, "only_there").result(WAIT_S) == "installed"
            assert executor.submit(tools().tried, "stray").result(WAIT_S) == "missing"


def test_the_live_tree_is_left_alone(project: Path, agent: AgentProcess) -> None:
    """An agent of the same machine imports what it was sent, not the files where the user works on them."""
    with cluster(agent) as executor:
        where = executor.submit(tools().file, "tools").result(WAIT_S)
    assert not where.startswith(str(project))


# ---- what is missing


def test_missing_package(project: Path, agent: AgentProcess) -> None:
    """A package that is not there is an error that says where it was looked for, and how to install it."""
    with cluster(agent) as executor:
        with pytest.raises(ModuleNotFoundError, match="no_such_module_here") as caught:
            executor.submit(tools().get, "no_such_module_here.sub").result(WAIT_S)
        notes = "\n".join(caught.value.__notes__)
        assert "node 'n1'" in notes
        assert sys.executable in notes
        assert "site-packages" in notes
        assert "-m pip install no_such_module_here" in notes
        assert executor.submit(tools().tried, "no_such_module_here").result(WAIT_S) == "missing"
        assert executor.submit(tools().spec, "no_such_module_here").result(WAIT_S) is None


def test_missing_for_unpickling(project: Path, agent: AgentProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same if the module is missing when the call is unpickled; the version that is here is named."""
    from distexec import usermodules
    write(project / "lib/site-packages/gone_there.py", "def f(): pass")
    monkeypatch.syspath_prepend(str(project / "lib/site-packages"))
    monkeypatch.setattr(usermodules, "distribution_of", lambda name: "gone-there==1.5")
    with cluster(agent) as executor:
        # Where something is installed here is looked at there too; this directory is not there.
        os.rename(project / "lib", project / "lib2")
        sys.path_importer_cache.clear()
        sys.path.insert(0, str(project / "lib2/site-packages"))
        try:
            function = importlib.import_module("gone_there").f
            with pytest.raises(ModuleNotFoundError, match="gone_there") as caught:
                executor.submit(function).result(WAIT_S)
        finally:
            sys.path.remove(str(project / "lib2/site-packages"))
        notes = "\n".join(caught.value.__notes__)
        assert f"{sys.executable} -m pip install 'gone-there==1.5'" in notes
        assert "the function could not be unpickled" in notes


def test_compiled_extensions(project: Path, agent: AgentProcess) -> None:
    """A compiled module of the user's own is sent; one for another platform is missing, and the error says so."""
    import _bisect
    from importlib.machinery import EXTENSION_SUFFIXES
    if not getattr(_bisect, "__file__", None):
        pytest.skip("this Python has no extension modules to make a copy of")
    write(project / "fast/__init__.py")
    write(project / "fast/_other.cpython-311-riscv64-linux-gnu.so")
    shutil.copy(_bisect.__file__, project / f"fast/_bisect{EXTENSION_SUFFIXES[0]}")
    with cluster(agent) as executor:
        assert executor.submit(tools().get, "fast._bisect", "__name__").result(WAIT_S) == "fast._bisect"
        with pytest.raises(ModuleNotFoundError) as caught:
            executor.submit(tools().get, "fast._other").result(WAIT_S)
        assert "compiled extension" in "\n".join(caught.value.__notes__)


def test_initializer_that_misses_a_package(project: Path, agent: AgentProcess) -> None:
    """An initializer that cannot import something breaks the executor, and says where it was looked for."""
    with pytest.raises(InitializerFailed) as caught, \
            cluster(agent, initializer=tools().get, initargs=("no_such_module_here",)) as executor:
        executor.submit(os.getpid).result(WAIT_S)
    assert "node 'n1'" in "\n".join(caught.value.__cause__.__notes__)  # type: ignore[union-attr]


def test_made_at_run_time(project: Path, agent: AgentProcess) -> None:
    """A module that has no file is missing, and the error says that this is why."""
    import types
    sys.modules["conjured"] = types.ModuleType("conjured")
    try:
        with cluster(agent) as executor, pytest.raises(ModuleNotFoundError) as caught:
            executor.submit(tools().get, "conjured").result(WAIT_S)
    finally:
        del sys.modules["conjured"]
    assert "has no file of it" in "\n".join(caught.value.__notes__)


# ---- what changes


@pytest.mark.parametrize("place", ["agent", "local"])
@pytest.mark.parametrize("how", ["reload", "delete"])
def test_imported_anew(project: Path, request: pytest.FixtureRequest, place: str, how: str) -> None:
    """After a module was imported anew every later task has the new one, whichever worker runs it."""
    file = write(project / "fickle.py", "VALUE = 1\ndef value():\n    import tools\n    return VALUE, tools.seen")
    module = importlib.import_module("fickle")
    agents = [request.getfixturevalue("agent")] if place == "agent" else []
    with ClusterExecutor(2, nodes=[each.address for each in agents] or None,
                         secret=agents[0].secret if agents else None) as executor:
        for each in [executor.submit(module.value) for _ in range(20)]:
            assert each.result(WAIT_S) == (1, [])
        write(file, "VALUE = 22\ndef value():\n    import tools\n    return VALUE, tools.seen")
        if how == "reload":
            importlib.reload(module)
        else:
            del sys.modules["fickle"]
            module = importlib.import_module("fickle")
        for each in [executor.submit(module.value) for _ in range(20)]:
            assert each.result(WAIT_S) == (22, [])
        assert {each.result(WAIT_S) for each in [executor.submit(tools().get, "fickle") for _ in range(20)]} == {22}


def test_old_task_is_refused_the_new_module(project: Path, agent: AgentProcess, tmp_path: Path) -> None:
    """A task that began before a module was imported anew does not get the new one, and is told so."""
    write(project / "slow.py", """
from tests.system import deeds

def late(directory):
    deeds.note(directory, "began")
    deeds.wait_for_file(directory + "/go")
    import fickle
    return fickle.VALUE
""")
    module = importlib.import_module("slow")
    file = write(project / "fickle.py", "VALUE = 1")
    fickle = importlib.import_module("fickle")
    with cluster(agent) as executor:
        old = executor.submit(module.late, str(tmp_path))
        assert wait_until(lambda: deeds.notes(tmp_path) == ["began"])
        write(file, "VALUE = 22")
        importlib.reload(fickle)
        assert executor.submit(tools().get, "fickle").result(WAIT_S) == 22
        (tmp_path / "go").touch()
        with pytest.raises(ModuleNotFoundError, match="imported it anew"):
            old.result(WAIT_S)


def test_edited_and_not_reloaded(project: Path, agent: AgentProcess) -> None:
    """A file that is not what this program has imported is not sent: an error for that task, and for no other."""
    file = write(project / "edited.py", "VALUE = 1")
    importlib.import_module("edited")
    write(file, "VALUE = 22")
    later = os.stat(file).st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(later, later))
    with cluster(agent) as executor:
        with pytest.raises(ModuleNotFoundError, match=r"edited\.py.*was changed after"):
            executor.submit(tools().get, "edited").result(WAIT_S)
        assert executor.submit(tools().tried, "edited").result(WAIT_S) == "missing"
        importlib.reload(sys.modules["edited"])
        os.utime(file)
        importlib.reload(sys.modules["edited"])
        assert executor.submit(tools().get, "edited").result(WAIT_S) == 22


def test_changes_while_it_is_sent(project: Path, agent: AgentProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file that changes on the way is an error for the task that imports its package, and for no other."""
    write(project / "moving/__init__.py", "VALUE = 1")
    large = write(project / "moving/large.bin", "x" * 500_000)
    say = ClientModules._say

    def saying(self: ClientModules, node: Any, number: int, name: str, packed: Any) -> None:
        if name == "moving":
            write(large, "y" * 500_001)
        say(self, node, number, name, packed)

    monkeypatch.setattr(ClientModules, "_say", saying)
    with cluster(agent) as executor:
        with pytest.raises(ModuleNotFoundError, match=r"large\.bin.*changed"):
            executor.submit(tools().get, "moving").result(WAIT_S)
        assert executor.submit(tools().get, "tools", "seen").result(WAIT_S) == []


LIFE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import slow
from distexec import ClusterExecutor
with ClusterExecutor(nodes=[sys.argv[3]], durable=sys.argv[2] + "/run.db") as executor:
    future = executor.options(key="the task").submit(slow.late, sys.argv[2])
    if sys.argv[4] == "1":
        while not os.path.exists(sys.argv[2] + "/log"):
            pass
        os._exit(0)
    executor.options(key="another").submit(os.getpid).result()
    open(sys.argv[2] + "/go", "w").close()
    print(future.result())
"""


def test_next_life_of_the_program(project: Path, tmp_path: Path) -> None:
    """A task that imports for the first time when its program has another life runs again, with that one's modules only."""
    write(project / "slow.py", """
import os

def late(directory):
    with open(directory + "/log", "a") as log:
        print("began", file=log)
    while not os.path.exists(directory + "/go"):
        pass
    import lazily
    return lazily.VALUE
""")
    write(project / "lazily.py", "VALUE = 1")
    with AgentProcess(slots=2) as agent:
        for life in ("1", "2"):
            done = subprocess.run([sys.executable, "-c", LIFE, str(project), str(tmp_path), agent.address, life], cwd=ROOT,
                                  timeout=60, env=os.environ | {"DISTEXEC_SECRET": agent.secret}, capture_output=True,
                                  text=True, check=False)
            assert done.returncode == 0, done.stderr
            write(project / "lazily.py", "VALUE = 22")
    assert done.stdout == "22\n"
    assert (tmp_path / "log").read_text() == "began\nbegan\n"


# ---- links


def test_cut_while_it_is_asked_for(project: Path, agent: AgentProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that a cut link swallowed is asked again on the next, and the import goes on."""
    write(project / "remote.py", "VALUE = 7")
    swallowed = threading.Event()
    find = ClientModules.find

    def swallowing(self: ClientModules, node: Any, message: Find) -> None:
        if message.name == "remote" and not swallowed.is_set():
            swallowed.set()
            proxy.cut()
        else:
            find(self, node, message)

    monkeypatch.setattr(ClientModules, "find", swallowing)
    with Proxy(agent.address) as proxy, cluster(agent, nodes=[proxy.address]) as executor:
        future = executor.submit(tools().get, "remote")
        assert swallowed.wait(WAIT_S)
        proxy.heal()
        assert future.result(WAIT_S) == 7
        assert future.attempts == 1


def test_killed_while_it_waits(project: Path, agent: AgentProcess, monkeypatch: pytest.MonkeyPatch,
                               tmp_path: Path) -> None:
    """A task that waits for a module that never comes can be killed, and the next one asks anew."""
    write(project / "never.py", "VALUE = 8")
    importlib.import_module("tools")
    find = ClientModules.find
    asked = threading.Event()

    def silent(self: ClientModules, node: Any, message: Find) -> None:
        if message.name == "never":
            asked.set()
        else:
            find(self, node, message)

    monkeypatch.setattr(ClientModules, "find", silent)
    with cluster(agent) as executor:
        future = executor.submit(tools().noted, str(tmp_path), "never")
        assert asked.wait(WAIT_S)
        future.kill()
        with pytest.raises(TaskKilled):
            future.result(WAIT_S)
        assert executor.submit(tools().tried, "tools").result(WAIT_S) == "there"
