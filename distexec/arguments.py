"""What a user may say of an executor, checked before anything begins.

Rule: what cannot be meant is refused at once, with what is wrong and what would be right.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.context import BaseContext
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .address import parse_address, resolve
from .clientfiles import Depends
from .cpus import usable_cpus
from .supply import LOCAL
from .taskoptions import check_kind

if TYPE_CHECKING:
    from .handshake import Credentials
    from .journal import NodeRow

__all__ = ["NodeSpec", "check_callables", "check_child_limit", "check_env", "check_linger", "check_numbers",
           "find_credentials", "left_behind", "local_slots", "node_specs"]

_log = logging.getLogger("distexec")


class NodeSpec(NamedTuple):
    """A node to use, and how much of it: `address` as in `nodes=`, `slots` at most (None: all that it offers).

    `depends`: as the executor's, for this node alone, beside those. `setup_args`: what its setup is called with here.
    """

    address: str
    slots: int | None = None
    depends: Depends = ()
    setup_args: tuple[Any, ...] = ()


def check_numbers(max_workers: int | None, retries: int, node_timeout: float, nodes_timeout: float | None,
                   max_pending: int | None) -> None:
    """Raise TypeError or ValueError for numbers that cannot be meant."""
    check_kind("max_workers", max_workers, Integral, may_be_none=True)
    check_kind("retries", retries, Integral)
    check_kind("node_timeout", node_timeout, Real)
    check_kind("nodes_timeout", nodes_timeout, Real, may_be_none=True)
    check_kind("max_pending", max_pending, Integral, may_be_none=True)
    if max_workers is not None and max_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    if not node_timeout > 0:
        raise ValueError(f"node_timeout must be a positive number of seconds, not {node_timeout}")
    if nodes_timeout is not None and not nodes_timeout >= 0:
        raise ValueError(f"nodes_timeout must be None or 0 or more seconds, not {nodes_timeout}")
    if max_pending is not None and max_pending < 1:
        raise ValueError(f"max_pending must be None or at least 1, not {max_pending}")


def check_linger(durable: object, linger: float | None) -> None:
    """The same for how long nodes keep a durable session."""
    check_kind("linger", linger, Real, may_be_none=True)
    if linger is not None and durable is None:
        raise ValueError("linger= is for durable sessions: name a journal with durable=")
    if linger is not None and not 0 <= linger < float("inf"):
        raise ValueError(f"linger must be 0 or more seconds, not {linger}")


def left_behind(rows: Sequence[NodeRow], specs: Sequence[NodeSpec]) -> list[tuple[NodeSpec, Any]]:
    """Name nodes that are not used any more but may hold calls of the journal: these are fetched, they get no others."""
    named = {spec.address for spec in specs} | {LOCAL}
    left = []
    for row in rows:
        if row.may_hold and row.address not in named:
            try:
                resolve_now = partial(resolve, parse_address(row.address))
                resolve_now()
                left.append((NodeSpec(row.address, 0), resolve_now))
            except ValueError as error:
                _log.warning("distexec: node %s of the journal is not asked what it holds: %s", row.address, error)
    return left


def check_env(env: Mapping[str, str] | None) -> None:
    """Raise TypeError for what are no variables."""
    if env is None:
        return
    if not isinstance(env, Mapping) or not all(isinstance(each, str) for pair in env.items() for each in pair):
        raise TypeError(f"env must map names of variables to strings, not {env!r}")


def check_callables(**given: object) -> None:
    """Raise TypeError for what is to be called and cannot be."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a callable")


def check_child_limit(max_tasks_per_child: int | None, mp_context: BaseContext | None) -> None:
    """Raise TypeError or ValueError for a limit or a context that cannot be meant."""
    if mp_context is not None and not hasattr(mp_context, "get_start_method"):
        raise TypeError(f"mp_context must be what multiprocessing.get_context() returns, not {mp_context!r}")
    if max_tasks_per_child is None:
        return
    if not isinstance(max_tasks_per_child, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if max_tasks_per_child <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
    if mp_context is not None and mp_context.get_start_method(allow_none=False) == "fork":
        raise ValueError("max_tasks_per_child is incompatible with the 'fork' multiprocessing start method; supply a "
                         "different mp_context.")


def node_specs(nodes: str | Sequence[str | NodeSpec] | None) -> list[NodeSpec]:
    """Read `nodes=`, or `$DISTEXEC_NODES`. Raises TypeError or ValueError for what names no node."""
    if nodes is None:
        nodes = os.environ.get("DISTEXEC_NODES") or LOCAL
    if isinstance(nodes, str):
        nodes = [part.strip() for part in nodes.split(",") if part.strip()]
    specs = [node if isinstance(node, NodeSpec) else NodeSpec(node) for node in nodes]
    if not specs:
        raise ValueError('nodes names no node; leave it out, or name "local" or addresses')
    for spec in specs:
        if not isinstance(spec.address, str):
            raise TypeError(f"a node is named by a string or NodeSpec, not {spec.address!r}")
        if spec.slots is not None and spec.slots < 0:
            raise ValueError(f"slots of node {spec.address!r} must be 0 or more, not {spec.slots}")
    return list({spec.address: spec for spec in specs}.values())  # one that is named twice is meant once


def local_slots(specs: list[NodeSpec], max_workers: int | None) -> int:
    """Say how many workers this machine shall have."""
    wanted = next((spec.slots for spec in specs if spec.address == LOCAL), None)
    return wanted if wanted is not None else max_workers if max_workers is not None else usable_cpus()


def find_credentials(secret: str | bytes | None, name: str, *, required: bool) -> Credentials | None:
    """Give what proves to nodes who we are, if that is `required`. Raises ValueError if there is no secret."""
    if not required:
        return None
    from .handshake import Credentials
    from .secretfile import load_secret, secret_path
    found = load_secret(secret)
    if found is None:
        raise ValueError("a remote node needs the secret of its cluster: pass secret=, set $DISTEXEC_SECRET, or put it into "
                         f"{secret_path()} (`distexec secret new` makes one; it must be the same on every machine)")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Credentials(found, name, secrets.token_bytes(16), python, __version__)
