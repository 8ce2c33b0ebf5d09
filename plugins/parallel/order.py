"""Which tokens a rank holds, and what its queries see of another rank's keys.

contiguous: rank r holds the r-th of N runs. Causal, the last rank then sees all keys, the first one its own alone, and
all wait for the last. zigzag: rank r holds the r-th and the r-th last of 2N runs, so that all see as many pairs:
striped attention (Brandon 2023, arXiv 2311.09431) balances token by token, and runs instead of tokens are what Llama 3
(Grattafiori 2024, arXiv 2407.21783, section 3.3.2) and ring-flash-attention take. Without a mask all see all keys
anyway, and order is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.distributed import ProcessGroup

from attnbench.parallel import Scheme, uneven
from attnbench.plugin import Attention, Option
from attnbench.workload import Workload

from ..autograd import differentiable
from . import kernel

ORDER = Option("zigzag", "which tokens a process holds; contiguous leaves causal work uneven", ("zigzag", "contiguous"))


Blocks: TypeAlias = Iterable[tuple[int, Tensor, Tensor]]
"""A rank's number, and its part of keys and values: (batch, kv_heads, keys, dim) each."""


class Part(NamedTuple):
    """Of a rank's own queries and of some rank's keys those that meet; causal: aligned top-left."""

    queries: slice
    keys: slice
    causal: bool


class Ordered(Scheme):
    """A scheme whose ranks hold queries and see blocks of keys, one rank's after the other."""

    order: str

    def unsupported(self, workload: Workload, world: int) -> str | None:
        if workload.value_dim != workload.head_dim:
            return "torch's flash operator wants values as wide as keys"
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

    def attended(self, workload: Workload, rank: int, query: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """What a rank's queries make of all keys: its part of the output, and log-sum-exp (batch, heads, queries).

        query: its part, (batch, heads, queries, head_dim). blocks: its own first.
        """
        merged = None
        for source, key, value in blocks:
            if part := self.meeting(workload, rank, source, query.shape[2]):
                k, v = key[:, :, part.keys], value[:, :, part.keys]
                out, lse = kernel.forward(query[:, :, part.queries], k, v, part.causal, workload.scale)
                if merged is None:
                    merged = kernel.Merged(out, lse)
                else:
                    merged.add(part.queries, out, lse)
                del out, lse, k, v
            del key, value  # while the next one comes, nobody holds this one
        assert merged is not None
        return merged.out.to(query.dtype), merged.lse

    def differentiated(
        self, workload: Workload, part: Part, up: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """What of a rank's queries and some rank's keys meets adds to the gradients of `part`'s queries and keys.

        up: of the rank's part of the output, which `out` is; lse: as `attended` gave it.
        """
        gradient, q = up[:, :, part.queries], query[:, :, part.queries]
        k, v = key[:, :, part.keys], value[:, :, part.keys]
        at = out[:, :, part.queries], lse[:, :, part.queries]
        return kernel.backward(gradient, q, k, v, *at, part.causal, workload.scale)

    def _zigzags(self, workload: Workload) -> bool:
        return self.order == "zigzag" and workload.is_causal


class Turn:
    """What one rank of an `Ordered` scheme does in a call."""

    def __init__(self, scheme: Ordered, workload: Workload, group: ProcessGroup) -> None:
        self._scheme, self._workload, self._group = scheme, workload, group
        self._rank, self._world = group.rank(), group.size()

    def call(self, name: str) -> Attention:
        """What the scheme of this name builds."""
        order = f"{self._scheme.order} order, " if self._workload.is_causal else ""
        how = f"{name}: {order}torch flash, blocks merged by log-sum-exp"
        return Attention(differentiable(self.forward, self.backward), how)

    def blocks(self, key: Tensor, value: Tensor) -> Blocks:
        """All ranks' keys and values, this one's first; its own parts are (batch, kv_heads, queries, dim) each."""
        raise NotImplementedError

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp (batch, heads, queries), of parts: query (batch, heads, queries, head_dim)."""
        return self._scheme.attended(self._workload, self._rank, query, self.blocks(key, value))

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the parts of query, key and value; up: of the output's part."""
        raise NotImplementedError
