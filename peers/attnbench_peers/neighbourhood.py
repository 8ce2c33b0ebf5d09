"""NATTEN's na1d: neighbourhood attention over a sequence (Hassani 2022, arXiv 2204.07143; fused: 2403.04690).

Each query sees the `keys` nearest to it: as many at the ends of the sequence, where the neighbourhood is moved inwards,
and those before it alone under a causal mask. natten/functional.py of 0.21: tensors are (batch, length, heads, dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import ClassVar

import torch
from natten import na1d
from natten.backends import choose_backend, choose_fmha_backend
from torch import Tensor

from attnbench.plugin import Attention, Option, Plugin, Softmax
from attnbench.workload import Workload

from .layout import by_token


class Natten(Plugin):
    """na1d by the backend that NATTEN chooses: its own kernels on a GPU, where they were compiled for it.

    Elsewhere it hands all pairs and a mask to torch's flex_attention, not compiled: right, and no measure of NATTEN.
    """

    family = "sparse"
    phases = ("forward", "train")
    honours = ("scale", "window")
    options: ClassVar[Mapping[str, Option]] = {"keys": Option(256, "that a query sees, its own among them")}
    keys: int

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if w.offset:
            return "na1d has as many queries as keys"
        if self._seen(w) < 2:
            return "na1d has neighbourhoods of 2 keys at least"
        if w.trains and w.device == "cpu":
            return "flex_attention, which NATTEN falls back to, has no backward pass on a CPU"
        return None if self._backend(w) else "NATTEN has no backend for such dims, dtype and mask on this device"

    def emulated(self, workload: Workload) -> bool:
        return self._backend(workload).startswith("flex")

    def definition(self, workload: Workload) -> Softmax:
        n, last = self._seen(workload), workload.seq - 1

        def allowed(row: Tensor, key: Tensor) -> Tensor:
            if workload.is_causal:
                return key > row - n
            first = row.clamp(n // 2, last - (n - 1) // 2) - n // 2  # the neighbourhood's
            return (key >= first) & (key < first + n)

        return Softmax(allowed=allowed)

    def flops(self, workload: Workload) -> int:
        w = workload
        return 2 * w.batch * w.heads * self._pairs(w) * (w.head_dim + w.value_dim)

    def build(self, workload: Workload) -> Attention:
        told = self.arguments(workload)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return by_token(na1d(*map(by_token, (query, key, value)), **told))

        how = f"natten {metadata.version('natten')} na1d, {self._backend(workload)}"
        return Attention(attend, how, self._pairs(workload) / workload.seq**2)

    def arguments(self, workload: Workload) -> dict[str, int | bool | float]:
        """What na1d is told of a workload beside its tensors."""
        w = workload
        return {"kernel_size": self._seen(w), "is_causal": w.is_causal, "scale": w.scale}

    def _seen(self, w: Workload) -> int:
        """Keys that a query sees: a workload's window may be the narrower one."""
        return min(self.keys, w.masked.window or w.seq, w.seq)

    def _pairs(self, w: Workload) -> int:
        n = self._seen(w)
        return n * w.seq - (n * (n - 1) // 2 if w.is_causal else 0)  # the first n - 1 queries see fewer

    def _backend(self, w: Workload) -> str:
        """The one that na1d will choose, in the order of natten/backends/__init__.py; "" where there is none."""
        made = {"dtype": getattr(torch, w.dtype), "device": w.device, "requires_grad": w.trains}
        shapes = ((batch, length, heads, dim) for batch, heads, length, dim in w.shapes)
        tensors = [torch.empty(shape[-1], **made).expand(shape) for shape in shapes]
        try:
            if self._seen(w) < w.seq:
                return str(choose_backend(*tensors, torch_compile=False))
            return str(choose_fmha_backend(*tensors, is_causal=w.is_causal, is_varlen=False, torch_compile=False))
        except NotImplementedError:
            return ""
