"""Multi-head latent attention over the latents themselves: W_UK is multiplied into the query, W_UV into the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.plugin import Attention, Cache, Decoding, built
from attnbench.workload import Workload

from ..pieces import hidden_part, strips
from ..tiled import Tiled
from .latent import Latent, product_dtype

_KERNEL = Tiled(impl="native")
SCORES = 1 << 23  # held at a time, of all heads


@dataclass(frozen=True)
class Absorbed:
    """All heads read the same rows, so that heads and queries are rows of one matrix.

    On a CPU that is `tiled`'s kernel, which reads them where they lie where queries are few: value is the first d_c
    numbers of a row. All else is plain torch, a strip of queries at a time.
    """

    latent: Latent

    def build(self, workload: Workload) -> Attention:
        latent = self.latent
        call, how = self._call(workload)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return call(query, latent.rows(key, value))

        return Attention(attend, f"absorbed; {how}")

    def decoding(self, workload: Workload) -> Decoding:
        """The state is the latents, d_c + rope numbers a token, and nothing of any head."""
        latent = self.latent
        call, how = self._call(workload)

        def start(key: Tensor, value: Tensor, capacity: int) -> Cache:
            rows = latent.rows(key, value)  # (batch, 1, past, d_c + rope)
            return Cache.of(rows, rows[..., :0], capacity)

        def step(state: Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Cache]:
            rows = latent.rows(key, value)  # (batch, 1, new, d_c + rope)
            state = state.append(rows, rows[..., :0])
            return call(query, state.keys), state

        return Decoding(start, step, f"absorbed, latents of {latent.row} numbers as state; {how}")

    def flops(self, workload: Workload) -> int:
        w, latent = workload, self.latent
        return latent.up_flops(w.seq) + 2 * latent.pairs() * (latent.row + latent.dim)

    def workspace_bytes(self, workload: Workload) -> int | None:
        """The latents, queries and outputs as wide as they are, and what attention over them holds."""
        w, latent = workload, self.latent
        if w.trains or w.decodes:
            return None
        as_one, wide = _multi_query(w, latent), product_dtype(w).itemsize
        own, rows = w.batch * w.kv_seq * latent.row, w.batch * w.heads * w.seq
        made = w.itemsize * own + wide * rows * (latent.row + latent.dim)
        if _KERNEL.supports(as_one) is None:
            held = _KERNEL.workspace_bytes(as_one)
            return None if held is None else max(latent.rows_bytes(), made + held)
        scores = 2 * w.batch * w.heads * _strip(w) * w.kv_seq
        return max(latent.rows_bytes(), made + wide * (own + scores))

    def _call(self, workload: Workload) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
        """(query, rows) -> out, and what computes it."""
        w, latent = workload, self.latent
        wide = product_dtype(w)
        up_key, up_value = latent.weights(wide)  # (heads, content, d_c), (heads, value_dim, d_c)
        over, how = _over_latents(w, latent)

        def call(query: Tensor, rows: Tensor) -> Tensor:
            content, position = query.to(wide).split((latent.content, latent.rope), -1)
            # Of all batch entries at a time: a product of matrices would copy W_UK for each.
            content = torch.einsum("bhsn,hnd->bhsd", content, up_key)  # (batch, heads, seq, d_c)
            absorbed = torch.cat([content, position], -1)  # (batch, heads, seq, d_c + rope)
            mixed = over(absorbed, rows)  # (batch, heads, seq, d_c)
            out = torch.einsum("bhsd,hnd->bhsn", mixed.to(wide), up_value)  # (batch, heads, seq, value_dim)
            return out.to(query.dtype)

        return call, how


def _over_latents(workload: Workload, latent: Latent) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """softmax(q . row) c for queries (batch, heads, seq, d_c + rope) and rows: (batch, heads, seq, d_c)."""
    w = workload
    as_one = _multi_query(w, latent)
    if _KERNEL.supports(as_one) is None:
        kernel = built(_KERNEL, as_one)
        return lambda query, rows: kernel.call(
            query.to(rows.dtype), rows, rows[..., : latent.dim]
        ), kernel.implementation
    return lambda query, rows: _strips(
        w, query, rows.to(query.dtype), latent.dim
    ), f"plain torch, strips of {_strip(w)} queries"


def _strips(w: Workload, query: Tensor, rows: Tensor, dim: int) -> Tensor:
    outs = []
    for strip, seen in strips(w, _strip(w)):
        n = strip.stop - strip.start
        q = query[:, :, strip].flatten(1, 2)  # (batch, heads * n, d_c + rope)
        keys = rows[:, 0, seen]  # (batch, keys seen, d_c + rope)
        scores = (q @ keys.mT * w.scale).unflatten(1, (w.heads, n))  # (batch, heads, n, keys seen)
        if w.is_causal:
            scores = scores.masked_fill(hidden_part(w, strip, seen), -torch.inf)
        weights = torch.softmax(scores, -1).flatten(1, 2)  # (batch, heads * n, keys seen)
        outs.append((weights @ keys[..., :dim]).unflatten(1, (w.heads, n)))  # (batch, heads, n, d_c)
    return torch.cat(outs, 2)  # (batch, heads, seq, d_c)


def _strip(workload: Workload) -> int:
    """Queries at a time."""
    w = workload
    return max(1, min(w.seq, SCORES // (w.batch * w.heads * w.kv_seq)))


def _multi_query(workload: Workload, latent: Latent) -> Workload:
    """Attention over the latents as a workload: all heads on one."""
    w = workload
    return w.replace(kv_heads=1, head_dim=latent.row, value_dim=latent.dim, softmax_scale=w.scale)
