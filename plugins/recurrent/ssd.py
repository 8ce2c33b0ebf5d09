"""State-space duality, the recurrence of Mamba-2: a decay and a step size that each token brings.

S_t = exp(-A_h dt_t) S_{t-1} + dt_t k_t v_t^T,  out_t = q_t S_t,  dt_t = softplus(raw_t + bias_h)

Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060): q is its C, k its B, v its x (section 7.2, and
listing 1 for the chunks). C has no scale there. Its convolution, D x and the gated norm belong to the layer around it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from attnbench.plugin import Recurrence
from attnbench.workload import Workload

from .recurrence import Recurrent, outer, rates


class Ssd(Recurrent):
    """A_h and bias_h are those that Mamba-2 begins its training with; h counts the key/value heads."""

    def gates(self, workload: Workload) -> tuple[int, ...]:
        return (1,)  # dt, before its softplus

    def definition(self, workload: Workload) -> Recurrence:
        rate, bias = rates(workload)  # (kv_heads, 1)

        def update(state: Tensor, k: Tensor, v: Tensor, raw: Tensor) -> Tensor:
            dt = softplus(raw + bias.to(raw))  # (batch, kv_heads, 1)
            return torch.exp(-rate.to(raw) * dt).unsqueeze(-1) * state + outer(k, dt * v)

        return Recurrence(query=lambda q: q, key=lambda k: k, update=update)

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        rate, bias = (x.float() for x in rates(workload))  # (kv_heads, 1)

        def terms(key: Tensor, value: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
            dt = softplus(raw.squeeze(-1) + bias)  # (batch, kv_heads, length)
            return key, value * dt.unsqueeze(-1), -rate * dt

        return terms
