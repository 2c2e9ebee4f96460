"""The programs: `distexec-agent`, and `distexec` with its subcommands.

Rule: a user's mistake gets one line that says what, where and what to do next, on stderr, and exit code 2; a machine's
refusal (port taken, no such node) the same with exit code 1. No traceback for either.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import __version__
from .address import DEFAULT_PORT, format_address, own_addresses, parse_address, resolve
from .errors import DistexecError
from .messages import MAX_INLINE_BYTES
from .secretfile import create_secret, load_secret, read_secret, secret_path

if TYPE_CHECKING:
    from .auth import Secret
    from .forking import Init
    from .memorywatch import MemoryLimit
    from .starters import Terms

DRAIN_S = 60.0
"""How long a stopping agent lets running tasks go on, unless told otherwise."""

SIGNAL_S = 0.5
"""How long a signal may wait to be noticed. Shorter: an idle agent wakes more often."""

MAX_NAME = 200  # characters; Hello must hold it


class UsageError(Exception):
    """The user asked for something that cannot be; its text says what and what to do."""


def agent_main(argv: Sequence[str] | None = None) -> int:
    """Run `distexec-agent`."""
    return _guarded(_agent_parser(), _run_agent, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `distexec`."""
    return _guarded(_parser(), lambda options: int(options.run(options)), argv)


