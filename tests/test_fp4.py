"""4-bit floats: their rounding and scales, and attention in them, against loops over single numbers; their two errors."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from attnbench_plugins.fp4 import Fp4
from attnbench_plugins.microscaling import FORMATS, decode, encode, round_e2m1

from attnbench.judge.conformance import check
from attnbench.judge.reference import exact, expected
from attnbench.plugin import Attention
from attnbench.workload import Workload

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # by their codes
E4M3 = [(m if e == 0 else 8 + m) * 2.0 ** (max(e, 1) - 10) for e, m in product(range(16), range(8))][:-1]  # one is NaN
BLOCKS = {"nvfp4": 16, "mxfp4": 32}
SMALL = Workload(seq=5, kv_seq=40, heads=4, kv_heads=2, head_dim=24, value_dim=9, dtype="float32", mask="causal")


def nearest(x: float, numbers: list[float]) -> float:
    """Of two that are as near, the one whose code is even."""
    return min(enumerate(numbers), key=lambda pair: (abs(pair[1] - x), pair[0] % 2))[1]


def rounded(row: list[float], form: str, whole: float = 1.0) -> list[float]:
    """A row of numbers, block by block, after a division by `whole`."""
    out = []
    for start in range(0, len(row), BLOCKS[form]):
        block = [x / whole for x in row[start : start + BLOCKS[form]]]
        peak = max(map(abs, block))
        if form == "nvfp4":
            scale = nearest(peak / 6, E4M3)
        else:
            scale = 2.0 ** (math.floor(math.log2(peak)) - 2) if peak else 1.0
        out += [math.copysign(nearest(abs(x) / scale, E2M1) * scale, x) * whole if scale else 0.0 for x in block]
    return out


def peak(rows: list[list[float]], form: str) -> float:
    """The float32 of a tensor."""
    return max(abs(x) for row in rows for x in row) / (6 * 448) if form == "nvfp4" else 1.0


def test_numbers_of_four_bits() -> None:
    between = [(a + b) / 2 for a, b in pairwise(E2M1)]
    x = torch.tensor([*E2M1, *between, *(n + 1e-3 for n in between), *(n - 1e-3 for n in between), 7.0, 1e4])
    should = torch.tensor([nearest(n, E2M1) for n in x.tolist()])
    assert torch.equal(round_e2m1(x), should)
    assert torch.equal(round_e2m1(-x), -should)
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode(codes).tolist() == [*E2M1, *(-n for n in E2M1)]
    assert torch.equal(encode(decode(codes)), codes)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_blocks_and_their_scales(form: str, size: float) -> None:
    """Also where scales are subnormal numbers of E4M3, or 0, and where they would be over its largest."""
    x = size * torch.randn(7, 50, generator=torch.Generator().manual_seed(3))
    x[2, 16:32] = 0
    numbers, scale = FORMATS[form].narrow(x)
    assert (scale.shape, scale.element_size()) == ((7, -(-50 // BLOCKS[form])), 1)
    should = torch.tensor([rounded(row, form) for row in x.tolist()])
    torch.testing.assert_close(FORMATS[form].widen(numbers, scale), should, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("weights", ["fp4", "full"])
def test_attention_number_by_number(form: str, weights: str) -> None:
    w, generator = SMALL, torch.Generator().manual_seed(1)
    shapes = (w.heads, w.seq, w.head_dim), (w.kv_heads, w.kv_seq, w.head_dim), (w.kv_heads, w.kv_seq, w.value_dim)
    query, key, value = (torch.randn(1, *shape, generator=generator) for shape in shapes)
    out = Fp4(format=form, weights=weights).build(w).call(query, key, value)
    for h in range(w.heads):
        k, v = key[0, h // 2].double(), value[0, h // 2].double()
        k_rows, columns = (k - k.mean(0)).tolist(), v.T.tolist()
        k = torch.tensor([rounded(row, form, peak(k_rows, form)) for row in k_rows], dtype=torch.float64)
        v = torch.tensor([rounded(row, form, peak(columns, form)) for row in columns], dtype=torch.float64).T
        for i in range(w.seq):
            row = query[0, h, i].tolist()
            q = torch.tensor(rounded(row, form, peak([row], form)), dtype=torch.float64)
            p = torch.softmax(k[: i + 36] @ q / math.sqrt(24), 0)  # what the query sees
            if weights == "fp4":
                top = float(p.max())
                p = torch.tensor(rounded((p / top).tolist(), form, peak([[1.0]], form)), dtype=torch.float64) * top
            torch.testing.assert_close(out[0, h, i].double(), p @ v[: i + 36], rtol=1e-4, atol=1e-5)


ERRORS = {("nvfp4", "full"): 0.16, ("nvfp4", "fp4"): 0.18, ("mxfp4", "full"): 0.19, ("mxfp4", "fp4"): 0.22}


@pytest.mark.parametrize(("form", "weights"), ERRORS)
def test_what_four_bits_cost(form: str, weights: str) -> None:
    """With a bias on all keys, which smoothing takes out."""
    w, generator = SMALL.replace(seq=200, kv_seq=200, head_dim=64, value_dim=64), torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, heads, 200, 64, generator=generator) for heads in (4, 2, 2))
    key += 5 * torch.randn(1, 2, 1, 64, generator=generator)
    plugin, rows = Fp4(format=form, weights=weights), torch.arange(200)
    out = plugin.build(w).call(query, key, value).double()
    defined, softmax = expected(plugin.definition(w), w, query, key, value, rows), exact(w, query, key, value, rows)
    assert float((out - defined).norm() / defined.norm()) < 2e-3
    assert 0.8 < float((out - softmax).norm() / softmax.norm()) / ERRORS[form, weights] < 1


class Half(Fp4):
    """Says that it rounds the weights, and doesn't."""

    def build(self, workload: Workload) -> Attention:
        return Fp4(format=self.format, weights="full").build(workload)


def test_a_judge_that_bears_with_edges_sees_what_is_left_out() -> None:
    assert check(Fp4(), SMALL).status == "ok"
    found = check(Half(), SMALL)
    assert (found.status, "implementation error" in found.reason) == ("wrong", True)
