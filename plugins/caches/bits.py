"""Small numbers, so many bits each, packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 (.., n), each below 2^bits -> uint8 (.., ceil(n / 8) * bits): eight codes lie in `bits` bytes.

    With 1, 2, 4 and 8 bits a byte holds whole codes; with others byte p of eight has bit p of each.
    """
    codes = pad(codes, (0, -codes.shape[-1] % 8))
    if bits == 8:
        return codes
    if 8 % bits == 0:
        parts = codes.unflatten(-1, (-1, 8 // bits))  # (.., bytes, codes of a byte)
        return (parts << _steps(parts, bits)).sum(-1, dtype=torch.uint8)
    eights = codes.unflatten(-1, (-1, 1, 8))  # (.., eights, 1, 8)
    planes = eights >> torch.arange(bits, dtype=torch.uint8, device=codes.device)[:, None] & 1  # (.., eights, bits, 8)
    return (planes << _steps(planes, 1)).sum(-1, dtype=torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """What `pack` made: uint8 (.., n)."""
    if bits == 8:
        return packed[..., :n]
    if 8 % bits == 0:
        parts = packed[..., None].expand(*packed.shape, 8 // bits)
        return (parts >> _steps(parts, bits) & 2**bits - 1).flatten(-2)[..., :n]
    planes = packed.unflatten(-1, (-1, bits, 1)).expand(*packed.shape[:-1], packed.shape[-1] // bits, bits, 8)
    ones = planes >> _steps(planes, 1) & 1  # (.., eights, bits, 8)
    weights = torch.arange(bits, dtype=torch.uint8, device=packed.device)[:, None]
    return (ones << weights).sum(-2, dtype=torch.uint8).flatten(-2)[..., :n]


def _steps(x: Tensor, bits: int) -> Tensor:
    return torch.arange(0, bits * x.shape[-1], bits, dtype=torch.uint8, device=x.device)
