"""Calls and outcomes to pickle and buffers, and back.

    client: CallPacker   pack_function, pack_call   ──bytes, buffers──►  load_function, load_call  CallUnpacker: worker
                         unpack_outcome             ◄──bytes, buffers──  pack_value, pack_error

The rule it keeps: plain `pickle` first. Only what plain pickle cannot do, or what names the client's `__main__`, is
made by `byvalue` (which needs cloudpickle), and such a payload may open with the definitions of `__main__` that it
relies on (see `mainmodule`). Only roots and workers call the loading half; everybody between them passes bytes.

Workers import this module before they fork, so it imports little; what only errors or `__main__` need comes lazily.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from distexec import mainmodule
from distexec.mainmodule import PROTOCOL, Buffer, digest, keep_large
from distexec.messages import OutcomeKind

if TYPE_CHECKING:
    from distexec.definitions import Definitions

Packed = tuple[bytes, list[memoryview]]

KEPT_FUNCTIONS = 4096
"""How many callables the packer remembers. Smaller: a program that alternates between more of them pickles each anew.
Larger: that many functions of the user's are kept alive."""

_MAIN = b"_main__"  # in `__main__` and `__mp_main__`, what multiprocessing calls it in a spawned child
_dumps = pickle.dumps
_loads = pickle.loads
_NO_ARGS = _dumps((), PROTOCOL)
_VALUE = OutcomeKind.VALUE
_PLAIN = frozenset((type(None), bool, int, float, str, bytes))  # without buffers, and without ways to fail


class CallPacker:
    """The client's half, one per session; any thread may use it.

    Callables that pickle by reference are remembered by identity. All others are looked at again on every call, because
    what they capture may have changed; while it has not, they give the same bytes and so the same key.
    """

    _definitions: Definitions | None = None

    def __init__(self, *, is_nested: bool = False) -> None:
        self._is_nested = is_nested  # for calls made in a worker
        # id(fn) -> (fn, packed, key); the reference to fn keeps its id from being used again.
        self._by_reference: dict[int, tuple[object, tuple[bytes, list[memoryview], bytes]]] = {}

    def pack_function(self, fn: Callable[..., Any]) -> tuple[bytes, list[memoryview], bytes]:
        """Give the pickle of a callable, its buffers, and a key that is equal whenever those are equal.

        Raises what pickling raises, with its own type.
        """
        known = self._by_reference.get(id(fn))
        if known is not None:
            return known[1]
        if not _may_be_reference(fn) or fn.__module__ in mainmodule.MAIN_NAMES:
            return self._main_definitions().pack_function(fn)
        try:
            data = _dumps(fn, PROTOCOL)
        except Exception as error:
            if not _is_curable(error):
                raise
            return self._main_definitions().pack_function(fn, error)
        if data.find(_MAIN) >= 0:
            return self._main_definitions().pack_function(fn)
        packed: tuple[bytes, list[memoryview], bytes] = data, [], digest(data)
        if len(self._by_reference) >= KEPT_FUNCTIONS:
            self._by_reference.pop(next(iter(self._by_reference)), None)
        self._by_reference[id(fn)] = fn, packed
        return packed

    def forget_references(self) -> None:
        """Look at each callable anew: modules are others than they were."""
        self._by_reference.clear()

    def pack_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], known: bytes | None = None) -> Packed:
        """Give the pickle of a call's arguments and its large buffers, which are the arguments' own memory: copy them.

        `known`: the key of the function they are for; definitions that travel with it are left out here.
        Raises what pickling raises, with its own type.
        """
        if not kwargs:
            if not args:
                return _NO_ARGS, []
            for value in args:
                if type(value) not in _PLAIN:
                    break
            else:
                return _dumps(args, PROTOCOL), []
            call: Any = args
        else:
            call = [args, kwargs]
        buffers: list[memoryview] = []
        try:
            data = _dumps(call, PROTOCOL, buffer_callback=keep_large(buffers))
        except Exception as error:
            if not _is_curable(error):
                raise
            return self._main_definitions().pack_call(call, known, error)
        if data.find(_MAIN) >= 0:  # a third quicker than `in`
            return self._main_definitions().complete_call(call, known, data, buffers)
        return data, buffers

    def unpack_outcome(self, kind: OutcomeKind, data: Buffer,
                       buffers: Sequence[Buffer] = ()) -> tuple[Any, BaseException | None]:
        """Give (value, None), or (None, exception) when the task raised or what it sent cannot be rebuilt here."""
        try:
            if kind == _VALUE:
                if buffers or self._definitions is not None:
                    return self._load(data, buffers), None
                return _loads(data), None
            if kind in (OutcomeKind.TIMEOUT, OutcomeKind.KILLED):
                return None, _ended(kind)
            pickled, text = _loads(data)
        except BaseException as error:  # a user's __setstate__ may raise anything; the future's owner will see it
            return None, _payload_error("the value the task returned", data, error)
        try:
            exception = self._load(pickled, ())
            if not isinstance(exception, BaseException):
                raise TypeError(f"{type(exception).__name__} object is no exception")
        except BaseException as error:  # as above
            failure = _payload_error("the exception the task raised", pickled, error)
            failure.add_note(f"The task raised, on the worker:{text}")
            return None, failure
        from concurrent.futures.process import _RemoteTraceback

        exception.__cause__ = _RemoteTraceback(text)
        return None, exception

    def _load(self, data: Buffer, buffers: Sequence[Buffer]) -> Any:
        buffers = _writable(buffers)
        if self._definitions is not None and self._definitions.has_namespaces:
            return self._definitions.load(data, buffers)
        return _loads(data, buffers=buffers)

    def _main_definitions(self) -> Definitions:
        if self._definitions is None:
            from distexec.definitions import Definitions

            # One, however many threads come here at once.
            return cast("Definitions", vars(self).setdefault("_definitions", Definitions(is_nested=self._is_nested)))
        return self._definitions


