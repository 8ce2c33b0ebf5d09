"""Block-sparse attention: softmax over the keys that a pattern shows, computing only blocks that it touches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import (
    Attention,
    Cache,
    Choice,
    Decoding,
    Definition,
    Implementation,
    Option,
    Softmax,
    built,
)
from attnbench.workload import Workload

from ..native import attention as kernels
from ..tiled import exact_here
from .flex_attention import flex, flex_bytes, flex_unsupported
from .native import BLOCK_KEYS, STRIP_ROWS, plan
from .patterns import PATTERNS, Pattern, pattern
from .plain import Gather, gather_bytes


class BlockSparse(Choice):
    """Sparse attention by blocks of queries and keys: in C++, through torch's flex_attention or in plain torch.

    `impl=native` is the C++ kernel of `tiled` over those blocks alone, on a CPU.
    `impl=flex` compiles torch.nn.attention.flex_attention (Dong 2024, "Flex Attention") for the pattern.
    `impl=gather` runs in plain torch: block by block of queries over the keys that its blocks hold.
    `impl=auto` is the first of these that can run, but for flex on a CPU: there gathering takes 0.7 to 1.4 times as
    long (docs/cpu-kernels.md) and needs no compilation, of seconds in each process. The implementation says which, and
    why. All can be trained, but for flex_attention on a CPU: torch's has no backward there.

    The density is the share of seq * kv_seq pairs in the blocks that are computed, hidden pairs in them included:
    what is saved is whole blocks.
    """

    family = "sparse"
    options: ClassVar[Mapping[str, Option]] = {
        "pattern": Option("window", "which keys a query sees", PATTERNS),
        "window": Option(256, "keys seen around the query, on each side (causal: before it), its own included"),
        "block": Option(128, "queries and keys to a block"),
        "impl": Option("auto", "what computes it", ("auto", "native", "flex", "gather")),
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

        def native_bytes(w: Workload) -> int:
            return kernels.workspace_bytes(w, min(STRIP_ROWS, self.block, w.seq), BLOCK_KEYS, kernels.packed_bytes(w))

        def gathered(w: Workload) -> int:
            return gather_bytes(w, self._pattern(w))

        no_flex, flex_size = partial(flex_unsupported, block=self.block), partial(flex_bytes, block=self.block)
        scaled = partial(Implementation, honours=("scale",))  # a window would be one more pattern
        native = scaled("native", self._native, no_kernel, workspace_bytes=_untrained(native_bytes))
        flex = scaled("flex", self._flex, no_flex, workspace_bytes=_untrained(flex_size))
        gather = scaled("gather", self._gather, workspace_bytes=_untrained(gathered))
        return (flex, gather, native) if workload.device == "cuda" else (native, gather, flex)

    def _native(self, workload: Workload) -> Attention:
        both = plan(self._pattern(workload))
        call = kernels.exact(workload, both, BLOCK_KEYS, both, BLOCK_KEYS)
        return Attention(call, f"{kernels.described(workload.dtype)}, hidden blocks skipped", self._density(workload))

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
        gather, asked = Gather(workload, self._pattern(workload)), " (as asked)" if self.impl == "gather" else ""
        call, how = (gather.again, ", checkpointed") if workload.phase == "train" else (gather, "")
        return Attention(call, f"plain torch, block gather{how}{asked}", self._density(workload))

    def workspace_bytes(self, workload: Workload) -> int | None:
        if not _is_step(workload):
            return super().workspace_bytes(workload)
        w, (dense, part) = workload, self._seen(workload)
        held = exact_here(w).workspace_bytes(dense)
        gathered = w.batch * w.kv_heads * dense.kv_seq * (w.head_dim + w.value_dim) * w.itemsize
        return held if held is None or isinstance(part, slice) else held + gathered

    def decoding(self, workload: Workload) -> Decoding:
        """One new token reads the keys that it sees, and no others, by a dense kernel."""
        if not _is_step(workload):
            return super().decoding(workload)
        dense, part = self._seen(workload)
        inner = built(exact_here(workload), dense)

        def step(state: Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Cache]:
            state = state.append(key, value)
            return inner.call(query, state.keys[:, :, part], state.values[:, :, part]), state

        how = "a slice of" if isinstance(part, slice) else "blocks gathered from"
        return Decoding(Cache.of, step, f"{how} the cache, {inner.implementation}", dense.kv_seq / workload.kv_seq)

    def _seen(self, workload: Workload) -> tuple[Workload, slice | Tensor]:
        """A step as attention over the keys alone that it sees, and which those are: a range, or indices."""
        w = workload
        every = torch.arange(w.kv_seq, device=w.device)  # (kv_seq,)
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


def _untrained(size: Callable[[Workload], int]) -> Callable[[Workload], int | None]:
    """`size`, but for training, for which nobody knows."""
    return lambda workload: None if workload.phase == "train" else size(workload)
