"""Differential attention against its equation, pair by pair; and the definition that it brings."""

from __future__ import annotations

import math

import pytest
import torch
from attnbench_plugins.differential import Differential

from attnbench.judge.reference import expected
from attnbench.workload import Workload


@pytest.mark.parametrize("impl", ["halves", "padded"])
@pytest.mark.parametrize(("scale", "by"), [(0.0, 0.8), (0.3, 0.25)])
def test_it_is_the_difference_of_two_maps(impl: str, scale: float, by: float) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 5}
    w = Workload(seq=4, kv_seq=6, mask="causal", softmax_scale=scale, **sizes)
    plugin = Differential(impl=impl, lambda_init=by)
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for shape in w.shapes)
    should = torch.zeros(1, w.heads, w.seq, w.value_dim, dtype=torch.float64)
    for h in range(w.heads):
        for i in range(w.seq):
            for half, sign in ((slice(0, 4), 1.0), (slice(4, 8), -by)):
                weights = []
                for j in range(i + 3):
                    score = float(q[0, h, i, half].double() @ k[0, h // 2, j, half].double())
                    weights.append(math.exp(score * (scale or 1 / math.sqrt(4))))
                mean = sum(weight * v[0, h // 2, j].double() for j, weight in enumerate(weights)) / sum(weights)
                should[0, h, i] += sign * mean
    defined = expected(plugin.definition(w), w, q, k, v, torch.arange(w.seq))
    torch.testing.assert_close(defined, should, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plugin.build(w).call(q, k, v).double(), should, rtol=1e-5, atol=1e-6)


def test_an_odd_head_dim_has_no_halves() -> None:
    w = Workload(seq=2, kv_seq=2, head_dim=7)
    assert Differential().supports(w) == "a head has two halves: head_dim must be even, not 7"
