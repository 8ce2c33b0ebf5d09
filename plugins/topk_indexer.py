"""The keys that a cheap score finds best: DeepSeek Sparse Attention with its lightning indexer.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2-Exp", section 1: I_ts = sum_j w_tj ReLU(q^I_tj . k^I_s) (equation 1), and
attention over the keys of the top-k scores alone (equation 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Cache, Decoding, Definition, Option, Plugin, Softmax
from attnbench.workload import Workload

from .pieces import hidden_part, strips
from .selection import best, gathered, gathered_bytes, joined, rows_at_once


class TopkIndexer(Plugin):
    """softmax over the `topk` keys of each query with the largest index scores I_ts = sum_j ReLU(q^I_tj . k^I_s).

    In the paper index queries, keys and weights are projected from tokens by matrices that were trained to find what
    attention looks at. Nothing is trained here: q^I and k^I are the query and key themselves, multiplied by one random
    matrix (head_dim, dims) that is the same in each call, and rounded to bfloat16 (the paper's are in FP8); all weights
    w_tj are 1. So a product of the indexer is an estimate of the score, the better the more dims. With dims=head_dim or
    more there is no matrix, and it is the score, but for that rounding.

    The indexer's heads j are the query heads that share a key head, and choose together, as all of DeepSeek's query
    heads do, which share one key. Of equal index scores, such as the many that are 0 where no product is above 0, the
    later key comes first.

    Operations: 2 dims for each pair that the mask shows, which is O(l^2) with a small factor, and for each query
    attention over topk keys. State: keys, values, and dims numbers of 2 bytes a token for the indexer. The density is
    of attention, without the indexer. Gradients go through the keys that were chosen; the paper trains its indexer by a
    loss of its own.
    """

    family = "sparse"
    study = True
    honours = ("scale", "window")
    options: ClassVar[Mapping[str, Option]] = {
        "topk": Option(64, "keys that a query attends to"),
        "dims": Option(16, "of an index query or key; head_dim or more: the query and key as they are"),
    }
    topk: int
    dims: int

    def supports(self, workload: Workload) -> str | None:
        return None if self.topk >= 1 and self.dims >= 1 else "topk and dims must be at least 1"

    def definition(self, workload: Workload) -> Definition:
        def chosen(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
            keys = torch.arange(key.shape[2], device=key.device)  # (kv_seq,)
            seen = workload.masked.visible(rows[:, None], keys, workload.offset)  # (n, kv_seq)
            index = self._choose(query[:, :, rows], self._lowered(key), seen)  # (batch, kv_heads, n, topk)
            found = seen.new_zeros(*index.shape[:3], len(keys))  # (batch, kv_heads, n, kv_seq)
            return found.scatter_(-1, index, True).repeat_interleave(
                query.shape[1] // key.shape[1], 1
            )  # (batch, heads, n, kv_seq)

        return Softmax(chosen=chosen)

    def flops(self, workload: Workload) -> int | None:
        w, dims = workload, min(self.dims, workload.head_dim)
        lowering = 0 if dims == w.head_dim else (w.heads * w.seq + w.kv_heads * w.kv_seq) * w.head_dim * dims
        scoring = w.heads * w.masked.pairs(w.seq, w.kv_seq) * dims
        return 2 * w.batch * (lowering + scoring + w.heads * self._pairs(w) * (w.head_dim + w.value_dim))

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Index keys and outputs of strips; of one strip either index scores and their order, or what is gathered."""
        w, dims, rows = workload, min(self.dims, workload.head_dim), self._rows(workload)
        if w.trains:
            return None
        kept = w.batch * (w.kv_heads * w.kv_seq * dims * 10 + w.heads * w.seq * w.value_dim * w.itemsize)
        scores = w.batch * rows * w.kv_seq * max(8 * (w.heads + w.kv_heads), 36 * w.kv_heads)
        widened = w.batch * w.kv_heads * w.kv_seq * w.head_dim * 8  # before the first strip
        return kept + max(scores, gathered_bytes(w, w.kv_heads, rows, self._keys(w)), widened)

    def build(self, workload: Workload) -> Attention:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self._attend(workload, query, key, value, self._lowered(key))

        return Attention(attend, self._how(workload), self._density(workload))

    def decoding(self, workload: Workload) -> Decoding:
        """The state has the index keys, too: a step makes those of new tokens alone."""

        def start(key: Tensor, value: Tensor, capacity: int) -> tuple[Cache, Tensor]:
            return Cache.of(key, value, capacity), self._lowered(key)

        def step(state: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
            cache, index_key = state[0].append(key, value), torch.cat((state[1], self._lowered(key)), 2)
            return self._attend(workload, query, cache.key, cache.value, index_key), (cache, index_key)

        return Decoding(start, step, self._how(workload), self._density(workload))

    def _attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor, index_key: Tensor) -> Tensor:
        def strip(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> Tensor:
            hidden, q = hidden_part(w, rows, keys), q[:, :, rows]  # (rows, keys), (batch, heads, rows, head_dim)
            with torch.no_grad():
                index = self._choose(q, index_key[:, :, keys], ~hidden)  # (batch, kv_heads, rows, topk)
            out_of_sight = hidden.expand(*index.shape[:2], -1, -1).gather(-1, index)  # (batch, kv_heads, rows, topk)
            return gathered(q, k, v, index + keys.start, out_of_sight, w.scale)

        return torch.cat(joined(w, strip, strips(w, self._rows(w)), query, key, value), 2)

    def _choose(self, query: Tensor, index_key: Tensor, seen: Tensor) -> Tensor:
        """Places of the keys with the largest index scores.

        query: (batch, heads, n, head_dim). index_key: (batch, kv_heads, keys, dims). seen: bool (n, keys).

        Returns:
            (batch, kv_heads, n, topk), or all keys, if fewer; of a row that sees fewer, unseen ones come last.
        """
        q = self._lowered(query).unflatten(1, (index_key.shape[1], -1)).double()  # (batch, kv_heads, group, n, dims)
        scores = (q @ index_key[:, :, None].double().mT).relu_().sum(2)  # (batch, kv_heads, n, keys)
        return best(scores.masked_fill_(~seen, -torch.inf), min(self.topk, seen.shape[-1]))

    def _lowered(self, x: Tensor) -> Tensor:
        """Index queries or keys (.., dims) of x (.., head_dim), in bfloat16."""
        x = x.detach()
        if self.dims >= x.shape[-1]:
            return x.to(torch.bfloat16)
        draws = torch.Generator().manual_seed(0)
        matrix = torch.randn(x.shape[-1], self.dims, generator=draws, dtype=torch.float64)  # (head_dim, dims)
        return (x.double() @ matrix.to(x.device) * self.dims**-0.5).to(torch.bfloat16)

    def _keys(self, workload: Workload) -> int:
        return min(self.topk, workload.kv_seq)

    def _pairs(self, workload: Workload) -> int:
        """(query, key) pairs of a head that are computed, unseen ones of the first rows included."""
        each = strips(workload, self._rows(workload))
        return sum((rows.stop - rows.start) * min(self.topk, keys.stop - keys.start) for rows, keys in each)

    def _density(self, workload: Workload) -> float:
        return self._pairs(workload) / (workload.seq * workload.kv_seq)

    def _rows(self, workload: Workload) -> int:
        return rows_at_once(workload, workload.kv_heads, self._keys(workload), workload.kv_seq)

    def _how(self, workload: Workload) -> str:
        lowered = f"index of {self.dims} dims" if self.dims < workload.head_dim else "index of whole scores"
        return f"plain torch, {lowered}, {self._keys(workload)} keys gathered for each query"
