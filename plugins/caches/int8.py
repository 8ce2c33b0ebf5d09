"""Keys and values in 8 bits."""

from __future__ import annotations

from typing import ClassVar

from attnbench.cache import Step
from attnbench.workload import Workload

from ..int8 import Int8 as Decoder
from .integers import Integers
from .packed import packed_step


class Int8(Integers):
    """In integers of 8 bits, with a scale for each token."""

    bits: ClassVar[int] = 8

    def step(self, workload: Workload) -> Step | str:
        other = "the kernel has one scale for a token" if self.group else ""
        return packed_step(self, Decoder(), workload, self.unread or other)
