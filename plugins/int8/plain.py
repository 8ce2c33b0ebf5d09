"""int8 attention in plain torch on a CPU: integers multiplied as such, or as float32 where that is faster."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from attnbench.plugin import Attention, Implementation
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler
from ..pieces import hidden_part, strips
from ..quantization import LEVELS, quantize, smooth

SCORES = 1 << 21  # scores held at a time: 8 MiB, about what a CPU's caches hold
QUANTIZED = 1 << 19  # elements of Q or K quantized at a time


def implementation(rows: int) -> Implementation:
    """rows: of Q, and of K, that share a scale."""

    def build(workload: Workload) -> Attention:
        both = Heads(workload, rows, multiplies_int8())
        how = "torch._int_mm" if both.integers else "int8 multiplied as float32"
        return Attention(both, f"{how}, strips of {both.strip} rows")

    return Implementation(
        "torch",
        build,
        _unsupported,
        workspace_bytes=_workspace_bytes,
        emulated=not multiplies_int8(),
        honours=("scale", "window"),
    )


def _unsupported(workload: Workload) -> str | None:
    wrong = workload.head_dim == 1 and multiplies_int8()
    return "torch._int_mm is wrong for a head dim of 1" if wrong else None


@cache
def multiplies_int8() -> bool:
    """Whether torch._int_mm is fast here, and exact: told to do without VNNI, it adds products in pairs, in 16 bits."""
    peak = torch.full((64, 64), LEVELS, dtype=torch.int8)
    return compiler.multiplies_int8() and bool((torch._int_mm(peak, peak) == 64 * LEVELS**2).all())


class Heads:
    """Head by head, a strip of query rows at a time over all keys that they see.

    integers: multiply Q and K by torch._int_mm; else as float32, which holds the sums of their products exactly up to a
        head dim of 1040, and to rounding beyond.
    """

    def __init__(self, workload: Workload, rows: int, integers: bool) -> None:
        self.workload, self.rows, self.integers = workload, rows, integers
        self.dtype = kernels.product_dtype(workload.dtype)
        self.strip, self.together = strip_rows(workload), heads_together(workload)
        self.future = torch.ones(self.strip, self.strip, dtype=torch.bool).triu(1)  # True where a key is behind a query

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w, size = self.workload, self.strip * self.workload.kv_seq
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim, dtype=self.dtype)
        buffer = torch.empty(size, dtype=torch.int32 if self.integers else torch.float32)
        narrow = torch.empty(size if self.dtype != torch.float32 else 0, dtype=self.dtype)
        for b, first in product(range(w.batch), range(0, w.kv_heads, self.together)):
            heads = range(first * w.group, min(first + self.together, w.kv_heads) * w.group)
            k8, k_scale = quantize(smooth(key[b, first : first + self.together]), self.rows)  # (together, kv_seq, ..)
            q8, q_scale = quantize(query[b, heads.start : heads.stop].float(), self.rows)  # (together * group, seq, ..)
            q_scale *= w.scale
            v = value[b, first : first + self.together].to(self.dtype)  # (together, kv_seq, value_dim)
            for i, h in enumerate(heads):
                j = i // w.group
                if i % w.group == 0:
                    k = k8[j] if self.integers else k8[j].float()  # (kv_seq, head_dim)
                self.attend((q8[i], q_scale[i]), (k, k_scale[j]), v[j], out[b, h], buffer, narrow)
        return out.to(query.dtype)

    def attend(
        self, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], v: Tensor, out: Tensor, *buffers: Tensor
    ) -> None:
        """One head: query (seq, head_dim) and key (kv_seq, head_dim) in 8 bits, each with its scales (.., 1)."""
        w, (q8, q_scale), (k8, k_scale), (buffer, narrow) = self.workload, query, key, buffers
        for rows, seen in strips(w, self.strip):
            n, shape = rows.stop - rows.start, (rows.stop - rows.start, seen.stop - seen.start)
            products = buffer[: shape[0] * shape[1]].view(shape)  # (rows, keys seen), int32 or float32
            if self.integers:
                torch._int_mm(q8[rows], k8[seen].T, out=products)
                scores = products.view(torch.float32).copy_(products)  # (rows, keys seen), in place
            else:
                scores = torch.mm(q8[rows].float(), k8[seen].T, out=products)  # (rows, keys seen)
            scores.mul_(k_scale[seen].T).mul_(q_scale[rows])  # (1, keys seen), (rows, 1)
            if w.masked.window:
                scores.masked_fill_(hidden_part(w, rows, seen), -torch.inf)
            elif w.is_causal:
                scores[:, rows.start + w.offset :].masked_fill_(self.future[:n, :n], -torch.inf)
            weights = torch.softmax(scores, dim=-1, out=scores)  # (rows, keys seen)
            if self.dtype != torch.float32:
                weights = narrow[: weights.numel()].view(shape).copy_(weights)  # in the dtype of V
            torch.mm(weights, v[seen], out=out[rows])  # (rows, value_dim)


def strip_rows(workload: Workload) -> int:
    """Query rows to a strip: as many as hold SCORES scores with all keys, between 64 and 512."""
    return min(workload.seq, max(64, min(512, SCORES // workload.kv_seq)))


def heads_together(workload: Workload) -> int:
    """Key/value heads quantized at once: all of a short sequence, to spare small calls; one of a long one."""
    per_head = workload.head_dim * max(workload.kv_seq, workload.group * workload.seq)
    return max(1, min(workload.kv_heads, QUANTIZED // per_head))


def _workspace_bytes(workload: Workload) -> int:
    w = workload
    narrow = kernels.product_dtype(w.dtype) == torch.bfloat16
    scores = strip_rows(w) * w.kv_seq * (6 if narrow else 4)
    # int8 of Q and K, of these heads and the ones before, and the float32 that quantizing holds: smoothed K and
    # K / scale, or Q and Q / scale.
    q, k = (n * heads_together(w) * w.head_dim for n in (w.group * w.seq, w.kv_seq))
    quantizing = 2 * (q + k) + 4 * max(2 * k, (2 if w.itemsize < 4 else 1) * q)
    widened = 0 if multiplies_int8() else 4 * (w.kv_seq + strip_rows(w)) * w.head_dim
    copies = 0 if narrow or w.itemsize == 4 else 4 * (w.batch * w.heads * w.seq + w.kv_seq) * w.value_dim
    return scores + quantizing + widened + copies
