"""Block-sparse attention by torch's flex_attention (Dong 2024), compiled for a pattern's blocks."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbench.plugin import Call
from attnbench.workload import Workload

from .patterns import Pattern

if TYPE_CHECKING:  # it loads torch's compiler, which takes a second: only where something is compiled
    from torch.nn.attention.flex_attention import BlockMask


def flex_unsupported(workload: Workload, block: int) -> str | None:
    """None, or why flex_attention can't be compiled for this workload on this machine."""
    if workload.device == "cuda":
        if not find_spec("triton"):
            return "flex_attention needs triton"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "flex_attention needs a C compiler"
        if min(workload.head_dim, workload.value_dim) < 16:
            return "flex_attention needs a head dim and value dim of at least 16"
        if block % 128:
            return "flex_attention needs a block that is a multiple of 128"
        return None
    if workload.phase == "train":
        return "flex_attention has no backward on a CPU"
    if platform.system() != "Linux" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "flex_attention needs Linux and AVX2"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler for flex_attention"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python.h for flex_attention"
    return None


def flex(workload: Workload, mask: Pattern, kernel_options: Mapping[str, int | bool] | None = None) -> Call:
    """flex_attention over the pattern's blocks; see `flex_over`."""
    return flex_over(workload, block_mask(mask, workload.device == "cuda").to(workload.device), kernel_options)


def flex_over(
    workload: Workload,
    blocks: BlockMask | None,
    kernel_options: Mapping[str, int | bool] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
) -> Call:
    """flex_attention with this block mask, compiled by calling it once on zeros of the workload's shape.

    blocks: None for all pairs.
    kernel_options: torch's `FlexKernelOptions` for CUDA, such as its tiles; its own choice where nothing is given.
    score_mod: (score, batch, head, query, key) -> the score that counts.
    """
    on_gpu, enable_gqa = workload.device == "cuda", workload.group > 1
    static = on_gpu or score_mod is not None  # torch 2.13's C++ for any length knows no constants of a score_mod
    # Its kernel for few queries, which it takes for static shapes alone, can't have 65 to 127 of grouped heads.
    options = {"FORCE_USE_FLEX_ATTENTION": True, **(kernel_options or {})} if on_gpu else None
    more: dict[str, object] = {"scale": workload.scale} if "scale" in workload.beyond else {}
    more |= {"score_mod": score_mod} if score_mod else {}

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend = _compiled(1 if on_gpu else torch.get_num_threads(), static)
        return attend(query, key, value, block_mask=blocks, enable_gqa=enable_gqa, kernel_options=options, **more)

    dtype, trained = getattr(torch, workload.dtype), workload.phase == "train"
    zeros = [torch.zeros(s, dtype=dtype, device=workload.device, requires_grad=trained) for s in workload.shapes]
    with torch.set_grad_enabled(trained):
        out = call(*zeros)
    if trained:
        torch.autograd.grad(out, zeros, torch.zeros_like(out))
    return call


def block_mask(mask: Pattern, static: bool) -> BlockMask:
    """The pattern's blocks; those of which every pair is seen are listed apart, and no mask is computed in them.

    static: the band is constants of the kernel; else tensors that it reads, so that one compilation serves all bands.
    """
    from torch.nn.attention.flex_attention import BlockMask

    some, every = mask.blocks()
    near = _band(*mask.band.tolist()) if static else mask.near  # alone, as far blocks are whole
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=mask.block,
        mask_mod=lambda _batch, _head, row, key: near(row, key),
        seq_lengths=(mask.seq, mask.kv_seq),
    )


def _band(low: int, high: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`Pattern.near` with the band's edges as constants."""
    return lambda row, key: (key - row >= low) & (key - row <= high)


@cache
def _compiled(threads: int, static: bool) -> Callable[..., Tensor]:
    """flex_attention, compiled when called.

    On a CPU once for all lengths and masks, anew for other heads, dims or strides. On CUDA, and with a score_mod, for
    each shape (`static`): on CUDA only lengths that the compiler knows let the kernel drop the bounds checks of every
    load and every score. torch's tiles for a Hopper GPU, at most 128 x 128, divide our blocks. Two of its kernel
    options would be wrong for a window: ROWS_GUARANTEED_SAFE makes NaN unless a row sees something in the first tile
    that is computed for it, and late rows of a block see nothing of the window's first block; BLOCKS_ARE_CONTIGUOUS
    reads blocks between the window's two edges, which are listed one after the other. PRESCALE_QK rounds the scaled
    query once more.

    threads: the C++ code holds a buffer for each; torch < 2.13 would reuse code compiled for another count. Torch 2.13
    still reuses code for AVX-512 where the same machine is told to do with AVX2, and answers wrong: hence the bits.
    """
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: an error rather than torch's eager code, which computes all pairs. The usual limit of 8 is too few.
    torch._dynamo.config.recompile_limit = 1024
    bits = 512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 256
    options: dict[str, str | int | bool | Callable[..., object]] = {"cpp.threads": threads, "cpp.simdlen": bits}
    return torch.compile(flex_attention, dynamic=not static, fullgraph=True, options=options)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool (query blocks, key blocks) -> int32 counts (1, 1, query blocks) and indices (1, 1, query, key blocks)."""
    count = blocks.sum(-1, dtype=torch.int32)
    index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[None, None], index[None, None].contiguous()


def flex_bytes(workload: Workload, block: int) -> int:
    """What flex_attention holds: log-sum-exp and maximum on a GPU, tiles of each thread and packed K, V on a CPU."""
    w = workload
    if w.device == "cuda":
        return 2 * 4 * w.batch * w.heads * w.seq
    rows, keys = min(block, w.seq), min(block, w.kv_seq)
    tiles = w.threads * (4 * rows * (keys + 2 + w.value_dim) + w.itemsize * (rows * keys + (rows + keys) * w.head_dim))
    packed = w.batch * w.kv_heads * w.kv_seq * (w.head_dim + w.value_dim) * w.itemsize
    return tiles + (packed if w.itemsize < 4 else 0)
