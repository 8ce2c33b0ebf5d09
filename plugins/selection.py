"""What queries choose by values: the best of scores, without a doubt, and attention over the keys of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from attnbench.workload import Workload

ELEMENTS = 1 << 19  # scores, or numbers of gathered keys, held at a time: 2 MiB in float32, which caches hold


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of scores (..., n), the largest first: int64 (..., count).

    Scores come in float64 and are compared in float32, so that it does not show in which order they were summed up; of
    equal ones the later place comes first. torch.topk leaves open which one it takes.
    """
    bits = (scores.float() + 0.0).view(torch.int32).long()  # (..., n); + 0.0 makes 0 of -0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as the scores are ordered, the negative ones too
    places = torch.arange(scores.shape[-1], device=scores.device)  # (n,)
    return (order << 32).add_(places).topk(count).indices


def block_means(x: Tensor, block: int) -> Tensor:
    """Of each block of tokens of x (batch, heads, length, dim), of the last one those there are: (.., blocks, dim)."""
    length = x.shape[2]
    sums = pad(x, (0, 0, 0, -length % block)).unflatten(2, (-1, block)).sum(3)  # (batch, heads, blocks, dim)
    start = torch.arange(0, length, block, device=x.device)  # (blocks,)
    return sums / (length - start).clamp(max=block)[:, None]


def gathered(query: Tensor, key: Tensor, value: Tensor, index: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax(q K_i^T * scale) V_i in float32, of queries that have keys of their own each.

    query: (batch, heads, n, head_dim); key, value as in `Workload`, best contiguous: else they are copied.
    index: int64 (batch, choosing, n, m), places of keys; choosing is kv_heads or heads, and what query heads share.
    hidden: bool, of that shape or one that broadcasts to it, True where a place does not count.

    Returns:
        (batch, heads, n, value_dim), in the dtype of query.
    """
    batch, choosing = index.shape[:2]
    heads = torch.arange(batch * key.shape[1], device=index.device) * key.shape[2]  # (batch * kv_heads,)
    first = heads.view(batch, -1).repeat_interleave(choosing // key.shape[1], 1)  # (batch, choosing): each one's key 0
    at = (index + first[..., None, None]).flatten()  # (batch * choosing * n * m,)
    k, v = (x.reshape(-1, x.shape[-1]).index_select(0, at).view(*index.shape, -1).float() for x in (key, value))
    q = query.unflatten(1, (choosing, -1)).transpose(2, 3).float()  # (batch, choosing, n, group, head_dim)
    scores = (q @ k.mT * scale).masked_fill(hidden[..., None, :], -torch.inf)  # (batch, choosing, n, group, m)
    out = torch.softmax(scores, -1) @ v  # (batch, choosing, n, group, value_dim)
    return out.transpose(2, 3).flatten(1, 2).to(query.dtype)  # (batch, heads, n, value_dim)


def gathered_bytes(workload: Workload, choosing: int, rows: int, keys: int) -> int:
    """What `gathered` holds for so many rows and keys of each, beside keys and values in float32."""
    w, picked = workload, workload.batch * choosing * rows * keys
    dims = w.head_dim + w.value_dim
    shared = 0 if w.itemsize == 4 or w.decodes else 4 * w.batch * w.kv_heads * w.kv_seq * dims
    narrow = w.itemsize * max(w.head_dim, w.value_dim) if w.itemsize < 4 and w.decodes else 0
    return shared + picked * (4 * dims + narrow + 2 * 4 * (w.heads // choosing))


def rows_at_once(workload: Workload, choosing: int, keys: int, scores: int) -> int:
    """Query rows that a strip has. keys: chosen by each. scores: that a query head has before it chooses."""
    w = workload
    of_row = w.batch * max(w.heads * scores, choosing * keys * max(w.head_dim, w.value_dim))
    return max(1, min(w.seq, ELEMENTS // of_row))


def joined(
    workload: Workload, part: Callable[..., Tensor], each: Iterable[Sequence[Any]], query: Tensor, *shared: Tensor
) -> list[Tensor]:
    """What `part` makes of the query and what all share, such as keys, and of each of its further arguments.

    What all share is in float32, in which the gradients of all parts add up; but for a decoding step, which reads a
    part of it. In training a part keeps nothing, and is computed once more when its gradient is.
    """
    w, wide = workload, [x if workload.decodes else x.float().contiguous() for x in shared]
    if not w.trains:
        return [part(query, *wide, *more) for more in each]
    again = partial(checkpoint, part, query, *wide, use_reentrant=False, preserve_rng_state=False)
    return [again(*more) for more in each]
