"""int8 attention in C++ on a CPU with AVX512-VNNI: int8.cpp's kernels, for bfloat16."""

from __future__ import annotations

from attnbench.plugin import Attention, Implementation
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler

STRIP_ROWS = 192  # the kernels' tile
BLOCK_KEYS = {"qk": 1024, "qkpv": 512}  # P in 8 bits loses by larger blocks: their keys share a maximum
PRODUCTS = {"qk": "int8 Q K^T, bf16 P V", "qkpv": "int8 Q K^T and P V"}


def implementation(kind: str, rows: int) -> Implementation:
    """The kernel of this name, "qk" or "qkpv". rows: that share a scale."""

    def build(w: Workload) -> Attention:
        kernel, plan = getattr(compiler.load("int8.cpp"), f"int8_{kind}"), kernels.dense(w, min(STRIP_ROWS, w.seq))
        return Attention(kernels.caller(kernel, w, plan, BLOCK_KEYS[kind]), f"C++ AVX512-VNNI, {PRODUCTS[kind]}")

    def unsupported(w: Workload) -> str | None:
        if rows != 1:
            return "the AVX-512 kernel has a scale for each row"
        return kernels.unsupported(w, "int8.cpp")

    def workspace_bytes(w: Workload) -> int:
        weight = 2 if kind == "qk" else 1  # bytes of P, and of V
        packed = kernels.round_up(w.head_dim, 4) + 4 + weight * kernels.round_up(w.value_dim, kernels.LANES)
        return kernels.workspace_bytes(w, min(STRIP_ROWS, w.seq), BLOCK_KEYS[kind], packed, weight)

    return Implementation(kind, build, unsupported, workspace_bytes=workspace_bytes)
