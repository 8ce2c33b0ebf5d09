"""H2O (Zhang 2023, arXiv 2306.14048): the tokens that were attended to most, and the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.cache import Kept, KVCache, State, Step
from attnbench.errors import AttnbenchError
from attnbench.plugin import Option
from attnbench.workload import Workload

from .sides import FULL


class H2O(KVCache):
    """`size` tokens of each head in bfloat16: the last `recent`, and of the others those with the largest sum of
    attention weights from all queries so far (algorithm 1). Heads that share keys add up their weights.

    Tokens go at the end of a chunk: its queries see the kept ones and the whole chunk up to themselves.
    """

    family: ClassVar[str] = "sparse"
    weighs: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "size": Option(256, "tokens kept"),
        "recent": Option(128, "of them the last"),
    }
    size: int
    recent: int

    def __init__(self, **values: int) -> None:
        super().__init__(**values)
        if not 0 <= self.recent <= self.size or self.size < 1:
            raise AttnbenchError(f"h2o: recent={self.recent} must be from 0 to size={self.size}, which is at least 1")

    def start(self, key: Tensor, value: Tensor) -> State:
        return key.to(FULL), value.to(FULL), key.new_zeros(key.shape[:3], dtype=torch.int32), _none(key), 0

    def append(self, state: State, key: Tensor, value: Tensor) -> State:
        old_key, old_value, positions, weights, seen = state
        after = seen + key.shape[2]
        new = torch.arange(seen, after, dtype=torch.int32, device=key.device).expand(*key.shape[:3])
        return (
            torch.cat((old_key, key.to(FULL)), 2),
            torch.cat((old_value, value.to(FULL)), 2),
            torch.cat((positions, new), 2),  # (batch, kv_heads, kept)
            torch.cat((weights, _none(key)), 2),
            after,
        )

    def read(self, state: State) -> Kept:
        return Kept(state[0], state[1], state[2].long())

    def settle(self, state: State, weights: Tensor | None) -> State:
        assert weights is not None
        key, value, positions, total, seen = state
        total = total + weights
        if key.shape[2] > self.size:
            older = total[:, :, : key.shape[2] - self.recent]  # (batch, kv_heads, kept - recent)
            best = older.topk(self.size - self.recent, -1).indices.sort(-1).values
            last = torch.arange(key.shape[2] - self.recent, key.shape[2], device=key.device).expand(*best.shape[:2], -1)
            kept = torch.cat((best, last), -1)  # (batch, kv_heads, size), ascending
            key, value = (x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
            positions, total = positions.gather(2, kept), total.gather(2, kept)
        return key, value, positions, total, seen

    def step(self, workload: Workload) -> Step | str:
        return "no kernel adds up the weights that tokens are ranked by"


def _none(key: Tensor) -> Tensor:
    return key.new_zeros(key.shape[:3], dtype=torch.float32)
