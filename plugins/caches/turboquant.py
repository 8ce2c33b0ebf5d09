"""TurboQuant (Zandieh 2025, arXiv 2504.19874): a random rotation makes all numbers alike; each is rounded alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Option

from .bits import pack, unpack
from .rotation import rotation
from .sides import FULL, ONE_SIDE, Codes, Side, Turned, TwoSides

_TINIEST = 1e-30


class TurboQuant(TwoSides):
    """A token's direction, turned at random, and its length in bfloat16.

    Whatever the token was, a number of its turned direction is distributed as that of a random unit vector, about
    normal with variance 1 / dim, so that the levels which are best for a normal need no data (section 3.1, algorithm 1,
    the one for the least squared error; the paper's second algorithm, which spends a bit on unbiased products, is not
    here, nor its separate treatment of outlier channels).
    """

    options: ClassVar[Mapping[str, Option]] = {"bits": Option(4, "of a number", (2, 3, 4)), **ONE_SIDE}
    bits: int

    def sides(self) -> tuple[Side, Side]:
        bits, levels = self.bits, torch.tensor(normal_levels(self.bits))
        edges = (levels[1:] + levels[:-1]) / 2

        def narrow(x: Tensor) -> tuple[Tensor, ...]:
            length = x.norm(dim=-1).to(FULL)  # (.., n)
            numbers = x * (math.sqrt(x.shape[-1]) / length.float().clamp(min=_TINIEST))[..., None]
            return pack(torch.bucketize(numbers, edges.to(x.device)).to(torch.uint8), bits), length

        def widen(kept: tuple[Tensor, ...], dim: int) -> Tensor:
            numbers = levels.to(kept[0].device)[unpack(kept[0], bits, dim).int()]  # (.., n, dim)
            return numbers * (kept[1].float() / math.sqrt(dim))[..., None]

        side = Turned(Codes(narrow, widen), rotation)
        return side, side


@cache
def normal_levels(bits: int) -> list[float]:
    """The 2^bits levels with the least squared error for a standard normal (Max 1960, table I), ascending.

    Each is the mean of what lies nearest to it, which is solved for by turns (Lloyd 1982).
    """
    n = 2**bits
    levels = [2 * (i + 0.5) / n * 2 - 2 for i in range(n)]
    for _ in range(2000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        levels = [(_density(a) - _density(b)) / (_below(b) - _below(a)) for a, b in pairwise(edges)]
    return levels


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
