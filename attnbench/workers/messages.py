"""What a session and its workers say to each other: a request and the answer that fits it, or a `Failure`.

They travel as MessagePack and are checked against these types when they arrive, so that nothing else can be said.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from attnbench.judge.cases import Case
from attnbench.plugin import Value
from attnbench.task.promise import Promise
from attnbench.theory.roofline import Ceilings
from attnbench.workers.about_caches import CacheDescribed, CacheJudged, DescribeCache, JudgeCache
from attnbench.workers.about_models import AskModel, JudgeModel, ModelFacts, ModelJudged
from attnbench.workers.about_parallel import Called, CallTogether, DescribeScheme, Join, Joined, SchemeDescribed
from attnbench.workers.about_witness import Placed, Witness, Witnessed
from attnbench.workers.kinds import Answer, Choice, Request
from attnbench.workers.kinds import Columns as Columns
from attnbench.workload import Workload


class Failure(Answer, frozen=True):
    """The request came to no good end: status and reason are those of the cell."""

    status: str
    reason: str
    traceback: str = ""


class Found(msgspec.Struct, frozen=True):
    """A device. missing: why there is none here, None where there is. free_bytes: of its memory.

    unmeasured: what of a row can't be had on it here, and why. dtype: what is computed in where nothing is asked.
    """

    missing: str | None
    free_bytes: int = 0
    unmeasured: dict[str, str] = {}
    dtype: str = "float32"


class Facts(Answer, frozen=True):
    """machine: see `device.describe`. devices: each that attnbench knows."""

    machine: dict[str, Any]
    devices: dict[str, Found]


class Calibrated(Answer, frozen=True):
    """What the machine can do at best."""

    ceilings: Ceilings


class Instance(msgspec.Struct, frozen=True):
    """A plugin with its options set, and what it says of each workload that was asked about, in their order."""

    plugin: str
    options: dict[str, Value]
    promises: list[Promise]


class Described(Answer, frozen=True):
    """What a plugin says of itself. deprecated: see `registry.deprecated`."""

    family: str
    devices: list[str]
    phases: list[str]
    options: dict[str, Choice]
    instances: list[Instance]
    deprecated: tuple[str, ...] = ()
    study: bool = False


class Captured(Answer, frozen=True):
    """A model's activations lie in the user's cache."""


class Generated(Answer, frozen=True):
    """Seconds of generating token by token: see `workers.generation.generate`."""

    prompt_s: float
    with_s: list[float]
    without_s: list[float]
    difference: float
    implementation: str


class Tried(Answer, frozen=True):
    """What became of a plugin on a case: see `judge.trials.Checked`."""

    status: str
    reason: str
    implementation: str
    measures: dict[str, float]
    traceback: str = ""


class Prepared(Answer, frozen=True):
    """A plugin is ready to be timed on a workload.

    call_s, call_start: of the last call, now that it is warm. calls_s: of all calls so far, the variant's own alone.
    setup_s, first_call_s: to build, and of the first call. checks_s: of its first process alone, probes_s of them for
    small problems. flaw: what is wrong with it on those. suspect: whether the call that measured memory looks wrong.
    compiles: whether it has made torch load its compiler.
    """

    call_s: float
    call_start: float
    calls_s: float
    setup_s: float
    first_call_s: float
    checks_s: float
    probes_s: float
    columns: Columns
    flaw: str | None = None
    suspect: bool = False
    compiles: bool = False


class Aimed(Answer, frozen=True):
    """The next burst's calls have their inputs. calls_s: of untimed calls."""

    calls_s: float


class Timed(Answer, frozen=True):
    """A burst: when it started, seconds of its calls, of all that ran, and on a GPU of a call by the host's clock.

    waited_s: meanwhile, see `others.waited_s`. placed: where the outputs lie of the call that is checked.
    """

    start: float
    seconds: float
    calls_s: float
    wall_s: float | None
    waited_s: float | None = None
    placed: tuple[Placed, ...] = ()


class Looked(Answer, frozen=True):
    """What a call returned has been looked at. calls_s: of calls that this took. output: to show to a witness.

    wrong: what is wrong with it, None where nothing is; columns: its errors, in either case, where it was judged.
    """

    calls_s: float
    wrong: str | None
    columns: Columns = msgspec.field(default_factory=dict)
    output: bytes = b""


class Finished(Answer, frozen=True):
    """After the last burst. leak_bytes: gained a call since it was ready."""

    leak_bytes: float
    columns: Columns


class Released(Answer, frozen=True):
    """The process is ready for another workload."""


class AskMachine(Request[Facts], frozen=True):
    """What machine is this, and how many of so many threads run at a time on it?"""

    threads: int


