"""Keys and values in 4-bit floats with scales of 8 bits for 16 or 32 numbers: 4.5 or 4.25 bits a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Option

from ..microscaling import FORMATS, decode, encode
from .bits import pack, unpack
from .integers import FIRST
from .sides import ONE_SIDE, Codes, Fitted, Side, TwoSides

ROOM = 8  # times the first tokens' largest number that later ones may be


class Fp4(TwoSides):
    """In NVFP4 or MXFP4 (see `microscaling`), in blocks of a token's numbers.

    NVFP4's float32 for a whole tensor, here a head's, is fitted to the first 32 tokens, and leaves room for numbers 8
    times as large: what is kept can't follow those that come later, and beside E4M3's range 8 is little.
    """

    options: ClassVar[Mapping[str, Option]] = {
        "format": Option("nvfp4", "blocks of 16 with scales in E4M3, or of 32 with powers of two", tuple(FORMATS)),
        **ONE_SIDE,
    }
    format: str

    def sides(self) -> tuple[Side, Side]:
        form = FORMATS[self.format]

        def narrow(x: Tensor) -> tuple[Tensor, ...]:
            numbers, scale = form.narrow(x)  # (.., n, dim), (.., n, blocks)
            return pack(encode(numbers), 4), scale

        def widen(kept: tuple[Tensor, ...], dim: int) -> Tensor:
            return form.widen(decode(unpack(kept[0], 4, dim)), kept[1])

        def whole(x: Tensor) -> Tensor:
            peak = x.abs().amax((2, 3), keepdim=True)  # (batch, kv_heads, 1, 1)
            return (peak * ROOM / form.top).clamp(min=torch.finfo(torch.float32).tiny)

        side: Side = Codes(narrow, widen)
        if form.top:
            side = Fitted(side, FIRST, whole, torch.div, torch.mul)
        return side, side
