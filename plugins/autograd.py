"""A forward and a backward pass of one's own as one function that torch can differentiate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.plugin import Call

Forward: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""query, key, value -> out, and what `Backward` needs of the way there, such as each row's log-sum-exp."""

Backward: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""query, key, value, out, what else `Forward` gave, and out's gradient with dense rows -> gradients of the first three.
"""


def differentiable(forward: Forward, backward: Backward) -> Call:
    """Attention that torch can differentiate, once."""
    return partial(_Differentiable.apply, forward, backward)


def dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Each tensor, copied where its last dimension is not dense."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, *inputs: Tensor) -> Tensor:
        out, *kept = forward(*(x.detach() for x in inputs))  # torch records what threads of one's own do, but for this
        ctx.save_for_backward(*inputs, out, *kept)
        ctx.made_by = backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.made_by(*(x.detach() for x in ctx.saved_tensors), *dense_rows(out_gradient))
