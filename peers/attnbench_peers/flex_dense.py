"""torch's flex_attention over all pairs, or those that a mask shows: what block-sparse saves is measured against it.

The same compiler and the same kernel as `block-sparse:impl=flex`, so that only the blocks differ (Dong 2024, "Flex
Attention"). A softcap and a bias are a `score_mod` in it, so that no matrix of them is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attnbench_plugins.block_sparse.flex_attention import flex_over, flex_unsupported
from attnbench_plugins.pieces import by_distance
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload

BLOCK = 128  # queries and keys to a block of a mask


class FlexDense(Plugin):
    """flex_attention compiled as `block-sparse` compiles it: without a mask, or with the workload's by blocks."""

    phases = ("forward", "train")
    honours = ("scale", "window", "softcap", "alibi-bias", "relative-bias")

    def supports(self, workload: Workload) -> str | None:
        return flex_unsupported(workload, BLOCK)

    def build(self, workload: Workload) -> Attention:
        w, masked, offset = workload, workload.masked, workload.offset
        block_mask = None
        if w.is_causal:
            block_mask = create_block_mask(
                lambda _batch, _head, row, key: masked.visible(row, key, offset),
                None, None, w.seq, w.kv_seq, device=w.device, BLOCK_SIZE=BLOCK,
            )  # fmt: skip
        how = "flex_attention, compiled, all pairs that the mask shows"
        return Attention(flex_over(w, block_mask, score_mod=_score_mod(w)), how)


def _score_mod(workload: Workload) -> Callable[..., Tensor] | None:
    """What becomes of a score: the softcap, then the bias, of ALiBi computed and of T5 looked up by distance."""
    w, cap, last, offset = workload, workload.softcap, workload.seq - 1, workload.offset
    line = by_distance(w)  # (heads, seq + kv_seq - 1)
    slope = None
    if w.bias == "alibi" and w.biased:
        slope = -w.biased(torch.ones(1, dtype=torch.int64, device=w.device) * -1).float().squeeze(-1)  # (heads,)

    def mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if cap:
            score = cap * torch.tanh(score / cap)
        if slope is not None:
            return score - slope[head] * (row + offset - key).abs()
        return score if line is None else score + line[head, key - row + last]

    return mod if cap or w.bias else None
