"""Gated DeltaNet: before a token writes to the state, what its key already reads there is taken out.

S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  out_t = q_t S_t / sqrt(head_dim)
alpha_t = exp(-A_h softplus(a_t + bias_h)),  beta_t = sigmoid(b_t),  q and k of length 1

Source: Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), equation 10, and
section 3.3 for the chunks (WY representation, UT transform). Convolutions, norm and output gate belong to the layer
around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from attnbench.plugin import Recurrence
from attnbench.workload import Workload

from .recurrence import Recurrent, decayed, left, outer, rates


class GatedDelta(Recurrent):
    """A_h and bias_h are those that Mamba-2 begins its training with; h counts the key/value heads."""

    kernel: ClassVar[str] = "gated_delta_rule"

    def gates(self, workload: Workload) -> tuple[int, ...]:
        return 1, 1  # a and b

    def definition(self, workload: Workload) -> Recurrence:
        rate, bias = rates(workload)  # (kv_heads, 1)

        def update(state: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            kept = torch.exp(-rate.to(a) * softplus(a + bias.to(a))).unsqueeze(-1) * state  # as the state
            read = (k.unsqueeze(-2) @ kept).squeeze(-2)  # (batch, kv_heads, value_dim)
            return kept + outer(k, b.sigmoid() * (v - read))  # (batch, kv_heads, head_dim, value_dim)

        return Recurrence(query=lambda q: normalize(q, dim=-1) * workload.scale, key=_unit, update=update)

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        rate, bias = (x.float() for x in rates(workload))  # (kv_heads, 1)

        def terms(key: Tensor, value: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            decay = -rate * softplus(a.squeeze(-1) + bias)  # (batch, kv_heads, length)
            return _unit(key), value, decay, b.squeeze(-1).sigmoid()

        return terms

    def advance(self, state: Tensor, query: Tensor | None, *terms: Tensor) -> tuple[Tensor | None, Tensor]:
        """With u_t = beta_t (v_t - alpha_t S_{t-1}^T k_t) it is S_t = alpha_t S_{t-1} + k_t u_t^T, a scalar decay.

        Unrolled to the chunk's first state S with d_ij the decay from j to i, all u of the chunk solve
        u_i + beta_i sum_{j<i} d_ij (k_i . k_j) u_j = beta_i (v_i - d_i S^T k_i).
        """
        key, value, decay, beta = terms
        since, between = left(decay)  # (batch, kv_heads, length, 1), (batch, kv_heads, length, length)
        beta = beta.unsqueeze(-1)  # (batch, kv_heads, length, 1)
        system = beta * (key @ key.mT) * between  # (batch, kv_heads, length, length); its diagonal is not read
        known = beta * (value - since * (key @ state))  # (batch, kv_heads, length, value_dim)
        u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)  # as `known`
        return decayed(state, query, key, u, since, between)

    def flops(self, workload: Workload) -> int:
        """With the products of keys, what they read of the state, and the triangular system."""
        w = workload
        tokens, _, length = self._sizes(w)
        more = 2 * length * w.head_dim + 2 * w.head_dim * w.value_dim + length * w.value_dim
        return super().flops(w) + tokens * more


def _unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1)
