"""Patterns of sparse attention: which keys a query may see, as one predicate and as a table of blocks.

Every pattern is a band of keys around the query's own position, and for some also whole blocks far from it. Kernels
compute blocks of `block` queries x `block` keys, so what lies far away is made of whole blocks from the start.

A query's position is its index + kv_seq - seq: the last query stands at the last key, as in the causal mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, isqrt

import torch
from torch import Tensor

PATTERNS = ("window", "bigbird", "strided")

# BigBird's base model (Zaheer 2020, appendix E): blocks that all see and that see all, and blocks drawn for each row.
GLOBAL_BLOCKS = 2
RANDOM_BLOCKS = 3


@dataclass(frozen=True, eq=False)
class Pattern:
    """The mask of a pattern for one shape, causal mask included.

    band: int64 (2,), the least and the greatest key - row that is seen around the query's position.
    far: bool (query blocks, key blocks), blocks seen as a whole beside the band; None for a band alone.
    """

    seq: int
    kv_seq: int
    block: int
    band: Tensor
    far: Tensor | None

    def near(self, rows: Tensor, keys: Tensor) -> Tensor:
        """True where the key at `keys` is in the band of the query at `rows` (broadcastable integer indices)."""
        return (keys - rows >= self.band[0]) & (keys - rows <= self.band[1])

    def allowed(self, rows: Tensor, keys: Tensor) -> Tensor:
        """True where the query at `rows` sees the key at `keys`: the whole mask."""
        near = self.near(rows, keys)
        return near if self.far is None else near | self.far[rows // self.block, keys // self.block]

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Which blocks must be computed, and in which of them every pair is seen: bool (query blocks, key blocks).

        Found from the edges of blocks alone. Far blocks are whole, so in blocks that are not, `near` is the whole mask.
        """
        low, high = self.band.tolist()
        row, last_row = (edge[:, None] for edge in _edges(self.seq, self.block))  # (query blocks, 1)
        key, last_key = _edges(self.kv_seq, self.block)  # (key blocks,)
        some = (key - last_row <= high) & (last_key - row >= low)  # (query blocks, key blocks)
        every = (last_key - row <= high) & (key - last_row >= low)
        if self.far is not None:
            far = self.far.cpu()
            some, every = some | far, every | far
        return some, every

    def pairs(self) -> int:
        """(query, key) pairs in the blocks that are computed, of seq * kv_seq."""
        some, _ = self.blocks()
        row, last_row = _edges(self.seq, self.block)
        key, last_key = _edges(self.kv_seq, self.block)
        return int((last_row - row + 1) @ some.long() @ (last_key - key + 1))

    def to(self, device: str) -> Pattern:
        far = None if self.far is None else self.far.to(device)
        return replace(self, band=self.band.to(device), far=far)


@lru_cache(maxsize=16)
def pattern(name: str, seq: int, kv_seq: int, is_causal: bool, window: int, block: int) -> Pattern:
    """The pattern `name` for a shape; kv_seq must be at least seq, so that every query has a position.

    window: |position - key| < window, and with a causal mask position - window < key <= position; every query sees
        itself (Beltagy 2020, "Longformer", section 3.1).
    bigbird: the window; the first GLOBAL_BLOCKS blocks, which all see and which see all; and RANDOM_BLOCKS blocks
        drawn for each block of queries, from one fixed seed (Zaheer 2020, "Big Bird", section 2, BigBird-ITC).
    strided: the window, and every stride-th block counted from the query's own, stride = sqrt(number of key blocks)
        (Child 2019, "Generating Long Sequences with Sparse Transformers", section 4.3; in whole blocks, since a stride
        in single keys would touch every block).

    A causal far block is one that lies wholly in the past, so that far blocks are never cut by a mask.
    """
    offset = kv_seq - seq
    far = None
    if name != "window":
        position = _edges(seq, block)[0][:, None] + offset  # (query blocks, 1): where its first query stands
        own, key_block = position // block, torch.arange(ceil(kv_seq / block))  # (query blocks, 1), (key blocks,)
        far = _bigbird(own, key_block, is_causal) if name == "bigbird" else _strided(own, key_block)
        if is_causal:
            far &= _edges(kv_seq, block)[1] <= position
    band = torch.tensor([offset - window + 1, offset if is_causal else offset + window - 1])
    return Pattern(seq, kv_seq, block, band, far)


def _bigbird(own: Tensor, key_block: Tensor, is_causal: bool) -> Tensor:
    far = (key_block < GLOBAL_BLOCKS) | (own < GLOBAL_BLOCKS)  # (query blocks, key blocks)
    lots = torch.rand(far.shape, generator=torch.Generator().manual_seed(0))  # (query blocks, key blocks)
    if is_causal:
        lots.masked_fill_(key_block >= own, -1.0)  # draw from the past
    drawn = lots.topk(min(RANDOM_BLOCKS, len(key_block))).indices  # (query blocks, RANDOM_BLOCKS)
    return far.scatter(1, drawn, True)


def _strided(own: Tensor, key_block: Tensor) -> Tensor:
    stride = max(1, isqrt(len(key_block)))
    return (own - key_block) % stride == 0  # (query blocks, key blocks)


def _edges(length: int, block: int) -> tuple[Tensor, Tensor]:
    """First and last index of each block: two int64 (blocks,)."""
    first = torch.arange(0, length, block)
    return first, (first + block).clamp(max=length) - 1
