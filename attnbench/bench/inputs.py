"""The inputs of a workload, drawn from its distribution and seed."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.workload import Workload

# FlashAttention-3 (Shah 2024, section 4.3): N(0, 1) + N(0, 100) * Bernoulli(0.001).
_OUTLIER_DEVIATION, _OUTLIER_SHARE = 10.0, 0.001


def shapes(workload: Workload) -> list[tuple[int, ...]]:
    """Shapes of what the timed call gets: query, key, value; for a block x and, for a decoder, memory.

    x is (batch, seq, width), memory (batch, kv_seq, width).
    """
    w = workload
    if w.scope == "block":
        x = (w.batch, w.seq, w.width)
        return [x, (w.batch, w.kv_seq, w.width)] if w.block == "decoder" else [x]
    return [
        (w.batch, w.heads, w.seq, w.head_dim),
        (w.batch, w.kv_heads, w.kv_seq, w.head_dim),
        (w.batch, w.kv_heads, w.kv_seq, w.value_dim),
    ]


def fill(tensors: list[Tensor], workload: Workload, draw: int) -> None:
    """Overwrites the tensors with the `draw`-th set of values of this workload."""
    for i, tensor in enumerate(tensors):
        # CUDA draws on its own device; every plugin still sees the same values for the same draw.
        generator = torch.Generator(tensor.device).manual_seed((workload.seed << 20) + (draw << 4) + i)
        tensor.normal_(generator=generator)
        if workload.inputs == "outlier":
            hit = torch.empty_like(tensor, dtype=torch.float32).uniform_(generator=generator) < _OUTLIER_SHARE
            noise = torch.empty_like(tensor).normal_(std=_OUTLIER_DEVIATION, generator=generator)
            tensor.add_(noise.mul_(hit))


def empty(workload: Workload) -> list[Tensor]:
    """Tensors of the right shapes, dtype and device, not filled yet."""
    dtype = getattr(torch, workload.dtype)
    return [torch.empty(shape, dtype=dtype, device=workload.device) for shape in shapes(workload)]
