"""Block-sparse attention: softmax over the keys that a pattern shows, computing only blocks that it touches."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from attnbench.plugin import (
    Attention,
    Cache,
    Call,
    Choice,
    Decoding,
    Definition,
    Implementation,
    Option,
    Plugin,
    Softmax,
    built,
)
from attnbench.workload import Workload

from .cpu import attention as kernels
from .cpu.attention import Plan
from .patterns import PATTERNS, Pattern, pattern
from .sdpa import Sdpa
from .tiled import Tiled

STRIP_ROWS, BLOCK_KEYS = 128, 512  # the C++ kernel's tile


class BlockSparse(Choice):
    """Sparse attention by blocks of queries and keys: in C++, through torch's flex_attention or in plain torch.

    `impl=avx512` is the C++ kernel of `tiled` over those blocks alone, in bfloat16 on a CPU.
    `impl=flex` compiles torch.nn.attention.flex_attention (Dong 2024, "Flex Attention") for the pattern.
    `impl=gather` runs in plain torch: block by block of queries over the keys that its blocks hold.
    `impl=auto` is the first of these that can run, but for flex on a CPU: there gathering takes about as long and needs
    no compilation, of seconds in each process. The implementation says which, and why. All can be trained, but for
    flex_attention on a CPU: torch's has no backward there.

    The density is the share of seq * kv_seq pairs in the blocks that are computed, hidden pairs in them included:
    what is saved is whole blocks.
    """

    family = "sparse"
    options: ClassVar[Mapping[str, Option]] = {
        "pattern": Option("window", "which keys a query sees", PATTERNS),
        "window": Option(256, "keys seen around the query, on each side (causal: before it), its own included"),
        "block": Option(128, "queries and keys to a block"),
        "impl": Option("auto", "what computes it", ("auto", "avx512", "flex", "gather")),
    }
    pattern: str
    window: int
    block: int

    def supports(self, workload: Workload) -> str | None:
        if self.window < 1 or self.block < 1:
            return "window and block must be at least 1"
        if workload.kv_seq < workload.seq:
            return "a pattern around the query's position needs kv_seq >= seq"
        return super().supports(workload)

    def definition(self, workload: Workload) -> Definition:
        return Softmax(allowed=self._pattern(workload).allowed)

    def flops(self, workload: Workload) -> int | None:
        pairs = workload.batch * workload.heads * self._pattern(workload).pairs()
        return 2 * pairs * (workload.head_dim + workload.value_dim)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        def no_kernel(w: Workload) -> str | None:
            return kernels.unsupported(w, *kernels.exact_sources(w))

        def avx512_bytes(w: Workload) -> int:
            return kernels.workspace_bytes(w, min(STRIP_ROWS, self.block, w.seq), BLOCK_KEYS, kernels.bf16_bytes(w))

        def gathered(w: Workload) -> int:
            return gather_bytes(w, self._pattern(w))

        no_flex, flex_size = partial(flex_unsupported, block=self.block), partial(flex_bytes, block=self.block)
        avx512 = Implementation("avx512", self._avx512, no_kernel, workspace_bytes=_untrained(avx512_bytes))
        flex = Implementation("flex", self._flex, no_flex, workspace_bytes=_untrained(flex_size))
        gather = Implementation("gather", self._gather, workspace_bytes=_untrained(gathered))
        return (flex, gather, avx512) if workload.device == "cuda" else (avx512, gather, flex)

    def _avx512(self, workload: Workload) -> Attention:
        both = plan(self._pattern(workload))
        call = kernels.exact(workload, both, BLOCK_KEYS, both, BLOCK_KEYS)
        return Attention(call, "C++ AVX512-BF16, hidden blocks skipped", self._density(workload))

    def _flex(self, workload: Workload) -> Attention:
        try:
            call = flex(workload, self._pattern(workload))
        except Exception as error:  # whatever a toolchain can throw
            if self.impl == "flex":
                raise
            # Compiled for this shape alone, and in each process anew: a promise can't wait for that to be sure.
            reason = f"flex_attention failed to compile: {str(error).strip().splitlines()[0][:120]}"
            made = self._gather(workload)
            return replace(made, implementation=f"{made.implementation} ({reason})")
        return Attention(call, "flex_attention, compiled", self._density(workload))

    def _gather(self, workload: Workload) -> Attention:
        made, how = (gather_again, ", checkpointed") if workload.phase == "train" else (gather, "")
        asked = " (as asked)" if self.impl == "gather" else ""
        call = made(workload, self._pattern(workload))
        return Attention(call, f"plain torch, block gather{how}{asked}", self._density(workload))

    def workspace_bytes(self, workload: Workload) -> int | None:
        if not _is_step(workload):
            return super().workspace_bytes(workload)
        w, (dense, part) = workload, self._seen(workload)
        held = _dense_plugin(w).workspace_bytes(dense)
        gathered = w.batch * w.kv_heads * dense.kv_seq * (w.head_dim + w.value_dim) * w.itemsize
        return held if held is None or isinstance(part, slice) else held + gathered

    def decoding(self, workload: Workload) -> Decoding:
        """One new token reads the keys that it sees, and no others, by a dense kernel."""
        if not _is_step(workload):
            return super().decoding(workload)
        dense, part = self._seen(workload)
        inner = built(_dense_plugin(workload), dense)

        def step(state: Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Cache]:
            state = state.append(key, value)
            return inner.call(query, state.keys[:, :, part], state.values[:, :, part]), state

        how = "a slice of" if isinstance(part, slice) else "blocks gathered from"
        return Decoding(Cache.of, step, f"{how} the cache, {inner.implementation}", dense.kv_seq / workload.kv_seq)

    def _seen(self, workload: Workload) -> tuple[Workload, slice | Tensor]:
        """A step as attention over the keys alone that it sees, and which those are: a range, or indices."""
        w = workload
        every = torch.arange(w.kv_seq, device=w.device)
        seen = self._pattern(w).allowed(every.new_zeros(1), every).nonzero()[:, 0]  # (keys seen,)
        first, last = int(seen[0]), int(seen[-1])
        part = slice(first, last + 1) if last - first + 1 == len(seen) else seen
        return w.replace(phase="forward", mask="full", kv_seq=len(seen)), part

    def _density(self, workload: Workload) -> float:
        return self._pattern(workload).pairs() / (workload.seq * workload.kv_seq)

    def _pattern(self, workload: Workload) -> Pattern:
        mask = pattern(self.pattern, workload.seq, workload.kv_seq, workload.is_causal, self.window, self.block)
        return mask.to(workload.device)


def _is_step(workload: Workload) -> bool:
    """Whether one new token of a decoder is what there is to compute."""
    return workload.phase == "decode" and workload.seq == 1 and workload.is_causal


def _dense_plugin(workload: Workload) -> Plugin:
    return Tiled() if workload.device == "cpu" else Sdpa()


def _untrained(size: Callable[[Workload], int]) -> Callable[[Workload], int | None]:
    """`size`, but for training, for which nobody knows."""
    return lambda workload: None if workload.phase == "train" else size(workload)


def plan(mask: Pattern) -> Plan:
    """What each strip of query rows computes: the runs of blocks that its block of queries sees.

    A band alone is one run for each strip, within which the kernel follows its edges.
    """
    some, every = (table.tolist() for table in mask.blocks())
    strips = []
    for row, (touched, whole) in enumerate(zip(some, every, strict=True)):
        kinds = [(full and mask.far is not None) if seen else None for seen, full in zip(touched, whole, strict=True)]
        ranges, at = [], 0
        for kind, run in groupby(kinds):
            end = at + len(list(run))
            if kind is not None:
                ranges.append((at * mask.block, min(end * mask.block, mask.kv_seq), kind))
            at = end
        first, last = row * mask.block, min((row + 1) * mask.block, mask.seq)
        step = -(-(last - first) // -(-(last - first) // STRIP_ROWS))  # even strips of at most STRIP_ROWS
        strips += [(i, min(i + step, last), tuple(ranges)) for i in range(first, last, step)]
    low, high = mask.band.tolist()
    return Plan(tuple(strips), (low, high))


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
    workload: Workload, blocks: BlockMask | None, kernel_options: Mapping[str, int | bool] | None = None
) -> Call:
    """flex_attention with this block mask, compiled by calling it once on zeros of the workload's shape.

    blocks: None for all pairs.
    kernel_options: torch's `FlexKernelOptions` for CUDA, such as its tiles; its own choice where nothing is given.
    """
    static, enable_gqa = workload.device == "cuda", workload.group > 1
    # Its kernel for few queries, which it takes for static shapes alone, can't have 65 to 127 of grouped heads.
    options = {"FORCE_USE_FLEX_ATTENTION": True, **(kernel_options or {})} if static else None

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend = _compiled(1 if static else torch.get_num_threads(), static)
        return attend(query, key, value, block_mask=blocks, enable_gqa=enable_gqa, kernel_options=options)

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

    On a CPU once for all lengths and masks, anew for other heads, dims or strides. On CUDA (`static`) for each shape:
    only lengths that the compiler knows let the kernel drop the bounds checks of every load and every score. torch's
    tiles for a Hopper GPU, at most 128 x 128, divide our blocks. Two of its kernel options would be wrong for a window:
    ROWS_GUARANTEED_SAFE makes NaN unless a row sees something in the first tile that is computed for it, and late rows
    of a block see nothing of the window's first block; BLOCKS_ARE_CONTIGUOUS reads blocks between the window's two
    edges, which are listed one after the other. PRESCALE_QK rounds the scaled query once more.

    threads: the C++ code holds a buffer for each; torch < 2.13 would reuse code compiled for another count. Torch 2.13
    still reuses code for AVX-512 where the same machine is told to do with AVX2, and answers wrong: hence the bits.
    """
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


