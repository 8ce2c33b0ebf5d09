"""What workloads ask for beyond plain attention: who honours it is right, and everybody else refuses it in a line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from machine_lacks import is_the_machines
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnbench.judge.conformance import check
from attnbench.workload import Workload

ASKED: dict[str, dict[str, Any]] = {
    "scale": {"softmax_scale": 0.3},
    "window": {"mask": "window:20"},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi-bias": {"bias": "alibi"},
    "relative-bias": {"bias": "relative"},
    "tree": {"mask": "tree:2x3", "phase": "decode", "seq": 7},
}
MANY = {"softmax_scale": 0.2, "mask": "window:33", "softcap": 2.0, "bias": "alibi"}
BIASES = "alibi-bias relative-bias"
HONOURED = {
    "naive": f"scale window softcap sinks tree {BIASES}",
    "sdpa": f"scale window tree {BIASES}",
    "sdpa:backend=math": f"scale window tree {BIASES}",
    "tiled": f"scale window softcap sinks tree {BIASES}",
    "tiled:impl=native": f"scale window sinks tree {BIASES}",
    "tiled:impl=strip": f"scale window softcap sinks tree {BIASES}",
    "paged": "scale window tree",
    "mla": "scale window",
    "differential": "scale window",
    "xformers": "scale window",
    "block-sparse": "scale",
    "block-sparse:impl=gather": "scale",
    "int8": "scale window",
    "int8:impl=torch": "scale window",
    "int8:impl=qkpv": "scale window",
    "int4": "scale",
    "fp8": "scale",
    "nystroem": "scale",
    "linear": "",
    "retention": "",
}
SIZES = {"heads": 2, "kv_heads": 1, "head_dim": 32, "value_dim": 32}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("spec", HONOURED)
def test_it_is_honoured_or_refused(spec: str, asked: str) -> None:
    masked = {"mask": "causal"} if spec == "retention" else {}
    w = Workload(**(SIZES | {"seq": 210, "kv_seq": 257, "dtype": "bfloat16"} | masked | ASKED[asked]))
    found = check(spec, w, strided=True)
    if asked not in HONOURED[spec].split():
        # Who has no such step at all says that first.
        first = {"int8:impl=qkpv": "the cache has a scale for each token", "nystroem": "it cannot add tokens to a past"}
        said = first.get(spec, f"it has no {asked}") if asked == "tree" else f"it has no {asked}"
        assert (found.status, found.reason[: len(said)]) == ("unsupported", said)
        return
    if is_the_machines(found.reason):
        pytest.skip(found.reason)
    assert (found.status, found.reason) == ("ok", "")


@pytest.mark.parametrize("spec", [name for name in HONOURED if "window" in HONOURED[name]])
def test_all_that_a_variant_honours_at_once(spec: str) -> None:
    fields = {"scale": "softmax_scale", "window": "mask", "softcap": "softcap", "alibi-bias": "bias"}
    same = {"dtype": "float32" if "qkpv" not in spec else "bfloat16"} | SIZES
    same |= {fields[name]: MANY[fields[name]] for name in HONOURED[spec].split() if name in fields}
    several = [{"phase": "decode", "seq": 2}, {"batch": 2}, {"phase": "train"}]
    if "sinks" in HONOURED[spec]:
        several.append({"sinks": True})
    for each in several:
        found = check(spec, Workload(**({"seq": 100, "kv_seq": 100} | same | each)))
        if is_the_machines(found.reason):
            pytest.skip(found.reason)
        may_refuse = "phase" in each and spec not in ("naive", "sdpa", "xformers")
        assert found.status == "ok" or (may_refuse and found.status == "unsupported"), (each, found.reason)


@pytest.mark.parametrize("asked", ASKED)
def test_a_plugin_that_never_heard_of_it_is_not_called(asked: str) -> None:
    def mine(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal="mask" in ASKED[asked], enable_gqa=True)

    w = Workload(**(SIZES | {"seq": 30, "kv_seq": 30} | ASKED[asked]))
    assert check(mine, w).reason == f"it has no {asked}"


@pytest.mark.parametrize("same", [{"softmax_scale": 32**-0.5}, {"mask": "window:30"}, {"softcap": 0.0}])
def test_what_changes_nothing_is_not_asked_for(same: dict[str, Any]) -> None:
    w = Workload(**(SIZES | {"seq": 30, "kv_seq": 30, "mask": "causal"} | same))
    assert w.beyond == ()
    assert check("linear", w).status == "ok"


def test_the_reference_is_the_textbooks() -> None:
    w = Workload(seq=9, kv_seq=12, heads=1, kv_heads=1, head_dim=4, value_dim=4, sinks=True, **MANY)
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 4, dtype=torch.float64) for n in (9, 12, 12))
    sink = torch.randn(1, dtype=torch.float64)
    out = torch.zeros(9, 4, dtype=torch.float64)
    for i in range(9):
        at = i + 3
        scores = {j: 2 * (0.2 * (q[i] @ k[j]) / 2).tanh() - (at - j) / 256 for j in range(max(0, at - 32), at + 1)}
        weights = {j: score.exp() for j, score in scores.items()}
        total = sum(weights.values()) + sink.exp()
        out[i] = sum(weight * v[j] for j, weight in weights.items()) / total
    from attnbench.judge.reference import exact

    found = exact(w, *(x[None, None] for x in (q, k, v)), torch.arange(9), [sink])
    assert torch.allclose(found[0, 0], out, atol=1e-12)
