"""Attention variants that break their process's CUDA context at one length, and are right at others."""

from typing import ClassVar

import torch
import triton
import triton.language as tl
from faulty import Good, right
from torch import Tensor

BAD = 64  # queries of the call that goes wrong


class Breaks(Good):
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[2] == BAD:
            self.go_wrong(query)
        return right(query, key, value)

    def go_wrong(self, query: Tensor) -> None:
        raise NotImplementedError


class Assert(Breaks):
    """An assertion on the device: every later CUDA call of the process fails."""

    def go_wrong(self, query: Tensor) -> None:
        query.flatten()[torch.full((1,), 1 << 40, device=query.device)]


@triton.jit
def far_away(pointer):  # type: ignore[no-untyped-def]
    tl.store(pointer + (1 << 44), 1.0)


class Illegal(Breaks):
    """Writes where there is no memory."""

    def go_wrong(self, query: Tensor) -> None:
        far_away[(1,)](query)


class Hog(Breaks):
    """Takes memory until there is none."""

    def go_wrong(self, query: Tensor) -> None:
        kept = []
        while True:
            kept.append(torch.empty(1 << 30, dtype=torch.uint8, device=query.device))
