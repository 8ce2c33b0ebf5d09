"""Nyström attention against its equations, written out, and where every token is a landmark against softmax."""

from __future__ import annotations

import torch
from attnbench_plugins.nystroem import Nystroem
from torch import Tensor

from attnbench.judge.reference import exact, expected
from attnbench.workload import Workload


def softmax(scores: list[list[float]]) -> Tensor:
    powers = torch.tensor(scores, dtype=torch.float64).exp()
    return powers / powers.sum(1, keepdim=True)


def by_the_paper(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Equations 11 and 13 of one head with 3 landmarks and 2 steps; q (5, 4), k (7, 4), v (7, 2)."""
    few_q = [q[0:2].mean(0), q[2:4].mean(0), q[4]]  # the shorter segments last
    few_k = [k[0:3].mean(0), k[3:5].mean(0), k[5:7].mean(0)]
    kernel, a, back = (
        softmax([[float(x @ y) * scale for y in right] for x in left])
        for left, right in ((q, few_k), (few_q, few_k), (few_q, k))
    )
    z = a.T / (max(float(a[:, j].sum()) for j in range(3)) * max(float(a[i].sum()) for i in range(3)))
    one = torch.eye(3, dtype=torch.float64)
    for _ in range(2):
        z = 0.25 * z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z)))
    return kernel @ z @ back @ v


def test_it_is_the_paper_s() -> None:
    w = Workload(seq=5, kv_seq=7, heads=4, kv_heads=2, batch=2, head_dim=4, value_dim=2)
    plugin = Nystroem(landmarks=3, steps=2)
    torch.manual_seed(0)
    q, k, v = tensors = [torch.randn(shape) for shape in w.shapes]
    should = torch.zeros(2, 4, 5, 2, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            should[b, h] = by_the_paper(*(x.double() for x in (q[b, h], k[b, h // 2], v[b, h // 2])), w.scale)
    defined = expected(plugin.definition(w), w, *tensors, torch.arange(5))
    torch.testing.assert_close(defined, should, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plugin.build(w).call(*tensors).double(), should, rtol=1e-5, atol=1e-5)


def test_with_every_token_a_landmark_more_steps_come_to_softmax() -> None:
    w = Workload(seq=24, kv_seq=24, heads=2, kv_heads=2, head_dim=16, value_dim=8)
    torch.manual_seed(0)
    tensors, rows = [torch.randn(shape) for shape in w.shapes], torch.arange(24)
    should = exact(w, *tensors, rows)
    off = [
        float((Nystroem(landmarks=24, steps=steps).build(w).call(*tensors) - should).norm() / should.norm())
        for steps in (6, 12, 25)
    ]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-3


def test_there_is_no_causal_form() -> None:
    w = Workload(seq=8, kv_seq=8, mask="causal")
    assert Nystroem().supports(w) == "a landmark is a mean over all tokens: --mask full"
    assert Nystroem(landmarks=0).supports(w) == "landmarks must be at least 1, steps not negative"
