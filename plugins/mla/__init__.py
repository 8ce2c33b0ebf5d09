"""Multi-head latent attention (DeepSeek-V2: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1), in its two forms.

A decoder keeps one latent c for each token, and not the keys and values of all heads: those are K = c W_UK and V = c
W_UV (equations 10 and 11), with a matrix of its own for each head. Positions go through a part of the key that all
heads share, and as many dims of each query (decoupled RoPE, equations 14 to 18): scores are q_C . k_C + q_R . k_R.

- `impl=expanded` makes K and V of c and computes attention of as many key heads as query heads. Decoding, it keeps
  them, as DeepSeek's own code does where it is called naive, and transformers': heads * (head_dim + value_dim) numbers
  a token.
- `impl=absorbed` never makes them: q . (W_UK c) = (W_UK^T q) . c, and sum_j p_j W_UV c_j = W_UV sum_j p_j c_j (after
  equation 13). So each query becomes one against the latents themselves, which all heads share as in multi-query
  attention, with head dim d_c + d_R and value dim d_c. A token is d_c + d_R numbers. For each pair of query and key
  that takes more operations, 2 d_c + d_R against head_dim + value_dim: good where reading the past is what costs, bad
  over a prompt.

What fits where. A workload hands over queries, keys and values, and no x to project a latent from. So the latent is a
sum of what it hands over: kv heads in `latent` groups, the keys' first dims and the values of each group added up and
divided by the square root of their number, so that they keep their variance. That gives d_c = latent * (head_dim - rope
+ value_dim), for latent=2 the paper's 4 heads' dims, and k_R likewise of the keys' last `rope` dims over all kv heads.
A block's W_K and W_V with these sums behind them are W_DKV and W_KR, a layer with it is a layer of MLA; where kv heads
are as few as the groups they are nothing else. In between lie no norm and, of the block's style, no RoPE of MLA's own.
W_UK and W_UV are drawn, N(0, 1 / d_c) as before training, by the workload's seed, belong to the variant, and get no
gradient.

It is another function than softmax attention over these keys and values, which a model is trained with; its distance
from that is told as its approximation error and is no fault of its.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Choice, Definition, Implementation, Option, Softmax
from attnbench.workload import Workload

from .absorbed import Absorbed
from .expanded import Expanded
from .latent import Latent


class Mla(Choice):
    """softmax over K = c W_UK and V = c W_UV, with keys' positions in a part that all heads share.

    `impl=auto` decodes absorbed, up to as many new tokens a step as `FEW`; else it takes the form of fewer operations.
    """

    family = "kernel"
    study: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "impl": Option("auto", "which form computes it", ("auto", "absorbed", "expanded")),
        "latent": Option(0, "kv heads' worth of keys and values in the latent; 0: 2, or 1 where kv heads are odd"),
        "rope": Option(0, "dims of a query and key that carry its position; 0: an even third of head_dim"),
    }
    latent: int
    rope: int

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if self.latent < 0 or self.rope < 0 or self.rope >= w.head_dim:
            return f"latent and rope must not be negative, and rope less than head_dim, {w.head_dim}"
        if self.latent and w.kv_heads % self.latent:
            return f"latent={self.latent} kv heads' worth are no whole part of {w.kv_heads} kv heads"
        return super().supports(w)

    def definition(self, workload: Workload) -> Definition:
        latent = self._latent(workload)
        weights = cache(lambda: latent.weights(torch.float64))  # drawing them takes a while

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = latent.rows(key, value).double()  # rounded once, as a cache holds them
            return query, *latent.expand(rows, *weights())

        return Softmax(operands=operands, smooth=True)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        absorbed, expanded = Absorbed(self._latent(workload)), Expanded(self._latent(workload))

        def dear(w: Workload) -> str | None:
            if w.decodes and w.seq <= FEW:
                return None
            times = absorbed.flops(w) / expanded.flops(w)
            return f"absorbed takes {times:.1f} times the operations" if times > 1 else None

        return (
            Implementation(
                "absorbed",
                absorbed.build,
                passed_over=dear,
                workspace_bytes=absorbed.workspace_bytes,
                flops=absorbed.flops,
                decoding=absorbed.decoding,
                honours=("scale", "window"),
            ),
            Implementation(
                "expanded",
                expanded.build,
                expanded.unsupported,
                workspace_bytes=expanded.workspace_bytes,
                flops=expanded.flops,
                decoding=expanded.decoding,
                honours=("scale", "window"),
            ),
        )

    def _latent(self, workload: Workload) -> Latent:
        return Latent.of(workload, self.latent, self.rope)


FEW = 16
"""New tokens of a decoding step up to which it is the reading of the past that costs."""
