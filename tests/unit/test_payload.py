"""Calls and outcomes to bytes and back, both ends in this process."""

from __future__ import annotations

import functools
import operator
import os
import pickle
import subprocess
import sys
import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distexec.errors import PayloadError, RemoteError
from distexec.messages import OutcomeKind
from distexec.payload import CallPacker, CallUnpacker


@pytest.fixture
def packer() -> CallPacker:
    """A client's half."""
    return CallPacker()


@pytest.fixture
def unpacker() -> CallUnpacker:
    """A worker's half."""
    return CallUnpacker()


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty `__main__` in place of pytest's."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def carried(buffers: list[memoryview]) -> list[bytes]:
    """What a message makes of buffers."""
    return [bytes(buffer) for buffer in buffers]


def called(packer: CallPacker, *args: Any, **kwargs: Any) -> Any:
    """The arguments of a call as the worker gets them."""
    data, buffers = packer.pack_call(args, kwargs)
    return CallUnpacker().load_call(data, carried(buffers))


def ran(packer: CallPacker, unpacker: CallUnpacker, error: BaseException) -> tuple[Any, BaseException | None]:
    """What the client gets when a task raises `error`."""
    try:
        raise error
    except BaseException as caught:
        return packer.unpack_outcome(OutcomeKind.ERROR, unpacker.pack_error(caught, caught.__traceback__))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner), max_leaves=10)


