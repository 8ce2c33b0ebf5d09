"""Attention of some queries to some keys with each row's log-sum-exp, by torch's operators, and how such merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.plugin import expand_kv

from ..autograd import dense_rows

aten: Any = torch.ops.aten


def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """query (batch, heads, queries, head_dim), key and value of kv_heads -> output, and log-sum-exp in float32.

    output (batch, heads, queries, value_dim), log-sum-exp (batch, heads, queries). causal: top-left, of as many queries
    as keys.
    """
    query, key, value = dense_rows(query, key, value)
    if query.is_cuda:
        key, value = expand_kv(key, query.shape[1]), expand_kv(value, query.shape[1])
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return out, lse
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def backward(
    up: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of query, key and value.

    up: of the output. out, lse: over all keys, not these alone: softmax is made anew from the log-sum-exp, and the
    output is needed in rowsum(dO * O) only (FlashAttention-2: Dao 2023, arXiv 2307.08691, algorithm 2).
    """
    up, query, key, value, out = dense_rows(up, query, key, value, out)
    lse = lse.contiguous()
    if not query.is_cuda:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            up, query, key, value, out, lse, 0.0, causal, scale=scale
        )
        return found[0], found[1], found[2]
    shared, heads, seed = key.shape[1], query.shape[1], torch.zeros((), dtype=torch.int64)
    wide = expand_kv(key, heads), expand_kv(value, heads)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        up, query, *wide, out, lse, None, None, query.shape[2], key.shape[2], 0.0, causal, seed, seed, scale=scale
    )
    dk, dv = (x.unflatten(1, (shared, -1)).sum(2) for x in (dk, dv))  # (batch, kv_heads, keys, dim)
    return dq, dk, dv


class Merged:
    """Attention over several blocks of keys, of which the first was seen by all queries.

    softmax over all keys is the mean of the blocks' softmaxes, weighted by their sums of exponentials: each block comes
    with weight sigmoid(lse_block - lse_so_far) (blockwise attention: Liu 2023, arXiv 2310.01889, section 3.1).
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out = out.float()  # (batch, heads, queries, value_dim)
        self.lse = lse  # (batch, heads, queries)

    def add(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        """A block that these queries see."""
        so_far, before = self.out[:, :, queries], self.lse[:, :, queries]
        so_far.lerp_(out.float(), torch.sigmoid(lse - before)[..., None])
        before.copy_(torch.logaddexp(before, lse))
