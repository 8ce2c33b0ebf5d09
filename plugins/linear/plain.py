"""Linear attention in plain torch: the sums, and a scan over chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.workload import Workload

from ..pieces import parts
from .features import Phi, elu, elu_kept

STEP = 1024  # tokens at a time where nothing but memory asks for chunks


State: TypeAlias = tuple[Tensor, Tensor]
"""What a decoder keeps: `Sums.total` and `Sums.scale`."""


class Sums:
    """The running sum over keys of phi(k) (v, 1): (batch, kv_heads, n, value_dim + 1), times 2^-scale.

    The 1 beside the values makes the normaliser the last column of every product.
    """

    def __init__(self, total: Tensor, scale: Tensor, kept: bool = False) -> None:
        self.total, self.scale = total, scale
        self.kept = kept  # as a backward pass needs the sums that queries read; else changed in place

    @classmethod
    def empty(cls, like: Tensor, workload: Workload, n: int) -> Sums:
        w = workload
        total = like.new_zeros(w.batch, w.kv_heads, n, w.value_dim + 1, dtype=torch.float32)
        scale = like.new_full((w.batch, w.kv_heads, 1, 1), -torch.inf, dtype=torch.float32)  # no key yet
        return cls(total, scale, kept=w.phase == "train")

    def add(self, phi: Tensor, log2: Tensor | None, values: Tensor) -> None:
        """Take in keys: phi (batch, kv_heads, length, n), their factors, and (v, 1) (..., length, value_dim + 1)."""
        if log2 is not None:
            scale = torch.maximum(self.scale, log2.amax(-2, keepdim=True))  # (batch, kv_heads, 1, 1)
            self._change(torch.mul, torch.exp2(self.scale - scale))
            phi, self.scale = phi * torch.exp2(log2 - scale), scale  # (batch, kv_heads, length, n)
        self._change(torch.add, phi.mT @ values)  # (batch, kv_heads, n, value_dim + 1)

    def _change(self, operation: Callable[..., Tensor], by: Tensor) -> None:
        self.total = operation(self.total, by) if self.kept else operation(self.total, by, out=self.total)


class Scan:
    """Linear attention chunk by chunk, query (batch, heads, seq, head_dim) and so on as in the contract.

    The query heads that share a key/value head are rows of one matrix: keys and values are never expanded.
    """

    def __init__(self, workload: Workload, phi: Phi, n: int, chunk: int) -> None:
        w = self.workload = workload
        self.phi, self.n = phi, n
        self.scaled = phi not in (elu, elu_kept)
        self.step = min(chunk if w.is_causal else STEP, w.seq)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w = self.workload
        grouped = query.view(w.batch, w.kv_heads, w.group, w.seq, w.head_dim)
        outs = []  # training: torch differentiates nothing that is written with out=
        out = query.new_empty(w.batch, w.kv_heads, w.group, w.seq, w.value_dim)
        sums = self.sums(key, value, w.offset if w.is_causal else w.kv_seq)  # over the keys that every query sees
        for rows in parts(w.seq, self.step):
            q = grouped[:, :, :, rows].flatten(2, 3)  # (batch, kv_heads, group * rows, head_dim)
            if w.is_causal:
                part = slice(rows.start + w.offset, rows.stop + w.offset)  # keys on the diagonal
                o = self.diagonal(sums, q, key[:, :, part], value[:, :, part])
            else:
                o = self.phi(q.float())[0] @ sums.total  # (batch, kv_heads, group * rows, value_dim + 1)
            o = o.view(w.batch, w.kv_heads, w.group, -1, w.value_dim + 1)
            if w.phase == "train":
                outs.append((o[..., :-1] / o[..., -1:]).to(query.dtype))  # (.., group, rows, value_dim)
            else:
                torch.div(o[..., :-1], o[..., -1:], out=out[:, :, :, rows])
            del o
        return (torch.cat(outs, 3) if outs else out).flatten(1, 2)  # (batch, heads, seq, value_dim)

    def start(self, key: Tensor, value: Tensor, capacity: int) -> State:
        """The state behind the tokens that a decoder has seen."""
        sums = self.sums(key, value, key.shape[2])
        return sums.total, sums.scale

    def sums(self, key: Tensor, value: Tensor, length: int) -> Sums:
        """Over the first keys, so many."""
        sums = Sums.empty(key, self.workload, self.n)
        for part in parts(length, STEP):
            sums.add(*self.keys(key[:, :, part], value[:, :, part]))
        return sums

    def after(self, state: State, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, State]:
        """New tokens behind those that the sums hold, which they join: (batch, heads, seq, value_dim)."""
        w, sums = self.workload, Sums(state[0].clone(), state[1])
        q = query.reshape(w.batch, w.kv_heads, w.group * w.seq, w.head_dim)
        o = self.diagonal(sums, q, key, value) if key.shape[2] else self.phi(q.float())[0] @ sums.total
        out = o[..., :-1] / o[..., -1:]  # (batch, kv_heads, group * seq, value_dim)
        return out.to(query.dtype).view(w.batch, w.heads, w.seq, w.value_dim), (sums.total, sums.scale)

    def keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """phi(k) (batch, kv_heads, length, n), its factors, and (v, 1) (batch, kv_heads, length, value_dim + 1)."""
        return *self.phi(key.float()), pad(value.float(), (0, 1), value=1.0)

    def diagonal(self, sums: Sums, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries over all earlier keys and, causally, over the keys of their own chunk, which join the sums.

        With factors 2^log2 taken out of the keys, row i is computed times 2^-top_i, where top_i is the largest factor
        of the keys that it sees: whatever the keys are, its largest term stays in range.
        """
        phi, _ = self.phi(query.float())  # (batch, kv_heads, group * length, n); a query's own factor cancels
        phi_k, log2, values = self.keys(key, value)  # (.., length, n), (.., length, 1), (.., length, value_dim + 1)
        length = phi_k.shape[2]
        scores = phi @ phi_k.mT  # (batch, kv_heads, group * length, length)
        grouped = scores.view(*scores.shape[:2], -1, length, length)  # (batch, kv_heads, group, length, length)
        out = phi @ sums.total  # (batch, kv_heads, group * length, value_dim + 1)
        if log2 is None:
            grouped.tril_()
        else:
            top = torch.maximum(log2.cummax(-2).values, sums.scale)  # (batch, kv_heads, length, 1)
            grouped.mul_(torch.exp2(log2.mT - top).tril_().unsqueeze(2))
            out.view(*grouped.shape[:4], -1).mul_(torch.exp2(sums.scale - top).unsqueeze(2))
        out += scores @ values  # (batch, kv_heads, group * length, value_dim + 1)
        sums.add(phi_k, log2, values)
        return out

    def floats(self) -> int:
        """Float32 numbers held at the peak of a call: the sums, and the larger one of the two loops' chunks."""
        w = self.workload
        n, wide, heads = self.n, w.value_dim + 1, w.batch * w.kv_heads
        copied = w.itemsize < 4  # key.float(), value.float(), query.float()
        # A key: its features twice (being made, or being scaled), or beside its values.
        key = max(2 * n + copied * w.head_dim, n + wide + copied * w.value_dim, self.scaled * (2 * n + wide))
        first = heads * min(w.offset if w.is_causal else w.kv_seq, STEP) * key
        # A query: its features, two products with sums, and where it meets the diagonal a row of scores.
        query = n + wide + (w.group > 1) * w.head_dim
        second = heads * self.step * w.group * max(query, 2 * n + copied * w.head_dim)
        if w.is_causal:
            second = heads * self.step * (w.group * (query + wide + self.step) + n + wide + self.scaled * self.step)
        return 2 * heads * n * wide + max(first, second)
