"""torch's flex_attention over all pairs, or all below the diagonal: what block-sparse saves is measured against it.

The same compiler and the same kernel as `block-sparse:impl=flex`, so that only the blocks differ (Dong 2024, "Flex
Attention").
"""

from __future__ import annotations

import torch
from attnbench_plugins.block_sparse import flex_unsupported
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload

BLOCK = 128  # queries and keys to a block of the causal mask


class FlexDense(Plugin):
    """flex_attention compiled for one shape: with no mask at all, or with the causal one as a block mask."""

    phases = ("forward", "train")

    def supports(self, workload: Workload) -> str | None:
        return flex_unsupported(workload, BLOCK)

    def build(self, workload: Workload) -> Attention:
        w, offset = workload, workload.offset
        block_mask = None
        if w.is_causal:
            block_mask = create_block_mask(
                lambda _batch, _head, row, key: key <= row + offset,
                None, None, w.seq, w.kv_seq, device=w.device, BLOCK_SIZE=BLOCK,
            )  # fmt: skip
        torch._dynamo.config.recompile_limit = 1024  # a shape is a compilation, and the usual limit of 8 too few
        # On a CPU its code holds a buffer for each thread.
        options: dict[str, object] = {"cpp.threads": w.threads} if w.device == "cpu" else {}
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, options=options)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = compiled(query, key, value, block_mask=block_mask, scale=w.scale, enable_gqa=w.group > 1)
            return out

        # Compiled here, by zeros of the workload's shape: its time is no call's.
        dtype, trained, kv = getattr(torch, w.dtype), w.phase == "train", (w.batch, w.kv_heads, w.kv_seq)
        shapes = (w.batch, w.heads, w.seq, w.head_dim), (*kv, w.head_dim), (*kv, w.value_dim)
        zeros = [torch.zeros(shape, dtype=dtype, device=w.device, requires_grad=trained) for shape in shapes]
        with torch.set_grad_enabled(trained):
            out = attend(*zeros)
        if trained:
            torch.autograd.grad(out, zeros, torch.zeros_like(out))
        return Attention(attend, "flex_attention, compiled for this shape, all pairs that the mask shows")
