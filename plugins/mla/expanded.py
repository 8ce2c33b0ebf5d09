"""Multi-head latent attention as it is trained: K and V are made of the latents, and attention is what it always is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnbench.plugin import Attention, Cache, Decoding, built
from attnbench.workload import Workload

from ..tiled import exact_here
from .latent import Latent, product_dtype


@dataclass(frozen=True)
class Expanded:
    """With exact attention of as many key heads as query heads: `tiled` on a CPU, `sdpa` elsewhere."""

    latent: Latent

    def unsupported(self, workload: Workload) -> str | None:
        return exact_here(workload).supports(_expanded(workload))

    def build(self, workload: Workload) -> Attention:
        w, latent = workload, self.latent
        up = latent.weights(product_dtype(w))
        exact = built(exact_here(w), _expanded(w))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = latent.rows(key, value)  # (batch, 1, kv_seq, d_c + rope)
            return exact.call(query, *latent.expand(rows, *up))  # (batch, heads, seq, value_dim)

        return Attention(attend, f"expanded; {exact.implementation}")

    def decoding(self, workload: Workload) -> Decoding:
        """The state is keys and values of all heads; a step expands those of new tokens."""
        w, latent = workload, self.latent
        up = latent.weights(product_dtype(w))
        exact = built(exact_here(w), _expanded(w))

        def start(key: Tensor, value: Tensor, capacity: int) -> Cache:
            return Cache.of(*latent.expand(latent.rows(key, value), *up), capacity)

        def step(state: Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Cache]:
            state = state.append(*latent.expand(latent.rows(key, value), *up))
            return exact.call(query, state.keys, state.values), state

        return Decoding(start, step, f"expanded, all heads' keys and values as state; {exact.implementation}")

    def flops(self, workload: Workload) -> int:
        w = workload
        own = 2 * self.latent.pairs() * (w.head_dim + w.value_dim)
        return self.latent.up_flops(w.kv_seq - w.past) + own

    def workspace_bytes(self, workload: Workload) -> int | None:
        """The latents, K and V, what they are joined of or rounded from; then what exact attention holds."""
        w = workload
        exact = exact_here(w).workspace_bytes(_expanded(w))
        if w.trains or w.decodes or exact is None:
            return None
        rows, tokens = w.batch * w.kv_seq * self.latent.row, w.batch * w.heads * w.kv_seq
        made = rows + tokens * (w.head_dim + w.value_dim)
        wide = product_dtype(w).itemsize * (rows + tokens * self.latent.content)
        return max(self.latent.rows_bytes(), w.itemsize * made + max(exact, wide))


def _expanded(workload: Workload) -> Workload:
    """Attention over K and V of all heads, as a workload."""
    return workload.replace(kv_heads=workload.heads)
