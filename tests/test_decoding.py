"""What the built-in variants keep of the past: right in every shape, and of the size that it should be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from machine_lacks import is_the_machines
from test_task import judged, workload

from attnbench.plugin import Plugin
from attnbench.registry import find, instances, load
from attnbench.task.call import Task
from attnbench.workload import Workload

PLUGINS = {
    name: load(found.target)
    for name, found in find().items()
    if found.distribution == "attnbench" and "decode" in load(found.target).phases
}
SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"seq": 1, "kv_seq": 300},
    "first token": {"seq": 1, "kv_seq": 1},
    "a few": {"seq": 3, "kv_seq": 131},
    "multi-query": {"seq": 1, "kv_seq": 200, "heads": 4, "kv_heads": 1},
    "value dim": {"seq": 2, "kv_seq": 90, "head_dim": 16, "value_dim": 24},
    "cross": {"seq": 2, "kv_seq": 70, "mask": "full"},
}


def cases() -> Iterator[object]:
    """What each plugin says that it can do, or could on another machine."""
    for (name, kind), shape, dtype in product(PLUGINS.items(), SHAPES, ("float32", "bfloat16")):
        w = workload(**({"phase": "decode", "mask": "causal", "dtype": dtype} | SHAPES[shape]))
        for values in instances(kind, {}, every=True):
            reason = kind(**values).supports(w)
            if values.get("impl") == "flex" or (reason and not is_the_machines(reason)):
                continue  # flex compiles for minutes; its own tests do that
            yield pytest.param(kind(**values), w, id=f"{name} {'/'.join(map(str, values.values()))}-{shape}-{dtype}")


@pytest.mark.parametrize(("plugin", "w"), list(cases()))
def test_a_step_is_right(plugin: Plugin, w: Workload) -> None:
    if reason := plugin.supports(w):
        pytest.skip(reason)
    facts = judged(plugin, w)
    assert "failed" not in facts, facts


BYTES = {  # of a state at 4 k tokens, over that at 1 k
    "sdpa": 4, "naive": 4, "block-sparse": 4, "int8": 4, "linear": 1, "retention": 1, "gated-delta": 1, "gated-linear": 1,
    "ssd": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_a_state_grows_as_it_should(name: str) -> None:
    sizes = [
        Task(PLUGINS[name](), workload(phase="decode", mask="causal", seq=1, kv_seq=n, dtype="bfloat16")).cache_bytes
        for n in (1024, 4096)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(BYTES[name], rel=0.01)
    torch.set_grad_enabled(True)


def test_an_int8_cache_takes_half_of_bfloat16s() -> None:
    w = workload(phase="decode", mask="causal", seq=1, kv_seq=4096, head_dim=64, value_dim=64, dtype="bfloat16")
    plain, narrow = (Task(PLUGINS[name](), w).cache_bytes for name in ("sdpa", "int8"))
    assert narrow / plain == pytest.approx((64 + 4) / (2 * 64), rel=0.01)


def test_several_steps_are_one_pass() -> None:
    """Token by token from an empty past, each variant that is exact says what the whole says."""
    whole = workload(seq=12, kv_seq=12, mask="causal")
    query, key, value = (torch.randn(2, h, 12, 16) for h in (4, 2, 2))
    for name in ("naive", "sdpa", "linear"):
        should = PLUGINS[name]().build(whole)
        should = getattr(should, "call", should)(query, key, value)
        first = PLUGINS[name]().decoding(whole.replace(phase="decode", seq=1, kv_seq=1))
        state = first.start(key[:, :, :0], value[:, :, :0], capacity=12)
        for t in range(12):
            step = PLUGINS[name]().decoding(whole.replace(phase="decode", seq=1, kv_seq=t + 1)).step
            at = slice(t, t + 1)
            out, state = step(state, query[:, :, at], key[:, :, at], value[:, :, at])
            torch.testing.assert_close(out, should[:, :, at], rtol=1e-4, atol=1e-5)
