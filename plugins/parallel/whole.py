"""Attention in one process, which what several share is compared with."""

from __future__ import annotations

from functools import partial

from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from attnbench.parallel import Scheme
from attnbench.plugin import Attention
from attnbench.workload import Workload


class Whole(Scheme):
    """torch's scaled_dot_product_attention in one process: the baseline."""

    formula = "whole"

    def unsupported(self, workload: Workload, world: int) -> str | None:
        return "it runs in one process" if world > 1 else None

    def build(self, workload: Workload, group: ProcessGroup) -> Attention:
        w = workload
        call = partial(scaled_dot_product_attention, is_causal=w.is_causal, scale=w.scale, enable_gqa=w.group > 1)
        return Attention(call, "torch sdpa")
