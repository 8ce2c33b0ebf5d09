"""Block-sparse attention in plain torch: each block of queries over the keys that its blocks hold."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnbench.plugin import Call
from attnbench.workload import Workload

from ..native import attention as kernels
from .patterns import Pattern


def gather(workload: Workload, mask: Pattern) -> Call:
    """Plain torch: for each block of queries, one product with the keys of the blocks that it sees.

    Holds O(block * keys seen) scores at a time.
    """
    some, every = mask.blocks()
    steps = [_step(mask, row, some[row], every[row], workload.device) for row in range(len(some))]
    w, dtype = workload, _gathered_dtype(workload)
    both, widest = w.batch * w.kv_heads, _widest(w, mask, some)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        buffer = query.new_empty(widest, dtype=torch.float32)
        narrow = buffer if dtype == torch.float32 else query.new_empty(widest, dtype=dtype)
        for rows, keys, hidden in steps:
            q = query[:, :, rows].reshape(both, -1, w.head_dim).to(dtype)  # (both, group * rows, head_dim)
            k, v = (x[:, :, keys].flatten(0, 1).to(dtype) for x in (key, value))  # (both, keys, ..)
            shape = (both, q.shape[1], k.shape[1])
            scores, weights = (x[: shape[0] * shape[1] * shape[2]].view(shape) for x in (buffer, narrow))
            torch.baddbmm(weights, q, k.mT, beta=0, alpha=w.scale, out=weights)
            if dtype != torch.float32:
                scores.copy_(weights)
            if hidden is not None:
                scores.view(both, w.group, *hidden.shape).masked_fill_(hidden, float("-inf"))
            torch.softmax(scores, dim=-1, out=scores)
            if dtype != torch.float32:
                weights.copy_(scores)
            out[:, :, rows] = (weights @ v).view(w.batch, w.heads, -1, w.value_dim)
        return out

    return call


def gather_again(workload: Workload, mask: Pattern) -> Call:
    """`gather` for training: a block of queries keeps no scores, and is computed once more when its gradient is."""
    some, every = mask.blocks()
    steps = [_step(mask, row, some[row], every[row], workload.device) for row in range(len(some))]
    w, dtype, both = workload, _gathered_dtype(workload), workload.batch * workload.kv_heads

    def attend(
        query: Tensor, key: Tensor, value: Tensor, rows: slice, keys: slice | Tensor, hidden: Tensor | None
    ) -> Tensor:
        q = query[:, :, rows].reshape(both, -1, w.head_dim).to(dtype)  # (both, group * rows, head_dim)
        k, v = (x[:, :, keys].flatten(0, 1).to(dtype) for x in (key, value))  # (both, keys, ..)
        scores = (q @ k.mT).float() * w.scale
        if hidden is not None:
            scores = scores.view(both, w.group, *hidden.shape).masked_fill(hidden, float("-inf")).view(scores.shape)
        out = torch.softmax(scores, dim=-1).to(dtype) @ v
        return out.to(query.dtype).view(w.batch, w.heads, -1, w.value_dim)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        again = partial(checkpoint, attend, query, key, value, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*step) for step in steps], 2)

    return call


def _gathered_dtype(workload: Workload) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, workload.dtype)
    return kernels.product_dtype(workload.dtype) if workload.device == "cpu" else dtype


Step = tuple[slice, slice | Tensor, Tensor | None]
"""One block of queries: its rows, the keys that it sees (a range, or indices), True where a pair is hidden."""


def _step(mask: Pattern, row: int, some: Tensor, every: Tensor, device: str) -> Step:
    start, end = row * mask.block, min((row + 1) * mask.block, mask.seq)
    seen = some.nonzero()[:, 0]  # (blocks seen,)
    keys = (seen[:, None] * mask.block + torch.arange(mask.block)).flatten()
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
