"""int8 attention by SageAttention's recipe (Zhang 2024, arXiv 2410.02367): QK^T is multiplied in int8."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.plugin import Attention, Call, Definition, Option, Plugin, Softmax
from attnbench.workload import Workload

STRIP = 256  # query rows whose scores are held at a time on a CPU
MAX_DIM = 256  # what the GPU kernel's tiles hold


class Int8(Plugin):
    """softmax(Q8 K8^T * scales) V: K smoothed by its mean over tokens, Q and K quantized to int8 inside the call.

    Subtracting the mean of K adds one constant to each row of scores, which softmax removes (section 4.2). The integer
    products accumulate in int32; softmax is float32; P and V multiply in the input's dtype, accumulating in float32.

    `rows` rows of Q, and of K, share one scale, peak / 127: 1 is the paper's per-token, 128 its per-block way (4.3).

    Against softmax attention on normal inputs the relative L2 error is 9e-3 with rows=1 and 1.3e-2 with rows=128.
    """

    family = "quantized"
    options: ClassVar[Mapping[str, Option]] = {
        "rows": Option(1, "rows of Q, and of K, that share a scale", (1, 32, 128)),
    }
    rows: int

    def supports(self, workload: Workload) -> str | None:
        if workload.device == "cuda":
            if not find_spec("triton"):
                return "the CUDA kernel needs triton"
            if max(workload.head_dim, workload.value_dim) > MAX_DIM:
                return f"the CUDA kernel holds head and value dims up to {MAX_DIM}"
        elif workload.head_dim == 1:
            return "torch._int_mm is wrong for a head dim of 1"
        return None

    def definition(self, workload: Workload) -> Definition:
        levels = key_levels(workload.device)

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q8, q_scale = quantize(query.float(), self.rows)
            k8, k_scale = quantize(smooth(key), self.rows, levels)
            return q8.double() * q_scale.double(), k8.double() * k_scale.double(), value

        return Softmax(operands=operands)

    def workspace_bytes(self, workload: Workload) -> int | None:
        w = workload
        q_rows, k_rows = w.batch * w.heads * w.seq, w.batch * w.kv_heads * w.kv_seq
        int8_and_scales = (q_rows + k_rows) * (w.head_dim + 4)
        if w.device == "cuda":
            return int8_and_scales
        quantizing = 4 * max(q_rows if w.itemsize == 4 else 2 * q_rows, 2 * k_rows) * w.head_dim
        strip = min(STRIP, w.seq) * w.kv_seq * (4 if w.itemsize == 4 else 4 + w.itemsize)
        return int8_and_scales + max(strip, quantizing)

    def build(self, workload: Workload) -> Attention:
        if workload.device == "cuda":
            from .int8_triton import attention

            def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return attention(query, key, value, workload.scale, workload.is_causal, self.rows)

            return Attention(call, "triton, int8 tl.dot")
        narrow = "" if key_levels("cpu") == 127 else ", K in 7 bits (no VNNI)"
        return Attention(strips(workload, self.rows), f"torch._int_mm, strips of {STRIP} rows{narrow}")


def smooth(key: Tensor) -> Tensor:
    """K minus its mean over tokens, in float32: (batch, kv_heads, kv_seq, head_dim). Equation 5."""
    return key - key.mean(dim=2, keepdim=True, dtype=torch.float32)


def quantize(x: Tensor, rows: int, levels: int = 127) -> tuple[Tensor, Tensor]:
    """int8 (..., length, dim) and float32 scales (..., length, 1), so that x is about int8 * scale; equation 2.

    x: float32 (..., length, dim). Each `rows` rows share their scale, peak / levels; ties round to even.
    """
    peak = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # (..., length, 1)
    if rows > 1:
        length = x.shape[-2]
        blocks = pad(peak, (0, 0, 0, -length % rows)).view(*x.shape[:-2], -1, rows, 1)  # (..., blocks, rows, 1)
        peak = blocks.amax(-2, keepdim=True).expand_as(blocks).flatten(-3, -2)[..., :length, :]
    scale = peak.clamp(min=1e-30) / levels
    return (x / scale).round_().to(torch.int8), scale


@cache
def key_levels(device: str) -> int:
    """What K's integers reach: 127; on a CPU without VNNI 63, as int8 products are added in pairs there, in 16 bits."""
    if device == "cuda":
        return 127
    peak = torch.full((64, 64), 127, dtype=torch.int8)
    return 127 if bool((torch._int_mm(peak, peak) == 64 * 127 * 127).all()) else 63


def strips(workload: Workload, rows: int) -> Call:
    """Plain torch: head by head, STRIP query rows at a time over all keys that they see. Holds O(STRIP * l) scores."""
    levels = key_levels("cpu")
    future = torch.ones(STRIP, STRIP, dtype=torch.bool).triu(1)  # True where the key lies after the query

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, seq, _ = query.shape
        kv_seq = key.shape[2]
        q8, q_scale = quantize(query.float(), rows)
        k8, k_scale = quantize(smooth(key), rows, levels)
        q_scale *= workload.scale
        # float16 products run element by element on a CPU, thousands of times slower than in float32.
        v = value.float() if value.dtype == torch.float16 else value
        out = v.new_empty(batch, heads, seq, v.shape[-1])
        buffer = torch.empty(min(STRIP, seq) * kv_seq, dtype=torch.int32)
        for b in range(batch):
            for h in range(heads):
                kv_head = h // workload.group
                for start in range(0, seq, STRIP):
                    size = min(STRIP, seq - start)
                    part = slice(start, start + size)
                    seen = part.stop + workload.offset if workload.is_causal else kv_seq
                    k, ks = k8[b, kv_head, :seen].T, k_scale[b, kv_head, :seen].T  # (head_dim, seen), (1, seen)
                    integers = buffer[: size * seen].view(size, seen)
                    torch._int_mm(q8[b, h, part], k, out=integers)
                    scores = integers.view(torch.float32).copy_(integers)  # in place
                    scores.mul_(ks).mul_(q_scale[b, h, part])
                    if workload.is_causal:
                        scores[:, start + workload.offset :].masked_fill_(future[:size, :size], float("-inf"))
                    weights = torch.softmax(scores, dim=-1, out=scores)
                    torch.mm(weights.to(v.dtype), v[b, kv_head, :seen], out=out[b, h, part])
        return out.to(query.dtype)

    return call
