"""SageAttention 1.0.6 (Zhang 2024, arXiv 2410.02367): int8 Q K^T with a scale to a block, P V in float16, in Triton."""

from __future__ import annotations

from attnbench_plugins.quantization import quantize
from sageattention import sageattn
from torch import Tensor

from attnbench.plugin import Attention, Plugin, Softmax
from attnbench.workload import Workload

QUERY_ROWS, KEY_ROWS = 128, 64  # that share a scale, and the kernel's tile


class Sage(Plugin):
    """sageattn: K less its mean over tokens, in 8 bits by blocks of 64 rows, Q by 128; V as float16.

    The mean is subtracted here, in the same two operations: sageattn subtracts it from the caller's own K, in place.
    """

    family = "quantized"
    devices = ("cuda",)
    phases = ("forward",)

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if w.dtype == "float32":
            return "V is multiplied in float16"
        if w.head_dim not in (64, 96, 128) or w.value_dim != w.head_dim:
            return "sageattn has head dims of 64, 96 and 128, for values too"
        if w.is_causal and w.offset:
            return "its causal mask is for as many queries as keys"
        if w.is_causal and w.seq % QUERY_ROWS:
            return f"with a causal mask it reads scales past the end where seq is no multiple of {QUERY_ROWS}"
        if w.kv_seq % KEY_ROWS:
            return f"it counts keys past the end where kv_seq is no multiple of {KEY_ROWS}"
        return None

    def definition(self, workload: Workload) -> Softmax:
        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q8, q_scale = quantize(query.float(), QUERY_ROWS)
            k8, k_scale = quantize(smooth(key).float(), KEY_ROWS)
            return q8.double() * q_scale.double(), k8.double() * k_scale.double(), value

        return Softmax(operands=operands)

    def build(self, workload: Workload) -> Attention:
        w = workload

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # The kernels read rows whose elements are neighbours.
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, smooth(key), value))
            out: Tensor = sageattn(q, k, v, "HND", is_causal=w.is_causal, sm_scale=w.scale, smooth_k=False)
            return out

        return Attention(attend, "sageattention sageattn, Triton")


def smooth(key: Tensor) -> Tensor:
    """K (batch, kv_heads, kv_seq, head_dim) less its mean over tokens, both in K's dtype, as sageattn rounds them."""
    return key - key.mean(dim=2, keepdim=True)
