"""int8 attention by SageAttention's recipe (Zhang 2024, arXiv 2410.02367): QK^T is multiplied in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Attention, Call, Choice, Definition, Implementation, Option, Softmax
from attnbench.workload import Workload

from .int8_cache import implementations as cached_implementations
from .int8_cache import operands as cached_operands
from .native import attention as kernels
from .native import compiler
from .quantize import LEVELS, quantize

SCORES = 1 << 21  # scores held at a time on a CPU: 8 MiB, about what its caches hold
QUANTIZED = 1 << 19  # elements of Q or K quantized at a time on a CPU
MAX_DIM = 256  # what the GPU kernel's tiles hold
STRIP_ROWS = 192  # the C++ kernels' tile
BLOCK_KEYS = {"qk": 1024, "qkpv": 512}  # P in 8 bits loses by larger blocks: their keys share a maximum


class Int8(Choice):
    """softmax(Q8 K8^T * scales) V: K smoothed by its mean over tokens, Q and K quantized to int8 inside the call.

    Subtracting the mean of K adds one constant to each row of scores, which softmax removes (section 4.2). The integer
    products accumulate in int32; softmax is float32; P and V multiply in the input's dtype, accumulating in float32.

    `rows` rows of Q, and of K, share one scale, peak / 127: 1 is the paper's per-token, 128 its per-block way (4.3).

    On a CPU, `impl=qk` is a C++ kernel that does this for bfloat16 and rows=1, and `impl=qkpv` one that quantizes P and
    V too: V by column with the scale peak / 127, P to unsigned bytes by the maximum of each block of keys.
    `impl=torch` is plain torch around torch._int_mm, or where that is slow around the same integers in float32, which
    holds their sums exactly; `impl=auto` is qk where that can run, else torch.

    Against softmax attention on normal inputs the relative L2 error is 9e-3 with rows=1 and 1.3e-2 with rows=128.
    """

    family = "quantized"
    options: ClassVar[Mapping[str, Option]] = {
        "rows": Option(1, "rows of Q, and of K, that share a scale", (1, 32, 128)),
        "impl": Option("auto", "CPU: what computes it", ("auto", "torch", "qk", "qkpv")),
    }
    rows: int

    phases: ClassVar[tuple[str, ...]] = ("forward", "decode")

    def supports(self, workload: Workload) -> str | None:
        if workload.phase == "decode" and (self.rows != 1 or self.impl != "auto"):
            return "the cache has a scale for each token and one way"
        if workload.device == "cuda" and self.impl != "auto":
            return f"impl={self.impl} is for a CPU"
        return super().supports(workload)

    def definition(self, workload: Workload) -> Definition:
        if workload.phase == "decode":
            return Softmax(operands=partial(cached_operands, workload))

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q8, q_scale = quantize(query.float(), self.rows)
            k8, k_scale = quantize(smooth(key), self.rows)
            if self.impl == "qkpv":
                v8, v_scale = quantize(value.float().mT, 1)
                value = (v8.double() * v_scale.double()).mT
            return q8.double() * q_scale.double(), k8.double() * k_scale.double(), value

        return Softmax(operands=operands)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        if workload.phase == "decode":
            return cached_implementations()
        if workload.device == "cuda":
            return (Implementation("triton", self._triton, _no_triton, workspace_bytes=_triton_bytes),)
        if self.impl == "qkpv":  # not the same function: never one that auto takes
            return (self._native("qkpv", "int8 Q K^T and P V"),)
        plain = Implementation("torch", self._torch, _no_torch, workspace_bytes=_torch_bytes)
        return self._native("qk", "int8 Q K^T, bf16 P V"), plain

    def _native(self, kind: str, products: str) -> Implementation:
        """int8.cpp's kernel of this name."""

        def build(w: Workload) -> Attention:
            kernel, plan = getattr(compiler.load("int8.cpp"), f"int8_{kind}"), kernels.dense(w, min(STRIP_ROWS, w.seq))
            return Attention(kernels.caller(kernel, w, plan, BLOCK_KEYS[kind]), f"C++ AVX512-VNNI, {products}")

        def unsupported(w: Workload) -> str | None:
            if self.rows != 1:
                return "the AVX-512 kernel has a scale for each row"
            return kernels.unsupported(w, "int8.cpp")

        def workspace_bytes(w: Workload) -> int:
            weight = 2 if kind == "qk" else 1  # bytes of P, and of V
            packed = kernels.round_up(w.head_dim, 4) + 4 + weight * kernels.round_up(w.value_dim, kernels.LANES)
            return kernels.workspace_bytes(w, min(STRIP_ROWS, w.seq), BLOCK_KEYS[kind], packed, weight)

        return Implementation(kind, build, unsupported, workspace_bytes=workspace_bytes)

    def _triton(self, workload: Workload) -> Attention:
        from .int8_triton import attention

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, workload.scale, workload.is_causal, self.rows)

        return Attention(call, "triton, int8 tl.dot")

    def _torch(self, workload: Workload) -> Attention:
        integers = multiplies_int8()
        product = "torch._int_mm" if integers else "int8 multiplied as float32"
        return Attention(strips(workload, self.rows, integers), f"{product}, strips of {strip_rows(workload)} rows")


