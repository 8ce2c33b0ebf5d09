"""StreamingLLM (Xiao 2023, arXiv 2309.17453): the first tokens and the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.cache import Kept, KVCache, State, Step
from attnbench.errors import AttnbenchError
from attnbench.plugin import Option
from attnbench.workload import Workload

from .full import exact_step
from .sides import FULL


class Window(KVCache):
    """`size` tokens in bfloat16: the first `sinks`, which softmax puts on what it has no use for, and the last ones.

    Tokens stay at their own positions; the paper moves them up behind the sinks, which matters beyond the length that a
    model was trained for.
    """

    family: ClassVar[str] = "sparse"
    options: ClassVar[Mapping[str, Option]] = {
        "size": Option(256, "tokens kept"),
        "sinks": Option(4, "of them the first"),
    }
    size: int
    sinks: int

    def __init__(self, **values: int) -> None:
        super().__init__(**values)
        if not 0 <= self.sinks < self.size:
            raise AttnbenchError(f"window: sinks={self.sinks} must be from 0 to less than size={self.size}")

    def start(self, key: Tensor, value: Tensor) -> State:
        return key.to(FULL), value.to(FULL), 0

    def append(self, state: State, key: Tensor, value: Tensor) -> State:
        kept = [torch.cat((old, new.to(FULL)), 2) for old, new in zip(state, (key, value), strict=False)]
        return *kept, state[2] + key.shape[2]

    def read(self, state: State) -> Kept:
        key, value, seen = state
        first = min(self.sinks, key.shape[2])
        last = torch.arange(seen - (key.shape[2] - first), seen, device=key.device)
        return Kept(key, value, torch.cat((torch.arange(first, device=key.device), last)))

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys < self.sinks) | (keys > queries - (self.size - self.sinks))

    def settle(self, state: State, weights: Tensor | None) -> State:
        key, value, seen = state
        if key.shape[2] <= self.size:
            return state
        last = self.sinks - self.size
        kept = [torch.cat((x[:, :, : self.sinks], x[:, :, last:]), 2) for x in (key, value)]
        return *kept, seen

    def step(self, workload: Workload) -> Step | str:
        return exact_step(workload.replace(dtype="bfloat16", kv_seq=min(self.size, workload.kv_seq)))
