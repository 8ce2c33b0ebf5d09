"""DeepSpeed-Ulysses (Jacobs 2023, arXiv 2309.14509): lengths are exchanged for heads, and back.

Between two all-to-alls a rank has some heads over the whole length, so that any attention of one process does for them:
here torch's. Each sends (N - 1) / N of its parts of query, key, value and output, and backward of their gradients.
Grouped key/value heads fewer than N are repeated to N, each of which then goes to one rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from attnbench.parallel import Scheme
from attnbench.plugin import Attention, expand_kv
from attnbench.workload import Workload


class Ulysses(Scheme):
    """All-to-alls give each process some heads over the whole length, and its own tokens of all heads back."""

    formula = "ulysses"

    def unsupported(self, workload: Workload, world: int) -> str | None:
        if workload.heads % world:
            return f"{workload.heads} heads do not split evenly among {world} processes"
        if workload.kv_heads % world and world % workload.kv_heads:
            return f"{workload.kv_heads} kv heads neither split evenly among {world} processes nor repeat to them"
        return super().unsupported(workload, world)

    def build(self, workload: Workload, group: ProcessGroup) -> Attention:
        w, world = workload, group.size()
        wide = max(w.kv_heads, world)
        whole = partial(scaled_dot_product_attention, is_causal=w.is_causal, scale=w.scale, enable_gqa=w.heads > wide)

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = expand_kv(key, wide), expand_kv(value, wide)  # (batch, wide, seq / world, dim)
            own = (_Exchange.apply(x, group, True) for x in (query, key, value))
            out = whole(*own)  # (batch, heads / world, seq, value_dim)
            found: Tensor = _Exchange.apply(out, group, False)  # (batch, heads, seq / world, value_dim)
            return found

        return Attention(call, "ulysses: torch sdpa on the whole length")


class _Exchange(torch.autograd.Function):
    """Of all heads a part of the length -> of a part of the heads the whole length, or back; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, to_lengths: bool) -> Tensor:
        ctx.group, ctx.to_lengths = group, to_lengths
        return _heads_to_lengths(x, group) if to_lengths else _lengths_to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor, None, None]:
        back = _lengths_to_heads if ctx.to_lengths else _heads_to_lengths
        return back(up, ctx.group), None, None


def _heads_to_lengths(x: Tensor, group: ProcessGroup) -> Tensor:
    """(batch, heads, seq / world, dim) -> (batch, heads / world, seq, dim)."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0)  # (world, batch, heads / world, seq / world, dim)
    return _swapped(parts, group).movedim(0, 2).flatten(2, 3)


def _lengths_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """(batch, heads / world, seq, dim) -> (batch, heads, seq / world, dim)."""
    parts = x.unflatten(2, (group.size(), -1)).movedim(2, 0)  # (world, batch, heads / world, seq / world, dim)
    return _swapped(parts, group).movedim(0, 1).flatten(1, 2)


def _swapped(parts: Tensor, group: ProcessGroup) -> Tensor:
    """The i-th of (world, ..) goes to rank i, whose one for us comes in its place."""
    parts = parts.contiguous()
    came = torch.empty_like(parts)
    dist.all_to_all_single(came, parts, group=group)
    return came
