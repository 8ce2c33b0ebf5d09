"""Phases: what a plugin is called with, what its answers are held against, and faults that only they can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench import AttnbenchError, Workload
from attnbench.judge import reference
from attnbench.judge.values import judge
from attnbench.plugin import Cache, Call, Decoding, FeatureMap, Plugin, Recurrence, visible
from attnbench.task import inputs
from attnbench.task.call import NoGradient, Task, outputs
from attnbench.theory import costs


def workload(**changes: Any) -> Workload:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16, "seq": 24, "kv_seq": 24}
    if changes.get("scope") == "block":
        block = changes.setdefault("block", "decoder-only")
        changes = {"norm": "pre", "mask": "full" if block == "encoder" else "causal"} | changes
    return Workload(**(sizes | {"threads": 2} | changes))


class Right(Plugin):
    def build(self, workload: Workload) -> Call:
        mask = visible(workload, torch.arange(workload.seq)[:, None], torch.arange(workload.kv_seq))
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Decay(Plugin):
    """S_t = sigmoid(gate) S_{t-1} + k v^T, token by token: slow, and right by construction."""

    family = "recurrent"

    def gates(self, workload: Workload) -> tuple[int, ...]:
        return (1,)

    def definition(self, workload: Workload) -> Recurrence:
        def update(state: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
            return gate.sigmoid()[..., None] * state + key[..., :, None] * value[..., None, :]

        return Recurrence(lambda q: q * workload.scale, lambda k: k, update)

    def build(self, workload: Workload) -> Call:
        w = workload
        start = torch.zeros(w.batch, w.kv_heads, w.head_dim, w.value_dim)
        return lambda *tensors: self.scan(w, start, *tensors)[0]

    def scan(self, w: Workload, state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        grouped, out = q.unflatten(1, (w.kv_heads, w.group)) * w.scale, []
        for t in range(k.shape[2]):
            state = gate[:, :, t, :, None].sigmoid() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            if (row := t - k.shape[2] + q.shape[2]) >= 0:
                out.append(grouped[:, :, :, row] @ state)
        return torch.stack(out, 3).flatten(1, 2), state

    def decoding(self, workload: Workload) -> Decoding:
        w = workload
        empty = torch.zeros(w.batch, w.kv_heads, w.head_dim, w.value_dim)

        def start(key: Tensor, value: Tensor, gate: Tensor, capacity: int) -> Tensor:
            query = key.new_zeros(w.batch, w.heads, 1, w.head_dim)
            return self.scan(w, empty, query, key, value, gate)[1]

        return Decoding(start, lambda state, *tensors: self.scan(w, state, *tensors), "token by token")


def verdict(task: Task, family: str, tensors: list[Tensor], raw: Any) -> dict[str, Any]:
    """As a worker sends it: the errors, and what is wrong."""
    found = judge(task, family, tensors, raw, task.taps(tensors, raw), 0)
    return found.columns | ({"failed": "wrong", "reason": found.problem} if found.problem else {})


def judged(plugin: Plugin, w: Workload) -> dict[str, Any]:
    task = Task(plugin, w)
    gates = task.gates["self"] if w.scope == "attention" else ()
    tensors = inputs.empty(w, gates)
    torch.set_grad_enabled(False)
    try:
        inputs.fill(tensors, w, 0)
        raw = task.call(*tensors)
        return verdict(task, plugin.family, tensors, raw)
    finally:
        torch.set_grad_enabled(True)


SHAPES = {
    "forward": {"phase": "forward"},
    "train": {"phase": "train"},
    "train causal": {"phase": "train", "mask": "causal", "kv_seq": 40},
    "decode": {"phase": "decode", "seq": 1, "mask": "causal"},
    "decode a few": {"phase": "decode", "seq": 3, "mask": "causal"},
    "decode cross": {"phase": "decode", "seq": 2, "mask": "full"},
    "block": {"scope": "block", "block": "encoder"},
    "stack": {"scope": "block", "layers": 3},
    "block train": {"scope": "block", "phase": "train"},
    "decoder train": {"scope": "block", "phase": "train", "block": "decoder", "kv_seq": 30},
    "stack train": {"scope": "block", "phase": "train", "layers": 2, "norm": "post"},
    "block decode": {"scope": "block", "phase": "decode", "seq": 1},
    "decoder decode": {"scope": "block", "phase": "decode", "block": "decoder", "seq": 2},
    "ragged": {"lengths": "24,7"},
    "ragged causal": {"lengths": "9,24", "mask": "causal"},
    "ragged keys": {"lengths": "40,31", "kv_seq": 40},
    "ragged train": {"lengths": "11,24", "phase": "train"},
    "ragged decode": {"lengths": "24,5", "phase": "decode", "seq": 2, "mask": "causal"},
    "ragged block": {"scope": "block", "lengths": "24,3", "phase": "train"},
    "ragged stack decode": {"scope": "block", "phase": "decode", "seq": 1, "layers": 2, "lengths": "24,3"},
    "stack decode": {"scope": "block", "phase": "decode", "seq": 1, "layers": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_variant_is_right_in_every_phase(shape: str) -> None:
    w = workload(**SHAPES[shape])
    facts = judged(Right(), w)
    assert "failed" not in facts, facts
    assert facts["implementation_rel_l2"] == facts["approximation_rel_l2"] < 1e-6
    assert ("key_gradient_rel_l2" in facts) == (w.phase == "train")


@pytest.mark.parametrize(
    "shape", [name for name in SHAPES if "cross" not in name and "decoder" not in name and "keys" not in name]
)
def test_a_recurrence_gets_its_gates_in_every_phase(shape: str) -> None:
    w = workload(**SHAPES[shape]).replace(mask="causal")
    facts = judged(Decay(), w)
    assert "failed" not in facts, facts
    assert facts["implementation_rel_l2"] < 1e-6
    assert "approximation_rel_l2" not in facts
    assert ("gate_gradient_rel_l2" in facts) == (w.phase == "train")


class NoGradientOfKeys(Right):
    def build(self, workload: Workload) -> Call:
        right = super().build(workload)
        return lambda q, k, v: right(q, k.detach(), v)


class NoBackward(Right):
    def build(self, workload: Workload) -> Call:
        right = super().build(workload)
        return lambda q, k, v: right(q.detach(), k.detach(), v.detach())


class OneLayerOff(Right):
    """Wrong in the second call of each step, which is a stack's second layer."""

    def build(self, workload: Workload) -> Call:
        right, calls = super().build(workload), [0]

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            calls[0] += 1
            return right(query, key, value) * (1.01 if calls[0] % 2 == 0 else 1)

        return call


