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

from attnbench.plugin import Attention, Option, Value
from attnbench.workload import Workload

from .order import ORDER, Blocks, Ordered, Turn


class Ring(Ordered):
    """Keys and values travel round a ring of processes while each computes with the block in hand."""

    options: ClassVar[Mapping[str, Option]] = {"order": ORDER}

    def __init__(self, **values: Value) -> None:
        super().__init__(**values)
        self.formula = "ring" if self.order == "zigzag" else "ring-contiguous"

    def build(self, workload: Workload, group: ProcessGroup) -> Attention:
        return _Passed(self, workload, group).call("ring")


class _Passed(Turn):
    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, meeting = self._workload, self._scheme.meeting
        following: Shift | None = None
        for source, k, v in self.blocks(key, value):
            part, found = meeting(w, self._rank, source, query.shape[2]), None
            if part:
                found = self._scheme.differentiated(w, part, up, query, k, v, out, lse)
            if source == self._rank:  # it comes first, and all of it meets
                assert found is not None
                dq, *own = (x.float() for x in found)  # (batch, heads, queries, head_dim)
                continue
            # Who comes first after their owner begins the sums of a block: (batch, kv_heads, queries, dim) each.
            sums = following.wait() if following else [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
            if part and found:
                dq[:, :, part.queries] += found[0]
                for total, more in zip(sums, found[1:], strict=True):
                    total[:, :, part.keys] += more
            following = Shift(self._group, sums, tag=2)
            del k, v, found
        if following:
            for total, more in zip(own, following.wait(), strict=True):
                total += more
        return dq.to(query.dtype), own[0].to(key.dtype), own[1].to(value.dtype)

    def blocks(self, key: Tensor, value: Tensor) -> Blocks:
        """All ranks' keys and values, this one's first; while one is in use, the next is under way."""
        held = [key.contiguous(), value.contiguous()]
        for step in range(self._world):
            coming = Shift(self._group, held, tag=0) if step + 1 < self._world else None
            yield (self._rank - step) % self._world, held[0], held[1]
            if coming:
                held = coming.wait()


class Shift:
    """Tensors on their way to the next rank, while as many come from the one before."""

    def __init__(self, group: ProcessGroup, tensors: Sequence[Tensor], tag: int) -> None:
        """tensors: contiguous, and left alone until they are there. tag: of the first; the others count on."""
        rank, world = group.rank(), group.size()
        self._sent: Sequence[Tensor] = tensors
        self._received = [torch.empty_like(x) for x in tensors]
        ops = []
        for i, (sent, received) in enumerate(zip(tensors, self._received, strict=True), tag):
            ops.append(dist.P2POp(dist.isend, sent, group=group, tag=i, group_peer=(rank + 1) % world))
            ops.append(dist.P2POp(dist.irecv, received, group=group, tag=i, group_peer=(rank - 1) % world))
        self._work = dist.batch_isend_irecv(ops)

    def wait(self) -> list[Tensor]:
        """What came. Nothing of what was sent is held any longer."""
        for work in self._work:
            work.wait()
        received, self._sent, self._received, self._work = self._received, (), [], []
        return received
