"""Nyström attention (Xiong 2021, "Nyströmformer", arXiv 2102.03902, equation 13): softmax attention through landmarks.

softmax(Q K~^T) A^+ softmax(Q~ K^T) V, A = softmax(Q~ K~^T), each of scores times scale

Q~ and K~ are landmarks, means over segments of the queries and of the keys (section 3.2), some tens of each, so that
none of the three matrices is l x l and time is O(l). A^+ stands for the pseudo-inverse of A: six steps of an iteration
towards it (equation 11), from A^T / (|A|_1 |A|_inf). What is defined here is what these steps give, not the
pseudo-inverse. Each token being a landmark of its own, more steps come to softmax attention itself. Without the paper's
convolution over V beside it.

A landmark is a mean over tokens of all places, so there is no causal form and nothing to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Definition, Formula, Option, Plugin
from attnbench.workload import Workload


class Nystroem(Plugin):
    """Attention through landmarks in float32, but for A^+, in float64: its steps blow rounding up."""

    family = "kernel"
    phases = ("forward", "train")
    study: ClassVar[bool] = True
    honours = ("scale",)
    options: ClassVar[Mapping[str, Option]] = {
        "landmarks": Option(64, "of queries and of keys; where there are fewer of either, as many as that"),
        "steps": Option(6, "of the iteration towards the pseudo-inverse"),
    }
    landmarks: int
    steps: int

    def supports(self, workload: Workload) -> str | None:
        if self.landmarks < 1 or self.steps < 0:
            return "landmarks must be at least 1, steps not negative"
        return "a landmark is a mean over all tokens: --mask full" if workload.is_causal else None

    def definition(self, workload: Workload) -> Definition:
        return Formula(partial(attention, scale=workload.scale, landmarks=self._count(workload), steps=self.steps))

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Inputs in float32, both long matrices with their scores, and the output in float32."""
        w, m = workload, self._count(workload)
        if w.trains:
            return None
        rows, heads = w.batch * w.heads * w.seq, w.batch * w.heads
        inputs = (rows * w.head_dim + w.batch * w.kv_heads * w.kv_seq * (w.head_dim + w.value_dim)) * (w.itemsize < 4)
        small = heads * m * (10 * m + 2 * (w.head_dim + w.value_dim))
        return 4 * (inputs + 2 * m * max(rows, heads * w.kv_seq) + rows * w.value_dim + 2 * small)

    def flops(self, workload: Workload) -> int:
        """Of the matrix products: the long ones, and the iteration's four a step."""
        w, m = workload, self._count(workload)
        long = (w.seq + w.kv_seq) * m * (w.head_dim + w.value_dim)
        return 2 * w.batch * w.heads * (long + m * m * (w.head_dim + w.value_dim + 4 * self.steps * m))

    def build(self, workload: Workload) -> Attention:
        w, m = workload, self._count(workload)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q = query.float().unflatten(1, (w.kv_heads, w.group))  # (batch, kv_heads, group, seq, head_dim)
            k, v = key.float().unsqueeze(2), value.float().unsqueeze(2)  # (batch, kv_heads, 1, kv_seq, ..)
            out = attention(q, k, v, scale=w.scale, landmarks=m, steps=self.steps)  # (.., group, seq, value_dim)
            return out.flatten(1, 2).to(query.dtype)

        return Attention(attend, f"plain torch, {m} landmarks, {self.steps} steps")

    def _count(self, workload: Workload) -> int:
        return min(self.landmarks, workload.seq, workload.kv_seq)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, landmarks: int, steps: int) -> Tensor:
    """Equation 13 for query (.., seq, head_dim), key (.., kv_seq, head_dim) and value (.., kv_seq, value_dim)."""
    few_q, few_k = segments(query, landmarks) * scale, segments(key, landmarks)  # (.., landmarks, head_dim)
    small = torch.softmax(few_q @ few_k.mT, -1)  # A: (.., landmarks, landmarks)
    gathered = torch.softmax(few_q.to(key.dtype) @ key.mT, -1) @ value  # (.., landmarks, value_dim)
    mixed = (inverse(small, steps) @ gathered.double()).to(query.dtype)  # (.., landmarks, value_dim)
    return torch.softmax(query @ few_k.to(query.dtype).mT * scale, -1) @ mixed  # (.., seq, value_dim)


def segments(x: Tensor, count: int) -> Tensor:
    """Means over `count` segments of x (.., length, dim), as even as can be: (.., count, dim), float64."""
    length = x.shape[-2]
    own = torch.arange(length, device=x.device) * count // length  # the segment of each token
    sums = x.new_zeros(*x.shape[:-2], count, x.shape[-1], dtype=torch.float64).index_add(-2, own, x.double())
    return sums / torch.bincount(own, minlength=count)[:, None]  # (.., count, dim)


def inverse(a: Tensor, steps: int) -> Tensor:
    """Equation 11, some steps of it towards the pseudo-inverse of a (.., n, n)."""
    largest = a.sum(-2).amax(-1) * a.sum(-1).amax(-1)  # of |a|_1 |a|_inf, as nothing in it is negative
    z = a.mT / largest[..., None, None]  # (.., n, n)
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(steps):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z
