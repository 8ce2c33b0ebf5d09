"""Kimi Delta Attention: the gated delta rule with a decay of its own for each channel of the key.

S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,  out_t = q_t S_t / sqrt(head_dim)
alpha_t = exp(-A_h softplus(a_t + bias)),  beta_t = sigmoid(b_t),  q and k of length 1

Source: Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692), section 3:
the rule, and the chunks (WY representation, UT transform). Convolutions, norm and output gate belong to the layer
around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, softplus

from attnbench.plugin import Recurrence
from attnbench.workload import Workload

from .recurrence import Recurrent, evenly, outer, rates, step_bias, times


class KimiDelta(Recurrent):
    """A_h are those that Mamba-2 begins its training with, where h counts the key/value heads; so are the biases, which
    stand evenly over the channels of each head."""

    kernel: ClassVar[str] = "kda"
    study: ClassVar[bool] = True

    def gates(self, workload: Workload) -> tuple[int, ...]:
        return workload.head_dim, 1  # a and b

    def definition(self, workload: Workload) -> Recurrence:
        rate, bias = _decays(workload)  # (kv_heads, 1), (head_dim,)

        def update(state: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            alpha = torch.exp(-rate.to(a) * softplus(a + bias.to(a)))  # (batch, kv_heads, head_dim)
            kept = alpha.unsqueeze(-1) * state  # as the state
            read = (k.unsqueeze(-2) @ kept).squeeze(-2)  # (batch, kv_heads, value_dim)
            return kept + outer(k, b.sigmoid() * (v - read))  # (batch, kv_heads, head_dim, value_dim)

        return Recurrence(query=lambda q: normalize(q, dim=-1) * workload.scale, key=_unit, update=update)

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        rate, bias = (x.float() for x in _decays(workload))  # (kv_heads, 1), (head_dim,)

        def terms(key: Tensor, value: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            decay = -rate.unsqueeze(-1) * softplus(a + bias)  # (batch, kv_heads, length, head_dim)
            return _unit(key), value, decay, b.squeeze(-1).sigmoid()

        return terms

    def advance(self, state: Tensor, query: Tensor | None, *terms: Tensor) -> tuple[Tensor | None, Tensor]:
        """With u_t = beta_t (v_t - S_{t-1}^T Diag(alpha_t) k_t) it is S_t = Diag(alpha_t) S_{t-1} + k_t u_t^T.

        Unrolled to the chunk's first state S with d_ij the decays from j to i, all u of the chunk solve
        u_i + beta_i sum_{j<i} (k_i . d_ij k_j) u_j = beta_i (v_i - S^T d_i k_i).
        """
        key, value, decay, beta = terms
        length, own = key.shape[2], key.unsqueeze(3)  # (.., length, 1, head_dim)
        reads = own if query is None else torch.cat((own, query.unflatten(2, (length, -1))), 3)  # its key, its queries
        found, since, until = _scores(reads.flatten(2, 3), key, decay)
        found = found.unflatten(2, (length, -1))  # (batch, kv_heads, length, 1 + group, length)
        beta = beta.unsqueeze(-1)  # (batch, kv_heads, length, 1)
        left = since.exp()  # of the state before the chunk: (batch, kv_heads, length, head_dim)
        known = beta * (value - (key * left) @ state)  # (batch, kv_heads, length, value_dim)
        system = beta * found[:, :, :, 0]  # (batch, kv_heads, length, length); its diagonal is not read
        u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)  # as `known`
        after = left[:, :, -1:].mT * state + (key * until.exp()).mT @ u  # as the state
        if query is None:
            return None, after
        return times(query, left) @ state + found[:, :, :, 1:].flatten(2, 3) @ u, after

    def flops(self, workload: Workload) -> int:
        """The state made and read by keys and queries, the halves' scores of both, the triangular system, and its u."""
        w = workload
        tokens, rows, length = self._sizes(w)
        states = 2 * (2 * tokens + rows) * w.head_dim * w.value_dim
        return states + (tokens + rows) * (length + 1) * w.head_dim + (tokens + 2 * rows) * length * w.value_dim


def _scores(rows: Tensor, key: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What rows read of keys that are not behind them, and what is left from the chunk's beginning, and to its end.

    rows: (batch, kv_heads, length * m, head_dim), the m of a token together. key, decay: (.., length, head_dim), the
    latter the logarithm of what is left of a token before, at most 0.

    Returns:
        sum_d row_d exp(decay_{j+1} + .. + decay_i)_d key_d for a row of token i and the key of a j <= i, else 0:
            (.., length * m, length).
        decay_1 + .. + decay_i, and decay_{i+1} + .. + decay_length: (.., length, head_dim) each.

    Of two neighbouring blocks, the later one's rows meet the earlier one's keys through the decays from i back to the
    border and from there to j, so that no factor is over 1 whatever the decays are. Blocks of 1, 2, 4 .. tokens make
    every pair meet once. Sums are made of a block's own decays alone: as differences of two sums from the first token
    they would lose their digits behind a strong decay.
    """
    length = key.shape[2]
    m = rows.shape[2] // length
    room = (1 << (length - 1).bit_length()) - length  # to a power of 2, by tokens that say nothing
    if room:
        rows, key, decay = (pad(x, (0, 0, 0, room * n)) for x, n in ((rows, m), (key, 1), (decay, 1)))
    rows, key = rows.unflatten(2, (-1, m)), key.unsqueeze(3)  # (.., blocks, size * m or size, head_dim)
    since = decay.unsqueeze(3)  # (.., blocks, size, head_dim)
    until = torch.zeros_like(since)  # as `since`
    found = (rows * key).sum(-1, keepdim=True)  # (.., blocks, size * m, size)
    while found.shape[2] > 1:
        later, earlier = (
            _halves(rows)[1],
            _halves(key)[0],
        )  # (.., pairs, size * m, head_dim), (.., pairs, size, head_dim)
        (since_a, since_b), (until_a, until_b) = _halves(since), _halves(until)  # (.., pairs, size, head_dim)
        across = times(later, since_b.exp()) @ (earlier * until_a.exp()).mT  # (.., pairs, size * m, size)
        above, below = _halves(found)  # as `across`
        found = torch.cat((pad(above, (0, across.shape[-1])), torch.cat((across, below), -1)), -2)
        since = torch.cat((since_a, since_a[..., -1:, :] + since_b), -2)
        until = torch.cat((until_a + since_b[..., -1:, :], until_b), -2)
        rows, key = (x.unflatten(2, (-1, 2)).flatten(3, 4) for x in (rows, key))
    found = found.squeeze(2)[:, :, : length * m, :length]
    return found, since.squeeze(2)[:, :, :length], until.squeeze(2)[:, :, :length]


def _halves(blocks: Tensor) -> tuple[Tensor, ...]:
    """(.., blocks, size, n) -> the first and the second of each two blocks: (.., pairs, size, n)."""
    return blocks.unflatten(2, (-1, 2)).unbind(3)


def _decays(workload: Workload) -> tuple[Tensor, Tensor]:
    """A (kv_heads, 1) and the biases of a head's channels (head_dim,), float64."""
    return rates(workload)[0], step_bias(evenly(workload.head_dim, workload))


def _unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1)
