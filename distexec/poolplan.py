"""How the workers of a session are prepared: what the user gave, and what this process is like, put into a `SessionSpec`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any

from .cpus import thread_limits
from .logrecords import set_levels
from .memorywatch import environ_limit
from .messages import MAX_INLINE_BYTES, SessionSpec
from .payload import CallPacker
from .renewal import Ground
from .supply import LOCAL

if TYPE_CHECKING:
    from .pool import Pool
    from .root import Root


class PoolPlan:
    """How this session's workers are prepared, here and on nodes."""

    def __init__(self, packer: CallPacker, context: BaseContext | None, initializer: Callable[..., object] | None,
                 initargs: tuple[Any, ...], *, is_remote_too: bool, capture: bool | None = None,
                 setup: Callable[..., object] | None = None, cleanup: Callable[[], object] | None = None) -> None:
        self._packer = packer  # the session's, which keeps account of the globals of __main__ that workers were sent
        self._context = context
        self._capture = capture
        self._memory_limit = environ_limit()
        self._initializer: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self._packed: tuple[bytes, list[memoryview]] = (b"", [])
        self.ground = Ground(packer, setup, cleanup) if setup is not None or cleanup is not None else None
        if initializer is not None:
            self._initializer = (initializer, initargs)
            if context is None or is_remote_too:
                self._pack(is_remote_too)
        if self.ground is not None and self._context is not None:
            why = "initargs that only inheritance carries make them" if context is None else "with mp_context= they are"
            raise ValueError(f"setup= and cleanup= are for workers forked from distexec's own template; {why} processes of "
                             "a multiprocessing context. Leave that out, or use initializer=, which each worker calls")

    def _pack(self, is_remote_too: bool) -> None:
        assert self._initializer is not None
        try:
            self._packed = self._packer.pack_call(self._initializer, {})
        except RuntimeError as error:
            if "inheritance" not in str(error):
                raise
            if is_remote_too:
                culprit = next((arg for arg in self._initializer[1] if not _can_travel(arg)), self._initializer[1])
                raise ValueError(f"initargs holds {culprit!r}, which only a child process of this program can inherit; it "
                                 "cannot reach a remote node. Use a multiprocessing.Manager's proxy instead") from error
            self._context = multiprocessing.get_context()

    def spec(self, env: Mapping[str, str] | None, max_tasks_per_child: int, echo: bool, name: str,
             slots: int) -> SessionSpec:
        """Describe this process to its workers, of which `slots` run here at once."""
        extra = {str(key): str(value) for key, value in (env or {}).items()}
        environ = {**os.environ, **extra}
        environ.pop("DISTEXEC_SECRET", None)
        environ |= thread_limits(environ, slots)
        data, views = self._packed
        if len(data) > MAX_INLINE_BYTES or any(view.nbytes > MAX_INLINE_BYTES for view in views):
            raise ValueError("initargs are larger than 1 MiB; pass a path or let the initializer load them")
        return SessionSpec(
            path=tuple(sys.path), directory=os.getcwd(), argv=tuple(sys.argv), environ=environ,
            warnings=tuple(sys.warnoptions), authkey=bytes(multiprocessing.current_process().authkey), initializer=data,
            initializer_buffers=tuple(bytes(view) for view in views), max_tasks_per_child=max_tasks_per_child, echo=echo,
            name=name, env=extra, is_captured=self._capture is not False, log_levels=set_levels())

    def make_pool(self, root: Root) -> Pool:
        """Make the pool of local workers."""
        from .pool import Pool
        return Pool(root.loop, root.spec, root.supply, store=root.store, capture=bool(self._capture), node=LOCAL,
                    context=self._context, initializer=self._initializer, memory_limit=self._memory_limit)


def _can_travel(value: object) -> bool:
    try:
        CallPacker().pack_call((value,), {})
    except RuntimeError:
        return False
    return True
