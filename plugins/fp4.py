"""Attention in 4-bit floats with scales of small blocks, after SageAttention3 (Zhang 2025, arXiv 2505.11594)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Definition, Option, Plugin, Softmax
from attnbench.workload import Workload

from .microscaling import FORMATS
from .pieces import hidden_part, strips
from .quantization import TINIEST, smooth

SCORES = 1 << 19  # scores held at a time


class Fp4(Plugin):
    """softmax(Q4 K4^T) in 4 bits, times V4: both products of attention in NVFP4 or MXFP4, emulated in float32.

    Blocks run along what a product sums over: channels of Q and K, tokens of P and V. K is smoothed by its mean over
    tokens first. NVFP4's float32 is one for all of K of a head, one for V, and one for each row of Q and P, so that
    scales of P, which is at most 1, use all of E4M3's range (section 3, two-level quantization; there P is e^(S - max)
    of a tile's running maximum, here of the row's). Sums, softmax and its denominator are float32. SageAttention3's
    smoothing of Q is not here: it moves the mean of 128 queries into a product in 16 bits.

    A step of decoding makes all of the past narrow again: what a cache in this form keeps and costs, `attnbench cache
    --caches fp4` says.
    """

    family = "quantized"
    phases: ClassVar[tuple[str, ...]] = ("forward", "decode")
    study: ClassVar[bool] = True
    honours = ("scale",)
    options: ClassVar[Mapping[str, Option]] = {
        "format": Option("nvfp4", "blocks of 16 with scales in E4M3, or of 32 with powers of two", tuple(FORMATS)),
        "weights": Option("fp4", "softmax's weights in 4 bits, too, or as they are", ("fp4", "full")),
    }
    format: str
    weights: str

    def emulated(self, workload: Workload) -> bool:
        return True

    def definition(self, workload: Workload) -> Definition:
        return Softmax(operands=self.operands, weights=self.narrow_weights if self.weights == "fp4" else None)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What 4 bits leave of them, float32, each of its input's shape."""
        form = FORMATS[self.format]
        q = form.rounded(query.float(), -1)  # (batch, heads, seq, head_dim)
        k = form.rounded(smooth(key), -2, -1)  # (batch, kv_heads, kv_seq, head_dim)
        v = form.rounded(value.float().mT, -2, -1).mT  # (batch, kv_heads, kv_seq, value_dim)
        return q, k, v

    def narrow_weights(self, weights: Tensor) -> Tensor:
        """What 4 bits leave of rows of softmax's weights (.., rows, keys), of any float dtype."""
        peak = weights.amax(-1, keepdim=True).clamp(min=TINIEST)  # (.., rows, 1)
        return FORMATS[self.format].rounded((weights / peak).float(), -1).to(weights.dtype) * peak

    def workspace_bytes(self, workload: Workload) -> int | None:
        """Q, K and V as float32, what makes V narrow, and scores with what makes them narrow."""
        w = workload
        keys = w.batch * w.kv_heads * w.kv_seq
        operands = 4 * (w.batch * w.heads * w.seq * w.head_dim + keys * (w.head_dim + w.value_dim))
        scores = 4 * w.batch * w.heads * self._rows(w) * w.kv_seq
        making = 5 * 4 * max(keys * max(w.head_dim, w.value_dim), w.batch * w.heads * w.seq * w.head_dim)
        return operands + max(making, (8 if self.weights == "fp4" else 2) * scores)

    def build(self, workload: Workload) -> Attention:
        w, narrow = workload, self.weights == "fp4"

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = self.operands(query, key, value)
            q = q.unflatten(1, (w.kv_heads, w.group))  # (batch, kv_heads, group, seq, head_dim)
            k, v = k.unsqueeze(2), v.unsqueeze(2)  # (batch, kv_heads, 1, kv_seq, ..)
            out = query.new_empty(w.batch, w.kv_heads, w.group, w.seq, w.value_dim)
            for rows, seen in strips(w, self._rows(w)):
                scores = (q[:, :, :, rows] @ k[:, :, :, seen].mT).mul_(w.scale)  # (.., group, rows, keys seen)
                if w.is_causal:
                    scores.masked_fill_(hidden_part(w, rows, seen), -torch.inf)
                weights = torch.softmax(scores, -1, out=scores)  # in place
                if narrow:
                    weights = self.narrow_weights(weights)
                out[:, :, :, rows] = (weights @ v[:, :, :, seen]).to(out.dtype)  # (.., group, rows, value_dim)
            return out.flatten(1, 2)  # (batch, heads, seq, value_dim)

        return Attention(attend, f"{self.format} multiplied as float32, strips of {self._rows(w)} rows")

    def _rows(self, workload: Workload) -> int:
        w = workload
        return min(w.seq, max(16, SCORES // (w.batch * w.heads * w.kv_seq)))
