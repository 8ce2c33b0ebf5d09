"""Attention in float64 on a sample of query rows: what every error is measured against.

Only the sampled rows are computed, over all keys, so no l x l matrix is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.plugin import Definition, FeatureMap, Softmax, visible
from attnbench.workload import Workload

_CHUNK_ELEMENTS = 1 << 22  # scores held at a time: 32 MiB of float64


def sample_rows(seq: int, seed: int = 0, count: int = 48) -> Tensor:
    """Sorted int64 indices of about `count` query rows out of `seq`; all of them where there are no more.

    Always there: the first and last rows, and rows on both sides of block boundaries (multiples of 16 to 1024
    at the beginning, in the middle and at the end), where tiled kernels go wrong. The rest is drawn at random.
    """
    if seq <= count:
        return torch.arange(seq)
    generator = torch.Generator().manual_seed(seed)
    rows = {0, 1, seq - 2, seq - 1}
    for block in (16, 64, 128, 256, 1024):
        for boundary in {block, seq // 2 // block * block, (seq - 1) // block * block}:
            rows |= {boundary - 1, boundary}
    rows = {row for row in rows if 0 <= row < seq}
    while len(rows) < count:
        rows.add(int(torch.randint(seq, (), generator=generator)))
    return torch.tensor(sorted(rows))


def expected(
    definition: Definition, workload: Workload, query: Tensor, key: Tensor, value: Tensor, rows: Tensor
) -> Tensor:
    """Rows of the output of `definition`, in float64.

    Args:
        query: (batch, heads, seq, head_dim), any dtype; `key`, `value` as in `Workload`.
        rows: int64 (n,), the query rows to compute.

    Returns:
        (batch, heads, n, value_dim), float64.
    """
    if isinstance(definition, Softmax) and definition.operands is not None:
        query, key, value = definition.operands(query, key, value)
    rows = rows.to(query.device)
    return expected_at(definition, workload, query[:, :, rows], key, value, rows)


def expected_at(
    definition: Definition, workload: Workload, query: Tensor, key: Tensor, value: Tensor, rows: Tensor
) -> Tensor:
    """As `expected`, with a query that holds `rows` alone: (batch, heads, n, head_dim).

    A definition's `operands` are left out: they need every query, as blocks of queries share a scale.
    """
    rows = rows.to(query.device)
    keys = torch.arange(key.shape[2], device=key.device)
    batch, heads, _, _ = query.shape
    group = heads // key.shape[1]
    out = query.new_empty((batch, heads, len(rows), value.shape[-1]), dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // (group * len(keys)))
    for i in range(0, len(rows), step):
        part = slice(i, i + step)
        mask = visible(workload, rows[part, None], keys)  # (n, kv_seq)
        if isinstance(definition, Softmax) and definition.allowed is not None:
            mask = mask & definition.allowed(rows[part, None], keys)
        for b in range(batch):
            for h in range(key.shape[1]):
                shared = slice(h * group, (h + 1) * group)  # the query heads of this key/value head
                q, k, v = query[b, shared, part].double(), key[b, h].double(), value[b, h].double()
                out[b, shared, part] = _weights(definition, workload, q, k, mask) @ v  # (group, n, value_dim)
    return out


def _weights(definition: Definition, workload: Workload, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    if isinstance(definition, FeatureMap):
        scores = (definition.query(q) @ definition.key(k).T).masked_fill_(~mask, 0.0)  # (group, n, kv_seq)
        return scores / scores.sum(-1, keepdim=True)
    scores = (q @ k.T).mul_(workload.scale).masked_fill_(~mask, float("-inf"))  # (group, n, kv_seq)
    return torch.softmax(scores, dim=-1)


def exact(workload: Workload, query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """Rows of exact softmax attention in float64: what the approximation error is measured against."""
    return expected(Softmax(), workload, query, key, value, rows)