def _guarded(parser: argparse.ArgumentParser, run: Any, argv: Sequence[str] | None) -> int:
    options = parser.parse_args(argv)
    try:
        return int(run(options))
    except (UsageError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except (OSError, DistexecError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---- distexec-agent


def _agent_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distexec-agent", description="Offer this machine's CPUs to ClusterExecutor programs that hold the secret.")
    parser.add_argument("--listen", metavar="HOST[:PORT]", action="append",
                        help=f"where to listen; may be repeated (default: all interfaces, port {DEFAULT_PORT})")
    parser.add_argument("--slots", type=int, metavar="N",
                        help="tasks to run at once; negative: leave that many CPUs free (default: all CPUs)")
    parser.add_argument("--name", default=socket.gethostname(), help="what this node is called (default: the host's name)")
    parser.add_argument("--secret-file", metavar="FILE", help="file with the cluster's secret "
                        "(default: $DISTEXEC_SECRET, else the per-user file, which is made if need be)")
    parser.add_argument("--spool", metavar="DIR", help="directory for sessions' files (default: the temporary directory)")
    parser.add_argument("--drain", type=float, default=DRAIN_S, metavar="SECONDS",
                        help="how long SIGTERM lets running tasks go on (default: %(default)g)")
    parser.add_argument("--memory-limit", metavar="SIZE",
                        help="kill a worker that uses more together with the processes its task started, like 2G or 500M; "
                        "the task is told how much it was (default: $DISTEXEC_MEMORY_LIMIT, else no limit)")
    parser.add_argument("--max-open-files", type=int, metavar="N",
                        help="how many files, sockets and the like each process of a task may have open")
    parser.add_argument("--max-file-size", metavar="SIZE",
                        help="how large a file may get that a task writes, like 2G or 500M; also all that one worker prints")
    parser.add_argument("--user", metavar="NAME", help="run tasks as this system user, who then cannot read what is yours; "
                        "only root can have that")
    parser.add_argument("--init", metavar="FILE", help="Python file to run once for each session, before its setup; tasks "
                        "reach what it defines as the module distexec_init")
    parser.add_argument("--once", action="store_true", help="stop when the first client that came has gone")
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--version", action="version", version=f"distexec {__version__}")
    return parser


def _run_agent(options: argparse.Namespace) -> int:
    from .confinement import open_to
    from .cpus import usable_cpus
    from .nodeagent import Agent
    from .spool import spool
    from .starters import reap_orphans
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    slots = _slots(options.slots, usable_cpus())
    if not options.drain >= 0:
        raise UsageError(f"--drain must be 0 or more seconds, not {options.drain:g}")
    if not options.name or not options.name.isprintable() or "/" in options.name or len(options.name) > MAX_NAME:
        raise UsageError(f"--name {options.name!r}: give 1 to {MAX_NAME} printable characters without a slash")
    secret = _agent_secret(options.secret_file)
    os.environ.pop("DISTEXEC_SECRET", None)  # no process started from here may find it
    addresses = [parse_address(text, lowest_port=0) for text in options.listen or ["0.0.0.0", "[::]"]]
    terms, memory_limit = _terms(options), _memory_limit(options.memory_limit)
    reap_orphans()
    stop = threading.Event()
    with spool(_spool_parent(options.spool)) as directory:
        if terms.user is not None:
            open_to(terms.user, directory)
        agent = Agent(secret, slots, options.name, directory, stop.set, memory_limit, terms)
        try:
            _obey(agent, options, stop)
            _start(agent, addresses, is_default=not options.listen)
            while not stop.wait(SIGNAL_S):
                pass  # the kernel may give a signal to another thread: we act on it only when we wake
        finally:
            agent.close()
    return 0


def _start(agent: Any, addresses: list[tuple[str, int]], *, is_default: bool) -> None:
    if is_default and not _has_v6():
        addresses = addresses[:1]
    agent.start(addresses)
    where = ", ".join(format_address(listener.address) for listener in agent.listeners)
    named = f"; others reach it at {_reachable(agent.listeners[0].address[1])}" if is_default else ""
    print(f"distexec-agent {agent.name!r} ready: {agent.slots} slots, listening on {where}{named}", flush=True)


def _reachable(port: int) -> str:
    """Say what to put into `nodes=` on other machines."""
    return ", ".join(format_address((text, port)) for text in own_addresses()) or "no address but this machine's own"


def _has_v6() -> bool:
    return socket.has_ipv6 and os.path.exists("/proc/net/if_inet6")


def _obey(agent: Any, options: argparse.Namespace, stop: threading.Event) -> None:
    """Have SIGTERM drain, a second one (or Ctrl-C) stop at once: before anybody is told that the agent is there."""
    asked = 0

    def on_signal(number: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1 or number == signal.SIGINT:
            stop.set()
        else:
            print(f"distexec-agent {agent.name!r}: draining for at most {options.drain:g} s; "
                  "a second SIGTERM stops at once", file=sys.stderr, flush=True)
            agent.drain(options.drain)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if options.once:
        agent.on_last_client_gone = stop.set


def _slots(wanted: int | None, cpus: int) -> int:
    slots = cpus if wanted is None else wanted if wanted >= 0 else cpus + wanted
    if wanted == 0 or slots < 1:
        raise UsageError(f"--slots {wanted} leaves no slot on {cpus} CPUs; give a number from 1, or from -1 to -{cpus - 1} "
                         "to leave that many CPUs free")
    return slots


def _memory_limit(text: str | None) -> MemoryLimit | None:
    from .memorywatch import MemoryLimit, environ_limit
    if text is None:
        return environ_limit()
    return MemoryLimit(_size("--memory-limit", text), "distexec-agent --memory-limit")


def _terms(options: argparse.Namespace) -> Terms:
    """Read on what terms tasks run here."""
    from .confinement import find_user
    from .limits import MIN_OPEN_FILES, Limits
    from .starters import Terms
    files = options.max_open_files
    if files is not None and files < MIN_OPEN_FILES:
        raise UsageError(f"--max-open-files {files}: a worker needs {MIN_OPEN_FILES} or more")
    limits = Limits(files or 0, _size("--max-file-size", options.max_file_size) if options.max_file_size else 0)
    try:
        user = find_user(options.user) if options.user is not None else None
    except ValueError as error:
        raise UsageError(f"--user {options.user}: {error}") from None
    return Terms(user, limits, _init(options.init) if options.init is not None else None)


def _size(option: str, text: str) -> int:
    from .memorywatch import parse_size
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


def _init(file: str) -> Init:
    """Read the init file, and see that it is Python."""
    import tokenize

    from .forking import Init
    path = os.path.abspath(file)
    try:
        with tokenize.open(path) as source:
            text = source.read()
        compile(text, path, "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"--init {file}: {error.strerror}; name a Python file that can be read") from None
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"--init {file}: this is not Python that could be run: {error}") from None
    if len(text.encode()) > MAX_INLINE_BYTES:
        raise UsageError(f"--init {file}: larger than 1 MiB; import what is in it from there")
    return Init(path, text)


def _agent_secret(file: str | None) -> Secret:
    try:
        secret = load_secret(None, file)
    except FileNotFoundError:
        raise UsageError(f"--secret-file {file}: there is no such file; make it with `distexec secret new --file {file}` "
                         "or copy it from another machine of the cluster") from None
    if secret is not None:
        return secret
    path = create_secret()
    print(f"distexec-agent: made a new secret in {path}; copy that file to the same place on the other machines "
          "(mode 0600), or set $DISTEXEC_SECRET to what `distexec secret show` prints", file=sys.stderr, flush=True)
    return read_secret(path)


def _spool_parent(directory: str | None) -> str | None:
    if directory is None:
        return None
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"--spool {directory}: not a directory that can be written to; make it, or name another")
    return directory


# ---- distexec


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distexec", description="Look after a distexec cluster.")
    parser.add_argument("--version", action="version", version=f"distexec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    secret = commands.add_parser("secret", help="make or show the cluster's secret")
    actions = secret.add_subparsers(required=True, metavar="new|show")
    new = actions.add_parser("new", help="make a secret in the per-user file, never over an existing one")
    new.set_defaults(run=_secret_new)
    show = actions.add_parser("show", help="print the secret this machine would use, for the other machines")
    show.set_defaults(run=_secret_show)
    for action in (new, show):
        action.add_argument("--file", metavar="FILE", help=f"another file (default: {secret_path()})")
    nodes = commands.add_parser("nodes", help="ask nodes how they are, and say of each that is missing why")
    nodes.add_argument("nodes", nargs="*", metavar="HOST[:PORT]", help="default: $DISTEXEC_NODES, else localhost")
    nodes.add_argument("--secret-file", metavar="FILE")
    nodes.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS")
    nodes.set_defaults(run=_nodes)
    _add_session_commands(commands)
    _add_run_command(commands)
    return parser


def _add_session_commands(commands: Any) -> None:
    sessions = commands.add_parser("sessions", help="ask nodes which sessions they hold, and how long without their clients")
    sessions.add_argument("nodes", nargs="*", metavar="HOST[:PORT]", help="default: $DISTEXEC_NODES, else localhost")
    sessions.set_defaults(run=_sessions)
    recover = commands.add_parser("recover", help="go on with a durable session from its journal, until all its calls have "
                                  "ended; Ctrl-C leaves it as it is then")
    recover.add_argument("journal", metavar="JOURNAL", help="the file that durable= named")
    recover.add_argument("--show", action="store_true", help="only say what the journal holds")
    recover.add_argument("--list", action="store_true", help="only list its calls")
    recover.add_argument("--fetch", action="store_true", help="fetch what nodes hold, wait for what they run, send no more")
    recover.add_argument("--node", action="append", metavar="HOST[:PORT]", help="run the rest on this node; may be repeated "
                         "(default: the nodes that the program used)")
    recover.set_defaults(run=_recover)
    drop = commands.add_parser("drop", help="have nodes end a durable session and forget what they hold; its journal stays")
    drop.add_argument("journal", metavar="JOURNAL", help="its token is needed")
    drop.set_defaults(run=_drop)
    for command in (sessions, recover, drop):
        command.add_argument("--secret-file", metavar="FILE")
    for command in (sessions, drop):
        command.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS")


def _add_run_command(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="run a program once per set of arguments, all over the cluster",
        description="Run PROGRAM once for each -a, with ARGS before it; without any, once. A path with a slash is brought "
        "along; a name is looked for on each node. Exit code: 0 if every run's was 0, else 1.")
    run.add_argument("-a", "--args", metavar="ARGS", action="append", default=[],
                     help="one run's arguments, split as a shell does; may be repeated (-a=-x for those that begin with -)")
    run.add_argument("--args-file", metavar="FILE", help="more of them, one run's on each line; -: standard input")
    run.add_argument("--file", metavar="F", action="append", default=[],
                     help="a file or directory that each run finds in its working directory; may be repeated")
    run.add_argument("--nodes", metavar="HOST[:PORT],…", help="where (default: $DISTEXEC_NODES, else this machine)")
    run.add_argument("--secret-file", metavar="FILE", help="file with the cluster's secret (default: as everywhere)")
    run.add_argument("--slots", type=int, metavar="N", help="runs at once, at most (default: all there are)")
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="end a run that takes longer; it has failed")
    run.add_argument("--retries", type=int, default=3, metavar="N", help="how often to run again what died with its worker")
    run.add_argument("--prefix", action="store_true", help="begin each line of output with [node:run]")
    run.add_argument("program", metavar="PROGRAM")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="of every run, before its own")
    run.set_defaults(run=_run_program)


def _run_program(options: argparse.Namespace) -> int:
    from .batchrun import argument_sets, run_all
    from .executor import ClusterExecutor
    from .program import Program
    for path in options.file:
        if not os.path.exists(path):
            raise UsageError(f"--file {path}: there is no such file or directory")
    program = Program(options.program, timeout=options.timeout)
    if os.sep in program.path and os.path.isfile(program.path) and not os.access(program.path, os.X_OK):
        raise UsageError(f"{program.path} is not executable; see to it with chmod +x, or name the interpreter that runs it")
    secret = load_secret(None, options.secret_file)
    nodes = None if options.nodes is None else [text.strip() for text in options.nodes.split(",") if text.strip()]
    sets = list(argument_sets(options.arguments, options.args, _lines(options.args_file)))
    with ClusterExecutor(options.slots, nodes=nodes, secret=secret.text if secret is not None else None,
                         retries=options.retries, name="distexec-run") as cluster:
        counts = run_all(cluster, program, sets, options.file, has_prefix=options.prefix)
    if len(sets) != 1 or counts.failed:
        print(f"distexec run: {counts}", file=sys.stderr)
    return 1 if counts.failed else 0


def _lines(file: str | None) -> Sequence[str] | None:
    if file is None:
        return None
    if file == "-":
        return sys.stdin.readlines()
    with open(file) as lines:
        return lines.readlines()


def _secret_new(options: argparse.Namespace) -> int:
    try:
        path = create_secret(options.file)
    except FileExistsError:
        path = options.file or secret_path()
        raise UsageError(f"{path} exists already and is left as it is; show it with `distexec secret show`, or remove it "
                         "first if the cluster shall have a new one") from None
    print(f"made a new secret in {path}; copy it to the same place on the other machines (mode 0600)")
    return 0


def _secret_show(options: argparse.Namespace) -> int:
    secret = load_secret(None, options.file)
    if secret is None:
        raise UsageError(f"there is no secret: neither $DISTEXEC_SECRET nor {secret_path()}; make one with "
                         "`distexec secret new`")
    print(secret.text)
    return 0


def _nodes(options: argparse.Namespace) -> int:
    from .survey import survey
    rows = survey(*_targets(options), options.timeout)
    print(rows)
    return 0 if all(row.state == "up" for row in rows.nodes) else 1


def _sessions(options: argparse.Namespace) -> int:
    from .sessions import sessions_table
    from .survey import ask_sessions
    answers = ask_sessions(*_targets(options), options.timeout)
    print(sessions_table(answers))
    return 1 if any(isinstance(answer, str) for answer in answers.values()) else 0


def _recover(options: argparse.Namespace) -> int:
    from .reopening import calls_table, go_on, summary
    if options.list:
        print(calls_table(options.journal))
        return 0
    before = summary(options.journal)
    print(before, flush=True)
    if options.show or not before.unfinished:
        return 0 if before.is_good else 1
    after = go_on(options.journal, sends=not options.fetch, secret=load_secret(None, options.secret_file),
                  nodes=options.node)
    print(after)
    return 0 if after.is_good else 1


def _drop(options: argparse.Namespace) -> int:
    from .reopening import drop
    _check_timeout(options)
    lines, is_complete = drop(options.journal, load_secret(None, options.secret_file), options.timeout)
    print("\n".join(lines))
    return 0 if is_complete else 1


def _check_timeout(options: argparse.Namespace) -> None:
    if not options.timeout > 0:
        raise UsageError(f"--timeout must be more than 0 seconds, not {options.timeout:g}")


def _targets(options: argparse.Namespace) -> tuple[list[tuple[str, Any]], Secret]:
    """Give the nodes that were named, resolved, and the secret they want."""
    _check_timeout(options)
    addresses = options.nodes or [part.strip() for part in os.environ.get("DISTEXEC_NODES", "localhost").split(",")]
    secret = load_secret(None, options.secret_file)
    if secret is None:
        raise UsageError(f"nodes answer only who proves the secret, and there is none here: set $DISTEXEC_SECRET or put it "
                         f"into {secret_path()}")
    return [(text, resolve(parse_address(text))) for text in addresses if text and text != "local"], secret
