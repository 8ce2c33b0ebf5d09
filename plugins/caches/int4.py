"""Keys and values in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attnbench.cache import Step
from attnbench.plugin import Option
from attnbench.workload import Workload

from ..int4 import FORMAT
from ..int4 import Int4 as Decoder
from .integers import INTEGERS, Integers
from .packed import packed_step


class Int4(Integers):
    """In integers of 4 bits, two in a byte, with a scale for each group of a token's numbers."""

    options: ClassVar[Mapping[str, Option]] = {
        **INTEGERS,
        "group": Option(FORMAT.group, "numbers of a token that share a scale; 0: all"),
    }
    bits: ClassVar[int] = 4

    def step(self, workload: Workload) -> Step | str:
        other = f"the kernel has a scale for {FORMAT.group} numbers" if self.group != FORMAT.group else ""
        return packed_step(self, Decoder(), workload, self.unread or other)