def gather(workload: Workload, mask: Pattern) -> Call:
    """Plain torch: for each block of queries, one product with the keys of the blocks that it sees.

    Holds O(block * keys seen) scores at a time.
    """
    some, every = mask.blocks()
    steps = [_step(mask, row, some[row], every[row], workload.device) for row in range(len(some))]
    w, dtype = workload, _gathered_dtype(workload)
    both, widest = w.batch * w.kv_heads, _widest(w, mask, some)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        buffer = query.new_empty(widest, dtype=torch.float32)
        narrow = buffer if dtype == torch.float32 else query.new_empty(widest, dtype=dtype)
        for rows, keys, hidden in steps:
            q = query[:, :, rows].reshape(both, -1, w.head_dim).to(dtype)  # (both, group * rows, head_dim)
            k, v = (x[:, :, keys].flatten(0, 1).to(dtype) for x in (key, value))  # (both, keys, ..)
            shape = (both, q.shape[1], k.shape[1])
            scores, weights = (x[: shape[0] * shape[1] * shape[2]].view(shape) for x in (buffer, narrow))
            torch.baddbmm(weights, q, k.mT, beta=0, alpha=w.scale, out=weights)
            if dtype != torch.float32:
                scores.copy_(weights)
            if hidden is not None:
                scores.view(both, w.group, *hidden.shape).masked_fill_(hidden, float("-inf"))
            torch.softmax(scores, dim=-1, out=scores)
            if dtype != torch.float32:
                weights.copy_(scores)
            out[:, :, rows] = (weights @ v).view(w.batch, w.heads, -1, w.value_dim)
        return out

    return call


