"""Laws of a pool: how workers come, live and go, whichever way they are started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from glob import glob
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy
import pytest

from distexec import starters
from distexec.messages import BlobRef, OutcomeKind, Returned, SessionSpec
from distexec.payload import CallPacker
from tests import leaks
from tests.system import chores
from tests.system.rig import ROOT, Rig, await_arrival, content_of, gate, is_alive, open_gate

CONTEXTS = ("fork", "forkserver", "spawn")
ARRAY_BYTES = 8 << 20


@pytest.fixture(params=(None, *CONTEXTS), ids=("template", *CONTEXTS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A pool of each kind."""
    context = multiprocessing.get_context(request.param) if request.param else None
    with Rig(context=context) as rig:
        yield rig


@pytest.fixture
def forked() -> Iterator[Rig]:
    """A pool whose workers are forked by a template."""
    with Rig() as rig:
        yield rig


@pytest.fixture
def captured() -> Iterator[Rig]:
    """The same, with what tasks print captured."""
    with Rig(capture=True) as rig:
        yield rig


def spec_with(fn: Any, *args: Any, **fields: Any) -> SessionSpec:
    """A session with an initializer."""
    data, _ = CallPacker().pack_call((fn, args), {})
    return SessionSpec(path=(ROOT, *sys.path), initializer=data, **fields)


# ---- a good life


def test_worker_lives_works_and_stops(rig: Rig) -> None:
    """Ready, an outcome, and after a polite stop gone with exit code 0."""
    worker = rig.worker()
    assert rig.pool.pids == [worker.pid]
    assert rig.ask(worker, chores.double, 21) == 42
    assert (worker.orders, worker.page.started) == (1, 1)
    rig.pool.stop_worker(worker)
    (gone, evidence), = rig.wait("gone")
    assert gone is worker
    assert (evidence.node, evidence.pid, evidence.exitcode, evidence.signal) == ("here", worker.pid, 0, 0)
    assert rig.pool.pids == []


def test_stopped_worker_finishes_first(rig: Rig) -> None:
    """What was sent before a polite stop is done."""
    worker = rig.worker()
    for number in range(100):
        rig.send(worker, chores.double, number)
    rig.pool.stop_worker(worker)
    rig.wait("gone")
    assert [rig.await_result(seq) for seq in range(1, 101)] == [2 * number for number in range(100)]


def test_close_leaves_nothing(rig: Rig) -> None:
    """After close no worker is left, and a worker asked for later does not come."""
    workers = [rig.worker() for _ in range(3)]
    rig.pool.close(30)
    assert rig.pool.is_closed
    assert [evidence.exitcode for _, evidence in rig.of("gone")] == [0, 0, 0]
    assert not any(is_alive(worker.pid) for worker in workers)
    rig.pool.start_worker()
    rig.pool.close()
    assert len(rig.of("ready")) == 3


def test_close_does_not_wait_for_ever(rig: Rig, tmp_path: Path) -> None:
    """A task that does not end is killed with its worker when time is up."""
    path = gate(tmp_path)
    worker = rig.worker()
    rig.send(worker, chores.wait_for, path)
    await_arrival(path)
    rig.pool.close(0.1)
    (_, evidence), = rig.of("gone")
    assert (evidence.signal, evidence.reason) == (signal.SIGKILL, "the pool was closed")


def test_worker_started_by_a_passing_thread_stays(rig: Rig) -> None:
    """A worker does not depend on the life of the thread that asked for it."""
    thread = threading.Thread(target=rig.pool.start_worker)
    thread.start()
    thread.join()
    (worker,), = rig.wait("ready")
    assert rig.ask(worker, chores.double, 1) == 2


