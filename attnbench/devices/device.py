"""What times a call and what is known of the machine, on whatever device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnbench.devices import machine
from attnbench.devices.bursts import Timer, clock


def timer(call: Callable[..., Any], tensors: list[Tensor], l2: str = "kept") -> Timer:
    """What times this call on the device of its first tensor. l2: see `cuda.CudaTimer`; of a GPU alone."""
    if not tensors[0].is_cuda:
        return Timer(call, tensors)
    from attnbench.devices.cuda import CudaTimer

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


def describe() -> dict[str, Any]:
    """What `machine.describe` tells and the GPU, all JSON. It asks CUDA, so it is for a worker."""
    from attnbench.devices.cuda import facts

    return {**machine.describe(), **facts()}
