"""Tokens in pieces: slices, strips of query rows with the keys that they see, hidden pairs; caps and biases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnbench.plugin import visible
from attnbench.workload import Workload


def is_cut(workload: Workload) -> bool:
    """Whether a query does not see some of the keys before its own: those beyond a window, other branches of a tree."""
    return bool({"window", "tree"} & set(workload.beyond))


def parts(length: int, step: int) -> Iterator[slice]:
    """Slices of `step`, of which the last may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def strips(workload: Workload, rows: int) -> Iterator[tuple[slice, slice]]:
    """Query rows, so many at a time, and the keys from the first to the last that any of them sees."""
    w, window = workload, workload.masked.window
    for part in parts(w.seq, rows):
        first = max(0, part.start + w.offset + 1 - window) if window else 0
        yield part, slice(first, part.stop + w.offset if w.is_causal else w.kv_seq)


def hidden(workload: Workload) -> Tensor:
    """True where the query does not see the key: (seq, kv_seq)."""
    return hidden_part(workload, slice(0, workload.seq), slice(0, workload.kv_seq))


def hidden_part(workload: Workload, rows: slice, keys: slice) -> Tensor:
    """True where one of these rows does not see one of these keys: (rows, keys)."""
    row, key = (torch.arange(part.start, part.stop, device=workload.device) for part in (rows, keys))
    return visible(workload, row[:, None], key).logical_not_()


def by_distance(workload: Workload) -> Tensor | None:
    """What the workload's bias adds at each distance, (heads, seq + kv_seq - 1), in float32; None where it has none.

    The first is for the first key and the last query, the last for the last key and the first query.
    """
    w = workload
    if w.biased is None:
        return None
    return w.biased(torch.arange(1 - w.kv_seq, w.seq, device=w.device)).float()


def biased_part(line: Tensor, workload: Workload, rows: slice, keys: slice) -> Tensor:
    """Of `by_distance`, (..), what is added to the scores of some rows with some keys: (.., rows, keys)."""
    windows = line.unfold(-1, keys.stop - keys.start, 1)  # (.., first key less row, keys)
    first = workload.seq + keys.start
    # Copied before it is turned, at a tenth of an index's time: flip() alone would put columns next to each other.
    return windows[..., first - rows.stop : first - rows.start, :].contiguous().flip(-2)


def whole_bias(workload: Workload, dtype: torch.dtype) -> Tensor | None:
    """What the workload's bias adds to all scores: (heads, seq, kv_seq), which is in memory then."""
    w, line = workload, by_distance(workload)
    if line is None:
        return None
    whole = torch.empty(w.heads, w.seq, w.kv_seq, dtype=dtype, device=w.device)
    for into, own in zip(whole, line.to(dtype), strict=True):
        into.copy_(biased_part(own, w, slice(0, w.seq), slice(0, w.kv_seq)))
    return whole


def cap_(scores: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(scores / softcap), in place; as they are where softcap is 0."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores
