"""Every message of the protocol, and who says it to whom.

One link joins two vertices of the tree: its *upstream* end hands out tasks, its *downstream* end offers slots. Workers,
agents, hubs and executors all speak the messages below; the three unions at the end say which of them each side may
utter, and a decoder built from a union refuses the rest.

Sessions have a number per link, chosen by its upstream end in `Open`. A task is (session, seq); (session, seq, attempt)
names one lease of it, and never two.
"""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

MAX_INLINE_BYTES = 1 << 20
"""A buffer above this travels as a blob, in chunks. Smaller: more round trips. Larger: control messages wait behind it."""


class OutcomeKind(IntEnum):
    """What an attempt came to."""

    VALUE = 0
    """`data` is the pickled value."""
    ERROR = 1
    """`data` is the pickled exception the function raised."""
    PAYLOAD = 2
    """The call or its outcome could not be pickled or unpickled at the worker; `data` as for ERROR."""
    TIMEOUT = 3
    """The attempt ran longer than `Options.timeout_s` and was ended; `data` is empty."""
    KILLED = 4
    """The attempt was ended because `Kill` asked for it; `data` is empty."""


class Stream(IntEnum):
    """One of a task's two output streams."""

    STDOUT = 1
    STDERR = 2


class Role(IntEnum):
    """What the end that speaks wants to be on a link."""

    UPSTREAM = 1
    DOWNSTREAM = 2
    CONTROL = 3


class BlobRef(Struct, frozen=True, array_like=True, gc=False):
    """Names immutable bytes that travel apart from the message: xxh3-128 `digest` and `size_bytes`."""

    digest: bytes
    size_bytes: int


Buffers = tuple[bytes | BlobRef, ...]
"""The out-of-band buffers of a pickle, in its order; large ones as references."""


class File(Struct, frozen=True, array_like=True, gc=False):
    """A file that travels: where it belongs below some directory, its permission bits, what is in it.

    `path` is relative and "/"-separated; one that ends in "/" is an empty directory's.
    """

    path: str
    mode: int
    content: bytes | BlobRef


Tree = tuple[File, ...]
"""Files, sorted by path; the bytes of large ones stay in a file of the sender, from which they are sent."""


class Options(Struct, frozen=True, array_like=True, gc=False):
    """What `executor.options(...)` asked for one task, as far as vertices below the root must know it."""

    timeout_s: float = 0.0  # 0: none; counted from the start of the attempt
    priority: int = 0  # higher first, within the session
    node: str = ""  # the only node that may run it; "": any
    solo: bool = False  # retries=0: lease only to a free slot, flush every outcome
    ancestors: tuple[int, ...] = ()  # seqs of the tasks that it is a nested call of, outermost first
    files: Tree = ()  # found in a directory of the task's own, in which it then runs


class SessionSpec(Struct, frozen=True, array_like=True):
    """What a session's workers are prepared with, until `Renew`."""

    path: tuple[str, ...] = ()  # client's sys.path; for nodes, only where things are installed
    directory: str = ""  # client's working directory; used where it exists
    argv: tuple[str, ...] = ()
    environ: dict[str, str] = {}  # of the machine the workers run on, then the user's env=; without the cluster secret
    warnings: tuple[str, ...] = ()  # as -W options
    authkey: bytes = b""  # multiprocessing's, so that managers and queues of the client can be reached
    initializer: bytes = b""  # pickled (function, args); b"": none
    initializer_buffers: Buffers = ()
    max_tasks_per_child: int = 0  # 0: no limit
    echo: bool = True
    name: str = ""  # for logs and listings
    env: dict[str, str] = {}  # the user's env= alone
    label: str = ""  # by which a worker knows a nested executor as its own session's
    node: str = ""  # what the machine of the workers is called
    home: str = ""  # the session's directory on the machine of the workers, never on another; "": none could be made
    setup: bytes = b""  # pickled (setup or None, its args, cleanup or None), called once on a machine; b"" without
    setup_buffers: Buffers = ()  # buffers: none, with them the first is the pickle
    has_cleanup: bool = False
    generation: int = 0  # which preparation of the session it is; `Renew` brings the next
    is_captured: bool = True  # whether futures keep what their tasks print on nodes
    code: str = ""  # directory for the client's own modules, on the machine of the workers; "": they are imported as usual
    imports: str = ""  # where to ask for them there
    log_levels: dict[str, int] = {}  # of the client's loggers, as far as set; "": the root's


# ---- upstream to downstream


class Open(Struct, frozen=True, array_like=True, tag=1):
    """Upstream to downstream: a session begins on this link, or comes back to it with the same id and token."""

    session: int
    id: bytes  # 16 random bytes
    token: bytes  # 16 random bytes; acts on the session need it
    weight: float
    ceiling: int  # most slots the session can use here; 0: all
    spec: SessionSpec
    linger_s: float = 0.0  # how long to keep it without its client; what the vertex grants anyway if that is longer


class Close(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Upstream to downstream: the session is over; kill what still runs, drop everything, stop its workers."""

    session: int


class Define(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Upstream to downstream: function number `fn` of the session, pickled. Comes once per link, before its first Run."""

    session: int
    fn: int
    data: bytes
    buffers: Buffers = ()


class Run(Struct, frozen=True, array_like=True, tag=4, gc=False):
    """Upstream to downstream: a lease. `data` is the pickled (args, kwargs)."""

    session: int
    seq: int
    attempt: int
    fn: int
    data: bytes
    buffers: Buffers = ()
    options: Options | None = None


class Recall(Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Upstream to downstream: give back up to `count` tasks that have not started, youngest first, as `Returned`."""

    session: int
    count: int


class Kill(Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Upstream to downstream: end this attempt, started or not; answered by a KILLED outcome unless one is under way."""

    session: int
    seq: int
    attempt: int


class Ack(Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Upstream to downstream: the root has these outcomes; forget them."""

    session: int
    seqs: list[int]
    attempts: list[int] = []  # if given, forget only outcomes of just these attempts (late ones, already superseded)


class Want(Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Upstream to downstream: `count` more tasks are waiting for a slot (0: none any more)."""

    session: int
    count: int


class Resume(Struct, frozen=True, array_like=True, tag=9, gc=False):
    """Upstream to downstream, answering `Held`: end and drop the leases in `drop`, forget the outcomes in `ack`, go on."""

    session: int
    drop: list[tuple[int, int]]  # (seq, attempt)
    ack: list[int]


class Undefine(Struct, frozen=True, array_like=True, tag=10, gc=False):
    """Upstream to downstream: these functions will not be named again on this link; forget them."""

    session: int
    fns: list[int]


class Lend(Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Upstream to downstream: a task that it is a nested call of waits, so this lease may use any slot that was lent."""

    session: int
    seq: int
    attempt: int


class Delivered(Struct, frozen=True, array_like=True, tag=16, gc=False):
    """Upstream to downstream, answering `Delivery`: the client has the file, as `path` there; or, for `error`, has not."""

    session: int
    seq: int
    attempt: int
    number: int
    path: str
    error: str = ""
    errno: int = 0


class Place(Struct, frozen=True, array_like=True, tag=17, gc=False):
    """Upstream to downstream: put these files into the session's working directory. Answered by `Placed`.

    Said again on each link. No worker is started until what is vital is there.
    """

    session: int
    number: int  # of the upstream end's choice
    tree: Tree
    is_vital: bool


class Renew(Struct, frozen=True, array_like=True, tag=15):
    """Upstream to downstream: from here on workers are prepared so; those there are leave after what they have.

    Said again by `Open` on the next link, whose `spec` has the generation.
    """

    session: int
    spec: SessionSpec


class Found(Struct, frozen=True, array_like=True, tag=14, gc=False):
    """Upstream to downstream, answering `Find`: a part of the module's files, or that it is not the client's own.

    Unasked (`number` 0), what the session's tasks shall have from the first; said again on each link, and no worker is
    started until it is there.
    """

    session: int
    number: int  # of the question
    name: str
    is_own: bool
    tree: Tree = ()
    problem: str = ""  # why it cannot be had; if it is not the client's own, what to tell who does not find it elsewhere
    is_last: bool = True


class CleanUp(Struct, frozen=True, array_like=True, tag=19, gc=False):
    """Upstream to downstream: no task will come any more; end the workers, clean up, and answer `Cleaned`."""

    session: int
    generation: int  # the present one


class Heard(Struct, frozen=True, array_like=True, tag=18, gc=False):
    """Upstream to downstream: the root has the partial results of this attempt up to `number`; forget them."""

    session: int
    seq: int
    attempt: int
    number: int


class Unshare(Struct, frozen=True, array_like=True, tag=47, gc=False):
    """Upstream to downstream, pool to worker: these shared objects, by name, are used by no task that is still to come.

    `blobs`: what they were made of.
    """

    session: int
    names: list[bytes]
    blobs: tuple[BlobRef, ...] = ()


class Refuse(Struct, frozen=True, array_like=True, tag=13, gc=False):
    """Pool to worker, answering `Blocked`: its slot cannot be lent, for `limit` tasks here wait already; do not wait."""

    session: int
    seq: int
    attempt: int
    limit: int
    wait: int  # as in `Blocked`


# ---- downstream to upstream


class Ready(Struct, frozen=True, array_like=True, tag=20, gc=False):
    """Worker to pool: prepared, initializer passed, one slot free."""

    pid: int


class Offer(Struct, frozen=True, array_like=True, tag=21, gc=False):
    """Downstream to upstream: from now on up to `slots` tasks of the session may run here."""

    session: int
    slots: int
    birth: int = 0  # tells this beginning of the session here from others of the speaker's life; 0: unknown


class Outcome(Struct, frozen=True, array_like=True, tag=22, gc=False):
    """Downstream to upstream: an attempt ended by itself. Kept below until acknowledged, except on worker links."""

    session: int
    seq: int
    attempt: int
    kind: OutcomeKind
    data: bytes
    run_ns: int  # run time of the function alone
    buffers: Buffers = ()
    pid: int = 0
    ends: tuple[int, int] | None = None  # worker to pool: where its stdout and stderr stood when the task ended, if moved


class Evidence(Struct, frozen=True, array_like=True, gc=False):
    """What is known of a death: where, which process, how, and its last words."""

    node: str
    pid: int = 0
    exitcode: int | None = None  # None: unknown or by signal
    signal: int = 0
    reason: str = ""  # one sentence
    stderr_tail: str = ""


class Answer(Struct, frozen=True, array_like=True, tag=12, gc=False):
    """Upstream to downstream: what nested call number `call` of this attempt came to. Kept above until `Took`."""

    session: int
    seq: int
    attempt: int
    call: int
    kind: OutcomeKind
    data: bytes
    buffers: Buffers = ()
    node: str = ""  # where it ran last
    evidence: Evidence | None = None  # it was lost `deaths` times, the last time so
    deaths: int = 0


class Lost(Struct, frozen=True, array_like=True, tag=23, gc=False):
    """Downstream to upstream: an attempt that had started died with its worker. (Unstarted ones are requeued below.)"""

    session: int
    seq: int
    attempt: int
    evidence: Evidence


class Returned(Struct, frozen=True, array_like=True, tag=24, gc=False):
    """Downstream to upstream, worker to pool: these leases, (seq, attempt), certainly never started and are yours again."""

    session: int
    tasks: list[tuple[int, int]]


class Output(Struct, frozen=True, array_like=True, tag=25, gc=False):
    """Downstream to upstream: bytes a task wrote to one of its streams; `seq` 0: what no task did.

    Comes before the attempt's end; what is kept of it is said again after `Resume`.
    """

    session: int
    seq: int
    stream: Stream
    data: bytes
    attempt: int = 0  # 0: its end was told already
    offset: int = 0  # of these bytes in what the attempt wrote there; less than the last: said again; more: some is left out


class Find(Struct, frozen=True, array_like=True, tag=33, gc=False):
    """Downstream to upstream: a process of the session imports a top-level module; is it the client's own?

    Kept below until answered; said again after `Resume`.
    """

    session: int
    number: int  # of the question, never twice in a session
    name: str
    generation: int  # of the preparation that the process belongs to
    python: str  # the interpreter there, for advice


class Record(Struct, frozen=True, array_like=True, tag=36, gc=False):
    """Downstream to upstream: a task logged this. `text` is the message; `data` the rest, as `logrecords` packs it."""

    session: int
    seq: int  # 0: no task did
    attempt: int
    level: int
    name: str  # of the logger
    text: str
    data: bytes
    lost: int = 0  # records before it that there was no room for


class SessionFailed(Struct, frozen=True, array_like=True, tag=26, gc=False):
    """Downstream to upstream: no worker of the session can be had here.

    `data` is the pickled exception of the setup or the initializer, if that is why.
    """

    session: int
    evidence: Evidence
    data: bytes = b""
    generation: int = 0  # of the preparation that failed


class Held(Struct, frozen=True, array_like=True, tag=27, gc=False):
    """Downstream to upstream, after `Open` of a session it knows: what it still has, as (seq, attempt).

    The outcomes themselves follow `Resume`.
    """

    session: int
    leases: list[tuple[int, int]]
    outcomes: list[tuple[int, int]]
    birth: int = 0  # as in `Offer`; if it is not what was offered, what was leased before is gone


class Submit(Struct, frozen=True, array_like=True, tag=30, gc=False):
    """Downstream to upstream: the task `seq` makes its nested call number `call`, counted from 1 per attempt.

    Kept below until it is answered, the attempt is lost, or its outcome is acknowledged; said again after `Resume`.
    """

    session: int
    seq: int
    attempt: int
    call: int
    key: bytes  # names the function by its pickle
    function: bytes
    function_buffers: Buffers
    data: bytes  # as in `Run`
    buffers: Buffers = ()
    options: Options | None = None
    retries: int = -1  # -1: the executor's


class Blocked(Struct, frozen=True, array_like=True, tag=31, gc=False):
    """Downstream to upstream: the task waits for nested calls of its own, and its slot is lent; or it goes on."""

    session: int
    seq: int
    attempt: int
    is_blocked: bool
    wait: int = 0  # how often it has waited, on worker links: `Refuse` names it


class Took(Struct, frozen=True, array_like=True, tag=32, gc=False):
    """Downstream to upstream: the task has these answers, or wants them no more; one not begun need not be run."""

    session: int
    seq: int
    attempt: int
    calls: list[int]


class Delivery(Struct, frozen=True, array_like=True, tag=35, gc=False):
    """Downstream to upstream: a task sends a file to its client, to be fetched by digest. Said again after `Resume`.

    On a worker's link the file's descriptor comes with it, and a socket to which `pack_reply` of the answer is written.
    """

    session: int
    seq: int
    attempt: int
    number: int  # of the worker's choice, never twice for an attempt
    name: str  # relative, "/"-separated
    mode: int
    blob: BlobRef


class Placed(Struct, frozen=True, array_like=True, tag=38, gc=False):
    """Downstream to upstream, answering `Place`: the files are there; or, for `error`, are not."""

    session: int
    number: int
    error: str = ""


class Cleaned(Struct, frozen=True, array_like=True, tag=37, gc=False):
    """Downstream to upstream: what setup made in this generation is cleaned up, or was left for the reason in `evidence`.

    `data` is the pickled exception of the user's function, if that is why. Said again after `Resume` until `Close`.
    """

    session: int
    generation: int
    evidence: Evidence | None = None
    data: bytes = b""


class Partial(Struct, frozen=True, array_like=True, tag=34, gc=False):
    """Downstream to upstream: provisional result `number` (from 1) of an attempt, pickled as an outcome's value.

    Comes before the attempt's outcome. Kept below until `Heard`, the end of the session, or the outcome's acknowledgement;
    said again after `Resume`.
    """

    session: int
    seq: int
    attempt: int
    number: int
    data: bytes
    buffers: Buffers = ()


def partial_bytes(data: bytes, buffers: Buffers) -> int:
    """Count the bytes that a partial result takes while somebody keeps it; the same number at every vertex."""
    return 512 + len(data) + sum(each.size_bytes if isinstance(each, BlobRef) else len(each) for each in buffers)


class Load(Struct, frozen=True, array_like=True, tag=28, gc=False):
    """Downstream to upstream and to control, every few seconds: the node's state."""

    slots: int
    busy: int
    sessions: int
    cpu_percent: float
    memory_free_bytes: int
    memory_total_bytes: int


class Bye(Struct, frozen=True, array_like=True, tag=29, gc=False):
    """Either way: this end leaves on purpose; nothing it holds was lost in secret."""

    reason: str


# ---- either way: the link itself, and blobs


class Ping(Struct, frozen=True, array_like=True, tag=40, gc=False):
    """Either way: are you there? `sent_ns` is the sender's monotonic clock, for its own use."""

    sent_ns: int


class Pong(Struct, frozen=True, array_like=True, tag=41, gc=False):
    """Either way: yes; `sent_ns` as received."""

    sent_ns: int


class Hello(Struct, frozen=True, array_like=True, tag=42, gc=False):
    """Either way: the first message each end says once both have proved the secret."""

    version: str  # of distexec
    python: str  # "3.11"
    platform: str  # "linux-x86_64"
    name: str
    incarnation: bytes  # 16 random bytes, one per process life
    slots: int = 0  # downstream ends only


class Fetch(Struct, frozen=True, array_like=True, tag=43, gc=False):
    """Either way: send me this blob."""

    blob: BlobRef


class Chunk(Struct, frozen=True, array_like=True, tag=44, gc=False):
    """Either way: `data` of the blob at `offset`, in order, at most 256 KiB."""

    digest: bytes
    offset: int
    data: bytes


class Credit(Struct, frozen=True, array_like=True, tag=45, gc=False):
    """Either way: the receiver of a blob has consumed it up to `offset`; more may follow."""

    digest: bytes
    offset: int


class Missing(Struct, frozen=True, array_like=True, tag=46, gc=False):
    """Either way: the blob you fetched is not here (any more), or cannot be read."""

    digest: bytes
    reason: str = ""


# ---- pool and worker: one machine


class Segment(Struct, frozen=True, array_like=True, tag=50, gc=False):
    """Pool to worker and back: a blob lies at `offset` of shared-memory arena number `arena`.

    The arena's descriptor comes with the frame the first time the pool names it, and each time a worker does, whose
    arenas have one blob each; a worker's arena 0 is not used again.
    """

    blob: BlobRef
    arena: int
    offset: int


class Forget(Struct, frozen=True, array_like=True, tag=51, gc=False):
    """Pool to worker: arena number `arena` will not be named again; close its descriptor."""

    arena: int


class Free(Struct, frozen=True, array_like=True, tag=52, gc=False):
    """Pool to worker: nobody reads your arena number `arena` any more; or, not `is_reusable`, somebody may for ever.

    Arena 0: give the memory of all that are free back to the system.
    """

    arena: int
    is_reusable: bool


class Keep(Struct, frozen=True, array_like=True, tag=55, gc=False):
    """Worker to pool: it keeps these blobs mapped beyond its task, and no longer those in `dropped`."""

    blobs: tuple[BlobRef, ...]
    dropped: tuple[BlobRef, ...] = ()


# ---- control: who looks after nodes


class AskSessions(Struct, frozen=True, array_like=True, tag=60, gc=False):
    """Control to downstream: which sessions do you hold?"""


class SessionRow(Struct, frozen=True, array_like=True, gc=False):
    """One session as its node tells of it, without what would give power over it."""

    label: str  # a hash of its id
    name: str
    absent_s: float  # how long its client has been away; negative: it is connected
    running: int  # tasks that workers have
    waiting: int  # other tasks
    outcomes: int  # kept until its client has them
    size_bytes: int  # of these
    left_s: float  # how long it is still kept without its client


class Sessions(Struct, frozen=True, array_like=True, tag=61):
    """Downstream to control, answering `AskSessions`."""

    rows: tuple[SessionRow, ...]


class Drop(Struct, frozen=True, array_like=True, tag=62, gc=False):
    """Control to downstream: end this session, whose client does not come back; `token` as in `Open`."""

    id: bytes
    token: bytes


class Dropped(Struct, frozen=True, array_like=True, tag=63, gc=False):
    """Downstream to control, answering `Drop`: how many tasks and outcomes that was; -1: no such session here."""

    count: int


Shared = Ping | Pong | Hello | Bye | Fetch | Chunk | Credit | Missing
FromUpstream = (Open | Close | Define | Run | Recall | Kill | Ack | Want | Resume | Undefine | Lend | Answer | Delivered
                | Place | Found | Renew | CleanUp | Heard | Unshare | Shared)
FromDownstream = (Offer | Outcome | Lost | Returned | Output | SessionFailed | Held | Load | Submit | Blocked | Took
                  | Delivery | Placed | Find | Cleaned | Partial | Record | Shared)
ToWorker = Define | Undefine | Run | Segment | Forget | Free | Bye | Answer | Refuse | Unshare
FromWorker = (Ready | Outcome | Returned | SessionFailed | Segment | Submit | Blocked | Took | Delivery | Partial | Keep
              | Record)
"""A worker offers one slot of one session by being there, so it says less than a node."""
FromControl = AskSessions | Drop | Ping | Hello | Bye
ToControl = Sessions | Dropped | Hello | Load | Ping | Pong | Bye
Message = FromUpstream | FromDownstream | FromControl | ToControl | Ready | Refuse
