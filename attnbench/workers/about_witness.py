"""What a session asks a process without a plugin about an output, and where that lay: part of `messages`."""

from __future__ import annotations

import msgspec

from attnbench.workers.kinds import Answer, Columns, Request
from attnbench.workload import Workload


class Placed(msgspec.Struct, frozen=True):
    """Where an output lies in its process: address of its first value, shape, strides and a value's size in bytes."""

    address: int
    shape: list[int]
    strides: list[int]
    itemsize: int


class Given(msgspec.Struct, frozen=True):
    """What one call was given, told by the numbers that it was drawn from: see `task.inputs.Pools`.

    values: of the first values, then of what altered them, many of them first where the process was thorough.
    places: of the views of it, the first of those.
    """

    values: tuple[int, ...]
    thorough: bool
    places: int


class Witnessed(Answer, frozen=True):
    """How far an output is from exact attention: see `judge.deviation.Error`. problem: why it is not that.

    columns: errors of gradients that came with it.
    """

    rel_l2: float
    max_abs: float
    cosine: float
    worst_row: float
    problem: str | None = None
    columns: Columns = msgspec.field(default_factory=dict)


class Witness(Request[Witnessed], frozen=True):
    """To a worker without a plugin: how right is this output? See `workers.witness`. rows: which to look at."""

    workload: Workload
    given: Given
    rows: int
    output: bytes
