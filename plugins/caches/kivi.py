"""KIVI (Liu 2024, arXiv 2402.02750): keys by channel, values by token, and the last tokens in full."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.plugin import Option

from .bits import pack, unpack
from .sides import FULL, ONE_SIDE, Codes, Late, Side, TwoSides

_TINIEST = 1e-30


class Kivi(TwoSides):
    """A group of numbers has a scale and a lowest value: `group` tokens of a channel in keys, where channels have
    outliers, and `group` channels of a token in values.

    Keys wait in full until `residual` of them are there, and then go together; of values the last `residual` wait
    (section 4.2). Here keys are quantized after RoPE, as there.
    """

    options: ClassVar[Mapping[str, Option]] = {
        "bits": Option(4, "of a number", (2, 3, 4, 8)),
        "group": Option(32, "numbers that share a scale"),
        "residual": Option(128, "tokens in full, a multiple of the group; up to so many of the keys"),
        **ONE_SIDE,
    }
    bits: int
    group: int
    residual: int

    def sides(self) -> tuple[Side, Side]:
        size = self.residual
        if self.group < 1 or size < self.group or size % self.group:
            raise AttnbenchError(f"kivi: residual={size} must be a multiple of group={self.group}, which is at least 1")
        keys = Codes(partial(_by_channel, self.bits, self.group), partial(_from_channels, self.bits, self.group))
        values = Codes(partial(_by_token, self.bits, self.group), partial(_from_tokens, self.bits, self.group))
        return Late(keys, lambda n: n // size * size), Late(values, lambda n: max(0, n - size))


def _narrow(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 (.., group) -> codes, a byte each, scale and lowest value (..), so that x = code * scale + lowest.

    Section 3.1, equation 1.
    """
    lowest, highest = groups.amin(-1).to(FULL), groups.amax(-1)  # (..)
    scale = ((highest - lowest.float()) / (2**bits - 1)).clamp(min=_TINIEST).to(FULL)
    whole = ((groups - lowest.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    return whole.to(torch.uint8), scale, lowest


def _widen(whole: Tensor, scale: Tensor, lowest: Tensor) -> Tensor:
    return whole.float() * scale.float()[..., None] + lowest.float()[..., None]


def _by_channel(bits: int, group: int, x: Tensor) -> tuple[Tensor, ...]:
    """(batch, kv_heads, n, dim), in whole groups -> codes (.., groups, dim, bytes), scales (.., groups, dim)."""
    whole, scale, lowest = _narrow(x.unflatten(2, (x.shape[2] // group, group)).mT, bits)  # of (.., groups, dim, group)
    return pack(whole, bits), scale, lowest


def _from_channels(bits: int, group: int, kept: tuple[Tensor, ...], dim: int) -> Tensor:
    return _widen(unpack(kept[0], bits, group), *kept[1:]).mT.flatten(2, 3)


def _by_token(bits: int, group: int, x: Tensor) -> tuple[Tensor, ...]:
    """(batch, kv_heads, n, dim) -> codes (.., n, groups, bytes), scales (.., n, groups); the last group is filled."""
    short = -x.shape[-1] % group
    whole = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], short)), -1)  # what is repeated widens no range
    whole, scale, lowest = _narrow(whole.unflatten(-1, (-1, group)), bits)
    return pack(whole, bits), scale, lowest


def _from_tokens(bits: int, group: int, kept: tuple[Tensor, ...], dim: int) -> Tensor:
    return _widen(unpack(kept[0], bits, group), *kept[1:]).flatten(-2)[..., :dim]
