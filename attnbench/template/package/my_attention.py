"""my-attention: say here what it computes, and where that is from (paper, section, equation)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbench import Plugin, Workload
from attnbench.plugin import expand_kv, visible


class MyAttention(Plugin):
    """softmax(Q K^T * scale) V in float32, with the matrix of scores in memory: exact, until you change it."""

    api = "1.0"  # of the contract in attnbench.plugin that this is written for
    family = "exact"  # or "sparse", "quantized", "kernel", "recurrent": which tolerance it is held to
    phases = ("forward", "decode", "train")  # without "train" it has no backward pass
    honours = ("scale", "window")  # what it does where a workload asks for it; Plugin.honours has more words

    def supports(self, workload: Workload) -> str | None:
        """None, or in a few words why this workload can't be computed."""
        return None

    def workspace_bytes(self, workload: Workload) -> int | None:
        """What a call holds at its peak beside inputs and output; None if you don't know."""
        w = workload
        scores = w.batch * w.heads * w.seq * w.kv_seq
        return 4 * 3 * scores

    def build(self, workload: Workload) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The call for this workload. What depends on shapes alone, such as a mask, is made here and not timed."""
        w = workload
        rows, keys = torch.arange(w.seq, device=w.device), torch.arange(w.kv_seq, device=w.device)
        hidden = ~visible(w, rows[:, None], keys)  # (seq, kv_seq)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Your mathematics takes the place of these lines.
            k, v = (expand_kv(x.float(), w.heads) for x in (key, value))  # (batch, heads, kv_seq, dim)
            scores = query.float() @ k.mT * w.scale  # (batch, heads, seq, kv_seq)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)  # (batch, heads, seq, kv_seq)
            return (weights @ v).to(query.dtype)  # (batch, heads, seq, value_dim)

        return attend
