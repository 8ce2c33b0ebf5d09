"""Ring attention (Liu 2023, arXiv 2310.01889): queries stay, keys and values travel from rank to rank.

In N - 1 steps each rank sees all keys, a block at a time, and holds three at most: its own, the one that it computes
with and the one that arrives meanwhile. Backward, keys and values travel once more, and the gradients of a block's keys
and values follow one step behind them, a sum in float32 to which each rank adds; a rank's own share waits at home, so
that they too take N - 1 steps. A rank sends

    forward    (N - 1) * K (L / N) (d + dv) numbers of the workload's dtype, for each batch entry
    backward   as many again, and as many in float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attnbench.plugin import Attention, Option
from attnbench.workload import Workload

from ..autograd import differentiable
from . import kernel
from .order import ORDER, Ordered, Part


class Ring(Ordered):
    """Keys and values travel round a ring of processes while each computes with the block in hand."""

    options: ClassVar[Mapping[str, Option]] = {"order": ORDER}
    formula = "ring"

    def build(self, workload: Workload, group: ProcessGroup) -> Attention:
        turn = _Turn(self, workload, group)
        order = f"{self.order} order, " if workload.is_causal else ""
        how = f"ring: {order}torch flash, blocks merged by log-sum-exp"
        return Attention(differentiable(turn.forward, turn.backward), how)


class _Turn:
    def __init__(self, scheme: Ordered, workload: Workload, group: ProcessGroup) -> None:
        self._scheme, self._workload, self._group = scheme, workload, group
        self._rank, self._world = group.rank(), group.size()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp (batch, heads, queries), of parts: query (batch, heads, queries, head_dim)."""
        held, merged = [key.contiguous(), value.contiguous()], None
        for step in range(self._world):
            coming = Shift(self._group, held, tag=0) if step + 1 < self._world else None
            part = self._part(step, query.shape[2])
            if part:
                rows, (k, v) = query[:, :, part.queries], (x[:, :, part.keys] for x in held)
                out, lse = kernel.forward(rows, k, v, part.causal, self._workload.scale)
                if merged is None:
                    merged = kernel.Merged(out, lse)
                else:
                    merged.add(part.queries, out, lse)
                del out, lse
            if coming:
                held = coming.wait()
        assert merged is not None  # a rank sees its own keys first
        return merged.out.to(query.dtype), merged.lse

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the parts of query, key and value; up: of the output's part."""
        held, world = [key.contiguous(), value.contiguous()], self._world
        dq = torch.zeros_like(query, dtype=torch.float32)  # (batch, heads, queries, head_dim)
        own = [torch.zeros_like(x, dtype=torch.float32) for x in held]  # (batch, kv_heads, queries, dim)
        following: Shift | None = None
        for step in range(world):
            coming = Shift(self._group, held, tag=0) if step + 1 < world else None
            part, found = self._part(step, query.shape[2]), None
            if part:
                gradient, rows = up[:, :, part.queries], query[:, :, part.queries]
                at = out[:, :, part.queries], lse[:, :, part.queries]
                k, v = (x[:, :, part.keys] for x in held)
                found = kernel.backward(gradient, rows, k, v, *at, part.causal, self._workload.scale)
                dq[:, :, part.queries] += found[0]
            sums = own if step == 0 else following.wait() if following else [torch.zeros_like(x) for x in own]
            if part and found:
                for total, more in zip(sums, found[1:], strict=True):
                    total[:, :, part.keys] += more
            following = Shift(self._group, sums, tag=len(held)) if step else None
            if coming:
                held = coming.wait()
        if following:
            for total, more in zip(own, following.wait(), strict=True):
                total += more
        return dq.to(query.dtype), own[0].to(key.dtype), own[1].to(value.dtype)

    def _part(self, step: int, length: int) -> Part | None:
        return self._scheme.meeting(self._workload, self._rank, (self._rank - step) % self._world, length)


class Shift:
    """Tensors on their way to the next rank, while as many come from the one before."""

    def __init__(self, group: ProcessGroup, tensors: Sequence[Tensor], tag: int) -> None:
        """tensors: contiguous, and left alone until they are there. tag: of the first; the others count on."""
        rank, world = group.rank(), group.size()
        self._sent, self._received = tensors, [torch.empty_like(x) for x in tensors]
        ops = []
        for i, (sent, received) in enumerate(zip(tensors, self._received, strict=True), tag):
            ops.append(dist.P2POp(dist.isend, sent, group=group, tag=i, group_peer=(rank + 1) % world))
            ops.append(dist.P2POp(dist.irecv, received, group=group, tag=i, group_peer=(rank - 1) % world))
        self._work = dist.batch_isend_irecv(ops)

    def wait(self) -> list[Tensor]:
        """What came."""
        for work in self._work:
            work.wait()
        return self._received
