"""Blocks of keys that blocks of queries are predicted to attend to: the sparse half of SpargeAttn.

Source: Zhang 2025, "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", arXiv 2502.18137, section
3.2. What else that kernel does is left out: its second filter, which leaves out products of weights that turn out to be
small (3.3), and int8 products (3.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Definition, Option, Plugin, Softmax, visible
from attnbench.workload import Workload

from .pieces import parts
from .selection import best, block_means, joined

_TINIEST = 1e-30  # a row's length, at least: zeros have a direction, too


class Sparge(Plugin):
    """softmax over blocks of keys that are predicted to hold most of the weight, for each block of `rows` queries.

    A block's mean stands for it where its tokens are alike: where their mean cosine, with themselves included, is above
    `alike`. P = softmax(mean q . mean k * scale) over those blocks of keys; of P the largest are kept, as long as
    together they are no more than `mass` of it, and one at least. Blocks of keys that are not alike are kept for all,
    and a block of queries that are not alike keeps all. With a causal mask blocks that lie in the future take no part,
    and those at the queries' own positions are always kept, as a query there might see no key otherwise (in the
    paper's kernel they compete).

    So random normal inputs, of which no block is alike, are computed whole: density 1 and no error. The density is that
    of the call before, over all heads. It needs many queries at once, and doesn't decode. Operations: at most those of
    exact attention, as which they are counted, and 2 head_dim for each pair of blocks. State: keys and values.
    """

    family = "sparse"
    study = True
    honours = ("scale",)
    phases: ClassVar[tuple[str, ...]] = ("forward", "train")
    options: ClassVar[Mapping[str, Option]] = {
        "mass": Option(0.9, "of the predicted weight, what blocks that are kept may hold together"),
        "alike": Option(0.5, "mean cosine of a block's tokens, above which its mean stands for it"),
        "rows": Option(128, "queries to a block"),
        "keys": Option(64, "keys to a block"),
        "sink": Option(False, "keep the first block of keys for all, as the paper's code does on request"),
    }
    mass: float
    alike: float
    rows: int
    keys: int
    sink: bool

    def supports(self, workload: Workload) -> str | None:
        return None if self.rows >= 1 and self.keys >= 1 else "rows and keys must be at least 1"

    def definition(self, workload: Workload) -> Definition:
        def chosen(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
            kept = self._kept(workload, query, key)[:, :, rows // self.rows]  # (batch, heads, n, key blocks)
            return kept.repeat_interleave(self.keys, -1)[..., : key.shape[2]]  # (batch, heads, n, kv_seq)

        return Softmax(chosen=chosen)

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Q or K in float64 with what is made of it; then outputs, K and V in float32, and a block of rows with all."""
        w = workload
        if w.trains:
            return None
        pooling = 3 * 8 * w.batch * max(w.heads * w.seq, w.kv_heads * w.kv_seq) * w.head_dim
        outputs = w.batch * w.heads * w.seq * w.value_dim * w.itemsize
        dims = w.head_dim + w.value_dim
        wide = 0 if w.itemsize == 4 else 4 * w.batch * w.kv_heads * w.kv_seq * dims
        return max(pooling, outputs + wide + w.kv_seq * 4 * (dims + 3 * min(self.rows, w.seq)))

    def build(self, workload: Workload) -> Attention:
        call = _Call(self, workload)
        how = f"plain torch, blocks of {self.rows} x {self.keys} as predicted"
        return Attention(call, how, lambda: call.density)

    def _kept(self, w: Workload, query: Tensor, key: Tensor) -> Tensor:
        """Which blocks are computed: bool (batch, heads, query blocks, key blocks)."""
        group = query.shape[1] // key.shape[1]
        q, q_alike = _pooled(query, self.rows)  # (batch, heads, query blocks, head_dim), (batch, heads, query blocks)
        k, k_alike = (x.repeat_interleave(group, 1) for x in _pooled(key, self.keys))  # (batch, heads, key blocks, ..)
        known, unknown = (k_alike > self.alike)[:, :, None], (q_alike <= self.alike)[..., None]
        seen, own = self._masked(w, q.shape[2], k.shape[2], q.device)  # (query blocks, key blocks) each
        scores = (q @ k.mT * w.scale).masked_fill(~(seen & known), -torch.inf)
        predicted = torch.softmax(scores, -1).nan_to_num().float()  # (batch, heads, query blocks, key blocks)
        order = best(predicted, k.shape[2])  # all of them, the largest first
        total = predicted.gather(-1, order).double().cumsum(-1)
        enough = total <= self.mass * total[..., -1:]  # in that order
        enough[..., 0] = True
        kept = torch.zeros_like(enough).scatter_(-1, order, enough)
        if self.sink:
            kept[..., 0] = True
        return ((kept | ~known | unknown) & seen) | own

    def _masked(self, w: Workload, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Blocks of which the mask shows a pair, and those that stand where the queries stand: (queries, keys) each."""
        start = torch.arange(queries, device=device)[:, None] * self.rows  # (queries, 1)
        first, last = start + w.offset, (start + self.rows).clamp(max=w.seq) - 1 + w.offset
        block = torch.arange(keys, device=device)  # (keys,)
        if not w.is_causal:
            return (block >= 0).expand(queries, -1), (block < 0).expand(queries, -1)
        seen = block * self.keys <= last
        return seen, seen & ((block + 1) * self.keys > first)


class _Call:
    """Block by block of queries, head by head; density: of the last call."""

    def __init__(self, plugin: Sparge, workload: Workload) -> None:
        self.plugin, self.workload = plugin, workload
        self.density: float | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w, plugin = self.workload, self.plugin
        with torch.no_grad():
            kept = plugin._kept(w, query, key).repeat_interleave(plugin.keys, -1)[..., : w.kv_seq]
        each = [  # kept: (batch, heads, query blocks, kv_seq)
            (b, h, rows, kept[b, h, i].nonzero()[:, 0])
            for b, h in product(range(len(query)), range(w.heads))
            for i, rows in enumerate(parts(w.seq, plugin.rows))
        ]
        pairs = sum((rows.stop - rows.start) * len(keys) for _, _, rows, keys in each)
        self.density = pairs / max(1, len(query) * w.heads * w.seq * w.kv_seq)
        outs = joined(w, self._block, each, query, key, value)  # (rows, value_dim) each
        return torch.cat(outs).view(len(query), w.heads, w.seq, w.value_dim)

    def _block(self, query: Tensor, key: Tensor, value: Tensor, b: int, h: int, rows: slice, keys: Tensor) -> Tensor:
        """softmax(q k^T * scale) v in float32 of some rows of a head with the keys that were kept for them."""
        q = query[b, h, rows].float()  # (rows, head_dim)
        k, v = (x[b, h // self.workload.group, keys].float() for x in (key, value))  # (keys kept, dim)
        scores = q @ k.T * self.workload.scale  # (rows, keys kept)
        if self.workload.is_causal:
            at = torch.arange(rows.start, rows.stop, device=keys.device)[:, None]  # (rows, 1)
            seen = visible(self.workload, at, keys)  # (rows, keys kept)
            scores = scores.masked_fill(~seen, -torch.inf)
        return (torch.softmax(scores, -1) @ v).to(query.dtype)  # (rows, value_dim)


def _pooled(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Means of blocks of tokens, and how alike those are: float64 (batch, heads, blocks, dim), float32 (.., blocks).

    The mean cosine of all pairs of a block is the squared length of the mean of its tokens, each made of length 1.
    """
    x = x.detach().double()
    directions = x / x.norm(dim=-1, keepdim=True).clamp(min=_TINIEST)  # (batch, heads, length, dim)
    return block_means(x, block), block_means(directions, block).square().sum(-1).float()