def test_surroundings_are_the_clients(tmp_path: Path) -> None:
    """Path, directory, arguments, environment, key, warnings are the session's; `__main__` is empty, no secret."""
    spec = SessionSpec(
        path=(ROOT, "/no/such/entry", *sys.path), directory=str(tmp_path), argv=("prog", "-x"), authkey=b"key",
        environ={**os.environ, "COLOUR": "blue", "DISTEXEC_SECRET": "s"}, warnings=("ignore::ResourceWarning",))
    with Rig(spec) as rig:
        found = rig.ask(rig.worker(), chores.surroundings)
    assert found["path"][:len(spec.path)] == list(spec.path)
    assert found["directory"] == str(tmp_path)
    assert found["argv"] == ["prog", "-x"]
    assert found["environ"]["COLOUR"] == "blue"
    assert "DISTEXEC_SECRET" not in found["environ"]
    assert found["authkey"] == b"key"
    assert found["warnings"] == ["ignore::ResourceWarning"]
    assert found["main"] == []
    assert found["stdin"] == ""
    assert (found["name"], found["daemon"], found["threads"]) == ("distexec-worker-1", False, 1)


@pytest.mark.parametrize(("method", "own"), [(None, 1), ("fork", 2), ("forkserver", 2), ("spawn", 2)])
def test_worker_holds_no_socket_but_its_own(method: str | None, own: int) -> None:
    """Workers inherit neither each other's links nor the pool's; a fork context's inherit what was there before."""
    inherited = chores.count_sockets() if method == "fork" else 0
    with Rig(context=multiprocessing.get_context(method) if method else None) as rig:
        for worker in (rig.worker(), rig.worker()):
            assert rig.ask(worker, chores.count_sockets) == inherited + own


def test_tasks_may_use_multiprocessing(rig: Rig) -> None:
    """A task may start children, and use the proxies of a manager that runs in the client."""
    worker = rig.worker()
    assert rig.ask(worker, chores.double_in_child, 4) == 8


def test_workers_never_see_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a forked context's workers find the cluster's secret in their environment."""
    monkeypatch.setenv("DISTEXEC_SECRET", "s")
    with Rig(context=multiprocessing.get_context("fork")) as rig:
        assert rig.ask(rig.worker(), os.getenv, "DISTEXEC_SECRET") is None


def test_proxies_of_the_clients_managers_work() -> None:
    """With the client's authentication key a task reaches the client's managers."""
    key = bytes(multiprocessing.current_process().authkey)
    with SyncManager(ctx=multiprocessing.get_context("fork")) as manager, \
            Rig(SessionSpec(path=(ROOT, *sys.path), authkey=key)) as rig:
        proxy = manager.list()
        assert rig.ask(rig.worker(), chores.append_to, proxy, 5) is None
        assert list(proxy) == [5]


def test_revocation_takes_back(forked: Rig, tmp_path: Path) -> None:
    """The pool's side of the page stops what has not begun."""
    path = gate(tmp_path)
    worker = forked.worker()
    first = forked.send(worker, chores.wait_for, path)
    second = forked.send(worker, chores.double, 1)
    await_arrival(path)
    worker.page.revoke(2, 2)
    assert worker.page.started == 1
    open_gate(path)
    forked.await_result(first)
    assert forked.wait("said", 2)[1][1] == Returned(1, [(second, 1)])


# ---- initializers


def test_initializer_runs_before_ready() -> None:
    """What the initializer sets, tasks find; large arguments reach it as well."""
    with Rig(spec_with(chores.set_sign, "a sign")) as rig:
        assert rig.ask(rig.worker(), chores.get_sign) == "a sign"