@given(st.lists(VALUES).map(tuple), st.dictionaries(st.text(), VALUES))
def test_calls_round_trip(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call arrives as it was made."""
    assert CallUnpacker().load_call(*CallPacker().pack_call(args, kwargs)) == (args, kwargs)


@given(VALUES)
def test_values_round_trip(value: Any) -> None:
    """A value arrives as it was returned."""
    data, buffers = CallUnpacker().pack_value(value)
    assert CallPacker().unpack_outcome(OutcomeKind.VALUE, data, buffers) == (value, None)


@pytest.mark.parametrize("fn", [len, os.getcwd, subprocess.run, dict, functools.reduce, pickle.dumps])
def test_functions_by_reference_are_packed_once(packer: CallPacker, unpacker: CallUnpacker, fn: Any) -> None:
    """A function that goes by name is remembered by identity, and is the same object at the other end."""
    packed = packer.pack_function(fn)
    assert packer.pack_function(fn) is packed
    assert unpacker.load_function(*packed[:2]) is fn
    assert CallPacker().pack_function(fn)[2] == packed[2]


@pytest.mark.parametrize("make", [
    lambda n: lambda: n, lambda n: functools.partial(max, n, -1), lambda n: [n].pop, operator.itemgetter])
def test_functions_by_value_are_looked_at_every_time(packer: CallPacker, make: Any) -> None:
    """Equal closures, partials, methods and callable objects have one key; others have others."""
    code = make(1).__code__ if hasattr(make(1), "__code__") else None
    first, second, other = make(1), make(1), make(2)
    if code is not None:
        first.__qualname__ = second.__qualname__
    assert packer.pack_function(first)[2] == packer.pack_function(second)[2]
    assert packer.pack_function(first)[2] != packer.pack_function(other)[2]


def test_changed_closure_is_seen(packer: CallPacker, unpacker: CallUnpacker) -> None:
    """What a closure captures may change between two packings of it."""
    kept = [1]

    def total() -> int:
        return sum(kept)

    before = packer.pack_function(total)
    kept.append(2)
    after = packer.pack_function(total)
    assert before[2] != after[2]
    assert (unpacker.load_function(*before[:2])(), unpacker.load_function(*after[:2])()) == (1, 3)


def test_remembered_functions_are_kept_alive(packer: CallPacker) -> None:
    """The identity of a remembered function is not given to another one."""
    module = ModuleType("fleeting")
    sys.modules["fleeting"] = module
    try:
        for number in range(50):
            exec(f"def f(): return {number}", vars(module))
            data, buffers, _ = packer.pack_function(module.f)
            assert CallUnpacker().load_function(data, buffers)() == number
    finally:
        del sys.modules["fleeting"]


def test_large_buffers_go_out_of_band(packer: CallPacker) -> None:
    """An array's memory is not copied into the pickle, and its copy at the other end is writable."""
    array = np.arange(100_000)
    data, buffers = packer.pack_call((array,), {})
    assert len(data) < 1000
    assert np.shares_memory(np.frombuffer(buffers[0], array.dtype), array)
    (back,), _ = CallUnpacker().load_call(data, carried(buffers))
    back += 1
    assert (back == array + 1).all()


@pytest.mark.parametrize("array", [
    np.zeros(3), np.zeros((300, 300))[::2, ::2], np.asfortranarray(np.ones((200, 200))), np.zeros(0), np.array([None])])
def test_every_array_arrives_writable(packer: CallPacker, array: Any) -> None:
    """Small, strided, Fortran-ordered, empty and object arrays arrive equal and writable."""
    (back,), _ = called(packer, array)
    assert (back == array).all()
    assert back.flags.writeable


def test_read_only_buffers_stay_read_only(packer: CallPacker) -> None:
    """A read-only array does not become writable."""
    array = np.zeros(100_000)
    array.flags.writeable = False
    assert not called(packer, array)[0][0].flags.writeable


def test_what_pickle_cannot_do_is_done_by_value(packer: CallPacker) -> None:
    """Lambdas, modules, local classes and their instances may be arguments."""
    class Local:
        pass

    (function, module, cls, one), _ = called(packer, lambda x: x + 1, os, Local, Local())
    assert function(1) == 2
    assert module is os
    assert cls is Local
    assert type(one) is Local


class Counted:
    """Counts how often it is pickled."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.count = error, 0

    def __reduce__(self) -> Any:
        self.count += 1
        if self.error is not None:
            raise self.error
        return int, ()


@pytest.mark.parametrize("error", [
    pickle.PicklingError("no"), TypeError("no"), AttributeError("no"), ValueError("no"), RuntimeError("no"),
    SystemExit(1), KeyboardInterrupt()])
def test_pickling_errors_keep_their_type(packer: CallPacker, unpacker: CallUnpacker, error: BaseException) -> None:
    """What a `__reduce__` raises comes out as it is, and it is not run again."""
    for pack in (lambda x: packer.pack_call((x,), {}), packer.pack_function, unpacker.pack_value):
        counted = Counted(error)
        with pytest.raises(type(error)) as caught:
            pack(counted)
        assert caught.value is error
        assert counted.count == 1


def test_reducers_run_once(packer: CallPacker) -> None:
    """An object that plain pickle can handle is pickled once."""
    counted = Counted()
    packer.pack_call((counted,), {})
    assert counted.count == 1


@pytest.mark.parametrize("value", [(i for i in "a"), threading.Lock(), [memoryview(b""), threading.Lock()]])
def test_unpicklable_arguments_raise_what_pickle_raises(packer: CallPacker, value: Any) -> None:
    """Where pickling by value does not help either, the error is plain pickle's."""
    with pytest.raises(TypeError, match="cannot pickle"):
        packer.pack_call((value,), {})


def test_too_deep_recursion_is_an_error(packer: CallPacker) -> None:
    """Too deep a structure raises RecursionError, like PPE."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        packer.pack_call((deep,), {})
    while deep:  # taken apart from outside, as freeing it is recursive too
        deep = deep.pop()


def test_main_in_a_string_is_harmless(packer: CallPacker) -> None:
    """Text that says `__main__` travels like any other."""
    data, buffers = packer.pack_call((["__main__"],), {})
    assert (data, buffers) == (pickle.dumps((["__main__"],), 5), [])


def test_standard_streams_are_each_ones_own_and_other_files_refused(packer: CallPacker) -> None:
    """A function may hold sys.stdout; the contents of files are not sent silently."""
    assert called(packer, sys.stderr, lambda: 1)[0][0] is sys.stderr
    with open(__file__) as file, pytest.raises(TypeError, match="cannot pickle"):
        packer.pack_call((file,), {})


class Bomb:
    """Raises when it is unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return explode, (self.error,)

    def __call__(self) -> None:
        """Be a function."""


def explode(error: BaseException) -> None:
    """Raise it."""
    raise error


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), pickle.UnpicklingError("x")])
def test_unpickling_failures_are_payload_errors(packer: CallPacker, unpacker: CallUnpacker,
                                                error: BaseException) -> None:
    """Whatever unpickling raises, on either side, becomes a PayloadError that names what was in the pickle."""
    bomb = Bomb(error)
    with pytest.raises(PayloadError, match=r"the function could not be .*test_payload\.explode") as at_function:
        unpacker.load_function(*packer.pack_function(bomb)[:2])
    with pytest.raises(PayloadError, match=f"arguments.*{type(error).__name__}") as at_call:
        unpacker.load_call(*packer.pack_call((bomb,), {}))
    value, at_value = packer.unpack_outcome(OutcomeKind.VALUE, *unpacker.pack_value([bomb]))
    assert value is None
    assert isinstance(at_value, PayloadError)
    for failure in (at_function.value, at_call.value, at_value):
        assert type(failure.__cause__) is type(error)
    _, arrived = packer.unpack_outcome(OutcomeKind.PAYLOAD, unpacker.pack_error(at_call.value))
    assert isinstance(arrived, PayloadError)
    assert "explode" in str(arrived.__cause__)


@pytest.mark.parametrize("data", [b"", b"x", b"M", b"Mx", b"\x80\x05", b"M\x80\x05N"])
def test_broken_bytes_are_payload_errors(packer: CallPacker, unpacker: CallUnpacker, data: bytes) -> None:
    """Bytes that are no pickle raise nothing but PayloadError."""
    with pytest.raises(PayloadError):
        unpacker.load_call(data)
    with pytest.raises(PayloadError):
        unpacker.load_function(data)
    for kind in (OutcomeKind.VALUE, OutcomeKind.ERROR, OutcomeKind.PAYLOAD):
        assert isinstance(packer.unpack_outcome(kind, data)[1], PayloadError)


