"""Decoding over keys and values in 4 bits, two in a byte: a bit over a quarter of what bfloat16 takes.

64 numbers of a row share a scale, their peak / 7: 4 bits need finer scales than a row's (KIVI: Liu 2024, arXiv
2402.02750, has groups too, those of keys along tokens). Queries are quantized to 8 bits, and multiplied as integers.
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

LEVELS = 7
OFFSET = 8  # what bytes hold more than their number


def _code(numbers: Tensor) -> Tensor:
    return (numbers.round() + OFFSET).to(torch.uint8)


def _value(codes: Tensor) -> Tensor:
    return codes.float() - OFFSET


FORMAT = cache.Format("decode_int4.cpp", "int4", LEVELS, _code, _value, bits=4, group=64, query_levels=127)


class Int4(Choice):
    """softmax(Q8 K4^T * scales) V4: a decoder's past in 4 bits, keys smoothed by their mean over it.

    Against softmax attention on normal inputs the relative L2 error is 1.5e-1.
    """

    family = "quantized"
    phases: ClassVar[tuple[str, ...]] = ("decode", "forward")
    options: ClassVar[Mapping[str, Option]] = {"impl": cache.IMPL}

    def definition(self, workload: Workload) -> Definition:
        return Softmax(operands=partial(FORMAT.operands, workload))

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        return cache.implementations(FORMAT)
