"""FlashAttention-3 (Shah 2024, arXiv 2407.08608): flash_attn_interface, compiled from the folder hopper/ of its source.

pip has no release of it. Where the GPU's machine has a network, `hf-kernels:repo=kernels-community/flash-attn3` brings
one that is compiled.
"""

from __future__ import annotations

from importlib import metadata

import flash_attn_interface

from .flash import FlashAttention, Functions


class FlashAttention3(FlashAttention):
    """CUDA, for Hopper: products that run while others are loaded, by warps that do one thing each."""

    least = (9, 0)

    def functions(self) -> Functions:
        return Functions.of(flash_attn_interface, f"flash-attn-3 {metadata.version('flash-attn-3')}")
