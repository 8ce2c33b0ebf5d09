"""FlashAttention-4: the package flash-attn-4, kernels in CuTe's Python that are compiled when first asked for.

flash_attn/cute/interface.py of 4.0.0b36: head dims by compute capability in _validate_head_dims, what each kernel
lacks in _flash_attn_fwd and _flash_attn_bwd. It has no call that adds to a cache: decoding is flash_attn_func over the
views of one. It shares the folder flash_attn with flash-attn 2, and is to be installed after that.
"""

from __future__ import annotations

from importlib import metadata

import flash_attn.cute as interface
import torch

from attnbench.workload import Workload

from .flash import FlashAttention, Functions

DEEPSEEK = (192, 128)  # head dim and value dim that Blackwell's kernels have beside equal ones


class FlashAttention4(FlashAttention):
    """Made for Hopper and Blackwell, and does with Ampere. Sinks too, where they are made for."""

    honours = ("scale", "window", "softcap", "sinks")

    def functions(self) -> Functions:
        return Functions.of(interface, f"flash-attn-4 {metadata.version('flash-attn-4')}")

    def supports(self, workload: Workload) -> str | None:
        w = workload
        major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
        if w.dtype == "float32":
            return "FlashAttention computes in float16 and bfloat16"
        dims, widest = (w.head_dim, w.value_dim), 256 if major == 9 else 128
        if any(dim % 8 for dim in dims) or (max(dims) > widest and not _blackwells(dims, major)):
            return f"FlashAttention-4 has head dims that are multiples of 8, up to {widest} on this GPU"
        if w.sinks and major in (8, 12):
            return "FlashAttention-4 has sinks on Hopper and on Blackwell for data centres"
        if w.trains and major == 8:
            return "FlashAttention-4 has a backward pass from Hopper on"
        if w.trains and w.softcap and w.head_dim == 256 and major in (10, 11):
            return "FlashAttention-4 has no backward pass with softcap for a head dim of 256"
        return "FlashAttention is for GPUs of compute capability 8.0 and later" if major < 8 else None


def _blackwells(dims: tuple[int, int], major: int) -> bool:
    return major in (10, 11) and dims in (DEEPSEEK, (256, 256))
