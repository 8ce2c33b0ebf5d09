"""Token by token, as libraries for a GPU want tensors: (batch, length, heads, dim), or all tokens of a batch in a row.

Also a question that several of them ask: what the GPU at hand can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.workload import Workload


def by_token(x: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (batch, length, heads, dim) and back: a view."""
    return x.transpose(1, 2)


def older_than(major: int, minor: int = 0) -> bool:
    """Whether the GPU at hand has a lower compute capability. Without one it is not known to have."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (major, minor)


def wide_or_unequal(w: Workload, who: str) -> str | None:
    """Why a kernel for 16 bits, with one dim for queries, keys and values, can't; None where it can."""
    if w.dtype == "float32":
        return f"{who} computes in float16 and bfloat16"
    return f"{who} has one dim for queries, keys and values" if w.value_dim != w.head_dim else None


class Tokens:
    """Where the tokens of a batch lie, whose entries have lengths of their own and are padded to `longest`.

    starts: int32 (batch + 1,), where each entry begins among all tokens; the last is how many there are.
    """

    def __init__(self, lengths: Sequence[int], longest: int, device: str) -> None:
        self.longest, self._padded = max(lengths), longest
        self._batch = len(lengths)
        counts = torch.tensor(lengths, device=device)
        self.starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        there = torch.arange(longest, device=device) < counts[:, None]  # (batch, longest)
        self._places = None if bool(there.all()) else there.flatten().nonzero()[:, 0]  # (tokens,)

    def pack(self, x: Tensor) -> Tensor:
        """(batch, heads, longest, dim) -> (tokens, heads, dim), rows dense: a view where they lie so already."""
        tokens = by_token(x).flatten(0, 1)
        if self._places is not None:
            return tokens.index_select(0, self._places)
        return tokens if tokens.stride(-1) == 1 else tokens.contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        """(tokens, heads, dim) -> (batch, heads, longest, dim), 0 where there is no token."""
        if self._places is not None:
            x = x.new_zeros(self._batch * self._padded, *x.shape[1:]).index_copy(0, self._places, x)
        return by_token(x.unflatten(0, (self._batch, self._padded)))


def tokens_of(w: Workload) -> tuple[Tokens, Tokens]:
    """Of a workload's queries, and of its keys."""
    entries = w.entries() if w.lengths else [w] * w.batch
    of = ([each.seq for each in entries], w.seq), ([each.kv_seq for each in entries], w.kv_seq)
    queries, keys = (Tokens(lengths, longest, w.device) for lengths, longest in of)
    return queries, keys


def grown(length: int, new: int, capacity: int) -> int:
    """Tokens in a cache once `new` have joined `length`.

    Raises:
        AttnbenchError: there is no room for them.
    """
    if length + new > capacity:
        raise AttnbenchError(f"a cache of {capacity} tokens has no room for {length + new}")
    return length + new