class TwoArguments(Exception):
    """Cannot be rebuilt from its args."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class Kept(Exception):
    """Can be rebuilt although it takes several arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.b = b


class Untold(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("error", [
    ValueError("x"), Kept(1, 2), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1),
    OSError(2, "no", "f"), UnicodeDecodeError("utf-8", b"x", 0, 1, "r"),
    BaseExceptionGroup("g", [ValueError(1), KeyboardInterrupt()])])
def test_exceptions_arrive_as_themselves(packer: CallPacker, unpacker: CallUnpacker, error: BaseException) -> None:
    """An exception arrives with its type, arguments, attributes and notes, and the remote traceback as its cause."""
    error.add_note("noted")
    value, arrived = ran(packer, unpacker, error)
    assert value is None
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.__notes__ == ["noted"]
    assert getattr(arrived, "b", None) == getattr(error, "b", None)
    assert type(arrived.__cause__).__name__ == "_RemoteTraceback"
    assert "in ran\n" in str(arrived.__cause__)
    assert error.__traceback__ is None


@pytest.mark.parametrize("error", [
    TwoArguments(1, 2), ValueError(threading.Lock()), ValueError(Bomb(SystemExit(1))), Untold(i for i in "a")])
def test_exceptions_that_cannot_travel_are_stood_in_for(packer: CallPacker, unpacker: CallUnpacker,
                                                        error: BaseException) -> None:
    """An exception that cannot be pickled or rebuilt is replaced, on the worker, by one that tells type and text."""
    _, arrived = ran(packer, unpacker, error)
    assert type(arrived) is RemoteError
    assert type(error).__qualname__ in str(arrived)
    assert "in ran\n" in str(arrived.__cause__)
    if isinstance(error, TwoArguments):
        assert "1 and 2" in str(arrived)


def test_exception_by_value(packer: CallPacker, unpacker: CallUnpacker) -> None:
    """An exception of a local class arrives as that class."""
    class Local(Exception):
        pass

    assert type(ran(packer, unpacker, Local(1))[1]) is Local


def test_exception_only_the_client_cannot_rebuild(packer: CallPacker, unpacker: CallUnpacker) -> None:
    """If only the client fails to rebuild an exception, the remote traceback is not lost."""
    module = ModuleType("elsewhere")
    sys.modules["elsewhere"] = module
    exec("class Gone(Exception): pass", vars(module))
    try:
        data = unpacker.pack_error(module.Gone("text"))
    finally:
        del sys.modules["elsewhere"]
    _, arrived = packer.unpack_outcome(OutcomeKind.ERROR, data)
    assert isinstance(arrived, PayloadError)
    assert "elsewhere.Gone: text" in arrived.__notes__[0]


def test_versions_of_a_global_name_one_content_each(main: ModuleType, packer: CallPacker) -> None:
    """Threads that pack while a global changes never give two contents one version, nor the last one an old version."""
    exec("numbers = []\ndef total(): return sum(numbers)", vars(main))
    seen: dict[int, set[bytes]] = {}

    def pack() -> None:
        for _ in range(100):
            main.numbers.append(1)
            data, _, _ = packer.pack_function(main.total)
            for name, version, _, content, _, _ in pickle.loads(data[1:])[0]:
                if name == "numbers":
                    seen.setdefault(version, set()).add(content)

    threads = [threading.Thread(target=pack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(contents) == 1 for contents in seen.values())
    packed = packer.pack_function(main.total)
    assert packer.pack_function(main.total) is packed
    unpacker = CallUnpacker()
    unpacker.install_main("script.py")
    assert unpacker.load_function(*packed[:2])() == 400
    assert vars(sys.modules["__main__"])["__file__"] == "script.py"


def test_older_versions_do_not_come_back(main: ModuleType, packer: CallPacker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that runs late, or again, does not set a global back; one of an unbound name is applied all the same."""
    exec("x = 1\ndef get(): return x\ndef drop():\n    global x\n    del x", vars(main))
    payloads = []
    for value in (1, 2, 3):
        main.x = value
        payloads.append(packer.pack_function(main.get)[:2])
    drop = packer.pack_function(main.drop)[:2]
    unpacker = CallUnpacker()
    unpacker.install_main()
    assert [unpacker.load_function(*payloads[number])() for number in (1, 2, 0, 1)] == [2, 3, 3, 3]
    unpacker.load_function(*drop)()
    assert unpacker.load_function(*payloads[2])() == 3
    monkeypatch.setitem(sys.modules, "__main__", main)


def test_wrapped_functions_share_their_modules_globals(packer: CallPacker, unpacker: CallUnpacker) -> None:
    """A function made by value runs in the dict of its module where that can be imported."""
    def inner() -> Any:
        return CallPacker

    assert unpacker.load_function(*packer.pack_function(inner)[:2]).__globals__ is globals()


def test_import_is_light() -> None:
    """Workers' half pulls in nothing that templates would wait for."""
    code = ("import sys, distexec.payload; print(sorted({'cloudpickle', 'asyncio', 'logging', 'ssl', 'psutil', "
            "'xxhash', 'multiprocessing', 'distexec.byvalue'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"
