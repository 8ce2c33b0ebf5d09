"""Every installed plugin, in every declared option, against the float64 reference of what it says it computes."""

from __future__ import annotations

import pytest

from attnbench.registry import canonical, find, instances, load
from attnbench.workload import Workload

from .checks import check

PLUGINS = [
    pytest.param(found.target, values, id=canonical(found.name, values))
    for found in find().values()
    if found.distribution == "attnbench"
    for values in instances(load(found.target), {}, every=True)
]
SHAPES = {
    "one": {"seq": 1, "kv_seq": 1},
    "odd": {"seq": 17, "kv_seq": 17},
    "tail": {"seq": 257, "kv_seq": 257},
    "cache": {"seq": 100, "kv_seq": 257},
    "decode": {"seq": 1, "kv_seq": 300},
    "grouped": {"seq": 130, "kv_seq": 130, "heads": 4, "kv_heads": 2},
    "multi-query": {"seq": 100, "kv_seq": 140, "heads": 4, "kv_heads": 1},
    "batch": {"seq": 65, "kv_seq": 65, "batch": 2},
    "value-dim": {"seq": 100, "kv_seq": 100, "head_dim": 32, "value_dim": 48},
}


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("target", "values"), PLUGINS)
def test_a_plugin_computes_what_it_defines(target: str, values: dict, shape: str, dtype: str, mask: str) -> None:
    plugin = load(target)(**values)
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 32, "value_dim": 32} | SHAPES[shape]
    workload = Workload(**sizes, dtype=dtype, mask=mask)
    if reason := plugin.supports(workload):
        assert isinstance(reason, str)
        pytest.skip(reason)
    if "pattern" in values and values["impl"] in ("auto", "flex") and (shape, dtype) != ("tail", "float32"):
        pytest.skip("compiling every case takes minutes; test_block_sparse.py covers flex_attention")
    check(plugin, workload, strided=shape in ("tail", "grouped", "batch"))
