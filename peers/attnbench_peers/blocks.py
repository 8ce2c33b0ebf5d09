"""ggml's quantized types, in torch: what a cache of them holds. Each block of 32 numbers of a row shares a scale.

Scales are stored in float16, after they were divided by. (..., dim) -> (..., dim), float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def q8_0(x: Tensor) -> Tensor:
    """8 bits: the largest number of a block becomes 127 or -127."""
    blocks = x.unflatten(-1, (-1, BLOCK))  # (..., blocks, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks * _inverse(scale)).round() * _stored(scale)).flatten(-2)


def q4_0(x: Tensor) -> Tensor:
    """4 bits: the largest number of a block, by magnitude, becomes -8; what would be 8 becomes 7."""
    blocks = x.unflatten(-1, (-1, BLOCK))  # (..., blocks, 32)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = peak / -8
    whole = (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15) - 8
    return (whole * _stored(scale)).flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _stored(scale: Tensor) -> Tensor:
    return scale.half().float()
