"""Gated linear attention: every channel of the key has its own decay, which each token brings.

S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,  out_t = q_t S_t / sqrt(head_dim),  alpha_t = sigmoid(raw_t)^(1/16)

Source: Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635),
sections 4.1, 4.3 for the chunks, and 4.4 for tau = 16. Norm and output gate belong to the layer around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from attnbench.plugin import Recurrence
from attnbench.workload import Workload

from .recurrence import Recurrent, outer, times

TAU = 16


class GatedLinear(Recurrent):
    """Chunks are split in halves, and those again, so that no factor is ever over 1 whatever the gates are."""

    kernel: ClassVar[str] = "gla"

    def gates(self, workload: Workload) -> tuple[int, ...]:
        return (workload.head_dim,)

    def definition(self, workload: Workload) -> Recurrence:
        return Recurrence(
            query=lambda q: q * workload.scale,
            key=lambda k: k,
            update=lambda state, k, v, raw: (logsigmoid(raw) / TAU).exp().unsqueeze(-1) * state + outer(k, v),
        )

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        return lambda key, value, raw: (key, value, logsigmoid(raw) / TAU)

    def advance(self, state: Tensor, query: Tensor | None, *terms: Tensor) -> tuple[Tensor | None, Tensor]:
        key, value, decay = terms
        since = decay.cumsum(2)  # log of what is left of `state`: (batch, kv_heads, length, head_dim)
        last = since[:, :, -1:]  # (batch, kv_heads, 1, head_dim)
        after = last.exp().mT * state + (key * (last - since).exp()).mT @ value  # as the state
        if query is None:
            return None, after
        return times(query, since.exp()) @ state + _within(query, key, value, since), after

    def flops(self, workload: Workload) -> int:
        """Halves have half of the scores that whole chunks have."""
        w = workload
        tokens, rows, length = self._sizes(w)
        return 2 * (tokens + rows) * w.head_dim * w.value_dim + rows * (length + 1) * (w.head_dim + w.value_dim)


def _within(query: Tensor, key: Tensor, value: Tensor, since: Tensor) -> Tensor:
    """Sum over j <= i of (q_i . exp(since_i - since_j) k_j) v_j: (batch, kv_heads, length * group, value_dim).

    Of two neighbouring blocks, the later one's queries read the earlier one's keys through the decays from i back to
    the border and from there to j, both at most 1. Blocks of 1, 2, 4 .. tokens make every pair meet once.
    """
    length = key.shape[2]
    group = query.shape[2] // length
    room = (1 << (length - 1).bit_length()) - length  # to a power of 2, by tokens that say nothing
    if room:
        query, key, value = pad(query, (0, 0, 0, room * group)), pad(key, (0, 0, 0, room)), pad(value, (0, 0, 0, room))
        since = pad(since, (0, 0, 0, room), mode="replicate")
    own = (query.unflatten(2, (-1, group)) * key.unsqueeze(3)).sum(-1, keepdim=True)  # (.., length, group, 1)
    out = (own * value.unsqueeze(3)).flatten(2, 3)  # (batch, kv_heads, length * group, value_dim)
    size = 1
    while size < key.shape[2]:
        q = query.unflatten(2, (-1, 2, size * group))[:, :, :, 1]  # (batch, kv_heads, pairs, size * group, head_dim)
        k, v = (x.unflatten(2, (-1, 2, size))[:, :, :, 0] for x in (key, value))  # (batch, kv_heads, pairs, size, ..)
        earlier, later = since.unflatten(2, (-1, 2, size)).unbind(3)  # (batch, kv_heads, pairs, size, head_dim)
        border = earlier[..., -1:, :]  # (batch, kv_heads, pairs, 1, head_dim)
        scores = times(q, (later - border).exp()) @ (k * (border - earlier).exp()).mT  # (.., size * group, size)
        out = out + pad(scores @ v, (0, 0, size * group, 0)).flatten(2, 3)  # the earlier block gets nothing
        size *= 2
    return out[:, :, : length * group]
