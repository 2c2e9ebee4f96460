"""CPython's own tests of concurrent.futures, run against ClusterExecutor.

Each of CPython's test classes is made once for every way to get workers: forked from our template, as processes of each
multiprocessing context, and through an agent. What cannot be asked of another executor than ProcessPoolExecutor is in
`LEFT_OUT`, with the reason and the name of the test in `test_replacements.py` that asks it by the public interface.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest

from tests.contract import test_replacements
from tests.contract.substitute import AgentExecutor, LocalExecutor, TemplateExecutor, import_line

pytest.importorskip(
    "test.test_concurrent_futures.util", exc_type=ImportError,
    reason="needs CPython's own test.test_concurrent_futures, which this Python does not ship (3.13 does)")

from test.test_concurrent_futures import (
    test_as_completed,
    test_deadlock,
    test_init,
    test_process_pool,
    test_shutdown,
    test_wait,
    util,
)


class LeftOut(NamedTuple):
    """A test of CPython's that is not run, and what is run instead."""

    reason: str
    replacement: str
    where: str = ""  # only classes whose names begin so; "": all


PROCESSES = "reads ProcessPoolExecutor's _processes"
NAMES_PPE = "makes a ProcessPoolExecutor by that name and reads its private attributes"

LEFT_OUT: dict[str, LeftOut] = {
    "ProcessPoolExecutorTest.test_killed_child": LeftOut(
        PROCESSES + " and expects that one death breaks the pool", "test_killed_worker"),
    "ProcessPoolExecutorTest.test_saturation": LeftOut(PROCESSES, "test_saturation"),
    "ProcessPoolExecutorTest.test_idle_process_reuse_one": LeftOut(PROCESSES, "test_idle_worker_is_used_again"),
    "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": LeftOut(PROCESSES, "test_idle_worker_is_used_again"),
    "ProcessPoolExecutorTest.test_max_tasks_per_child": LeftOut(PROCESSES, "test_max_tasks_per_child"),
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": LeftOut(
        "reads ProcessPoolExecutor's _mp_context", "test_max_tasks_per_child_gives_fresh_processes"),
    "ProcessPoolExecutorTest.test_python_finalization_error": LeftOut(
        "mocks the second thread that ProcessPoolExecutor starts", "test_no_thread_can_be_started"),
    "ProcessPoolShutdownTest.test_processes_terminate": LeftOut(PROCESSES, "test_workers_end_with_shutdown"),
    "ProcessPoolShutdownTest.test_context_manager_shutdown": LeftOut(NAMES_PPE, "test_workers_end_with_the_block"),
    "ProcessPoolShutdownTest.test_del_shutdown": LeftOut(NAMES_PPE, "test_dropping_the_executor_ends_it"),
    "ProcessPoolShutdownTest.test_shutdown_no_wait": LeftOut(NAMES_PPE, "test_shutdown_without_waiting"),
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": LeftOut(
        "reads ProcessPoolExecutor's _executor_manager_thread", "test_pickling_error_and_shutdown_without_waiting"),
    "ExecutorDeadlockTest.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": LeftOut(
        "mocks ProcessPoolExecutor's manager thread and its wake-up pipe", "test_submitting_never_blocks"),
    "FailingInitializerMixin.test_initializer": LeftOut(
        "has a log queue that only inheritance can carry", "test_failing_initializer", "Agent"),
    "FailingInitializerResourcesTest.test_spawn": LeftOut(
        "runs a test of ProcessPoolExecutor inside", "test_failing_initializer_leaks_no_semaphore"),
    "FailingInitializerResourcesTest.test_forkserver": LeftOut(
        "runs a test of ProcessPoolExecutor inside", "test_failing_initializer_leaks_no_semaphore"),
}

TESTS: dict[type, Any] = {
    test_process_pool.ProcessPoolExecutorTest: test_process_pool,
    test_shutdown.ProcessPoolShutdownTest: test_shutdown,
    test_deadlock.ExecutorDeadlockTest: test_deadlock,
    test_init.InitializerMixin: test_init,
    test_init.FailingInitializerMixin: test_init,
    test_as_completed.AsCompletedTests: test_as_completed,
    test_wait.WaitTests: test_wait,
}
"""CPython's classes, and the module that each is from."""


class TemplateMixin(util.ProcessPoolForkserverMixin):
    """Workers fork from our template; the context is only for what the tests themselves make with it."""

    executor_type = TemplateExecutor


class ForkMixin(util.ProcessPoolForkMixin):
    """Workers are forks of the test process."""

    executor_type = LocalExecutor


class ForkserverMixin(util.ProcessPoolForkserverMixin):
    """Workers come from multiprocessing's fork server."""

    executor_type = LocalExecutor


class SpawnMixin(util.ProcessPoolSpawnMixin):
    """Workers are interpreters started anew."""

    executor_type = LocalExecutor


@pytest.mark.usefixtures("agent")
class AgentMixin(util.ProcessPoolForkserverMixin):
    """Workers are an agent's; the context is only for what the tests themselves make with it."""

    executor_type = AgentExecutor


MIXINS = (TemplateMixin, ForkMixin, ForkserverMixin, SpawnMixin, AgentMixin)

for tests in TESTS:
    util.create_executor_tests(globals(), tests, executor_mixins=MIXINS)
del tests

CASES = [value for value in globals().values() if isinstance(value, type) and issubclass(value, util.ExecutorMixin)
         and not value.__name__.endswith("Mixin")]

for case in CASES:
    for name, left_out in LEFT_OUT.items():
        origin, _, method = name.partition(".")
        if origin in {base.__name__ for base in case.__mro__} and case.__name__.startswith(left_out.where):
            setattr(case, method, None)
del case


@pytest.fixture(autouse=True)
def scripts_import_ours(request: pytest.FixtureRequest) -> Iterator[None]:
    """Scripts that a test runs in a process of their own get our import line, and the one that one of them forgot."""
    executor_type = getattr(request.cls, "executor_type", None)
    if executor_type is None:
        yield
        return
    asked = re.compile(rf"^( *)from concurrent\.futures import {executor_type.__name__}$", re.MULTILINE)
    run: Callable[..., Any] = test_shutdown.assert_python_ok

    def run_with_ours(option: str, script: str) -> Any:
        script, found = asked.subn(rf"\1import multiprocessing; {import_line(executor_type)}", script)
        assert found == 1, f"no import of {executor_type.__name__} in:\n{script}"
        return run(option, script)

    with mock.patch.object(test_shutdown, "assert_python_ok", run_with_ours):
        yield


def test_what_is_left_out_exists() -> None:
    """Every test left out is one that CPython has, and has a replacement that is run."""
    for name, left_out in LEFT_OUT.items():
        origin, _, method = name.partition(".")
        assert any(hasattr(getattr(module, origin, None), method) for module in {*TESTS.values(), test_init}), name
        assert hasattr(test_replacements, left_out.replacement), left_out.replacement


def test_nothing_else_is_left_out() -> None:
    """Every test of CPython's process pool classes is run or in the table."""
    run = {name.partition(".")[2] for name in LEFT_OUT}
    for case in CASES:
        run |= {name for name in dir(case) if name.startswith("test_") and getattr(case, name) is not None}
    theirs = {
        name for module in {*TESTS.values(), test_init} for case in vars(module).values()
        if isinstance(case, type) and case.__name__.startswith(("ProcessPool", "FailingInitializerResources"))
        for name in dir(case) if name.startswith("test_")}
    assert theirs - run == set()
