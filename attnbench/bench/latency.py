"""Timing: one block of calls, and how many calls a block needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbench.bench.blocks import block_size

# Taken before any plugin is imported: one that replaces time.perf_counter changes nothing here.
clock = time.perf_counter

_STEADY_SECONDS, _STEADY_GAIN = 0.3, 0.97


@dataclass(frozen=True)
class Block:
    """One timed block: `calls` calls in `seconds`, begun at `start` on this machine's monotonic clock."""

    start: float
    calls: int
    seconds: float
    total_seconds: float
    """All that the variant itself ran for, the untimed head call included."""
    wall_s: float | None = None
    """On a GPU, seconds of a call by the host's clock, the start of its kernels included."""


class Timer:
    """Times blocks of one call with the host's clock, for work that is done when the call returns."""

    how = "clock"
    """What it reads: a record's `timing`."""

    def __init__(self, call: Callable[..., Any], tensors: list[Tensor]) -> None:
        self.call, self.tensors = call, tensors

    def block(self, calls: int, head: int = 0) -> tuple[Block, Any]:
        """Times `calls` calls after `head` untimed ones. Also returns what the last timed call did."""
        began = clock()
        for _ in range(head):
            self.call(*self.tensors)
        start = clock()
        for _ in range(calls - 1):
            self.call(*self.tensors)
        out = self.call(*self.tensors)
        end = clock()
        return Block(start, calls, end - start, end - began), out

    def warm_up(self, last_s: float = 0.0) -> tuple[float, float]:
        """Calls until a call gets no faster, for at most a third of a second; long calls are steady at once.

        last_s: seconds of the last call, if it was not the first.

        Returns:
            seconds of a call now, and seconds spent.
        """
        if last_s >= _STEADY_SECONDS:
            return last_s, 0.0
        block, _ = self.block(1)
        best, spent = block.seconds, block.total_seconds
        while spent < _STEADY_SECONDS and best < _STEADY_SECONDS:
            block, _ = self.block(*block_size(best))
            spent += block.total_seconds
            now = block.seconds / block.calls
            if now > best * _STEADY_GAIN:
                return min(now, best), spent
            best = now
        return best, spent


def timer(call: Callable[..., Any], tensors: list[Tensor], l2: str = "kept") -> Timer:
    """What times this call on the device of its first tensor. l2: see `cuda_timer.CudaTimer`; of a GPU alone."""
    if not tensors[0].is_cuda:
        return Timer(call, tensors)
    from attnbench.bench.cuda_timer import CudaTimer

    return CudaTimer(call, tensors, l2)


def once(call: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[float, Any]:
    """Seconds of one call by the host's clock, from nothing to do to all done, and what it returned."""
    cuda = tensors[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    out = call(*tensors)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start, out
