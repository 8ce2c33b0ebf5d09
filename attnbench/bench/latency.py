"""Timing: one block of calls, and how many calls a block needs."""

from __future__ import annotations

import time
from collections.abc import Callable
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


def time_block(call: Callable[..., Any], tensors: list[Tensor], calls: int, head: int = 0) -> tuple[Block, Any]:
    """Times `calls` calls after `head` untimed ones. Also returns what the last timed call did."""
    cuda = tensors[0].is_cuda
    began = clock()
    for _ in range(head):
        call(*tensors)
    if cuda:
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start = clock()
        first.record()
        for _ in range(calls - 1):
            call(*tensors)
        out = call(*tensors)
        last.record()
        torch.cuda.synchronize()
        seconds = first.elapsed_time(last) / 1e3
    else:
        start = clock()
        for _ in range(calls - 1):
            call(*tensors)
        out = call(*tensors)
        seconds = clock() - start
    return Block(start, calls, seconds, clock() - began), out


def warm_up(call: Callable[..., Any], tensors: list[Tensor]) -> tuple[float, float]:
    """Calls until a call gets no faster, for at most a third of a second; long calls are steady at once.

    Returns:
        seconds of a call now, and seconds spent.
    """
    block, _ = time_block(call, tensors, 1)
    best, spent = block.seconds, block.total_seconds
    while spent < _STEADY_SECONDS and best < _STEADY_SECONDS:
        calls, head = block_size(best)
        block, _ = time_block(call, tensors, calls, head)
        spent += block.total_seconds
        now = block.seconds / block.calls
        if now > best * _STEADY_GAIN:
            return min(now, best), spent
        best = now
    return best, spent
