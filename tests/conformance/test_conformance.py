"""Every installed plugin, in every declared option, against the float64 reference of what it says it computes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from machine_lacks import is_the_machines

from attnbench.judge.cases import CASES
from attnbench.judge.conformance import check
from attnbench.plugin import Plugin
from attnbench.registry import canonical, find, instances, load
from attnbench.workload import Workload

SHAPES = ("one", "odd", "tail", "cache", "step", "grouped", "multi-query", "batch", "value-dim")
KINDS = list(product(("float32", "bfloat16"), ("full", "causal")))
EVERY = list(product(enumerate(SHAPES), enumerate(KINDS)))


def cases() -> Iterator[object]:
    """What each plugin says that it can do, or could on another machine.

    `make test` takes each shape in one of the four kinds, the other three are slow: together they are one path.
    """
    for found in find().values():
        if found.distribution != "attnbench":
            continue
        for values in instances(load(found.target), {}, every=True):
            plugin = load(found.target)(**values)
            for (s, shape), (k, (dtype, mask)) in EVERY:
                workload = CASES[shape].workload.replace(dtype=dtype, mask=mask)
                reason = plugin.supports(workload)
                compiles = values.get("impl") == "flex" and (shape, dtype) != ("tail", "float32")
                if compiles or (reason and not is_the_machines(reason)):
                    continue  # compiling takes minutes; test_block_sparse.py covers flex_attention
                name = f"{canonical(found.name, values)}-{shape}-{dtype}-{mask}"
                marks = [pytest.mark.slow] if s % len(KINDS) != k else []
                yield pytest.param(plugin, workload, shape in ("tail", "grouped", "batch"), id=name, marks=marks)


@pytest.mark.parametrize(("plugin", "workload", "strided"), list(cases()))
def test_a_plugin_computes_what_it_defines(plugin: Plugin, workload: Workload, strided: bool) -> None:
    if reason := plugin.supports(workload):
        pytest.skip(reason)
    found = check(plugin, workload, strided=strided)
    assert (found.status, found.reason) == ("ok", "")
