"""Variants that choose keys by their values: what they choose, written out as loops; ties; wrong choices are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnbench_plugins.moba import Moba
from attnbench_plugins.selection import best
from attnbench_plugins.sparge import Sparge
from attnbench_plugins.topk_indexer import TopkIndexer
from torch import Tensor

from attnbench import Workload, check
from attnbench.plugin import Attention, Plugin, built

SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 6, "mask": "causal"}


def drawn(w: Workload) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(*shape, generator=generator) for shape in w.shapes)
    return query, key, value


def softmax_over(w: Workload, q: Tensor, k: Tensor, v: Tensor, keys: list[int]) -> Tensor:
    weights = torch.softmax(k[keys].double() @ q.double() / math.sqrt(w.head_dim), 0)
    return weights @ v[keys].double()


def test_the_best_are_sorted_and_of_equal_ones_the_later() -> None:
    scores = torch.tensor([1.0, -2.0, 3.0, -0.0, 3.0, 0.0, -2.0, -torch.inf, torch.inf, 1e-300], dtype=torch.float64)
    assert best(scores, 10).tolist() == [8, 4, 2, 0, 9, 5, 3, 6, 1, 7]
    noise = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)  # as of sums in another order
    assert best(noise, 2).tolist() == [2, 1]


def topk_keys(w: Workload, q: Tensor, k: Tensor, row: int) -> list[list[int]]:
    """Of both query heads of a key head: the 5 keys with the largest sum of ReLU(q . k), in bfloat16."""
    seen = range(row + w.offset + 1)
    heads, keys = q.to(torch.bfloat16).double(), k.to(torch.bfloat16).double()
    score = {s: sum(max(0.0, float(head[row] @ keys[s])) for head in heads) for s in seen}
    chosen = sorted(seen, key=lambda s: (score[s], s))[-5:]
    return [chosen] * len(q)


def moba_keys(w: Workload, q: Tensor, k: Tensor, row: int) -> list[list[int]]:
    """Of each query head: its own block of 4, and of those before it the two with the best means."""
    at = row + w.offset
    means = [k[4 * i : 4 * i + 4].double().mean(0) for i in range(at // 4)]
    picked = []
    for head in q.double():
        blocks = sorted(range(len(means)), key=lambda i: float(head[row] @ means[i]))[-2:]
        picked.append([s for i in [*blocks, at // 4] for s in range(4 * i, 4 * i + 4) if s <= at])
    return picked


def sparge_keys(w: Workload, q: Tensor, k: Tensor, row: int) -> list[list[int]]:
    """Of each query head: of 6 queries together, blocks of 4 keys by softmax of means, up to 0.6 of it."""
    rows = range(row // 6 * 6, min(row // 6 * 6 + 6, w.seq))
    last = rows[-1] + w.offset
    blocks = range(last // 4 + 1)
    picked = []
    for head in q.double():
        mean = head[list(rows)].mean(0)
        fit = torch.stack([mean @ k[4 * j : 4 * j + 4].double().mean(0) for j in blocks]) / math.sqrt(w.head_dim)
        share, total, kept = torch.softmax(fit, 0).tolist(), 0.0, set[int]()
        for j in sorted(blocks, key=lambda j: -share[j]):
            total += share[j]
            if total > 0.6 and kept:
                break
            kept.add(j)
        kept |= {j for j in blocks if any(s // 4 == j for s in range(rows[0] + w.offset, last + 1))}
        picked.append([s for j in kept for s in range(4 * j, 4 * j + 4) if s <= row + w.offset])
    return picked


LOOPS: dict[str, tuple[Plugin, Callable[[Workload, Tensor, Tensor, int], list[list[int]]]]] = {
    "topk-indexer": (TopkIndexer(topk=5, dims=8), topk_keys),
    "moba": (Moba(topk=3, block=4), moba_keys),
    "sparge": (Sparge(mass=0.6, alike=0.0, rows=6, keys=4), sparge_keys),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_variant_is_its_formula_in_loops(name: str) -> None:
    plugin, keys_of = LOOPS[name]
    w = Workload(**SMALL, seq=21, kv_seq=27)
    query, key, value = drawn(w)
    out = built(plugin, w).call(query, key, value)
    for h in range(w.kv_heads):
        heads = slice(h * w.group, (h + 1) * w.group)
        for row in range(w.seq):
            for q, found, keys in zip(
                query[0, heads, row], out[0, heads, row], keys_of(w, query[0, heads], key[0, h], row), strict=True
            ):
                torch.testing.assert_close(
                    found.double(), softmax_over(w, q, key[0, h], value[0, h], keys), atol=1e-6, rtol=1e-5
                )


def test_blocks_that_are_not_alike_are_kept() -> None:
    w = Workload(seq=64, kv_seq=64, heads=1, kv_heads=1, head_dim=16, value_dim=16)
    query, key, value = drawn(w)
    plugin = Sparge(mass=0.3, alike=0.5, rows=16, keys=8)
    made = built(plugin, w)
    assert callable(made.density)
    assert (made.density(), made.call(query, key, value).shape[2], made.density()) == (None, 64, 1.0)
    query, key = (x.clone() for x in (query, key))
    query[:, :, :32] = 3.0 * torch.eye(16)[0]  # two blocks of queries that are alike: they choose
    key[:, :, 8:] = key[:, :, 8::8].repeat_interleave(8, 2)  # all blocks of keys but the first, which is kept for all
    made.call(query, key, value)
    assert made.density() == pytest.approx((32 * 2 + 32 * 8) / (64 * 8))
    assert check(plugin, w.replace(inputs="outlier")).status == "ok"


CASES: dict[str, dict[str, Any]] = {
    "full": {"seq": 40, "kv_seq": 61, "mask": "full"},
    "narrow": {"seq": 50, "kv_seq": 57, "dtype": "bfloat16"},
    "train": {"seq": 41, "kv_seq": 41, "phase": "train"},
    "step": {"seq": 1, "kv_seq": 57, "phase": "decode"},
    "ragged": {"batch": 2, "seq": 33, "kv_seq": 33, "lengths": "33,14"},
    "block": {"scope": "block", "block": "decoder", "norm": "pre", "seq": 24, "kv_seq": 37, "value_dim": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spec", ["topk-indexer:topk=6:dims=4", "moba:topk=2:block=8", "sparge:alike=0:rows=8:keys=4"])
def test_where_few_keys_are_chosen(spec: str, case: str) -> None:
    """At its defaults sparge keeps all of drawn keys, and the others most of what small problems have."""
    found = check(spec, Workload(**(SMALL | CASES[case])), strided=case == "full")
    if spec.startswith("sparge") and case == "step":
        assert found.status == "unsupported"
    else:
        assert (found.status, found.reason) == ("ok", "")
        assert (found.approximation_error or 0.0) > 0.05


class OneTooFew(TopkIndexer):
    """Attends to a key less than it defines."""

    def build(self, workload: Workload) -> Attention:
        return TopkIndexer(topk=self.topk - 1, dims=self.dims).build(workload)


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_another_choice_than_the_defined_one_is_wrong(scope: str) -> None:
    inside = {"scope": "block", "block": "decoder-only", "norm": "pre", "value_dim": 8} if scope == "block" else {}
    w = Workload(**(SMALL | {"seq": 40, "kv_seq": 40} | inside))
    assert check(TopkIndexer(topk=9, dims=4), w).status == "ok"
    found = check(OneTooFew(topk=9, dims=4), w)
    assert found.status == "wrong"
    assert "implementation error" in found.reason
    assert found.reason.startswith("self-attention: ") == (scope == "block")
