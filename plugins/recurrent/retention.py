"""Retention: linear attention whose state decays by a constant of each head.

S_t = gamma_h S_{t-1} + k_t v_t^T,  out_t = q_t S_t / sqrt(head_dim),  gamma_h = 1 - 2^(-5 - h)

Source: Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models" (arXiv 2307.08621),
equations 5 to 8. Its rotation of queries and keys (xPos) and the group norm behind it belong to the layer around it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbench.plugin import Recurrence
from attnbench.workload import Workload

from .recurrence import Recurrent, outer


class Retention(Recurrent):
    """h counts the key/value heads."""

    def definition(self, workload: Workload) -> Recurrence:
        gamma = _log_gamma(workload).exp().unsqueeze(-1)  # (kv_heads, 1, 1)
        return Recurrence(
            query=lambda q: q * workload.scale,
            key=lambda k: k,
            update=lambda state, k, v: gamma.to(state) * state + outer(k, v),
        )

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        decay = _log_gamma(workload).float()  # (kv_heads, 1)
        return lambda key, value: (key, value, decay.expand(key.shape[:3]))


def _log_gamma(workload: Workload) -> Tensor:
    """(kv_heads, 1), float64."""
    head = torch.arange(workload.kv_heads, dtype=torch.float64, device=workload.device).unsqueeze(-1)
    return torch.log1p(-(2 ** (-5 - head)))
