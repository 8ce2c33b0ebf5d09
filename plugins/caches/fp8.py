"""Keys and values in 8-bit floats (Micikevicius 2022, arXiv 2209.05433)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attnbench.cache import Step
from attnbench.plugin import Option
from attnbench.workload import Workload

from ..fp8 import FORMATS
from ..fp8 import Fp8 as Decoder
from .packed import packed_step
from .sides import ONE_SIDE, Codes, Side, TwoSides


class Fp8(TwoSides):
    """In 8-bit floats, with a scale for each token: its peak over the format's largest number."""

    options: ClassVar[Mapping[str, Option]] = {
        "format": Option("e4m3", "4 bits of exponent and 3 of mantissa, or 5 and 2", tuple(FORMATS)),
        **ONE_SIDE,
    }
    format: str

    def sides(self) -> tuple[Side, Side]:
        form = FORMATS[self.format]
        side = Codes(form.narrow, lambda kept, dim: form.widen(*kept))
        return side, side

    def step(self, workload: Workload) -> Step | str:
        return packed_step(self, Decoder(format=self.format), workload)