class CallUnpacker:
    """The worker's half, one per worker process, forked along from its session's template.

    Load a function at its first Run, not when its definition arrives, and before that Run's arguments: both may set
    globals of `__main__`, which tasks ahead of it must not see yet.
    """

    def __init__(self) -> None:
        self._main = mainmodule.MainModule()
        self.explain: Callable[[BaseException], object] | None = None  # adds to an exception what is known of it here

    def install_main(self, file: str | None = None) -> ModuleType:
        """Make the session's empty `__main__` and put it in `sys.modules`; the user's script is never run.

        `file` becomes its `__file__`; None: it has none.
        """
        return self._main.install(file)

    def load_function(self, data: Buffer, buffers: Sequence[Buffer] = ()) -> Callable[..., Any]:
        """Rebuild a callable that `pack_function` packed; PayloadError, with its cause, when that fails."""
        try:
            fn: Callable[..., Any] = self._load(data, buffers)
        except ModuleNotFoundError as error:
            _tell_for(error, "the function", data)
            raise
        except BaseException as error:  # unpickling runs the user's code; whoever waits for the task is told
            raise _payload_error("the function", data, error) from error
        return fn

    def load_call(self, data: Buffer, buffers: Sequence[Buffer] = ()) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rebuild (args, kwargs) that `pack_call` packed; PayloadError, with its cause, when that fails."""
        try:
            if buffers or data[0] == mainmodule.BUNDLE:
                call = self._load(data, buffers)
            else:
                call = _loads(data)
        except ModuleNotFoundError as error:
            _tell_for(error, "the arguments of the call", data)
            raise
        except BaseException as error:  # as in load_function
            raise _payload_error("the arguments of the call", data, error) from error
        if type(call) is tuple:
            return call, {}
        args, kwargs = call
        return args, kwargs

    def pack_value(self, value: Any) -> Packed:
        """Give the pickle of a task's value and its large buffers; raises what pickling raises, with its own type."""
        if type(value) in _PLAIN:
            return _dumps(value, PROTOCOL), []
        buffers: list[memoryview] = []
        try:
            return _dumps(value, PROTOCOL, buffer_callback=keep_large(buffers)), buffers
        except Exception as error:
            if not _is_curable(error):
                raise
            from distexec.byvalue import dumps

            return dumps(value, error)

    def pack_error(self, exc: BaseException, traceback: TracebackType | None = None) -> bytes:
        """Give what `unpack_outcome` needs to raise `exc` at the client, its traceback as text; never raises.

        `traceback`: the one to show; None: the exception's own. An exception that cannot be pickled, or not be rebuilt
        (tried here), is replaced by a RemoteError.
        """
        if self.explain is not None:
            self.explain(exc)
        text = _traceback_text(exc, traceback)
        exc = self._main.explain(exc)
        exc.__traceback__ = None  # its frames hold every object the task used
        try:
            data = self._pack_exception(exc)
        except BaseException as error:  # told to the user in the stand-in
            data = _dumps(_stand_in(exc, error), PROTOCOL)
        return _dumps((data, text), PROTOCOL)

    def _pack_exception(self, exc: BaseException) -> bytes:
        try:
            data = _dumps(exc, PROTOCOL)
        except Exception as error:
            if not _is_curable(error):
                raise
            from distexec.byvalue import dumps

            data = dumps(exc, error, in_band=True)[0]
        if not isinstance(_loads(data), BaseException):
            raise TypeError("what its pickle gives is no exception")
        return data

    def _load(self, data: Buffer, buffers: Sequence[Buffer]) -> Any:
        buffers = _writable(buffers)
        if data[0] == mainmodule.BUNDLE:
            return self._main.load(data, buffers)
        return _loads(data, buffers=buffers)


