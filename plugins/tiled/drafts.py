"""A decoding step of drafts that form a tree, by kernels that know of none (Miao 2024, "SpecInfer", arXiv 2305.09781).

All drafts see all of the past: that part is full attention of a few queries on many keys, whoever computes it. Among
themselves they are few, and a matrix of them is small. Softmax over both is the mean of the two softmaxes, weighted by
their sums of exponentials (Dao 2023, "FlashAttention-2", section 3.1.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.workload import Workload

from ..pieces import hidden_part


class Drafts:
    """Of a workload whose mask is a tree. past: the problem of its queries on the past alone; None without one."""

    def __init__(self, workload: Workload) -> None:
        self.workload = w = workload
        self.past = w.replace(phase="forward", mask="full", kv_seq=w.past) if w.past else None
        self.hidden = hidden_part(w, slice(0, w.seq), slice(w.past, w.kv_seq))  # (nodes, nodes)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, ...]) -> Tensor:
        """The output, of key and value (batch, kv_heads, nodes, dim) of the drafts.

        past: the output and log-sum-exp (batch, heads, nodes) of the problem on the past; or nothing.
        """
        w = self.workload
        q = query.unflatten(1, (w.kv_heads, w.group)).float()  # (batch, kv_heads, group, nodes, head_dim)
        s = q @ key[:, :, None].float().mT * w.scale  # (batch, kv_heads, group, nodes, nodes)
        s = s.masked_fill_(self.hidden, -torch.inf)
        lse = s.logsumexp(-1).flatten(1, 2)  # (batch, heads, nodes)
        own = (torch.softmax(s, -1) @ value[:, :, None].float()).flatten(1, 2)  # (batch, heads, nodes, value_dim)
        if not past:
            return own.to(query.dtype)
        out, past_lse = past
        share = torch.sigmoid(lse - past_lse)[..., None]  # (batch, heads, nodes, 1), of the drafts
        return torch.lerp(out.float(), own, share).to(query.dtype)
