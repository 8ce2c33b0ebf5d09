"""torch's own ring attention, the one behind `torch.distributed.tensor.experimental.context_parallel`.

That API replaces scaled_dot_product_attention by itself on a `DTensor`, and knows CUDA's kernels alone. On a CPU torch
2.13 says: "Operator aten._scaled_dot_product_flash_attention_for_cpu.default does not have a sharding strategy
registered". Behind it lies a ring that is given its operator, `_templated_ring_attention`: that one is called here,
with the flash operator of the device. Causal, its order is zigzag.

A rank sends what it does in `ring`, but for the gradients of keys and values: those, in float32, take N steps, not
N - 1, as the first to add to them is who holds the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup

from attnbench.plugin import Attention, Option
from attnbench.workload import Workload

from ..autograd import differentiable
from . import kernel
from .order import Ordered

_METHODS = {"alltoall": "ALL_TO_ALL", "allgather": "ALL_GATHER"}


class TorchRing(Ordered):
    """torch's templated ring attention, which context_parallel runs on GPUs, with the operator of this device."""

    options: ClassVar[Mapping[str, Option]] = {
        "rotate": Option("alltoall", "how keys and values travel; allgather holds all of them", tuple(_METHODS))
    }
    rotate: str
    order = "zigzag"
    formula = "torch-ring"
    preloads = ("torch.distributed.tensor.experimental",)

    def unsupported(self, workload: Workload, world: int) -> str | None:
        try:
            _ring()
        except (ImportError, AttributeError) as missing:
            return f"this torch has no such ring: {missing}"
        return super().unsupported(workload, world)

    def build(self, workload: Workload, group: ProcessGroup) -> Attention:
        both = _Both(workload, group, _METHODS[self.rotate])
        return Attention(differentiable(both.forward, both.backward), f"torch's ring, {self.rotate}, torch flash")


class _Both:
    """The forward and the backward ring. What torch keeps of its options for the process is set before each."""

    def __init__(self, workload: Workload, group: ProcessGroup, method: str) -> None:
        self._workload, self._group, self._method = workload, group, method

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp (batch, heads, queries), of parts: query (batch, heads, queries, head_dim)."""
        ring, causal = self._ready(), self._workload.is_causal

        def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
            return kernel.forward(query, key, value, is_causal, self._workload.scale)

        found = ring._templated_ring_attention(self._group, 2, attend, query, key, value, causal)
        return found[0], found[1]

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the parts of query, key and value; up: of the output's part."""
        ring, causal = self._ready(), self._workload.is_causal

        def differentiate(
            *, up: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
        ) -> tuple[Tensor, ...]:
            return kernel.backward(up, query, key, value, out, logsumexp, is_causal, self._workload.scale)

        found = ring._templated_ring_attention_backward(
            self._group, 2, differentiate, up, "up", query, key, value, out, lse, causal
        )
        return found[0], found[1], found[2]

    def _ready(self) -> Any:
        ring = _ring()
        ring._cp_options.enable_load_balance = self._workload.is_causal
        ring._cp_options.rotate_method = ring._RotateMethod[self._method]
        return ring


def _ring() -> Any:
    """torch's module. Raises: ImportError, AttributeError: it has changed, as it is marked experimental."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    for name in ("_templated_ring_attention", "_templated_ring_attention_backward", "_cp_options", "_RotateMethod"):
        getattr(_attention, name)
    return _attention