def _may_be_reference(fn: object) -> bool:
    """Say whether plain pickle, if it works, makes of `fn` no more than a module's and an attribute's name."""
    if isinstance(fn, BuiltinFunctionType):
        return isinstance(fn.__self__, ModuleType)
    return isinstance(fn, (FunctionType, type))


def _is_curable(error: Exception) -> bool:
    """Say whether pickling by value may succeed where plain pickle failed.

    Not if the error comes out of Python code that pickle called: that is the object's own `__reduce__` or the like,
    which would be run again only to fail again.
    """
    traceback = error.__traceback__
    return (isinstance(error, (pickle.PicklingError, AttributeError, TypeError))
            and traceback is not None and traceback.tb_next is None)


def _writable(buffers: Sequence[Buffer]) -> Sequence[Buffer]:
    """Give buffers that arrays built over them may write to, as over memory of their own."""
    return [bytearray(buffer) if type(buffer) is bytes else buffer for buffer in buffers]


def _tell_for(error: ModuleNotFoundError, what: str, data: Buffer) -> None:
    """Add to an error what could not be unpickled for it. It stays what it is: whoever gets it knows what to install."""
    names = _global_names(data)
    error.add_note(f"{what} could not be unpickled for that" + (f" (it names {', '.join(names)})" if names else ""))


def _payload_error(what: str, data: Buffer, error: BaseException) -> BaseException:
    from distexec.errors import PayloadError

    names = _global_names(data)
    involved = f" (it names {', '.join(names)})" if names else ""
    failure = PayloadError(f"{what} could not be unpickled{involved}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _global_names(data: Buffer) -> list[str]:
    """List the first few classes and functions a pickle names, which is the best there is to say what is in it."""
    import pickletools

    strings: list[str] = []
    names: dict[str, None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(mainmodule.without_definitions(data)[:1 << 16]):
            if opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                names[".".join(strings[-2:])] = None
            elif isinstance(argument, str):
                strings.append(argument)
            if len(names) >= 4:
                break
    except Exception:  # a pickle that is broken, or longer than this; the caller reports the failure itself
        pass
    return list(names)


def _traceback_text(exc: BaseException, traceback: TracebackType | None) -> str:
    from traceback import format_exception

    try:
        lines = format_exception(type(exc), exc, traceback or exc.__traceback__)
    except Exception as error:  # a user's exception may break even this; the text says so
        lines = [f"{type(exc).__qualname__} (its traceback could not be shown: {type(error).__name__})\n"]
    return '\n"""\n{}"""'.format("".join(lines))


def _stand_in(exc: BaseException, error: BaseException) -> BaseException:
    from distexec.errors import RemoteError

    name = f"{type(exc).__module__}.{type(exc).__qualname__}"
    return RemoteError(f"{name}: {_text(exc)} (the exception itself cannot be sent: "
                       f"{type(error).__name__}: {_text(error)})")


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as error:  # the user's __str__; the type's name still tells which exception it was
        return f"<str() failed with {type(error).__name__}>"


def _ended(kind: OutcomeKind) -> BaseException:
    from distexec.errors import TaskKilled, TaskTimeout

    if kind == OutcomeKind.TIMEOUT:
        return TaskTimeout("the task ran longer than its timeout and was ended")
    return TaskKilled("the task was ended by future.kill()")
