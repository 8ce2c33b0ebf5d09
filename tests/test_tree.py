"""A step of drafts that form a tree: which keys each sees, and who can compute it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attnbench_plugins.int8 import Int8
from attnbench_plugins.naive import Naive
from attnbench_plugins.paged import Paged
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.tiled import Tiled

from attnbench.errors import AttnbenchError
from attnbench.judge.conformance import check
from attnbench.mask import Mask, parents
from attnbench.sweep.settings import Asked
from attnbench.workload import Workload


def step(mask: str, keys: int, **more: Any) -> Workload:
    sizes = {"seq": Mask.parse(mask).nodes, "heads": 4, "kv_heads": 2, "head_dim": 24, "value_dim": 16}
    return Workload(**(sizes | more), kv_seq=keys, mask=mask, phase="decode")


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ("2x3", (0, 0, 1, 1, 2, 2)),
        ("1x4", (0, 1, 2)),
        ("3x2", (0, 0, 0)),
        ("5x1", ()),
        ("0,0,1", (0, 0, 1)),
        ("0,1,0,3", (0, 1, 0, 3)),
    ],
)
def test_a_tree_is_a_list_of_parents(tree: str, wanted: tuple[int, ...]) -> None:
    assert parents(tree) == wanted
    mask = Mask.parse(f"tree:{tree}")
    assert str(mask) == f"tree:{tree}"
    assert mask.nodes == len(wanted) + 1
    assert mask.branches == (tree not in ("1x4", "5x1"))


@pytest.mark.parametrize("wrong", ["", "2x0", "0x2", "x", "1", "0,2", "0,-1", "0,", "2x11", "9999x3", "1x9999"])
def test_what_is_no_tree_is_refused_in_a_line(wrong: str) -> None:
    with pytest.raises(AttnbenchError, match=r"--mask tree:.*write 2x3"):
        Mask.parse(f"tree:{wrong}")


@pytest.mark.parametrize("tree", ["2x3", "0,0,1,1,4,2", "1x3"])
def test_a_draft_sees_the_past_its_ancestors_and_itself(tree: str) -> None:
    w, above = step(f"tree:{tree}", 12), (-1, *parents(tree))
    seen = torch.zeros(w.seq, w.kv_seq, dtype=torch.bool)
    seen[:, : w.past] = True
    for row in range(w.seq):
        node = row
        while node >= 0:
            seen[row, w.past + node] = True
            node = above[node]
    rows, keys = torch.arange(w.seq)[:, None], torch.arange(w.kv_seq)
    assert torch.equal(w.masked.visible(rows, keys, w.offset), seen)
    each = [[bool(w.masked.visible(i, j, w.offset)) for j in range(w.kv_seq)] for i in range(w.seq)]
    assert each == seen.tolist()
    assert w.masked.pairs(w.seq, w.kv_seq) == int(seen.sum())


def test_attention_over_a_tree_is_that_of_a_few_lines() -> None:
    w = step("tree:0,0,1,1", 9, heads=1, kv_heads=1)
    query, key, value = (torch.randn(shape, dtype=torch.float64).float() for shape in w.shapes)
    sees = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4]]  # nodes, by hand
    rows = []
    for q, nodes in zip(query[0, 0], sees, strict=True):
        keys = [*range(4), *(4 + node for node in nodes)]
        weights = [math.exp(float(q @ key[0, 0, j]) / math.sqrt(24)) for j in keys]
        rows.append(sum(x * value[0, 0, j] for x, j in zip(weights, keys, strict=True)) / sum(weights))
    for plugin in (Naive(), Sdpa(), Tiled(), Tiled(impl="strip"), Paged()):
        decoding = plugin.decoding(w)
        state = decoding.start(key[:, :, :4], value[:, :, :4], capacity=9)
        out, _ = decoding.step(state, query, key[:, :, 4:], value[:, :, 4:])
        torch.testing.assert_close(out[0, 0], torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plugin", "how"), [(Tiled(), "C++"), (Paged(), "drafts, pages"), (Sdpa(), "mask made"), (Naive(), "")],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)  # fmt: skip
def test_long_pasts_and_batches(plugin: Any, how: str, isa: str) -> None:
    for more in ({"dtype": "bfloat16", "kv_seq": 700}, {"mask": "tree:3x4"}, {"batch": 3, "lengths": "90,7,300"}):
        w = step(**({"mask": "tree:2x3", "keys": more.pop("kv_seq", 300)} | more))
        found = check(plugin, w)
        assert found.status == "ok", found.reason
        assert how in found.implementation


def test_a_chain_of_drafts_is_causal_and_asks_for_nothing() -> None:
    chain, tree = step("tree:1x3", 40), step("tree:2x2", 40)
    assert (chain.beyond, tree.beyond) == ((), ("tree",))
    assert check(Int8(), chain).status == "ok"
    refused = check(Int8(), tree)
    assert (refused.status, refused.reason) == ("unsupported", "it has no tree")


@pytest.mark.parametrize(
    "wrong", [{"seq": 6}, {"phase": "forward"}, {"scope": "block", "block": "decoder-only", "norm": "pre"}]
)
def test_a_tree_is_a_decoding_step_of_its_nodes(wrong: dict[str, Any]) -> None:
    with pytest.raises(AttnbenchError, match="--phase decode --seq 7 --kv-seq"):
        step("tree:2x3", 40).replace(**wrong)


def test_a_bias_by_distance_says_nothing_of_branches() -> None:
    with pytest.raises(AttnbenchError, match="which a tree's order does not tell"):
        step("tree:2x3", 40, bias="alibi")


def test_a_sweep_adds_the_nodes_of_each_tree() -> None:
    asked = Asked.of(mask="causal,tree:2x3,tree:0,0,1", phase="decode", kv_seq="64,128", device="cpu", dtype="float32")
    found = {(w.mask, w.seq, w.kv_seq, w.scope) for w in asked.sweep.workloads() if w.scope == "attention"}
    nodes = {"causal": 1, "tree:2x3": 7, "tree:0,0,1": 4}
    assert found == {(mask, n, keys, "attention") for mask, n in nodes.items() for keys in (64, 128)}
    assert {w.mask for w in asked.sweep.workloads() if w.scope == "block"} == {"causal"}
