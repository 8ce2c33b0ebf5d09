"""Ragged batches in one call: what each entry is by itself, whoever computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnbench_plugins.naive import Naive
from attnbench_plugins.paged import Paged
from attnbench_plugins.tiled import Tiled
from test_cpu_kernels import EXACT, make, rel_l2

from attnbench.judge.conformance import check
from attnbench.judge.reference import exact
from attnbench.task import ragged
from attnbench.workload import Workload

BATCHES: dict[str, dict[str, Any]] = {
    "long and short": {"lengths": "700,1,300,7", "seq": 700, "kv_seq": 700, "mask": "causal"},
    "all alike": {"lengths": "130,130", "seq": 130, "kv_seq": 130, "mask": "full"},
    "new queries": {"lengths": "300,500,77,90", "seq": 40, "kv_seq": 500, "mask": "causal"},
    "window": {"lengths": "400,20,211", "seq": 400, "kv_seq": 400, "mask": "window:50"},
}


def workload(name: str, dtype: str, **more: Any) -> Workload:
    case = BATCHES[name]
    batch = case["lengths"].count(",") + 1
    sizes = {"batch": batch, "heads": 6, "kv_heads": 2, "head_dim": 40, "value_dim": 24}
    return Workload(**(sizes | case | more), dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", BATCHES)
def test_one_call_computes_every_entry_and_puts_out_nothing_behind(name: str, dtype: str, isa: str) -> None:
    w = workload(name, dtype)
    query, key, value = make(w, strided=True)
    outs = []
    for b, entry in enumerate(w.entries()):
        key[b, :, entry.kv_seq :], value[b, :, entry.kv_seq :] = torch.nan, torch.nan
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            built = ragged.build(Tiled(impl="native"), w)
            assert "all entries together" in built.implementation
            outs.append(built.call(query, key, value))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], other) for other in outs[1:])
    assert torch.equal(ragged.build(Paged(page=16), w).call(query, key, value), outs[0])
    for b, entry in enumerate(w.entries()):
        own = (x[b : b + 1, :, :n] for x, n in ((query, entry.seq), (key, entry.kv_seq), (value, entry.kv_seq)))
        wanted = exact(entry, *own, torch.arange(entry.seq))
        assert rel_l2(outs[0][b : b + 1, :, : entry.seq], wanted) < EXACT[dtype]
        assert not outs[0][b, :, entry.seq :].any()


@pytest.mark.parametrize("plugin", [Tiled(), Tiled(impl="strip"), Paged(), Naive()], ids=lambda p: type(p).__name__)
def test_the_judge_finds_it_right_at_once_or_entry_by_entry(plugin: Any) -> None:
    for name in ("long and short", "new queries"):
        found = check(plugin, workload(name, "bfloat16"), strided=True)
        assert found.status == "ok", found.reason
        at_once = "together" in found.implementation or "pages" in found.implementation
        assert at_once != ("entry by entry" in found.implementation)


def test_training_goes_entry_by_entry() -> None:
    w = workload("new queries", "float32", phase="train")
    assert "entry by entry" in ragged.build(Tiled(), w).implementation
