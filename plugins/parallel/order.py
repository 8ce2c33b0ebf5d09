"""Which tokens a rank holds, and what its queries see of another rank's keys.

contiguous: rank r holds the r-th of N runs. Causal, the last rank then sees all keys, the first one its own alone, and
all wait for the last. zigzag: rank r holds the r-th and the r-th last of 2N runs, so that all see as many pairs:
striped attention (Brandon 2023, arXiv 2311.09431) balances token by token, and runs instead of tokens are what Llama 3
(Grattafiori 2024, arXiv 2407.21783, section 3.3.2) and ring-flash-attention take. Without a mask all see all keys
anyway, and order is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attnbench.parallel import Scheme, uneven
from attnbench.plugin import Option
from attnbench.workload import Workload

ORDER = Option("zigzag", "which tokens a process holds; contiguous leaves causal work uneven", ("zigzag", "contiguous"))


class Part(NamedTuple):
    """Of a rank's own queries and of some rank's keys those that meet; causal: aligned top-left."""

    queries: slice
    keys: slice
    causal: bool


class Ordered(Scheme):
    """A scheme whose ranks hold queries and see blocks of keys, one rank's after the other."""

    order: str

    def unsupported(self, workload: Workload, world: int) -> str | None:
        return uneven(workload, world, 2 if self._zigzags(workload) else 1)

    def tokens(self, workload: Workload, rank: int, world: int) -> Sequence[range]:
        if not self._zigzags(workload):
            return super().tokens(workload, rank, world)
        run = workload.seq // (2 * world)
        return [range(i * run, (i + 1) * run) for i in (rank, 2 * world - 1 - rank)]

    def meeting(self, workload: Workload, rank: int, source: int, length: int) -> Part | None:
        """What a rank's queries see of the keys that `source` holds; both hold `length` tokens. None: nothing."""
        every = slice(0, length)
        if source == rank or not workload.is_causal:
            return Part(every, every, workload.is_causal)
        earlier = source < rank
        if not self._zigzags(workload):
            return Part(every, every, False) if earlier else None
        half = length // 2
        # Of an earlier rank's two runs the first lies before both of ours, the last one behind both; of a later rank's
        # both lie between ours.
        return Part(every, slice(0, half), False) if earlier else Part(slice(half, length), every, False)

    def _zigzags(self, workload: Workload) -> bool:
        return self.order == "zigzag" and workload.is_causal
