"""int8 attention in C++ on a CPU: int8.cpp's kernels.

The products take unsigned bytes with signed ones. Without VNNI pairs of them are added in 16 bits, which 8 bits on both
sides may exceed: there K is quantized to 63 levels on each side, and P to 127, half of what VNNI allows.
"""

from __future__ import annotations

from attnbench.plugin import Attention, Implementation
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler
from ..quantization import LEVELS

STRIP_ROWS = 192  # the kernels' tile
PRODUCTS = {"qk": "int8 Q K^T", "qkpv": "int8 Q K^T and P V"}


def key_levels() -> int:
    """Of K, on each side of 0."""
    return LEVELS if compiler.multiplies_bytes() else LEVELS // 2


def block_keys(kind: str) -> int:
    """P in 8 or 7 bits loses by larger blocks, as their keys share a maximum."""
    return 1024 if kind == "qk" else 512 if compiler.multiplies_bytes() else 128


def implementation(kind: str, rows: int) -> Implementation:
    """The kernel of this name, "qk" or "qkpv". rows: that share a scale."""

    def build(w: Workload) -> Attention:
        library, plan = compiler.load("int8.cpp", w.dtype), kernels.dense(w, min(STRIP_ROWS, w.seq))
        bits = "by VNNI" if compiler.multiplies_bytes() else "with 7 bits of K" + (" and P" if kind == "qkpv" else "")
        if compiler.has_tiles("int8"):
            bits = "by AMX"
        call = kernels.caller(getattr(library, f"int8_{kind}"), w, plan, block_keys(kind))
        return Attention(call, f"{kernels.described(w.dtype)}, {PRODUCTS[kind]} {bits}")

    def unsupported(w: Workload) -> str | None:
        if rows != 1:
            return "the C++ kernel has a scale for each row"
        if kind == "qkpv" and w.dtype != "bfloat16":
            return f"P in 8 bits is too coarse for {w.dtype}"
        return kernels.unsupported(w, "int8.cpp")

    def workspace_bytes(w: Workload) -> int:
        weight = kernels.operand_bytes(w.dtype) if kind == "qk" else 1  # of P, and of V
        packed = kernels.round_up(w.head_dim, 4) + 4 + weight * kernels.columns(w.value_dim)
        return kernels.workspace_bytes(w, min(STRIP_ROWS, w.seq), block_keys(kind), packed, weight)

    return Implementation(kind, build, unsupported, workspace_bytes=workspace_bytes, honours=kernels.HONOURS)
