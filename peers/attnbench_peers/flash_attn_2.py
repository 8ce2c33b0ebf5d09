"""FlashAttention-2 (Dao 2023, arXiv 2307.08691): the package flash-attn, from 2.6 on, where it has a softcap."""

from __future__ import annotations

from importlib import metadata

import flash_attn.flash_attn_interface as interface

from .flash import FlashAttention, Functions


class FlashAttention2(FlashAttention):
    """CUDA, for Ampere and later: windows, softcaps, a backward pass of all that, and its own call for a cache."""

    def functions(self) -> Functions:
        return Functions.of(interface, f"flash-attn {metadata.version('flash-attn')}")
