"""Block-sparse attention in plain torch: each block of queries over the keys that its blocks hold."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnbench.workload import Workload

from ..native import attention as kernels
from .patterns import Pattern


class Gather:
    """For each block of queries, one product with the keys of the blocks that it sees: O(block * keys seen) scores.

    `again` is for training: a block keeps no scores, and is computed once more when its gradient is.
    """

    def __init__(self, workload: Workload, mask: Pattern) -> None:
        w, (some, every) = workload, mask.blocks()
        self.workload, self.both, self.widest = w, w.batch * w.kv_heads, _widest(w, mask, some)
        self.steps = [_step(mask, row, some[row], every[row], w.device) for row in range(len(some))]
        self.dtype = kernels.product_dtype(w.dtype) if w.device == "cpu" else getattr(torch, w.dtype)

    def operands(self, query: Tensor, key: Tensor, value: Tensor, rows: slice, keys: slice | Tensor) -> list[Tensor]:
        """A block's (both, group * rows, head_dim), (both, keys, head_dim) and (both, keys, value_dim)."""
        q = query[:, :, rows].reshape(self.both, -1, self.workload.head_dim)
        return [x.to(self.dtype) for x in (q, *(x[:, :, keys].flatten(0, 1) for x in (key, value)))]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w = self.workload
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        buffer = query.new_empty(self.widest, dtype=torch.float32)  # for scores of any block
        narrow = buffer if self.dtype == torch.float32 else query.new_empty(self.widest, dtype=self.dtype)
        for rows, keys, hidden in self.steps:
            q, k, v = self.operands(query, key, value, rows, keys)
            shape = (self.both, q.shape[1], k.shape[1])
            scores, weights = (x[: prod(shape)].view(shape) for x in (buffer, narrow))  # (both, group * rows, keys)
            torch.baddbmm(weights, q, k.mT, beta=0, alpha=w.scale, out=weights)
            if narrow is not buffer:
                scores.copy_(weights)
            if hidden is not None:
                scores.view(self.both, w.group, *hidden.shape).masked_fill_(hidden, -torch.inf)
            torch.softmax(scores, dim=-1, out=scores)
            if narrow is not buffer:
                weights.copy_(scores)
            out[:, :, rows] = (weights @ v).view(w.batch, w.heads, -1, w.value_dim)  # (batch, heads, rows, ..)
        return out

    def again(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        again = partial(checkpoint, self._block, query, key, value, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*step) for step in self.steps], 2)

    def _block(
        self, query: Tensor, key: Tensor, value: Tensor, rows: slice, keys: slice | Tensor, hidden: Tensor | None
    ) -> Tensor:
        w, (q, k, v) = self.workload, self.operands(query, key, value, rows, keys)
        scores = (q @ k.mT).float() * w.scale  # (both, group * rows, keys)
        if hidden is not None:
            scores = scores.view(self.both, w.group, *hidden.shape).masked_fill(hidden, -torch.inf).view(scores.shape)
        out = torch.softmax(scores, dim=-1).to(self.dtype) @ v  # (both, group * rows, value_dim)
        return out.to(query.dtype).view(w.batch, w.heads, -1, w.value_dim)


Step = tuple[slice, slice | Tensor, Tensor | None]
"""One block of queries: its rows, the keys that it sees (a range, or indices), True where a pair is hidden."""


def _step(mask: Pattern, row: int, some: Tensor, every: Tensor, device: str) -> Step:
    start, end = row * mask.block, min((row + 1) * mask.block, mask.seq)
    seen = some.nonzero()[:, 0]  # (blocks seen,)
    keys = (seen[:, None] * mask.block + torch.arange(mask.block)).flatten()  # (keys seen,)
    keys = keys[keys < mask.kv_seq].to(device)
    hidden = None
    if not every[seen].all():
        hidden = ~mask.allowed(torch.arange(start, end, device=device)[:, None], keys)  # (rows, keys)
    first, last = int(keys[0]), int(keys[-1])
    neighbours = last - first + 1 == len(keys)
    return slice(start, end), slice(first, last + 1) if neighbours else keys, hidden


def _widest(workload: Workload, mask: Pattern, some: Tensor) -> int:
    """Scores of the block of queries that sees most."""
    rows, keys = min(mask.block, workload.seq), min(int(some.sum(-1).max()) * mask.block, workload.kv_seq)
    return workload.batch * workload.heads * rows * keys


def gather_bytes(workload: Workload, mask: Pattern) -> int:
    """What the widest block of queries holds: scores and weights; its rows of Q and output; its keys and values."""
    w, scores = workload, _widest(workload, mask, mask.blocks()[0])
    rows = w.batch * w.heads * min(mask.block, w.seq)
    dims = (w.head_dim + w.value_dim) * w.itemsize
    return scores * (4 if w.itemsize == 4 else 6) + (rows + scores // rows * w.batch * w.kv_heads) * dims