def _no_triton(workload: Workload) -> str | None:
    if not find_spec("triton"):
        return "the CUDA kernel needs triton"
    if max(workload.head_dim, workload.value_dim) > MAX_DIM:
        return f"the CUDA kernel holds head and value dims up to {MAX_DIM}"
    return None


def _triton_bytes(workload: Workload) -> int:
    from . import int8_triton

    return int8_triton.workspace_bytes(workload)


def _no_torch(workload: Workload) -> str | None:
    wrong = workload.head_dim == 1 and multiplies_int8()
    return "torch._int_mm is wrong for a head dim of 1" if wrong else None


def _torch_bytes(workload: Workload) -> int:
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


def smooth(key: Tensor) -> Tensor:
    """K (..., kv_seq, head_dim) minus its mean over tokens, in float32. Equation 5."""
    return key - key.mean(dim=-2, keepdim=True, dtype=torch.float32)


@cache
def multiplies_int8() -> bool:
    """Whether torch._int_mm is fast here, and exact: told to do without VNNI, it adds products in pairs, in 16 bits."""
    peak = torch.full((64, 64), LEVELS, dtype=torch.int8)
    return compiler.multiplies_int8() and bool((torch._int_mm(peak, peak) == 64 * LEVELS**2).all())


def strips(workload: Workload, rows: int, integers: bool) -> Call:
    """Plain torch: head by head, a strip of query rows at a time over all keys that they see.

    integers: multiply Q and K by torch._int_mm; else as float32, which holds the sums of their products exactly up to a
        head dim of 1040, and to rounding beyond.
    """
    w = workload
    dtype = kernels.product_dtype(w.dtype)
    strip, together = strip_rows(w), heads_together(w)
    future = torch.ones(strip, strip, dtype=torch.bool).triu(1)  # True where the key lies after the query

    def attend(
        q8: Tensor,
        q_scale: Tensor,
        k8: Tensor,
        k_scale: Tensor,
        value: Tensor,
        out: Tensor,
        buffer: Tensor,
        narrow: Tensor,
    ) -> None:
        """One head: q8 (seq, head_dim), k8 (kv_seq, head_dim; without `integers` in float32), scales (.., 1), value."""
        for start in range(0, w.seq, strip):
            end = min(start + strip, w.seq)
            seen = end + w.offset if w.is_causal else w.kv_seq
            shape = (end - start, seen)
            products = buffer[: shape[0] * seen].view(shape)
            if integers:
                torch._int_mm(q8[start:end], k8[:seen].T, out=products)
                scores = products.view(torch.float32).copy_(products)  # in place
            else:
                scores = torch.mm(q8[start:end].float(), k8[:seen].T, out=products)
            scores.mul_(k_scale[:seen].T).mul_(q_scale[start:end])
            if w.is_causal:
                scores[:, start + w.offset :].masked_fill_(future[: shape[0], : shape[0]], float("-inf"))
            weights = torch.softmax(scores, dim=-1, out=scores)
            if dtype != torch.float32:
                weights = narrow[: weights.numel()].view(shape).copy_(weights)
            torch.mm(weights, value[:seen], out=out[start:end])

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim, dtype=dtype)
        buffer = torch.empty(strip * w.kv_seq, dtype=torch.int32 if integers else torch.float32)
        narrow = torch.empty(strip * w.kv_seq if dtype != torch.float32 else 0, dtype=dtype)
        for b, first in product(range(w.batch), range(0, w.kv_heads, together)):
            heads = range(first * w.group, min(first + together, w.kv_heads) * w.group)
            k8, k_scale = quantize(smooth(key[b, first : first + together]), rows)  # (together, kv_seq, ..)
            q8, q_scale = quantize(query[b, heads.start : heads.stop].float(), rows)  # (together * group, seq, ..)
            q_scale *= w.scale
            v = value[b, first : first + together].to(dtype)
            for i, h in enumerate(heads):
                j = i // w.group
                if i % w.group == 0:
                    k = k8[j] if integers else k8[j].float()
                attend(q8[i], q_scale[i], k, k_scale[j], v[j], out[b, h], buffer, narrow)
        return out.to(query.dtype)

    return call


def strip_rows(workload: Workload) -> int:
    """Query rows to a strip: as many as hold SCORES scores with all keys, between 64 and 512."""
    return min(workload.seq, max(64, min(512, SCORES // workload.kv_seq)))


def heads_together(workload: Workload) -> int:
    """Key/value heads quantized at once: all of a short sequence, to spare small calls; one of a long one."""
    per_head = workload.head_dim * max(workload.kv_seq, workload.group * workload.seq)
    return max(1, min(workload.kv_heads, QUANTIZED // per_head))