def test_large_initializer_travels_beside_the_spec(forked: Rig) -> None:
    """A pickle too large for a message may be the first of the initializer's buffers, a blob; so may the others."""
    array = numpy.arange(ARRAY_BYTES // 8)
    data, buffers = CallPacker().pack_call((chores.set_sign, ([bytes(ARRAY_BYTES), array],)), {})
    assert forked.store is not None
    parts: list[Any] = [data, *buffers]
    refs = [forked.store.put(each) for each in parts]
    spec = SessionSpec(path=(ROOT, *sys.path), initializer_buffers=tuple(refs))
    rig = Rig.__new__(Rig)
    rig.__dict__.update(forked.__dict__)
    rig.pool = type(forked.pool)(forked.loop, spec, rig, store=forked.store, capture=False, node="here")
    for ref in refs:
        forked.store.release(ref)
    zeros, numbers = rig.ask(rig.worker(), chores.get_sign)
    assert zeros == bytes(ARRAY_BYTES)
    assert (numbers == array).all()
    rig.pool.close()
    assert not any(forked.store.has(ref) for ref in refs)


def test_failing_initializer_is_told_with_its_exception() -> None:
    """A worker whose initializer raises is never ready; the owner gets the exception, and which process it was."""
    with Rig(spec_with(chores.fail, KeyError("no"))) as rig:
        rig.pool.start_worker()
        (evidence, data), = rig.wait("failed")
        _, error = CallPacker().unpack_outcome(OutcomeKind.ERROR, data)
        assert isinstance(error, KeyError)
        assert evidence.exitcode == 1
        assert evidence.pid
        assert "KeyError" in evidence.reason
        assert not rig.of("ready")
        assert not rig.of("gone")


def test_dying_initializer_is_told() -> None:
    """A worker that dies before it is ready failed to start, with its exit code."""
    with Rig(spec_with(chores.die, 9)) as rig:
        rig.pool.start_worker()
        (evidence, data), = rig.wait("failed")
        assert (evidence.exitcode, data) == (9, b"")


@pytest.mark.parametrize("method", CONTEXTS)
def test_context_initializers_inherit(method: str) -> None:
    """With a context, an initializer may be given what only inheritance carries: a queue works."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with Rig(context=context, initializer=(chores.set_sign, (queue,))) as rig:
        queue.put("through the queue")
        assert rig.ask(rig.worker(), chores.get_sign) == "through the queue"
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_unpicklable_initargs_are_told(method: str) -> None:
    """What multiprocessing cannot pass on is a failed start with the error as its reason, not a hang."""
    with Rig(context=multiprocessing.get_context(method), initializer=(chores.set_sign, (threading.Lock(),))) as rig:
        rig.pool.start_worker()
        (evidence, data), = rig.wait("failed")
        assert "pickle" in evidence.reason
        assert isinstance(CallPacker().unpack_outcome(OutcomeKind.ERROR, data)[1], TypeError)


# ---- death


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_is_reported_after_its_outcomes(rig: Rig, tmp_path: Path, number: int) -> None:
    """What a worker sent before it was killed is delivered before it is gone; then another can be started."""
    path = gate(tmp_path)
    worker = rig.worker()
    done = rig.send(worker, chores.double, 4)
    rig.send(worker, chores.wait_for, path)
    await_arrival(path)
    os.kill(worker.pid, number)
    (gone, evidence), = rig.wait("gone")
    assert gone is worker
    assert (evidence.exitcode, evidence.signal, evidence.pid) == (None, number, worker.pid)
    assert worker.page.started == 2
    kinds = [event[0] for event in rig.events]
    assert kinds.index("said") < kinds.index("gone")
    assert rig.await_result(done) == 8
    assert rig.ask(rig.worker(), chores.double, 1) == 2


def test_exiting_task_is_reported_with_its_code(rig: Rig) -> None:
    """A task that ends the process is a death with that exit code."""
    worker = rig.worker()
    rig.send(worker, chores.die, 3)
    (_, evidence), = rig.wait("gone")
    assert (evidence.exitcode, evidence.signal) == (3, 0)


def test_kill_takes_the_whole_tree(rig: Rig, tmp_path: Path) -> None:
    """Killing a worker kills what its task started, and the reason given is in the evidence."""
    worker = rig.worker()
    rig.send(worker, chores.start_sleeper, str(tmp_path / "pid"))
    sleeper = int(content_of(tmp_path / "pid"))
    rig.pool.kill_worker(worker, "because")
    (_, evidence), = rig.wait("gone")
    assert (evidence.signal, evidence.reason) == (signal.SIGKILL, "because")
    assert leaks.wait_until(lambda: not is_alive(sleeper))


def test_crash_takes_what_the_task_started(forked: Rig, tmp_path: Path) -> None:
    """A worker that dies takes along what its task started, so that the next attempt does not meet it."""
    worker = forked.worker()
    other = forked.worker()
    forked.send(worker, chores.start_sleeper, str(tmp_path / "first"))
    forked.send(other, chores.start_sleeper, str(tmp_path / "second"))
    first, second = int(content_of(tmp_path / "first")), int(content_of(tmp_path / "second"))
    os.kill(worker.pid, signal.SIGKILL)
    forked.wait("gone")
    assert leaks.wait_until(lambda: not is_alive(first))
    assert is_alive(second)


def test_task_may_lead_a_session(rig: Rig) -> None:
    """A worker leads no process group yet, so a task or initializer may call os.setsid."""
    worker = rig.worker()
    assert rig.ask(worker, os.setsid) is None
    assert rig.ask(worker, os.getsid, 0) == worker.pid


def test_killing_twice_or_the_dead_is_nothing(rig: Rig) -> None:
    """A worker is gone once, however often it is killed."""
    worker = rig.worker()
    rig.pool.kill_worker(worker, "first")
    rig.pool.kill_worker(worker, "second")
    rig.wait("gone")
    rig.pool.kill_worker(worker, "third")
    rig.pool.close()
    (_, evidence), = rig.of("gone")
    assert evidence.reason == "first"


def test_offspring_that_holds_the_link_hides_no_death(rig: Rig) -> None:
    """A dead worker is gone even while a process it left behind holds its end of the link."""
    worker = rig.worker()
    rig.send(worker, chores.hold_link_and_die)
    (_, evidence), = rig.wait("gone")
    assert evidence.exitcode == 7
    _end_orphans(rig)


def _end_orphans(rig: Rig) -> None:
    """Kill what a context's worker left behind: without a template there is no guardian for it."""
    if isinstance(rig.pool._generations.current.starter, starters.ContextStarter):
        for pid in leaks._descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_worker_that_closes_its_link_is_ended(rig: Rig) -> None:
    """A worker that nobody can talk to any more does not stay."""
    worker = rig.worker()
    rig.send(worker, chores.close_link_and_stay)
    (_, evidence), = rig.wait("gone")
    assert evidence.signal == signal.SIGKILL
    assert "closed its link" in evidence.reason


def test_dead_template_takes_its_workers_along(forked: Rig) -> None:
    """When the template is killed all its workers are reported gone, with the reason; the next worker has a new one."""
    workers = [forked.worker(), forked.worker()]
    starter = forked.pool._generations.current.starter
    assert isinstance(starter, starters.TemplateStarter)
    os.kill(starter.pid, signal.SIGKILL)
    gone = forked.wait("gone", 2)
    assert {worker for worker, _ in gone} == set(workers)
    assert all("SIGKILL" in evidence.reason for _, evidence in gone)
    assert leaks.wait_until(lambda: not any(is_alive(worker.pid) for worker in workers))
    assert forked.ask(forked.worker(), chores.double, 1) == 2


def test_killed_task_leaves_no_shared_memory(forked: Rig, tmp_path: Path) -> None:
    """multiprocessing's resource tracker outlives the kill, and unlinks what the task had."""
    worker = forked.worker()
    forked.send(worker, chores.share_and_wait, str(tmp_path / "name"))
    name = content_of(tmp_path / "name")
    forked.pool.kill_worker(worker, "test")
    forked.wait("gone")
    assert leaks.wait_until(lambda: not Path("/dev/shm", name.lstrip("/")).exists())


@pytest.mark.parametrize("spare", range(8))
def test_no_descriptors_is_a_failed_start(forked: Rig, spare: int) -> None:
    """Short of descriptors, a start fails with the remedy at whichever step, or succeeds; those there are go on."""
    worker = forked.worker()
    with few_descriptors(spare):
        forked.pool.start_worker()
        assert leaks.wait_until(lambda: len(forked.of("failed")) + len(forked.of("ready")) == 2)
    assert all("ulimit" in evidence.reason for evidence, _ in forked.of("failed"))
    assert forked.of("failed") or spare > 2
    assert forked.ask(worker, chores.double, 1) == 2


@contextlib.contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """Let this process open only so many more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, limits[1]))
    fillers: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        for _ in range(spare):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)


CLIENT = """
import sys, multiprocessing
from tests.system import chores
from tests.system.rig import Rig
if __name__ == "__main__":
    method, path = sys.argv[1:]
    rig = Rig(context=multiprocessing.get_context(method) if method != "template" else None)
    busy, idle = rig.worker(), rig.worker()
    rig.send(busy, chores.start_sleeper, path)
    print(busy.pid, idle.pid, flush=True)
    rig.wait("gone", timeout_s=1000)
"""


@pytest.mark.parametrize("method", ["template", *CONTEXTS])
def test_nothing_survives_a_killed_client(method: str, tmp_path: Path) -> None:
    """When the client is killed its workers end, busy or idle, and so does what their tasks started."""
    (tmp_path / "client.py").write_text(CLIENT)
    with subprocess.Popen([sys.executable, str(tmp_path / "client.py"), method, str(tmp_path / "pid")],
                          stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}) as client:
        assert client.stdout is not None
        pids = [int(word) for word in client.stdout.readline().split()]
        sleeper = int(content_of(tmp_path / "pid"))
        client.kill()
    assert leaks.wait_until(lambda: not any(map(is_alive, [*pids, sleeper])))


@pytest.mark.parametrize("method", CONTEXTS)
def test_context_workers_die_with_their_guardian(method: str, tmp_path: Path) -> None:
    """When a context's guardian is killed, so are its workers, in the middle of a task too; new ones can be had."""
    path = gate(tmp_path)
    with Rig(context=multiprocessing.get_context(method)) as rig:
        worker = rig.worker()
        rig.send(worker, chores.wait_for, path)
        await_arrival(path)
        starter = rig.pool._generations.current.starter
        assert isinstance(starter, starters.ContextStarter)
        assert starter._guardian is not None
        assert rig.ask(rig.worker(), chores.double, 1) == 2
        os.kill(starter._guardian.pid, signal.SIGKILL)
        assert [evidence.signal for _, evidence in rig.wait("gone", 2)] == [signal.SIGKILL] * 2
        assert leaks.wait_until(lambda: starter._guardian is None)
        assert rig.ask(rig.worker(), chores.double, 1) == 2


def test_start_under_a_dying_template_is_made_again(forked: Rig) -> None:
    """A worker asked for while its template is being killed comes all the same, if the template had worked before."""
    forked.worker()
    starter = forked.pool._generations.current.starter
    assert isinstance(starter, starters.TemplateStarter)
    os.kill(starter.pid, signal.SIGSTOP)  # so that it takes the order with it
    forked.pool.start_worker()
    os.kill(starter.pid, signal.SIGKILL)
    worker = forked.wait("ready", 2)[1][0]
    assert forked.ask(worker, chores.double, 1) == 2
    assert not forked.of("failed")


# ---- output


def test_output_is_attributed(captured: Rig) -> None:
    """What tasks print is handed over before their outcome, with the task and the stream it came from."""
    worker = captured.worker()
    first = captured.send(worker, chores.say, "one", "uno")
    second = captured.send(worker, chores.say, "two")
    captured.await_result(second)
    written = [event[2:] for event in captured.events if event[0] == "wrote"]
    assert written == [(first, 1, b"one"), (first, 2, b"uno"), (second, 1, b"two")]
    kinds = [event[0] for event in captured.events]
    assert kinds.index("wrote") < kinds.index("said")


def test_output_is_read_while_the_task_runs(captured: Rig, tmp_path: Path) -> None:
    """What a long task prints is handed over while it still runs, and not again with its outcome."""
    path = gate(tmp_path)
    worker = captured.worker()
    captured.send(worker, chores.double, 1)
    seq = captured.send(worker, chores.say_and_wait, "working", path)
    await_arrival(path)
    assert captured.wait("wrote") == [(worker, seq, 1, b"working\n")]
    assert len(captured.of("said")) == 1
    open_gate(path)
    captured.await_result(seq)
    assert len(captured.of("wrote")) == 1


def test_much_output_comes_whole(captured: Rig) -> None:
    """Megabytes of output arrive in pieces that fit a message, and their memory is given back."""
    worker = captured.worker()
    seq = captured.send(worker, chores.say, "0123456789" * 500_000)
    captured.await_result(seq)
    pieces = [data for _, _, _, data in captured.of("wrote")]
    assert b"".join(pieces) == b"0123456789" * 500_000
    assert max(map(len, pieces)) <= 256 << 10
    assert worker.output is not None
    assert os.fstat(worker.output.fds[0]).st_blocks * 512 < 1_000_000


def test_last_words_are_kept(captured: Rig) -> None:
    """The output of a task that died is handed over, and the end of its stderr is in the evidence."""
    worker = captured.worker()
    seq = captured.send(worker, os.write, 2, b"x" * 5000 + b"last words")
    captured.await_result(seq)
    seq = captured.send(worker, os.kill, worker.pid, signal.SIGSEGV)
    (_, evidence), = captured.wait("gone")
    assert "last words" in evidence.stderr_tail
    assert "Segmentation fault" in evidence.stderr_tail
    assert len(evidence.stderr_tail) <= 4096
    assert captured.of("wrote")[-1][1] == seq


# ---- large values


def test_large_arguments_are_private_and_writable(rig: Rig) -> None:
    """A task may write to a large argument; the caller's, and the next task's, stay what they were."""
    worker = rig.worker()
    array = numpy.arange(ARRAY_BYTES // 8)
    for _ in range(2):
        assert (rig.ask(worker, chores.negative, array) == -array).all()
    assert array[1] == 1


def test_large_values_leave_nothing_in_the_store(forked: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an argument's and a result's references are released their memory is free, on both sides, in a while."""
    monkeypatch.setattr("distexec.pool.TRIM_S", 0.05)
    worker = forked.worker()
    array = numpy.arange(ARRAY_BYTES // 8)
    messages = forked.call(chores.negative, array, at=worker)
    worker.queue(messages)
    worker.flush()
    refs = [ref for ref in messages[-1].buffers if isinstance(ref, BlobRef)]
    result = forked.await_result(forked.seq)
    assert result[1] == -1
    assert forked.store is not None
    for ref in refs:
        forked.store.release(ref)
    assert "0 blobs" in repr(forked.store)
    del result
    forked.store.reap()
    forked.store.trim()

    def holds_no_more_than_its_page() -> bool:
        held = [os.readlink(link) for link in glob(f"/proc/{worker.pid}/fd/*") if os.path.lexists(link)]
        return sum(name.startswith("/memfd:distexec") for name in held) <= 2  # mapped, and open for last words

    assert leaks.wait_until(holds_no_more_than_its_page)


def test_kept_argument_stays_what_it_was(forked: Rig) -> None:
    """An argument that a task holds on to is not touched when its memory in the store is used again."""
    worker = forked.worker()
    assert forked.store is not None
    for value in (1, 2, 3):
        messages = forked.call(chores.keep, numpy.full(ARRAY_BYTES // 8, value), at=worker)
        worker.queue(messages)
        worker.flush()
        assert forked.await_result(forked.seq) == value * (ARRAY_BYTES // 8)
        for ref in messages[-1].buffers:
            forked.store.release(ref)
    assert forked.ask(worker, chores.kept_sum) == ARRAY_BYTES // 8


def test_large_functions_work_in_every_worker(forked: Rig) -> None:
    """A function that captures a large array is defined by a blob, which lives as long as a worker that has it."""
    array = numpy.arange(ARRAY_BYTES // 8)

    def total() -> int:
        return int(array.sum())

    define, run = forked.call(total)
    for worker in (forked.worker(), forked.worker()):
        worker.queue([define, run])
        worker.flush()
    assert forked.store is not None
    for ref in define.buffers:
        forked.store.release(ref)
    forked.wait("said", 2)
    assert [forked.result(message) for _, message in forked.of("said")] == [array.sum()] * 2
    forked.pool.close()
    assert "0 blobs" in repr(forked.store)
