"""Tokens as integers around zero, with a scale for each token or each group of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Option

from ..quantized_cache import Format
from .bits import pack, unpack
from .rotation import rotation
from .sides import ONE_SIDE, Codes, Side, Turned, TwoSides, smoothed

FIRST = 32  # tokens to which a cache is fitted, such as by their mean


def codes(bits: int, group: int) -> Codes:
    """A number is code * scale: codes of up to L = 2^(bits-1) - 1 on each side, the scale a peak over L in bfloat16.

    group: numbers of a token that share a scale; 0: all.
    """
    levels = 2 ** (bits - 1) - 1
    form = Format(
        "", "", levels, bits=bits, group=group,
        code=lambda numbers: (numbers.round() + levels).to(torch.uint8),
        value=lambda whole: whole.float() - levels,
    )  # fmt: skip

    def narrow(x: Tensor) -> tuple[Tensor, ...]:
        whole, scale = form.narrow(x)  # (.., n, dim), a byte each, and (.., n, groups)
        return pack(whole, bits), scale

    def widen(kept: tuple[Tensor, ...], dim: int) -> Tensor:
        return form.widen(unpack(kept[0], bits, dim), kept[1])

    return Codes(narrow, widen)


INTEGERS: Mapping[str, Option] = {
    "group": Option(0, "numbers of a token that share a scale; 0: all"),
    "rotate": Option(False, "turned by one random rotation first (QuaRot: Ashkboos 2024, arXiv 2404.00456)"),
    "smooth": Option(False, f"keys less the mean of the first {FIRST} (SageAttention: Zhang 2024, arXiv 2410.02367)"),
    **ONE_SIDE,
}


class Integers(TwoSides):
    """Symmetric integers of `bits`, quantized on arrival."""

    options: ClassVar[Mapping[str, Option]] = INTEGERS
    bits: ClassVar[int]
    group: int
    rotate: bool
    smooth: bool

    def sides(self) -> tuple[Side, Side]:
        side: Side = codes(self.bits, self.group)
        if self.rotate:
            side = Turned(side, rotation)
        return smoothed(side, FIRST) if self.smooth else side, side

    @property
    def unread(self) -> str:
        """Why no kernel reads what these options make, whatever the group; "" where one does."""
        return "no kernel rotates" if self.rotate else ""
