"""SageAttention 2 (Zhang 2024, arXiv 2411.10958): int8 Q K^T with a scale to a thread's rows, P V in float16, in CUDA.

sageattn_qk_int8_pv_fp16_cuda of sageattention/core.py (2.2), which pip has no release of. What its `sageattn` takes on
Ada, Hopper and later rounds P to 8 bits as well: no definition here can say so, and the tolerance would call it wrong.
"""

from __future__ import annotations

from importlib import metadata

from sageattention.core import sageattn_qk_int8_pv_fp16_cuda
from torch import Tensor

from attnbench.plugin import Attention, Plugin, Softmax
from attnbench.workload import Workload

from . import lanes
from .layout import older_than, wide_or_unequal
from .sage import smooth


class Sage2(Plugin):
    """K less its mean over tokens; rows of Q and K that one thread of a warp multiplies share a scale; V as float16."""

    family = "quantized"
    devices = ("cuda",)
    phases = ("forward",)
    honours = ("scale",)

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if reason := wide_or_unequal(w, "SageAttention"):
            return reason
        if w.head_dim > 128:
            return "SageAttention has head dims up to 128"
        if w.is_causal and w.offset:
            return "its causal mask is for as many queries as keys"
        return "SageAttention 2 is for GPUs of compute capability 8.0 and later" if older_than(8) else None

    def definition(self, workload: Workload) -> Softmax:
        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return lanes.queries(query), lanes.keys(smooth(key)), value.half()

        return Softmax(operands=operands)

    def build(self, workload: Workload) -> Attention:
        w = workload

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
            out: Tensor = sageattn_qk_int8_pv_fp16_cuda(
                q, k, v, tensor_layout="HND", is_causal=w.is_causal, sm_scale=w.scale,
                qk_quant_gran="per_thread", pv_accum_dtype="fp32", smooth_k=True,
            )  # fmt: skip
            return out

        return Attention(attend, f"sageattention {metadata.version('sageattention')} sageattn_qk_int8_pv_fp16_cuda")
