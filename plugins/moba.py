"""The blocks of keys whose means a query fits best: Mixture of Block Attention.

Source: Lu 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Definition, Option, Plugin, Softmax
from attnbench.workload import Workload

from .pieces import parts
from .selection import best, block_means, gathered, gathered_bytes, joined, rows_at_once


class Moba(Plugin):
    """softmax over the keys of `topk` blocks, for each query and head those with the largest q . mean of their keys.

    With a causal mask a query's own block is always one of the topk, and blocks after it are none: their mean would
    tell of the future (section 2.2, "current block attention"). With a full mask, which the paper doesn't have, all
    blocks compete. Nothing is trained beside Q, K and V. Of blocks that fit equally well the later one is taken.

    Operations: head_dim for each query and block, O(l^2 / block), and for each query attention over topk * block keys.
    The paper turns this round, block by block over the queries that chose it, and merges what comes of the blocks: the
    same sums in an order for GPUs. State of a decoder: keys and values; block means could be kept, and are not here.
    """

    family = "sparse"
    study = True
    honours = ("scale",)
    options: ClassVar[Mapping[str, Option]] = {
        "topk": Option(4, "blocks that a query attends to, its own included"),
        "block": Option(16, "keys to a block"),
    }
    topk: int
    block: int

    def supports(self, workload: Workload) -> str | None:
        return None if self.topk >= 1 and self.block >= 1 else "topk and block must be at least 1"

    def definition(self, workload: Workload) -> Definition:
        def chosen(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
            blocks = self._choose(workload, query[:, :, rows], self._means(key), rows)  # (batch, heads, n, topk)
            found = torch.zeros(*blocks.shape[:3], self._blocks(workload), dtype=torch.bool, device=query.device)
            found.scatter_(-1, blocks, True)  # (batch, heads, n, blocks)
            return found.repeat_interleave(self.block, -1)[..., : key.shape[2]]  # (batch, heads, n, kv_seq)

        return Softmax(chosen=chosen)

    def flops(self, workload: Workload) -> int | None:
        w = workload
        attention = self._keys(w) * (w.head_dim + w.value_dim)
        return 2 * w.batch * w.heads * w.seq * (self._blocks(w) * w.head_dim + attention)

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Means and outputs of strips; of one strip scores of blocks, and what is gathered."""
        w, rows, keys = workload, self._rows(workload), self._keys(workload)
        if w.trains:
            return None
        blocks = self._blocks(w)
        kept = w.batch * (w.kv_heads * blocks * w.head_dim * 8 + w.heads * w.seq * w.value_dim * w.itemsize)
        widened = 2 * w.batch * w.kv_heads * w.kv_seq * w.head_dim * 8  # before the first strip, padded to whole blocks
        strip = w.batch * w.heads * rows * (blocks * 44 + keys * 10)  # with places of keys, and which are hidden
        return kept + max(widened, strip + gathered_bytes(w, w.heads, rows, keys))

    def build(self, workload: Workload) -> Attention:
        w = workload

        def strip(query: Tensor, key: Tensor, value: Tensor, part: slice, means: Tensor) -> Tensor:
            rows = torch.arange(part.start, part.stop, device=query.device)  # (rows,)
            query = query[:, :, part]  # (batch, heads, rows, head_dim)
            with torch.no_grad():
                blocks = self._choose(w, query, means, rows)  # (batch, heads, rows, topk)
            within = torch.arange(self.block, device=query.device)  # (block,)
            index = (blocks[..., None] * self.block + within).flatten(-2)  # (batch, heads, rows, topk * block)
            hidden = ~w.masked.visible(rows[:, None], index, w.offset) | (index >= w.kv_seq)
            return gathered(query, key, value, index.clamp_(max=w.kv_seq - 1), hidden, w.scale)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            means, strips = self._means(key), parts(w.seq, self._rows(w))
            return torch.cat(joined(w, strip, ((part, means) for part in strips), query, key, value), 2)

        how = f"plain torch, {self._keys(w) // self.block} of {self._blocks(w)} blocks gathered for each query"
        return Attention(attend, how, min(1.0, self._keys(w) / w.kv_seq))

    def _choose(self, w: Workload, query: Tensor, means: Tensor, rows: Tensor) -> Tensor:
        """Blocks of `rows`: int64 (batch, heads, n, topk), or all of them, if fewer.

        query: (batch, heads, n, head_dim), of those rows alone. means: float64 (batch, kv_heads, blocks, head_dim).
        """
        q = query.detach().double().unflatten(1, (means.shape[1], -1))  # (batch, kv_heads, group, n, head_dim)
        fit = (q @ means[:, :, None].mT).flatten(1, 2)  # (batch, heads, n, blocks)
        if w.is_causal:
            own, block = (rows + w.offset)[:, None] // self.block, torch.arange(means.shape[2], device=rows.device)
            fit = fit.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)  # (n, blocks)
        return best(fit, min(self.topk, means.shape[2]))

    def _means(self, key: Tensor) -> Tensor:
        """Of each block's keys: float64 (batch, kv_heads, blocks, head_dim)."""
        return block_means(key.detach().double(), self.block)

    def _blocks(self, workload: Workload) -> int:
        return -(-workload.kv_seq // self.block)

    def _keys(self, workload: Workload) -> int:
        return min(self.topk, self._blocks(workload)) * self.block

    def _rows(self, workload: Workload) -> int:
        return rows_at_once(workload, workload.heads, self._keys(workload), self._blocks(workload))
