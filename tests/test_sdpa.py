"""Which of torch's kernels `sdpa` says that it runs: found out from torch itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnbench_plugins.sdpa import Sdpa, _dispatched
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnbench.plugin import built
from attnbench.workload import Workload

SHAPES: dict[str, dict[str, Any]] = {
    "square": {"seq": 64, "kv_seq": 64},
    "shifted": {"seq": 16, "kv_seq": 64},
    "one": {"seq": 1, "kv_seq": 64},
    "grouped": {"seq": 64, "kv_seq": 64, "heads": 8, "kv_heads": 2},
}


def workload(shape: str, **more: Any) -> Workload:
    return Workload(**{"heads": 4, "kv_heads": 4} | SHAPES[shape] | more)


@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "kernel"), [("auto", "flash"), ("flash", "flash"), ("math", "math")])
def test_on_a_cpu(backend: str, kernel: str, shape: str, mask: str, phase: str) -> None:
    implementation = built(Sdpa(backend=backend), workload(shape, mask=mask, phase=phase)).implementation
    assert implementation.partition(",")[0] == f"torch sdpa: {kernel}"


def test_it_is_seen_and_not_predicted() -> None:
    w = workload("square")

    def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT, -1) @ value

    def forced(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value)

    assert _dispatched(w, scaled_dot_product_attention) == "flash"
    assert _dispatched(w, forced) == "math"
    assert _dispatched(w, by_hand) == "math"
    assert _dispatched(w, lambda query, key, value: value) == "no kernel that is known"


def test_nothing_is_computed_to_find_out() -> None:
    w = workload("square", seq=1 << 17, kv_seq=1 << 17)  # 10^13 operations
    assert _dispatched(w, scaled_dot_product_attention) == "flash"


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn", "math"])
def test_on_a_gpu_what_was_asked_for_runs(backend: str, shape: str, mask: str) -> None:
    w = workload(shape, mask=mask, device="cuda", dtype="bfloat16")
    plugin = Sdpa(backend=backend)
    if reason := plugin.supports(w):
        pytest.skip(reason)
    assert built(plugin, w).implementation.partition(",")[0] == f"torch sdpa: {backend}"