def gather_again(workload: Workload, mask: Pattern) -> Call:
    """`gather` for training: a block of queries keeps no scores, and is computed once more when its gradient is."""
    some, every = mask.blocks()
    steps = [_step(mask, row, some[row], every[row], workload.device) for row in range(len(some))]
    w, dtype, both = workload, _gathered_dtype(workload), workload.batch * workload.kv_heads

    def attend(
        query: Tensor, key: Tensor, value: Tensor, rows: slice, keys: slice | Tensor, hidden: Tensor | None
    ) -> Tensor:
        q = query[:, :, rows].reshape(both, -1, w.head_dim).to(dtype)  # (both, group * rows, head_dim)
        k, v = (x[:, :, keys].flatten(0, 1).to(dtype) for x in (key, value))  # (both, keys, ..)
        scores = (q @ k.mT).float() * w.scale
        if hidden is not None:
            scores = scores.view(both, w.group, *hidden.shape).masked_fill(hidden, float("-inf")).view(scores.shape)
        out = torch.softmax(scores, dim=-1).to(dtype) @ v
        return out.to(query.dtype).view(w.batch, w.heads, -1, w.value_dim)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        again = partial(checkpoint, attend, query, key, value, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*step) for step in steps], 2)

    return call


def _gathered_dtype(workload: Workload) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, workload.dtype)
    return kernels.product_dtype(workload.dtype) if workload.device == "cpu" else dtype


Step = tuple[slice, slice | Tensor, Tensor | None]
"""One block of queries: its rows, the keys that it sees (a range, or indices), True where a pair is hidden."""


def _step(mask: Pattern, row: int, some: Tensor, every: Tensor, device: str) -> Step:
    start, end = row * mask.block, min((row + 1) * mask.block, mask.seq)
    seen = some.nonzero()[:, 0]  # (blocks seen,)
    keys = (seen[:, None] * mask.block + torch.arange(mask.block)).flatten()
    keys = keys[keys < mask.kv_seq].to(device)
    hidden = None
    if not every[seen].all():
        hidden = ~mask.allowed(torch.arange(start, end, device=device)[:, None], keys)  # (rows, keys)
    first, last = int(keys[0]), int(keys[-1])
    neighbours = last - first + 1 == len(keys)
    return slice(start, end), slice(first, last + 1) if neighbours else keys, hidden


def _widest(workload: Workload, mask: Pattern, some: Tensor) -> int:
    """Scores of the block of queries that sees most."""
    rows, keys = min(mask.block, workload.seq), min(int(some.sum(-1).max()) * mask.block, workload.kv_seq)
    return workload.batch * workload.heads * rows * keys


def gather_bytes(workload: Workload, mask: Pattern) -> int:
    """What the widest block of queries holds: scores and weights; its rows of Q and output; its keys and values."""
    w, scores = workload, _widest(workload, mask, mask.blocks()[0])
    rows = w.batch * w.heads * min(mask.block, w.seq)
    dims = (w.head_dim + w.value_dim) * w.itemsize
    return scores * (4 if w.itemsize == 4 else 6) + (rows + scores // rows * w.batch * w.kv_heads) * dims
