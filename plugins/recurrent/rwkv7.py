"""RWKV-7: the delta rule with a decay and a learning rate of each channel, and another key to write than to remove by.

S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + (a_t * k_t) v_t^T,  out_t = q_t S_t / sqrt(head_dim)
kappa_t = k_t / |k_t|,  w_t = exp(-exp(-1/2) sigmoid(d_t + bias)),  a_t = sigmoid(raw_t + bias)

Source: Peng et al. 2025, "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (arXiv 2503.14456), section 4.1 up to
equation 17, with S_t for its wkv_t^T and q for its r. What it learns beside its projections (xi, which scales the
channels of kappa, and alpha, the share of a in the written key) is 1 here. Token shift, the values of the first layer,
group norm, bonus and output gate belong to the layer around it; that norm would take any scale of q out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnbench.plugin import Recurrence
from attnbench.workload import Workload

from .recurrence import Recurrent, evenly, outer, times

STRONGEST = -math.exp(-0.5)  # the logarithm of a token's decay at most: 0.545 of the state is left
MOST = 64  # tokens of a chunk


class Rwkv7(Recurrent):
    """The biases are those with which RWKV-7 begins to train its first layer."""

    kernel: ClassVar[str] = "rwkv7"
    study: ClassVar[bool] = True

    def supports(self, workload: Workload) -> str | None:
        return f"chunk must be at most {MOST}" if self.chunk > MOST else super().supports(workload)

    def gates(self, workload: Workload) -> tuple[int, ...]:
        return workload.head_dim, workload.head_dim  # d and a, before their biases

    def definition(self, workload: Workload) -> Recurrence:
        decays, learning = _biases(workload)  # (kv_heads, head_dim)

        def update(state: Tensor, k: Tensor, v: Tensor, d: Tensor, raw: Tensor) -> Tensor:
            w = torch.exp(STRONGEST * (d + decays.to(d)).sigmoid())  # (batch, kv_heads, head_dim)
            a, kappa = (raw + learning.to(raw)).sigmoid(), normalize(k, dim=-1)  # as w
            read = (kappa.unsqueeze(-2) @ state).squeeze(-2)  # (batch, kv_heads, value_dim)
            return w.unsqueeze(-1) * state - outer(a * kappa, read) + outer(a * k, v)  # as the state

        return Recurrence(query=lambda q: q * workload.scale, key=lambda k: k, update=update)

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        decays, learning = (x.float().unsqueeze(1) for x in _biases(workload))  # (kv_heads, 1, head_dim)

        def terms(key: Tensor, value: Tensor, d: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
            a, kappa = (raw + learning).sigmoid(), normalize(key, dim=-1)  # (batch, kv_heads, length, head_dim)
            return a * key, value, STRONGEST * (d + decays).sigmoid(), kappa, a * kappa

        return terms

    def advance(self, state: Tensor, query: Tensor | None, *terms: Tensor) -> tuple[Tensor | None, Tensor]:
        """With z_t = S_{t-1}^T kappa_t it is S_t = Diag(w_t) S_{t-1} + k_t v_t^T - (a_t * kappa_t) z_t^T.

        Unrolled to the chunk's first state S with d_ij the decays from j to i, all z of the chunk solve
        z_i + sum_{j<i} (kappa_i . d_{i-1,j} (a_j * kappa_j)) z_j = S^T d_{i-1} kappa_i
        + sum_{j<i} (kappa_i . d_{i-1,j} k_j) v_j.

        As no token decays by more than 0.545, d_ij is a product of what lies between either token and the chunk's
        middle, which float32 holds on both sides of 1: up to exp(0.61 * 32) of `MOST` tokens.
        """
        key, value, decay, kappa, removed = terms
        since = decay.cumsum(2)  # log of what is left of `state`: (batch, kv_heads, length, head_dim)
        before, middle, last = since - decay, since[:, :, since.shape[2] // 2, None], since[:, :, -1:]
        here = (middle - since).exp()  # (batch, kv_heads, length, head_dim)
        k, b = (key * here).mT, (removed * here).mT  # (batch, kv_heads, head_dim, length)
        reads = kappa * (before - middle).exp()  # (batch, kv_heads, length, head_dim)
        known = (kappa * before.exp()) @ state + (reads @ k).tril(-1) @ value  # (batch, kv_heads, length, value_dim)
        z = torch.linalg.solve_triangular(reads @ b, known, upper=False, unitriangular=True)  # its diagonal is not read
        ends = (last - since).exp()  # what is left of each token at the end: as `here`
        after = last.exp().mT * state + (key * ends).mT @ value - (removed * ends).mT @ z  # as the state
        if query is None:
            return None, after
        rows = times(query, (since - middle).exp())  # (batch, kv_heads, length * group, head_dim)
        length = key.shape[2]
        behind = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)  # True where the key is
        behind = behind.repeat_interleave(rows.shape[2] // length, 0)  # (length * group, length)
        by_key, by_removed = ((rows @ x).masked_fill(behind, 0.0) for x in (k, b))  # (.., length * group, length)
        return times(query, since.exp()) @ state + by_key @ value - by_removed @ z, after

    def flops(self, workload: Workload) -> int:
        """The state made of two parts and read twice, scores of two keys, the triangular system, what v and z make."""
        w = workload
        tokens, rows, length = self._sizes(w)
        states = 2 * (3 * tokens + rows) * w.head_dim * w.value_dim
        return states + 4 * (tokens + rows) * length * w.head_dim + (3 * tokens + 4 * rows) * length * w.value_dim

    def handed(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        decay, kappa, removed = rest
        return (query, decay, key, value, -kappa.to(key.dtype), removed.to(key.dtype)), {}


def _biases(workload: Workload) -> tuple[Tensor, Tensor]:
    """Of d and of a, float64 (kv_heads, head_dim): a head has slow and fast channels, and later heads decay faster."""
    at = evenly(workload.kv_heads * workload.head_dim, workload).view(workload.kv_heads, -1)  # over all channels
    z = 2 * evenly(workload.head_dim, workload) - 1  # over those of a head
    zigzag = z * z.abs()  # (head_dim,)
    return -5.5 + 6 * at + 2.5 * zigzag, -0.19 + 0.4 * (at - 0.5) + 0.3 * zigzag
