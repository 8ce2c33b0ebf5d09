"""flash-linear-attention's chunk_linear_attn, in Triton, on the features of Katharopoulos et al. 2020 (equation 7)."""

from __future__ import annotations

from fla.ops.linear_attn import chunk_linear_attn
from torch import Tensor
from torch.nn.functional import elu

from attnbench.plugin import Attention, FeatureMap, Plugin
from attnbench.workload import Workload


class FlaLinear(Plugin):
    """The function of attnbench's `linear`: elu(x) + 1 as features, no scale, each row divided by its sum of weights.

    fla divides by that sum + 1e-10, and keeps the running sum of the keys' features in the inputs' dtype.
    """

    family = "kernel"
    devices = ("cuda",)
    phases = ("forward", "train")

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if not w.is_causal or w.offset:
            return "chunk_linear_attn is causal, for as many queries as keys"
        if w.group > 1:
            return "chunk_linear_attn has no grouped queries"
        if w.phase == "train" and (w.head_dim % 2 or w.value_dim % 2):
            return "its backward pass needs an even head dim and value dim"
        return "float32 is multiplied as tf32" if w.dtype == "float32" else None

    def definition(self, workload: Workload) -> FeatureMap:
        return FeatureMap(query=phi, key=phi)

    def flops(self, workload: Workload) -> int:
        """As `linear`: keys into the state, queries reading it, and the scores within each chunk of 64."""
        w = workload
        rows = w.batch * w.heads * w.seq
        return 2 * rows * (2 * w.head_dim * w.value_dim + min(64, w.seq) * (w.head_dim + w.value_dim))

    def build(self, workload: Workload) -> Attention:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # (batch, heads, length, dim) -> fla's (batch, length, heads, dim)
            q, k, v = (x.transpose(1, 2).contiguous() for x in (phi(query), phi(key), value))
            out, _ = chunk_linear_attn(q, k, v, scale=1.0, normalize=True)
            return out.transpose(1, 2).to(query.dtype)

        return Attention(attend, "fla chunk_linear_attn, Triton, features by torch")


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1, of any shape."""
    return elu(x) + 1
