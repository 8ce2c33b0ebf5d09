"""torch's flex_attention over all pairs, or all below the diagonal: what block-sparse saves is measured against it.

The same compiler and the same kernel as `block-sparse:impl=flex`, so that only the blocks differ (Dong 2024, "Flex
Attention").
"""

from __future__ import annotations

from attnbench_plugins.block_sparse.flex_attention import flex_over, flex_unsupported
from torch.nn.attention.flex_attention import create_block_mask

from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload

BLOCK = 128  # queries and keys to a block of the causal mask


class FlexDense(Plugin):
    """flex_attention compiled as `block-sparse` compiles it: without a mask, or with the causal one by blocks."""

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
        return Attention(flex_over(w, block_mask), "flex_attention, compiled, all pairs that the mask shows")
