"""The inputs of a workload, drawn from its distribution and seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnbench.workload import Workload

# FlashAttention-3 (Shah 2024, section 4.3): N(0, 1) + N(0, 100) * Bernoulli(0.001).
_OUTLIER_DEVIATION, _OUTLIER_SHARE = 10.0, 0.001


def shapes(workload: Workload, gates: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Shapes of what the timed call gets: query, key, value and gates; for a block x and, for a decoder, memory.

    x is (batch, seq, width), memory (batch, kv_seq, width). Decoding, keys, values and gates are those of new tokens,
    and a decoder has its memory already. Training, the gradient of the output is the last one.
    """
    w = workload
    if w.scope == "block":
        out: tuple[int, ...] = (w.batch, w.seq, w.width)
        found = [out, (w.batch, w.kv_seq, w.width)] if w.block == "decoder" and not w.decodes else [out]
    else:
        out = (w.batch, w.heads, w.seq, w.value_dim)
        found = [(w.batch, w.heads, w.seq, w.head_dim), *_token_shapes(w, w.kv_seq - w.past, gates)]
    return [*found, out] if w.trains else found


def past(workload: Workload, gates: Sequence[int], layer: int) -> list[Tensor]:
    """Key, value and gates of the tokens that a decoding step of scope attention finds there, in one layer."""
    tensors = [_empty(workload, shape) for shape in _token_shapes(workload, workload.past, gates)]
    fill(tensors, workload, -1 - layer)
    return tensors


def _token_shapes(w: Workload, length: int, gates: Sequence[int]) -> list[tuple[int, ...]]:
    return [(w.batch, w.kv_heads, length, n) for n in (w.head_dim, w.value_dim, *gates)]


def fill(tensors: list[Tensor], workload: Workload, draw: int) -> None:
    """Overwrites the tensors with the `draw`-th set of values of this workload."""
    for i, tensor in enumerate(tensors):
        # CUDA draws on its own device; every plugin still sees the same values for the same draw.
        generator = torch.Generator(tensor.device).manual_seed(((workload.seed << 20) + (draw << 4) + i) % (1 << 63))
        tensor.normal_(generator=generator)
        if workload.inputs == "outlier":
            hit = torch.empty_like(tensor, dtype=torch.float32).uniform_(generator=generator) < _OUTLIER_SHARE
            noise = torch.empty_like(tensor).normal_(std=_OUTLIER_DEVIATION, generator=generator)
            tensor.add_(noise.mul_(hit))


def empty(workload: Workload, gates: Sequence[int] = (), strided: bool = False) -> list[Tensor]:
    """Tensors of the right shapes, dtype and device, not filled yet.

    strided: those of heads as a block hands them on, views of (batch, length, heads, dim).
    """
    if not strided or workload.scope == "block":
        return [_empty(workload, shape) for shape in shapes(workload, gates)]
    swapped = ((b, length, heads, dim) for b, heads, length, dim in shapes(workload, gates))
    return [_empty(workload, shape).transpose(1, 2) for shape in swapped]


def _empty(workload: Workload, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, workload.dtype), device=workload.device)
