"""Multi-head latent attention over the latents themselves: W_UK is multiplied into the query, W_UV into the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.plugin import Attention, Cache, Decoding
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler
from ..pieces import hidden_part, strips
from .latent import Latent, product_dtype

SCORES = 1 << 23  # held at a time, of all heads


@dataclass(frozen=True)
class Absorbed:
    """All heads read the same rows, so that heads and queries are rows of one matrix.

    On a CPU a step of few queries takes the kernel in C++ that reads keys and values once, which here are the same
    memory: value is the first d_c numbers of a row. All else is plain torch, a strip of queries at a time.
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
        """The latents, queries and outputs as wide as they are, and a strip's scores with their softmax."""
        w, latent = workload, self.latent
        if w.trains or w.decodes or _takes_kernel(w, latent):
            return None
        rows = w.batch * w.heads * w.seq
        scores = w.batch * w.heads * _strip(w) * w.kv_seq
        own = w.batch * w.kv_seq * latent.row
        return w.itemsize * own + product_dtype(w).itemsize * (own + rows * (latent.row + latent.dim) + 2 * scores)

    def _call(self, workload: Workload) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
        """(query, rows) -> out, and what computes it."""
        w, latent = workload, self.latent
        wide = product_dtype(w)
        up_key, up_value = latent.weights(wide)  # (heads, content, d_c), (heads, value_dim, d_c)
        over, how = _over_latents(w, latent)

        def call(query: Tensor, rows: Tensor) -> Tensor:
            content, position = query.to(wide).split((latent.content, latent.rope), -1)
            absorbed = torch.cat([content @ up_key, position], -1)  # (batch, heads, seq, d_c + rope)
            mixed = over(absorbed, rows)  # (batch, heads, seq, d_c)
            return (mixed.to(wide) @ up_value.mT).to(query.dtype)  # (batch, heads, seq, value_dim)

        return call, how


def _over_latents(workload: Workload, latent: Latent) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """softmax(q . row) c for queries (batch, heads, seq, d_c + rope) and rows: (batch, heads, seq, d_c)."""
    w = workload
    if _takes_kernel(w, latent):
        as_one = _multi_query(w, latent)
        decode = compiler.load("decode.cpp", w.dtype).decode
        kernel = kernels.caller(decode, as_one, kernels.dense(as_one, w.seq), kernels.KEYS)
        return lambda query, rows: kernel(query.to(rows.dtype), rows, rows[..., : latent.dim]), (
            f"{kernels.described(w.dtype)}, latents read once"
        )
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


def _takes_kernel(workload: Workload, latent: Latent) -> bool:
    w = workload
    few = not w.trains and not w.masked.window and w.seq * w.heads <= kernels.WIDE_ROWS
    return few and kernels.unsupported(_multi_query(w, latent), "decode.cpp") is None
