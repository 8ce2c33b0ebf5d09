"""Messages about attention across processes: see `workers.parallel`."""

from __future__ import annotations

import msgspec

from attnbench.plugin import Value
from attnbench.workers.kinds import Answer, Choice, Columns, Request
from attnbench.workload import Workload


class SchemeInstance(msgspec.Struct, frozen=True):
    """A scheme with its options set. scheme: its spec, with those options that are not their defaults.

    refusals: for each workload asked about and each number of processes why it can't be, None where it can.
    sent_bytes: likewise what each process sends by formula, None where nothing says it.
    """

    scheme: str
    target: str
    options: dict[str, Value]
    refusals: list[list[str | None]]
    sent_bytes: list[list[int | None]]


class SchemeDescribed(Answer, frozen=True):
    """What a scheme says of itself, `what` in a line, and its instances. preloads: see `parallel.Scheme`."""

    what: str
    options: dict[str, Choice]
    instances: list[SchemeInstance]
    preloads: tuple[str, ...] = ()


class Joined(Answer, frozen=True):
    """A rank has joined its group and made its first calls. call_s: of the last one.

    wrong: what is wrong with the group's answer, which rank 0 says; None where nothing is.
    """

    call_s: float
    columns: Columns
    wrong: str | None = None


class Called(Answer, frozen=True):
    """A burst of the group as one rank saw it, from a barrier on. columns, wrong: where it was checked, of rank 0."""

    start: float
    seconds: float
    columns: Columns = msgspec.field(default_factory=dict)
    wrong: str | None = None


class DescribeScheme(Request[SchemeDescribed], frozen=True):
    """Which schemes are these, and can they share these workloads among so many processes? See `registry.Request`."""

    name: str
    target: str
    options: dict[str, str]
    every: bool
    workloads: list[Workload]
    worlds: list[int]


class Join(Request[Joined], frozen=True):
    """Be this rank of a group, which meets at a file, and get ready for a workload. number: see `CallTogether`.

    timeout: seconds that a rank waits for another.
    """

    workload: Workload
    scheme: SchemeInstance
    rank: int
    world: int
    meeting: str
    timeout: float
    number: int


class CallTogether(Request[Called], frozen=True):
    """So many calls in a row, after `head` untimed ones. number: what their values are drawn from.

    check: judge what comes out of the last one.
    """

    calls: int
    head: int
    number: int
    check: bool
