"""SageAttention 2's grouping of rows, in torch: those that one thread of a warp multiplies share a scale.

Source: Zhang 2024, arXiv 2411.10958, and per_thread_int8 of sageattention/triton/quant_per_thread.py (2.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

WARP_QUERIES, WARP_KEYS = 32, 64  # rows of a warp: WARPQ, WARPK


def queries(x: Tensor) -> Tensor:
    """Q (batch, heads, length, dim), float64 of what int8 holds: a thread has every eighth row of its warp's."""
    row = torch.arange(x.shape[2], device=x.device)
    return _rounded(x, row // WARP_QUERIES * 8 + row % 8)


def keys(x: Tensor) -> Tensor:
    """K likewise: a thread has two neighbours of every eight rows of its warp's."""
    row = torch.arange(x.shape[2], device=x.device)
    return _rounded(x, row // WARP_KEYS * 4 + row % 8 // 2)


def _rounded(x: Tensor, groups: Tensor) -> Tensor:
    """In 127 steps to either side; rows of a group, one for each of (length,), share a scale."""
    peaks = x.float().abs().amax(-1)  # (batch, heads, length)
    none = peaks.new_zeros(*peaks.shape[:2], int(groups.max()) + 1)
    peaks = none.scatter_reduce(-1, groups.expand(peaks.shape), peaks, "amax")[..., groups]
    scale = peaks[..., None] / 127 + 1e-7
    return (x.float() / scale).round().double() * scale.double()
