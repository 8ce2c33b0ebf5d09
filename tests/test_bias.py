"""ALiBi's slopes and T5's buckets are the papers', and of the workload's heads each has its own."""

from __future__ import annotations

import math

import pytest
import torch

from attnbench.bias import Bias, slopes, table
from attnbench.judge.conformance import check
from attnbench.judge.reference import exact
from attnbench.plugin import expand_kv
from attnbench.workload import Workload


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),  # section 3
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes(heads: int, exponents: list[float]) -> None:
    assert slopes(heads) == tuple(2.0**-n for n in exponents)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_transformers(causal: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-400, 1 if causal else 401)
    bucket = t5.T5Attention._relative_position_bucket(distance, bidirectional=not causal)  # 32, up to 128
    numbers = torch.tensor(table(3, 5), dtype=torch.float64)  # (heads, 32)
    assert bucket.unique().tolist() == sorted(set(range(32)) - (set() if causal else {16}))
    assert torch.equal(Bias("relative", 3, causal, 5)(distance), numbers[:, bucket])


@pytest.mark.parametrize("bias", ["alibi", "relative"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_reference_adds_it_head_by_head(bias: str, mask: str) -> None:
    w = Workload(seq=5, kv_seq=40, heads=6, kv_heads=2, head_dim=4, value_dim=3, mask=mask, bias=bias, seed=2)
    q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in w.shapes)
    k, v = (expand_kv(x, w.heads)[0] for x in (k, v))  # (heads, kv_seq, dim)
    out = exact(w, q, k[None, ::3], v[None, ::3], torch.arange(5))[0]  # (heads, seq, value_dim)
    for h, i in ((0, 0), (4, 2), (5, 4)):
        at = i + 35
        seen = range(at + 1) if mask == "causal" else range(40)
        assert w.biased is not None
        added = w.biased(torch.tensor([j - at for j in seen]))[h]
        if bias == "alibi":
            assert added.tolist() == [-slopes(6)[h] * abs(at - j) for j in seen]
        weights = [math.exp(float(q[0, h, i] @ k[h, j]) / 2 + float(x)) for j, x in zip(seen, added, strict=True)]
        should = sum(weight * v[h, j] for weight, j in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(out[h, i], should)


@pytest.mark.parametrize("inside", ["encoder", "decoder-only", "decoder"])
def test_inside_a_block_and_of_a_ragged_batch(inside: str) -> None:
    sizes = {"seq": 12, "kv_seq": 12, "heads": 3, "kv_heads": 3, "head_dim": 16, "value_dim": 16}
    mask = "full" if inside == "encoder" else "causal"
    w = Workload(**sizes, scope="block", block=inside, norm="pre", mask=mask, bias="relative", seed=1)
    each = [w, w.replace(phase="train")]
    each += [w.replace(batch=2, lengths="12,7", bias="alibi")] if inside != "decoder" else []
    for one in each:
        for name in ("naive", "sdpa", "tiled:impl=strip"):
            found = check(name, one)
            assert (found.status, found.reason) == ("ok", ""), (name, one.label())
