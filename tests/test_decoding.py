"""What the built-in variants keep of the past: right in every shape, and of the size that it should be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from machine_lacks import is_the_machines
from test_task import judged, workload
from torch import Tensor

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
    assert facts["implementation_rel_l2"] < (1e-4 if w.dtype == "float32" else 2e-2)


BYTES = {  # of a state at 4 k tokens, over that at 1 k
    "sdpa": 4, "naive": 4, "block-sparse": 4, "int8": 4, "int4": 4, "fp8": 4, "fp4": 4, "linear": 1, "retention": 1, "gated-delta": 1,
    "gated-linear": 1, "kimi-delta": 1, "rwkv7": 1, "mla": 4, "differential": 4, "paged": 4, "ssd": 1, "tiled": 4, "xformers": 4,
    "topk-indexer": 4, "moba": 4,
}  # fmt: skip


def test_every_variant_that_decodes_is_tried_in_every_shape_that_it_can() -> None:
    tried = {(type(case.values[0]), case.values[1].seq, case.values[1].kv_seq) for case in cases()}
    assert PLUGINS.keys() == BYTES.keys()
    for name, kind in PLUGINS.items():
        # A recurrence has no full mask.
        shapes = [sizes for sizes in SHAPES.values() if BYTES[name] == 4 or name == "linear" or "mask" not in sizes]
        assert {(kind, sizes["seq"], sizes["kv_seq"]) for sizes in shapes} <= tried, name


@pytest.mark.parametrize("name", BYTES)
def test_a_state_grows_as_it_should(name: str) -> None:
    sizes = [
        Task(PLUGINS[name](), workload(phase="decode", mask="causal", seq=1, kv_seq=n, dtype="bfloat16")).cache_bytes
        for n in (1024, 4096)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(BYTES[name], rel=0.01)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(("name", "bits", "scales"), [("int8", 8, 1), ("fp8", 8, 1), ("int4", 4, 2)])
def test_a_quantized_cache_takes_what_its_bits_take(name: str, bits: int, scales: int) -> None:
    w = workload(phase="decode", mask="causal", seq=1, kv_seq=4096, head_dim=128, value_dim=128, dtype="bfloat16")
    vectors = 2 * 2 * 2 * 4096  # keys and values, batch, kv heads, length
    plain, narrow = (Task(PLUGINS[each](), w).cache_bytes for each in ("sdpa", name))
    assert plain == pytest.approx(vectors * 128 * 2, rel=0.01)
    assert narrow == pytest.approx(vectors * (128 * bits // 8 + 2 * scales), rel=0.01)  # scales of two bytes


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, name: str) -> Tensor:
    """Causal attention in float64, (batch, heads, length, head_dim) each, heads in groups of two a kv head.

    softmax(Q K^T / sqrt(d)) V (Vaswani 2017, equation 1); linear: phi(x) = elu(x) + 1 in place of the exponential
    (Katharopoulos 2020, equations 4, 7 and 9).
    """
    q, k, v = query.double(), key.double().repeat_interleave(2, 1), value.double().repeat_interleave(2, 1)
    if name == "linear":
        weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    else:
        weights = torch.exp(q @ k.mT / q.shape[-1] ** 0.5)
    weights = weights.tril()
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("name", ["naive", "sdpa", "linear"])
def test_steps_from_an_empty_past_say_what_the_paper_says(name: str) -> None:
    whole = workload(seq=12, kv_seq=12, mask="causal")
    query, key, value = (torch.randn(2, h, 12, 16) for h in (4, 2, 2))
    should = attention_by_hand(query, key, value, name).float()
    first = PLUGINS[name]().decoding(whole.replace(phase="decode", seq=1, kv_seq=1))
    state = first.start(key[:, :, :0], value[:, :, :0], capacity=12)
    for t in range(12):
        step = PLUGINS[name]().decoding(whole.replace(phase="decode", seq=1, kv_seq=t + 1)).step
        at = slice(t, t + 1)
        out, state = step(state, query[:, :, at], key[:, :, at], value[:, :, at])
        torch.testing.assert_close(out, should[:, :, at], rtol=1e-4, atol=1e-5)
