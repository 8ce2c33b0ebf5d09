"""Attention as the textbook writes it: softmax(Q K^T * scale) V, with the l x l matrix in memory.

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.plugin import Attention, Plugin, expand_kv
from attnbench.workload import Workload

from .native.attention import has_slow_products
from .pieces import cap_, hidden, whole_bias


class Naive(Plugin):
    """softmax(Q K^T * scale) V, everything in the workload's dtype, nothing fused.

    Memory: two matrices (batch, heads, seq, kv_seq) of the workload's dtype live at once, first Q K^T beside its
    scaled copy, then the scaled scores beside their softmax. The mask is filled into the scores in place; it is
    (seq, kv_seq) bools, made in `build`. Grouped-query attention adds K and V repeated for every query head. Training,
    three matrices do: the softmax, kept from the forward pass, its gradient and that of the scores. A bias is one more,
    of all heads and one batch entry, made in `build` and added in place.
    """

    honours = ("scale", "window", "tree", "softcap", "sinks", "alibi-bias", "relative-bias")

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Two score matrices and the expanded K and V, less the output, which comes when one matrix is gone.

        Training, three matrices, less the gradients of Q and K, which come when they are gone; and of grouped heads the
        expanded K and the expanded gradient of V, which becomes that of V.
        """
        w = workload
        if w.sinks or (w.softcap and w.trains):
            return None
        rows = w.batch * w.heads
        matrix = rows * w.seq * w.kv_seq * w.itemsize
        bias = matrix // w.batch if w.bias else 0
        output = rows * w.seq * w.value_dim * w.itemsize
        if w.phase == "train":
            query, key, value = (
                n * w.itemsize for n in (w.seq * w.head_dim, w.kv_seq * w.head_dim, w.kv_seq * w.value_dim)
            )
            narrow = w.batch * w.kv_heads
            grouped = rows * (key + value) - narrow * value if w.group > 1 else 0
            return bias + max(3 * matrix + grouped - rows * query - narrow * key, matrix)
        expanded = rows * w.kv_seq * (w.head_dim + w.value_dim) * w.itemsize if w.group > 1 else 0
        return bias + expanded + max(2 * matrix - output, matrix)

    def emulated(self, workload: Workload) -> bool:
        return has_slow_products(workload)

    def build(self, workload: Workload) -> Attention:
        w = workload
        mask = hidden(w) if w.is_causal else None  # (seq, kv_seq)
        bias = whole_bias(w, getattr(torch, w.dtype))  # (heads, seq, kv_seq)

        def capped(query: Tensor, key: Tensor) -> Tensor:  # (batch, heads, seq, kv_seq)
            if not w.softcap:
                return query @ key.mT * w.scale
            if w.trains:
                return torch.tanh(query @ key.mT * (w.scale / w.softcap)) * w.softcap
            return cap_(query @ key.mT * w.scale, w.softcap)

        def scores(query: Tensor, key: Tensor) -> Tensor:  # (batch, heads, seq, kv_seq)
            return capped(query, key) if bias is None else capped(query, key).add_(bias)

        def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
            key = expand_kv(key, w.heads)  # (batch, heads, kv_seq, head_dim)
            value = expand_kv(value, w.heads)  # (batch, heads, kv_seq, value_dim)
            if sinks is not None:
                return _with_sinks(scores(query, key), mask, sinks) @ value
            if mask is None:
                return torch.softmax(scores(query, key), dim=-1) @ value  # of (batch, heads, seq, kv_seq)
            return torch.softmax(scores(query, key).masked_fill_(mask, -torch.inf), dim=-1) @ value

        return Attention(attend, f"plain torch, {w.seq} x {w.kv_seq} matrix in memory")


def _with_sinks(scores: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """The weights (batch, heads, seq, kv_seq) where each head's sink, of (heads,), takes its share of the sum."""
    if mask is not None:
        scores = scores.masked_fill_(mask, -torch.inf)
    sink = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)  # (batch, heads, seq, 1)
    return torch.softmax(torch.cat([scores, sink], -1), dim=-1)[..., :-1]
