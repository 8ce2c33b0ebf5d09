"""zentorch, AMD's ZenDNN for torch: its attention operator on a CPU.

Each release is for one release of torch, which its version begins with. It wants AVX-512; elsewhere it hands the call
to torch's own operator, so that there is nothing to compare.
"""

from __future__ import annotations

from importlib import metadata

import torch
import zentorch  # noqa: F401 - it registers its operators
from torch import Tensor

from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload


class Zentorch(Plugin):
    """torch.ops.zentorch.zentorch_sdpa: what zentorch puts in the place of torch's flash operator as it compiles."""

    devices = ("cpu",)
    phases = ("forward", "decode")

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            return "zentorch_sdpa needs AVX-512; without it is torch's own operator"
        if w.value_dim != w.head_dim:
            return "zentorch_sdpa has one dim for queries, keys and values"
        if w.is_causal and w.offset and w.seq > 1:
            return "its causal mask is aligned top-left"
        return None

    def build(self, workload: Workload) -> Attention:
        w = workload

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # It fails where numbers of a row are no neighbours.
            query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
            out: Tensor = torch.ops.zentorch.zentorch_sdpa(
                query, key, value, is_causal=w.is_causal and w.seq > 1, scale=w.scale
            )[0]
            return out

        return Attention(attend, f"zentorch {metadata.version('zentorch')} zentorch_sdpa")
