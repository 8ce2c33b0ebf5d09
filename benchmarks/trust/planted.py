"""The kernel that the proofs measure: alone in its file, since every worker imports it."""

import statistics
import time

import torch

from attnbench.plugin import Option, Plugin
from attnbench.workload import Workload

_CALLS = 9  # what a call takes is the median of so many


class Planted(Plugin):
    """torch's attention, and after it nothing, for `extra` per cent of the time that it takes.

    Work would have a price of its own: a second call for a hundredth of the rows takes several per cent.
    """

    options = {"extra": Option(0.0, "per cent of a call's time that it takes longer")}  # noqa: RUF012
    extra: float

    def build(self, workload: Workload):  # type: ignore[no-untyped-def]
        attend, clock = torch.nn.functional.scaled_dot_product_attention, time.perf_counter
        if not self.extra:
            return attend
        shape = (workload.batch, workload.heads, workload.seq, workload.head_dim)
        tensors = [torch.randn(shape) for _ in range(3)]
        taken = []
        for _ in range(_CALLS):
            start = clock()
            attend(*tensors)
            taken.append(clock() - start)
        pause = statistics.median(taken) * self.extra / 100

        def call(query, key, value):  # type: ignore[no-untyped-def]
            out = attend(query, key, value)
            end = clock() + pause
            while clock() < end:
                pass
            return out

        return call
