"""What is added to a score by how far the key lies from the query: ALiBi and T5's relative bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BIASES = ("alibi", "relative")
BUCKETS, FARTHEST = 32, 128  # of relative, and the distance at which one more would begin, as in T5


@dataclass(frozen=True)
class Bias:
    """Added behind the scale and the softcap, and before the mask; the key's position less the query's is the distance.

    alibi: -slope * |distance|, with a slope for each head (Press 2022, arXiv 2108.12409, section 3): see `slopes`.
    relative: a number for each head and bucket of distances (Raffel 2020, arXiv 1910.10683, section 2.1): see
        `bucket_starts`. The numbers, which a model learns, are drawn from the seed: see `table`.

    heads: of the queries. causal: keys behind a query are not seen, so that all buckets are for those before it.
    """

    name: str
    heads: int
    causal: bool
    seed: int

    def __call__(self, distance: Tensor, heads: slice = slice(None)) -> Tensor:
        """What these heads add at each distance: int64 (..) -> float64 (heads, ..)."""
        import torch

        far = -distance.clamp_max(0) if self.causal else distance.abs()
        if self.name == "alibi":
            slope = torch.tensor(slopes(self.heads)[heads], dtype=torch.float64, device=distance.device)  # (heads,)
            return slope.view(-1, *[1] * distance.ndim) * -far
        starts = torch.tensor(bucket_starts(self.causal), device=distance.device)
        bucket = torch.bucketize(far, starts, right=True) - 1
        if not self.causal:
            bucket += (distance > 0) * len(starts)
        own = table(self.heads, self.seed)[heads]
        return torch.tensor(own, dtype=torch.float64, device=distance.device)[:, bucket]


@cache
def slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's: of n heads, a power of 2, the i-th has 2^(-8 i / n).

    Of another number those of the power of 2 below it come first, then every second one of the power of 2 above it,
    as in the paper's own code.
    """
    whole = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    more = [2.0 ** (-8 * i / (2 * whole)) for i in range(1, 2 * whole + 1, 2)]
    return tuple(first + more[: heads - whole])


@cache
def bucket_starts(causal: bool) -> tuple[int, ...]:
    """The distance from which on each bucket counts: the first half have one each, the others grow evenly in logarithm.

    Without a causal mask there are half as many, of keys before the query and once more of those behind it.
    """
    count = BUCKETS if causal else BUCKETS // 2
    single = count // 2
    starts = list(range(single))
    for i in range(count - single):  # single * (FARTHEST / single)^(i / (count - single)), rounded up, in integers
        power = count - single
        n = starts[-1] + 1
        while n**power * single**i < single**power * FARTHEST**i:
            n += 1
        starts.append(n)
    return tuple(starts)


@cache
def table(heads: int, seed: int) -> tuple[tuple[float, ...], ...]:
    """(heads, BUCKETS) numbers of about unit variance, in steps of 1/32, which each dtype holds."""
    drawn = Random(f"{seed} relative bias")
    return tuple(tuple(round(32 * drawn.gauss(0, 1)) / 32 for _ in range(BUCKETS)) for _ in range(heads))
