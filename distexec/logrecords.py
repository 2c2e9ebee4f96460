"""What tasks log, on its way to the client's handlers.

    logger of the task ── has no handler ──► logging.lastResort ── Record ──► outbox ──► pool … root ──► its namesake there

Loggers have the levels that the client's had when the session began. Where a task or an initializer gives a logger
handlers, these are used instead. The rule: `logging` is not imported before somebody else does that. Part of every worker,
so it imports little.
"""

from __future__ import annotations

import os
import sys
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec import msgpack

from distexec.messages import Record

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec

    from distexec.messages import Run
    from distexec.outbox import Outbox

__all__ = ["forward", "set_levels", "unpack"]

TEXT_CHARS = 64 << 10
"""Of a message or a traceback. Larger: one record costs more than anybody reads."""

REST_BYTES = 64 << 10
"""Of what else is in a record."""

MAX_LEVELS = 4096

_SCALARS = frozenset((type(None), bool, int, float, str))
_FIELDS = ("levelname", "pathname", "lineno", "funcName", "created", "thread", "threadName", "process", "processName",
           "taskName", "stack_info")
_NOT_EXTRA = frozenset((*_FIELDS, "name", "msg", "args", "levelno", "filename", "module", "exc_info", "exc_text", "msecs",
                        "relativeCreated", "message", "asctime"))


def set_levels() -> dict[str, int]:
    """Give the levels of this process's loggers, of those that were given one; "" is the root's."""
    import logging

    levels = {"": logging.root.level}
    for name, logger in list(logging.root.manager.loggerDict.items())[:MAX_LEVELS]:
        if isinstance(logger, logging.Logger) and logger.level:
            levels[name] = logger.level
    return levels


# ---- in the worker


class Worker(Protocol):
    """Whose tasks log."""

    current: Run | None
    outbox: Outbox


def forward(worker: Worker, levels: dict[str, int]) -> None:
    """Send up what nobody handles here, from now on or from when `logging` is imported."""
    logging = sys.modules.get("logging")
    if logging is not None:
        _install(logging, worker, levels)
    else:
        sys.meta_path.insert(0, _Watch(worker, levels))


class _Watch:
    """Waits for `logging` to be imported. (No `MetaPathFinder` by name: to import that takes as long as a template does.)"""

    def __init__(self, worker: Worker, levels: dict[str, int]) -> None:
        self._worker, self._levels = worker, levels

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Have the others find it; only of `logging` the loader is ours."""
        if name != "logging":
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Any", _HookingLoader(spec.loader, self._worker, self._levels))
                return spec
        return None


class _HookingLoader:
    """Loads `logging`, and then sees to its records."""

    def __init__(self, loader: Any, worker: Worker, levels: dict[str, int]) -> None:
        self._loader, self._worker, self._levels = loader, worker, levels

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Do as the other does."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do as the other does, which takes its place again."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _install(module, self._worker, self._levels)


def _install(logging: Any, worker: Worker, levels: dict[str, int]) -> None:
    before = logging.lastResort
    owner = os.getpid()

    class Sender(logging.Handler):  # type: ignore[misc]
        """Sends records to the client; in processes that a task forked it does what was done without it."""

        def emit(self, record: logging.LogRecord) -> None:
            if os.getpid() != owner:
                if before is not None and record.levelno >= before.level:
                    before.handle(record)
                return
            try:
                _send(worker, record)
            except Exception:
                self.handleError(record)

    logging.lastResort = Sender()
    logging.basicConfig = _reluctant(logging, logging.basicConfig, owner)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def _reluctant(logging: Any, basic_config: Callable[..., None], owner: int) -> Callable[..., None]:
    """Give a `basicConfig` that does nothing when `logging.info` and the like call it, or records would go to stderr."""
    @wraps(basic_config)
    def configure(**arguments: Any) -> None:
        if arguments or os.getpid() != owner or sys._getframe(1).f_globals is not vars(logging):
            basic_config(**arguments)
    return configure


def _send(worker: Worker, record: logging.LogRecord) -> None:
    run = worker.current
    session, seq, attempt = (0, 0, 0) if run is None else (run.session, run.seq, run.attempt)
    worker.outbox.append(Record(session, seq, attempt, record.levelno, record.name, *pack(record)))
    if not worker.outbox.is_sending:
        worker.outbox.flush_soon()
    elif not worker.outbox.flusher.is_armed:
        worker.outbox.flusher.arm()  # we may be in a signal handler, in the middle of that


def pack(record: logging.LogRecord) -> tuple[str, bytes]:
    """Give a record's message, and the rest of it; what cannot travel as it is does as text."""
    text = _short(record.getMessage())
    rest: dict[str, Any] = {name: getattr(record, name, None) for name in _FIELDS}
    if record.exc_info and not record.exc_text:
        import logging

        record.exc_text = logging.Formatter().formatException(record.exc_info)
    rest["exc_text"] = _short(record.exc_text or "")
    args = record.args
    if type(record.msg) is str and type(args) is tuple and args and _SCALARS.issuperset(map(type, args)):
        rest["msg"], rest["args"] = record.msg, args
    extra = {str(name): value for name, value in vars(record).items() if name not in _NOT_EXTRA}
    for each in (rest | {"extra": extra}, rest | {"extra": {name: _text(value) for name, value in extra.items()}}, rest):
        try:
            data = msgpack.encode(each, enc_hook=_text)
        except Exception:  # an int too large, a user's repr that raises: the next is plainer
            continue
        if len(data) <= REST_BYTES + len(rest["exc_text"]):
            return text, data
    return text, msgpack.encode({name: rest[name] for name in ("created", "process", "exc_text")})


def _short(text: str) -> str:
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]}… ({len(text) - TEXT_CHARS:,} more characters)"


def _text(value: object) -> str:
    try:
        return _short(repr(value))
    except Exception as error:  # the user's: the record is worth more than this part of it
        return f"<repr() failed with {type(error).__name__}>"


# ---- at the client


def unpack(record: Record, node: str) -> dict[str, Any]:
    """Give what `logging.makeLogRecord` takes; with it, `node` and `task_id` (0: no task logged it)."""
    import logging

    try:
        rest = msgpack.decode(record.data)
    except Exception:  # who sent it is mistaken; the message is there
        rest = {}
    rest = rest if isinstance(rest, dict) else {}
    extra = rest.pop("extra", None)
    args = rest.pop("args", None)
    fields: dict[str, Any] = {"node": node, "task_id": record.seq}
    fields.update(extra if isinstance(extra, dict) else {})
    fields |= {name: rest[name] for name in _FIELDS if name in rest}
    created, path = fields.get("created"), fields.get("pathname")
    if not isinstance(created, float):
        fields.pop("created", None)
    else:
        fields |= {"msecs": int((created - int(created)) * 1000) + 0.0,
                   "relativeCreated": (created - logging._startTime) * 1000}  # type: ignore[attr-defined]
    if isinstance(path, str):
        filename = os.path.basename(path)
        fields |= {"filename": filename, "module": os.path.splitext(filename)[0]}
    msg = rest.get("msg")
    has_args = isinstance(msg, str) and isinstance(args, list)
    fields |= {"name": record.name, "levelno": record.level, "exc_info": None, "exc_text": rest.get("exc_text") or None,
               "msg": msg if has_args else record.text, "args": tuple(args) if has_args else ()}
    fields.setdefault("levelname", logging.getLevelName(record.level))
    return fields
