"""Caches that keep every number as a float of 16 or more bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attnbench.cache import Step
from attnbench.plugin import Option
from attnbench.workload import Workload

from ..sdpa import Sdpa
from ..tiled import Tiled
from .sides import FULL, Full, Side, TwoSides


class Exact(TwoSides):
    """As the model computes them: what others are compared with."""

    family: ClassVar[str] = "exact"
    options: ClassVar[Mapping[str, Option]] = {}

    def sides(self) -> tuple[Side, Side]:
        return Full(None), Full(None)

    def step(self, workload: Workload) -> Step | str:
        return exact_step(workload)


class Bf16(TwoSides):
    """In bfloat16: the usual cache, and nothing is lost where the model computes in that."""

    family: ClassVar[str] = "exact"
    options: ClassVar[Mapping[str, Option]] = {}

    def sides(self) -> tuple[Side, Side]:
        return Full(FULL), Full(FULL)

    def step(self, workload: Workload) -> Step | str:
        return exact_step(workload.replace(dtype="bfloat16"))


def exact_step(workload: Workload) -> Step:
    """The exact variant that is made for a few queries on many keys."""
    tiled = Tiled()
    usable = workload.device in tiled.devices and tiled.supports(workload) is None
    return Step(tiled if usable else Sdpa(), workload)
