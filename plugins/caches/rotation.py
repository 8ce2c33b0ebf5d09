"""One random rotation for all rows of a dimension: what is large in one number spreads over all."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def rotation(dim: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix, float32 (dim, dim), drawn evenly from all (Stewart 1980): made again, never kept."""
    drawn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).float()
