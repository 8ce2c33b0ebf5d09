"""int8 attention by SageAttention's recipe (Zhang 2024, arXiv 2410.02367): QK^T is multiplied in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Choice, Definition, Implementation, Option, Softmax
from attnbench.workload import Workload

from .. import quantized_cache, triton_kit
from ..quantization import LEVELS, quantize, smooth
from . import native, plain

FORMAT = quantized_cache.Format(
    "decode_int8.cpp",
    "int8",
    LEVELS,
    code=lambda numbers: numbers.round().to(torch.int8).view(torch.uint8),
    value=lambda codes: codes.view(torch.int8).float(),
    query_levels=LEVELS,
)
"""Of what a decoder keeps: a scale for each token."""


class Int8(Choice):
    """softmax(Q8 K8^T * scales) V: K smoothed by its mean over tokens, Q and K quantized to int8 inside the call.

    Subtracting the mean of K adds one constant to each row of scores, which softmax removes (section 4.2). The integer
    products accumulate in int32; softmax is float32; P and V multiply in the input's dtype, accumulating in float32.

    `rows` rows of Q, and of K, share one scale, peak / 127: 1 is the paper's per-token, 128 its per-block way (4.3).

    On a CPU, `impl=qk` is a C++ kernel that does this for rows=1, and `impl=qkpv` one that quantizes P and V too, for
    bfloat16: V by column with the scale peak / 127, P to unsigned bytes by the maximum of each block of keys, of which
    the first 64 are one, as trained models lay much weight on the first tokens. Where the CPU has no VNNI, K and P have
    7 bits there. `impl=torch` is plain torch around torch._int_mm, or where that is slow around the same integers in
    float32, which holds their sums exactly; `impl=auto` is qk where that can run, else torch. A decoder's past is kept
    in 8 bits.

    Against softmax attention on normal inputs the relative L2 error is 9e-3 with rows=1 and 1.3e-2 with rows=128; with
    7 bits of K it is 1.4e-2.
    """

    family = "quantized"
    options: ClassVar[Mapping[str, Option]] = {
        "rows": Option(1, "rows of Q, and of K, that share a scale", (1, 32, 128)),
        "impl": Option("auto", "CPU: what computes it", ("auto", "torch", "qk", "qkpv")),
    }
    rows: int

    phases: ClassVar[tuple[str, ...]] = ("forward", "decode")

    def supports(self, workload: Workload) -> str | None:
        if workload.phase == "decode" and (self.rows != 1 or self.impl not in ("auto", "torch")):
            return "the cache has a scale for each token, and its own kernel: rows=1, impl=auto or torch"
        if workload.device == "cuda" and self.impl != "auto":
            return f"impl={self.impl} is for a CPU"
        return super().supports(workload)

    def definition(self, workload: Workload) -> Definition:
        if workload.phase == "decode":
            return Softmax(operands=partial(FORMAT.operands, workload))

        chosen, _ = self.chosen(workload)
        levels = native.key_levels() if chosen and chosen.name in native.PRODUCTS else LEVELS

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q8, q_scale = quantize(query.float(), self.rows)  # (batch, heads, seq, head_dim), (.., seq, 1)
            k8, k_scale = quantize(smooth(key), self.rows, levels)  # (batch, kv_heads, kv_seq, ..), (.., kv_seq, 1)
            if self.impl == "qkpv":
                v8, v_scale = quantize(value.float().mT, 1)  # (batch, kv_heads, value_dim, kv_seq), (.., value_dim, 1)
                value = (v8.double() * v_scale.double()).mT  # (batch, kv_heads, kv_seq, value_dim)
            return q8.double() * q_scale.double(), k8.double() * k_scale.double(), value

        return Softmax(operands=operands)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        if workload.phase == "decode":
            return quantized_cache.implementations(FORMAT)
        if workload.device == "cuda":
            return (
                Implementation(
                    "triton", self._triton, triton_kit.unsupported, workspace_bytes=_triton_bytes, honours=("scale",)
                ),
            )
        if self.impl == "qkpv":  # not the same function: never one that auto takes
            return (native.implementation("qkpv", self.rows),)
        return native.implementation("qk", self.rows), plain.implementation(self.rows)

    def _triton(self, workload: Workload) -> Attention:
        w, kernels = workload, triton_kit.kernels(__name__)
        call = partial(kernels.attention, scale=w.scale, is_causal=w.is_causal, rows=self.rows)
        return Attention(call, "triton, int8 tl.dot")


def _triton_bytes(workload: Workload) -> int | None:
    return triton_kit.kernels(__name__).workspace_bytes(workload)