class ForgetsThePast(Right):
    def decoding(self, workload: Workload) -> Decoding:
        right = super().decoding(workload)

        def start(key: Tensor, value: Tensor, capacity: int) -> Cache:
            return Cache.of(torch.zeros_like(key), value, capacity)

        return Decoding(start, right.step, "")


class ChangesItsState(Decay):
    def decoding(self, workload: Workload) -> Decoding:
        right = super().decoding(workload)

        def step(state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            out, new = right.step(state, *tensors)
            state.copy_(new)
            return out, state

        return Decoding(right.start, step, "")


WRONG = {
    "gradient": (NoGradientOfKeys(), {"phase": "train"}, "gradient of key is off"),
    "gradient in a block": (NoGradientOfKeys(), SHAPES["block train"], "self-attention: gradient of key"),
    "past": (ForgetsThePast(), SHAPES["decode"], "implementation error"),
    "past in a block": (ForgetsThePast(), SHAPES["stack decode"], "self-attention of layer 1: implementation error"),
    "layer": (OneLayerOff(), SHAPES["stack"] | {"layers": 2}, "self-attention of layer 2: implementation error"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_faults_of_a_phase_are_found(fault: str) -> None:
    plugin, shape, reason = WRONG[fault]
    facts = judged(plugin, workload(**shape))
    assert facts["failed"] == "wrong"
    assert reason in facts["reason"]


@pytest.mark.parametrize("shape", ["train", "block train"])
def test_an_output_without_gradient_is_no_training(shape: str) -> None:
    with pytest.raises(NoGradient):
        judged(NoBackward(), workload(**SHAPES[shape]))


def test_a_state_that_a_step_changes_is_found_by_the_second() -> None:
    w = workload(phase="decode", seq=1, mask="causal")
    task = Task(ChangesItsState(), w)
    tensors = inputs.empty(w, task.gates["self"])
    inputs.fill(tensors, w, 0)
    verdicts = [verdict(task, "recurrent", tensors, task.call(*tensors)) for _ in range(2)]
    assert ["failed" in v for v in verdicts] == [False, True]


def test_a_cache_grows_in_place_and_refuses_what_does_not_fit() -> None:
    key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    cache = Cache.of(key, value, 5)
    longer = cache.append(key[:, :, :2], value[:, :, :2])
    assert longer.key.data_ptr() == cache.key.data_ptr()
    assert torch.equal(longer.keys, torch.cat([key, key[:, :, :2]], 2))
    assert torch.equal(cache.values, value)  # what it was
    with pytest.raises(AttnbenchError, match="no room for 6"):
        longer.append(key[:, :, :1], value[:, :, :1])


@pytest.mark.parametrize("shape", [n for n, s in SHAPES.items() if s.get("phase") == "decode" and "ragged" not in n])
def test_the_cache_holds_what_theory_says(shape: str) -> None:
    w = workload(**SHAPES[shape])
    new = sum(2 * w.batch * w.kv_heads * (p.kv_seq - p.past) * w.head_dim * 4 for p in costs.attentions(w).values())
    assert Task(Right(), w).cache_bytes == costs.cache_bytes(w) + w.layers * new


def test_padding_is_neither_seen_nor_written() -> None:
    w = workload(lengths="24,7", mask="causal")
    task, tensors = Task(Right(), w), inputs.empty(w)
    inputs.fill(tensors, w, 0)
    before = task.call(*tensors)
    for x in tensors:
        x[1, :, 7:] = float("nan")
    after = task.call(*tensors)
    assert torch.equal(before, after)
    assert not after[1, :, 7:].any()
    assert after[1, :, :7].all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": "24"},
        {"lengths": "24,25"},
        {"lengths": "24,x"},
        {"lengths": "24,0"},
        {"lengths": "1,24", "kv_seq": 30, "mask": "causal"},
    ],
)
def test_lengths_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AttnbenchError, match="--lengths"):
        workload(**wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_and_outputs_are_of_the_size_that_theory_says(shape: str) -> None:
    w = workload(**SHAPES[shape])
    task, tensors = Task(Right(), w), inputs.empty(w)
    assert sum(x.nbytes for x in tensors) + costs.cache_bytes(w) == costs.input_bytes(w)
    assert sum(x.nbytes for x in outputs(task.call(*tensors))) == costs.output_bytes(w)
    assert task.parameter_bytes == 4 * costs.parameters(w)


DEFINITIONS: dict[str, Any] = {
    "softmax": None,
    "features": FeatureMap(lambda x: F.elu(x) + 1, lambda x: F.elu(x) + 1),
}


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_gradients_of_the_reference_are_autograds(definition: str) -> None:
    w = workload(seq=9, kv_seq=13, mask="causal")
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in inputs.shapes(w)]
    up = torch.randn(w.batch, w.heads, w.seq, w.value_dim, dtype=torch.float64)
    query, key, value = tensors
    mask = visible(w, torch.arange(w.seq)[:, None], torch.arange(w.kv_seq))
    wide_key, wide_value = (x.repeat_interleave(w.group, 1) for x in (key, value))
    if definition == "softmax":
        out = F.scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask)
    else:
        scores = ((F.elu(query) + 1) @ (F.elu(wide_key) + 1).mT) * mask
        out = scores @ wide_value / scores.sum(-1, keepdim=True)
    should = torch.autograd.grad(out, tensors, up)
    for b in range(w.batch):
        for h in range(w.kv_heads):
            known = DEFINITIONS[definition] or Right().definition(w)
            found = reference.gradients(known, w, tensors, up, b, h)
            assert_same(
                found, [should[0][b : b + 1, 2 * h : 2 * h + 2], *(x[b : b + 1, h : h + 1] for x in should[1:])]
            )


def assert_same(found: Sequence[Tensor], should: Sequence[Tensor]) -> None:
    for a, b in zip(found, should, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "deviation"), [("normal", 1.0), ("outlier", 1.05)])
def test_a_long_past_is_like_a_drawn_one(kind: str, deviation: float) -> None:
    w = workload(phase="decode", mask="causal", seq=1, kv_seq=1 << 16, heads=2, kv_heads=2, batch=1, inputs=kind)
    w = w.replace(head_dim=64, value_dim=48)
    key, value = inputs.past(w, (), 0)
    assert key.numel() > value.numel() > 1 << 22
    for x, y in zip((key, value), inputs.past(w, (), 0), strict=True):
        assert torch.equal(x, y)
        assert float(x.mean()) == pytest.approx(0, abs=2e-3)
        assert float(x.std()) == pytest.approx(deviation, abs=0.01)
        vectors = x.flatten(0, 2)
        assert len(torch.unique(vectors[:, :4], dim=0)) > 0.95 * len(vectors)
    assert not torch.equal(key, inputs.past(w, (), 1)[0])
    assert not torch.equal(key[..., :48], value)
