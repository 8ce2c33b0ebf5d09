"""The baseline of both: each rank gathers all keys and values, and attends with its own queries.

Llama 3 (Grattafiori 2024, arXiv 2407.21783, section 3.3.2) does so, as its few kv heads are cheap to gather. What ring
attention saves shows beside it: memory here does not fall with the number of processes. A rank sends what it does in a
ring, but for the gradients: backward it gathers once more, and what it adds to the gradients of others' keys and values
goes to who holds those, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attnbench.plugin import Attention, Option
from attnbench.workload import Workload

from .order import ORDER, Blocks, Ordered, Turn

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13


class AllGather(Ordered):
    """All keys and values in each process, in one step: simple, and memory does not fall with their number."""

    options: ClassVar[Mapping[str, Option]] = {"order": ORDER}
    formula = "all-gather"

    def build(self, workload: Workload, group: ProcessGroup) -> Attention:
        return _Gathered(self, workload, group).call("all-gather")


class _Gathered(Turn):
    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq = torch.zeros_like(query, dtype=torch.float32)  # (batch, heads, queries, head_dim)
        # Shares of each rank's gradients: (world, batch, kv_heads, queries, dim).
        dk, dv = (torch.zeros(self._world, *x.shape, dtype=torch.float32, device=x.device) for x in (key, value))
        for source, k, v in self.blocks(key, value):
            if part := self._scheme.meeting(self._workload, self._rank, source, query.shape[2]):
                found = self._scheme.differentiated(self._workload, part, up, query, k, v, out, lse)
                dq[:, :, part.queries] += found[0]
                dk[source][:, :, part.keys] += found[1]
                dv[source][:, :, part.keys] += found[2]
        return dq.to(query.dtype), self._summed(dk).to(key.dtype), self._summed(dv).to(value.dtype)

    def blocks(self, key: Tensor, value: Tensor) -> Blocks:
        keys, values = self._all(key), self._all(value)  # (world, batch, kv_heads, queries, dim)
        for step in range(self._world):
            source = (self._rank - step) % self._world
            yield source, keys[source], values[source]

    def _all(self, part: Tensor) -> Tensor:
        """(batch, kv_heads, queries, dim) of each rank: with the rank in front."""
        every = part.new_empty(self._world, *part.shape)
        _gather(every.flatten(0, 1), part.contiguous(), group=self._group)
        return every

    def _summed(self, shares: Tensor) -> Tensor:
        """Of what each rank has found for each (world, ..), the sum for this one: (..).

        Gloo's reduce-scatter is an all-reduce, which sends twice as much.
        """
        mine = torch.empty_like(shares)
        dist.all_to_all_single(mine, shares, group=self._group)
        return mine.sum(0)
