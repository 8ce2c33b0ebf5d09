"""Tokens in pieces: slices of them, strips of query rows with the keys that they see, and pairs that are hidden."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnbench.plugin import visible
from attnbench.workload import Workload


def parts(length: int, step: int) -> Iterator[slice]:
    """Slices of `step`, of which the last may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def strips(workload: Workload, rows: int) -> Iterator[tuple[slice, slice]]:
    """Query rows, so many at a time, and the keys that the last of them sees."""
    w = workload
    return ((part, slice(0, part.stop + w.offset if w.is_causal else w.kv_seq)) for part in parts(w.seq, rows))


def hidden(workload: Workload) -> Tensor:
    """True where the query does not see the key: (seq, kv_seq)."""
    rows, keys = (torch.arange(n, device=workload.device) for n in (workload.seq, workload.kv_seq))
    return visible(workload, rows[:, None], keys).logical_not_()