class Calibrate(Request[Calibrated], frozen=True):
    """What can it do at best?"""

    device: str
    threads: int


class Describe(Request[Described], frozen=True):
    """What does a plugin say of itself and of these workloads? See `registry.Request`."""

    name: str
    target: str
    options: dict[str, str]
    every: bool
    workloads: list[Workload]


class Capture(Request[Captured], frozen=True):
    """Let a model read the shipped text, and keep what its layers' attention gets: see `models.capture`."""

    model: str
    layers: list[int]
    window: int


class Generate(Request[Generated], frozen=True):
    """Generate token by token with a plugin."""

    workload: Workload
    target: str
    options: dict[str, Value]
    prompt: int
    tokens: int
    repeats: int


class Try(Request[Tried], frozen=True):
    """What becomes of a plugin on this case? Nothing is timed."""

    case: Case
    target: str
    options: dict[str, Value]


class Prepare(Request[Prepared], frozen=True):
    """Make a plugin ready for a workload. thorough: measure its memory, and let it be judged in whole once.

    number: what its values are drawn from. show: tell the outputs of calls that are judged.
    probe: try it on small problems, too, see `judge.probes`.
    """

    workload: Workload
    target: str
    options: dict[str, Value]
    thorough: bool
    number: int = 0
    show: bool = False
    probe: bool = False
    l2: str = ""
    memory_limit: int | None = None


class Aim(Request[Aimed], frozen=True):
    """A burst of so many calls comes, after `head` untimed ones. number: what their values are drawn from.

    check: of which call to look at what comes out, on values that are new; None of none.
    """

    calls: int
    head: int
    number: int
    check: int | None = None


class Burst(Request[Timed], frozen=True):
    """Now. Nothing but the calls happens until the answer, so that the session's clock can tell how long they took."""


class Look(Request[Looked], frozen=True):
    """Is what came out of the burst right?"""


class Judge(Request[Looked], frozen=True):
    """Is what the call that measured memory returned right? No call of a burst is judged instead."""


class Finish(Request[Finished], frozen=True):
    """No burst will follow. energy_s: how long to measure what calls use."""

    energy_s: float


class Release(Request[Released], frozen=True):
    """Forget the workload."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """To the fork server: a worker that may allocate so many bytes beyond what it starts with; its files follow.

    path: a folder that it imports from before all others; "" for none.
    """

    memory: int | None
    path: str = ""


class Reap(msgspec.Struct, frozen=True, tag=True):
    """To the fork server: end this worker. Answered by an exit code; None where it is not one of its own."""

    pid: int


COMPILER = ("torch._dynamo", "torch.nn.attention.flex_attention", "torch._inductor.compile_fx")
"""Modules that torch loads late and takes seconds for."""


class Preload(msgspec.Struct, frozen=True, tag=True):
    """To the fork server: load these modules, so that no further worker has to. Answered when they are there."""

    modules: tuple[str, ...] = COMPILER


AnyRequest: TypeAlias = (
    AskMachine
    | AskModel
    | Calibrate
    | CallTogether
    | Capture
    | Describe
    | DescribeCache
    | DescribeScheme
    | Generate
    | Join
    | JudgeCache
    | JudgeModel
    | Prepare
    | Try
    | Witness
    | Aim
    | Burst
    | Look
    | Judge
    | Finish
    | Release
)
AnyAnswer: TypeAlias = (
    Failure
    | Facts
    | CacheDescribed
    | CacheJudged
    | Called
    | Calibrated
    | Captured
    | Described
    | Generated
    | Joined
    | ModelFacts
    | ModelJudged
    | SchemeDescribed
    | Tried
    | Prepared
    | Witnessed
    | Aimed
    | Timed
    | Looked
    | Finished
    | Released
)


def printable(text: str) -> str:
    """What a plugin said, without what would move a terminal's cursor or can't be encoded; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def encode(message: AnyRequest | AnyAnswer) -> bytes:
    """Raises: TypeError, ValueError: a plugin said what is no figure, or a number that does not fit into 64 bits."""
    try:
        return msgspec.msgpack.encode(message)
    except OverflowError as error:
        raise ValueError(str(error)) from None


_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_answers: msgspec.msgpack.Decoder[AnyAnswer] = msgspec.msgpack.Decoder(AnyAnswer)


def decode_request(data: bytes | bytearray) -> AnyRequest:
    """Raises: msgspec.DecodeError: it is none."""
    return _requests.decode(data)


def decode_answer(data: bytes | bytearray) -> AnyAnswer:
    """Raises: msgspec.DecodeError: it is none."""
    return _answers.decode(data)
