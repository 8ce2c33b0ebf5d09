"""Rows to 8 bits with scales, as int8 attention multiplies and keeps them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVELS = 127
TINIEST = 1e-30  # a row's peak, at least: zeros have a scale too


def quantize(x: Tensor, rows: int, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """int8 (..., length, dim) and float32 scales (..., length, 1), so that x is about int8 * scale; equation 2.

    x: float32 (..., length, dim). Each `rows` rows share their scale, peak / levels; ties round to even.
    """
    peak = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # (..., length, 1)
    if rows > 1:
        length = x.shape[-2]
        blocks = pad(peak, (0, 0, 0, -length % rows)).view(*x.shape[:-2], -1, rows, 1)  # (..., blocks, rows, 1)
        peak = blocks.amax(-2, keepdim=True).expand_as(blocks).flatten(-3, -2)[..., :length, :]  # (..., length, 1)
    scale = peak.clamp(min=TINIEST) / levels  # (..., length, 1)
    return (x / scale).round_().to(torch.int8), scale


def smooth(key: Tensor) -> Tensor:
    """K (..., kv_seq, head_dim) minus its mean over tokens, in float32. Equation 5."""
    return key - key.mean(dim=-2, keepdim=True, dtype=torch.float32)
