"""The recurrences: against their equations, the float64 reference, its gradients, and decoding token by token."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from attnbench_plugins.recurrent.gated_delta import GatedDelta
from attnbench_plugins.recurrent.gated_linear import GatedLinear
from attnbench_plugins.recurrent.kimi_delta import KimiDelta
from attnbench_plugins.recurrent.recurrence import Recurrent, rates
from attnbench_plugins.recurrent.retention import Retention
from attnbench_plugins.recurrent.rwkv7 import MOST, Rwkv7
from attnbench_plugins.recurrent.ssd import Ssd
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.judge.reference import expected
from attnbench.workload import Workload

VARIANTS: dict[str, type[Recurrent]] = {
    "retention": Retention,
    "gated-delta": GatedDelta,
    "gated-linear": GatedLinear,
    "ssd": Ssd,
    "kimi-delta": KimiDelta,
    "rwkv7": Rwkv7,
}
SHAPES = {
    "one": {"seq": 1, "kv_seq": 1},
    "one of many": {"seq": 1, "kv_seq": 40},
    "odd": {"seq": 17, "kv_seq": 17},
    "whole chunks": {"seq": 64, "kv_seq": 64},
    "tail of one": {"seq": 65, "kv_seq": 65},
    "grouped": {"seq": 50, "kv_seq": 50, "heads": 6},
    "multi-query": {"seq": 33, "kv_seq": 70, "heads": 4, "kv_heads": 1},
    "batch": {"seq": 21, "kv_seq": 21, "batch": 3},
    "wide value": {"seq": 40, "kv_seq": 40, "value_dim": 24},
    "past": {"seq": 40, "kv_seq": 90, "heads": 4},
}
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-3}
variants = pytest.mark.parametrize("name", VARIANTS)
shapes = pytest.mark.parametrize("shape", SHAPES)


def workload(shape: str, **changes: Any) -> Workload:
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 16, "value_dim": 16, "mask": "causal"}
    return Workload(**(sizes | SHAPES[shape] | changes))


def inputs(plugin: Recurrent, w: Workload) -> list[Tensor]:
    """query, key, value and gates, all of unit variance."""
    generator = torch.Generator(w.device).manual_seed(w.seed)
    tokens = [(w.kv_heads, w.kv_seq, n) for n in (w.head_dim, w.value_dim, *plugin.gates(w))]
    made = [
        torch.randn(w.batch, *x, generator=generator, device=w.device) for x in [(w.heads, w.seq, w.head_dim), *tokens]
    ]
    return [x.to(getattr(torch, w.dtype)) for x in made]


def reference(plugin: Recurrent, w: Workload, tensors: list[Tensor]) -> Tensor:
    query, key, value, *gates = tensors
    return expected(plugin.definition(w), w, query, key, value, torch.arange(w.seq), gates)


def rel_l2(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


@variants
def test_a_token_changes_the_state_as_the_paper_writes_it(name: str) -> None:
    w = workload("grouped")
    plugin = VARIANTS[name]()
    _, key, value, *gates = (x.double() for x in inputs(plugin, w))
    definition = plugin.definition(w)
    k = definition.key(key)[:, :, 0]
    state = torch.randn(w.batch, w.kv_heads, w.head_dim, w.value_dim, dtype=torch.float64)
    new = definition.update(state, k, value[:, :, 0], *(x[:, :, 0] for x in gates))
    for h in range(w.kv_heads):
        s, column, row = state[0, h], k[0, h, :, None], value[0, h, :1]
        raw = [x[0, h, 0] for x in gates]
        rate, dt0 = 1 + 15 * (h + 0.5) / w.kv_heads, 0.001 * 100 ** ((h + 0.5) / w.kv_heads)
        if name == "retention":
            should = (1 - 2.0 ** (-5 - h)) * s + column @ row
        elif name == "ssd":
            dt = math.log1p(math.exp(raw[0].item() + math.log(math.expm1(dt0))))
            should = math.exp(-rate * dt) * s + dt * column @ row
        elif name == "gated-delta":
            alpha = math.exp(-rate * math.log1p(math.exp(raw[0].item() + math.log(math.expm1(dt0)))))
            beta = 1 / (1 + math.exp(-raw[1].item()))
            should = alpha * (torch.eye(w.head_dim) - beta * column @ column.T) @ s + beta * column @ row
            assert math.isclose(float(column.norm()), 1)
        elif name == "kimi-delta":
            dts = 0.001 * 100 ** ((torch.arange(w.head_dim, dtype=torch.float64) + 0.5) / w.head_dim)
            alpha = torch.exp(-rate * torch.log1p(torch.exp(raw[0]) * torch.expm1(dts)))
            beta = 1 / (1 + math.exp(-raw[1].item()))
            erased = torch.eye(w.head_dim) - beta * column @ column.T
            should = erased @ torch.diag(alpha) @ s + beta * column @ row
            assert math.isclose(float(column.norm()), 1)
        elif name == "rwkv7":
            n = torch.arange(w.head_dim, dtype=torch.float64) + 0.5
            at, z = (h * w.head_dim + n) / (w.kv_heads * w.head_dim), 2 * n / w.head_dim - 1
            d, a = raw[0] - 5.5 + 6 * at + 2.5 * z * z.abs(), raw[1] - 0.19 + 0.4 * (at - 0.5) + 0.3 * z * z.abs()
            kept, a = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-d))), 1 / (1 + torch.exp(-a))
            kappa = column[:, 0] / column.norm()
            # As equation 17 has it, with rows of values.
            wkv = s.T @ (torch.diag(kept) - kappa[:, None] @ (a * kappa)[None]) + row.T @ (a * column[:, 0])[None]
            should = wkv.T
        else:
            should = torch.diag((1 / (1 + torch.exp(-raw[0]))) ** (1 / 16)) @ s + column @ row
        torch.testing.assert_close(new[0, h], should, rtol=1e-12, atol=1e-13)


def test_queries_are_scaled_but_not_those_of_a_state_space_model() -> None:
    w, x = workload("odd"), torch.randn(3, 16, dtype=torch.float64)
    for name, should in {
        "retention": x / 4,
        "gated-linear": x / 4,
        "gated-delta": x / x.norm(dim=-1)[:, None] / 4,
        "kimi-delta": x / x.norm(dim=-1)[:, None] / 4,
        "rwkv7": x / 4,
        "ssd": x,
    }.items():
        torch.testing.assert_close(VARIANTS[name]().definition(w).query(x), should)


def test_heads_begin_where_mamba_2_lets_them() -> None:
    for kv_heads in (1, 8):
        rate, bias = rates(workload("odd", heads=kv_heads, kv_heads=kv_heads))
        dt = torch.nn.functional.softplus(bias)
        assert bool(((rate >= 1) & (rate <= 16) & (dt >= 0.001) & (dt <= 0.1)).all())
        assert len(set(rate.flatten().tolist())) == len(set(dt.flatten().tolist())) == kv_heads


@variants
@shapes
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [0, 16, 7, 1])
def test_chunks_compute_the_definition(name: str, shape: str, dtype: str, chunk: int) -> None:
    w, plugin = workload(shape, dtype=dtype), VARIANTS[name](chunk=chunk)
    tensors = inputs(plugin, w)
    out = plugin.build(w).call(*tensors)
    assert (out.shape, out.dtype) == ((w.batch, w.heads, w.seq, w.value_dim), tensors[0].dtype)
    assert rel_l2(out, reference(plugin, w, tensors)) < TOLERANCE[dtype]


@variants
def test_a_long_sequence_in_chunks_of_the_default(name: str) -> None:
    w, plugin = workload("odd", seq=1000, kv_seq=1000, head_dim=32), VARIANTS[name]()
    tensors = inputs(plugin, w)
    assert rel_l2(plugin.build(w).call(*tensors), reference(plugin, w, tensors)) < 1e-5


@variants
@shapes
def test_gradients_of_all_heads(name: str, shape: str) -> None:
    w, plugin = workload(shape, phase="train"), VARIANTS[name](chunk=16)
    leaves = [x.requires_grad_() for x in inputs(plugin, w)]
    up = torch.randn(w.batch, w.heads, w.seq, w.value_dim, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(plugin.build(w).call(*leaves), leaves, up, allow_unused=True, materialize_grads=True)
    # As reference.gradients does it for one head: by differentiating `expected`.
    wide = [x.detach().double().requires_grad_() for x in leaves]
    should = torch.autograd.grad(
        reference(plugin, w, wide), wide, up.double(), allow_unused=True, materialize_grads=True
    )
    for i, (actual, wanted) in enumerate(zip(found, should, strict=True)):
        # Of a sequence of one token nothing decays: that gate's gradient is 0.
        assert float((actual - wanted).norm()) <= 2e-5 * float(wanted.norm()), f"input {i}"


@variants
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoding_goes_on_where_the_past_ends(name: str, new: int, dtype: str) -> None:
    w, plugin = workload("past", seq=new, kv_seq=47, phase="decode", batch=2, dtype=dtype), VARIANTS[name](chunk=16)
    whole = w.replace(phase="forward", seq=47 + 2 * new, kv_seq=47 + 2 * new)
    query, *tokens = inputs(plugin, whole)
    should = reference(plugin, whole, [query, *tokens])
    decoding = plugin.decoding(w)
    state = decoding.start(*(x[:, :, : w.past] for x in tokens), capacity=w.kv_seq)
    for at in range(w.past, whole.seq, new):
        part = [x[:, :, at : at + new] for x in (query, *tokens)]
        out, after = decoding.step(state, *part)
        assert (out.shape, out.dtype) == ((2, 4, new, 16), query.dtype)
        assert rel_l2(out, should[:, :, at : at + new]) < TOLERANCE[dtype]
        assert torch.equal(decoding.step(state, *part)[0], out), "a step changes the state that it came from"
        state = after


@variants
def test_a_state_is_as_large_for_any_past(name: str) -> None:
    plugin, states = VARIANTS[name](), []
    for past in (0, 1, 100):
        w = workload("grouped", seq=1, kv_seq=past + 1, phase="decode")
        _, *tokens = inputs(plugin, w)
        states.append(plugin.decoding(w).start(*(x[:, :, :past] for x in tokens), capacity=w.kv_seq))
    assert all([(x.shape, x.dtype) for x in state] == [((1, 2, 16, 16), torch.float32)] for state in states)
    assert not states[0][0].any()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "retention"])
@pytest.mark.parametrize("raw", [(-30.0,), (30.0,), (-30.0, 30.0), (-1000.0, 0.0, 1000.0)])
@pytest.mark.parametrize("chunk", [0, 16])
def test_no_gate_is_too_far_out(name: str, raw: tuple[float, ...], chunk: int) -> None:
    w, plugin = workload("past", kv_seq=150, seq=140), VARIANTS[name](chunk=chunk)
    tensors = inputs(plugin, w)
    values, generator = torch.tensor(raw), torch.Generator().manual_seed(1)
    for gate in tensors[3:]:
        gate.copy_(values[torch.randint(len(raw), gate.shape, generator=generator)])
    leaves = [x.requires_grad_() for x in tensors]
    out = plugin.build(w).call(*leaves)
    assert rel_l2(out.detach(), reference(plugin, w, [x.detach() for x in tensors])) < 2e-5
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), leaves))


def test_the_longest_chunk_of_rwkv7_holds_the_strongest_decays() -> None:
    """Its factors lie on both sides of 1."""
    w, plugin = workload("past", kv_seq=256, seq=256), Rwkv7(chunk=MOST)
    query, key, value, decay, rate = inputs(plugin, w)
    tensors = [1e3 * query, 1e3 * key, value, torch.full_like(decay, 1e3), rate]
    leaves = [x.requires_grad_() for x in tensors]
    out = plugin.build(w).call(*leaves)
    assert rel_l2(out.detach(), reference(plugin, w, [x.detach() for x in tensors])) < 2e-5
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), leaves))
    assert "at most 64" in str(Rwkv7(chunk=MOST + 1).supports(w))


@variants
def test_a_key_of_zeros_is_no_nan(name: str) -> None:
    w, plugin = workload("odd"), VARIANTS[name]()
    leaves = [torch.zeros_like(x).requires_grad_() for x in inputs(plugin, w)]
    out = plugin.build(w).call(*leaves)
    assert not out.any()
    assert all(
        bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), leaves, allow_unused=True) if x is not None
    )


@variants
def test_what_cannot_be_is_refused(name: str) -> None:
    variant = VARIANTS[name]
    assert "--mask causal" in str(variant().supports(workload("odd", mask="full")))
    assert "chunk" in str(variant(chunk=-1).supports(workload("odd")))
    assert "for CUDA" in str(variant(impl="fla").supports(workload("odd")))
    with pytest.raises(AttnbenchError, match="for CUDA"):
        variant(impl="fla").build(workload("odd"))
    on_gpu = workload("grouped", device="cuda")
    assert variant().supports(on_gpu) is None, "plain torch can do on CUDA what fla's kernels can't"
    assert "as many kv heads" in str(variant(impl="fla").supports(on_gpu))
    assert "their own chunk" in str(variant(impl="fla", chunk=16).supports(on_gpu))


@variants
def test_the_implementation_says_which_ran(name: str) -> None:
    assert (
        VARIANTS[name]().build(workload("odd")).implementation
        == "plain torch, chunks of 17 (fla's kernels are for CUDA)"
    )
    assert (
        VARIANTS[name](impl="torch", chunk=8).decoding(workload("past", seq=2, phase="decode")).implementation
        == "plain torch, chunks of 2 (as asked)"
    )


@variants
def test_work_grows_with_length_and_memory_with_the_output_alone(name: str) -> None:
    plugin = VARIANTS[name]()
    long = [workload("grouped", seq=n, kv_seq=n) for n in (1024, 2048)]
    assert plugin.flops(long[1]) == 2 * plugin.flops(long[0])
    one, other = (plugin.workspace_bytes(w) or 0 for w in long)
    assert other - one == 4 * 6 * 1024 * 16
    steps = [workload("past", seq=1, kv_seq=n, phase="decode") for n in (100, 100_000)]
    assert plugin.flops(steps[0]) == plugin.flops(steps[1])
    assert plugin.workspace_bytes(steps[0]) == plugin.workspace_bytes(steps[1])


def plain(name: str, *x: Tensor, **more: Any) -> Tensor:
    """fla's own reference, on (batch, length, heads, ..)."""
    family = VARIANTS[name].kernel
    if name == "kimi-delta":
        q, k, v, beta, decay = x
        x = q, k, v, decay, beta
    elif name == "rwkv7":  # theirs is of all such rules, heads first, and subtracts nothing
        q, k, v, kappa, removed, decay = (each.transpose(1, 2) for each in x)
        naive = import_module("fla.ops.generalized_delta_rule.dplr.naive")
        return naive.dplr_recurrence(q, k, v, -kappa, removed, decay)[0].transpose(1, 2)
    naive = import_module(f"fla.ops.{family}.naive")
    return getattr(naive, f"naive_recurrent_{family}")(*x, **more)[0]


@variants
@pytest.mark.parametrize("shape", ["odd", "tail of one", "batch", "wide value"])
def test_as_flash_linear_attention_has_it(name: str, shape: str) -> None:
    pytest.importorskip("fla")
    w, plugin = workload(shape), VARIANTS[name](chunk=16)
    query, key, value, *gates = tensors = inputs(plugin, w)
    out = plugin.build(w).call(*tensors)
    if name == "retention":
        theirs = import_module("fla.ops.retention.naive").naive_retention(query, key, value)
    else:
        k, v, decay, *beta = (x.transpose(1, 2) for x in plugin.terms(w)(key, value, *gates))
        q = plugin.definition(w).query(query).transpose(1, 2) * w.head_dim**0.5  # they scale by themselves
        theirs = plain(name, q, k, v, *beta, decay).transpose(1, 2)
    assert rel_l2(out, theirs.double()) < 3e-6


@pytest.mark.gpu
@variants
@pytest.mark.parametrize("impl", ["torch", pytest.param("fla", marks=pytest.mark.slow)])  # fla tunes its kernels
@pytest.mark.parametrize("phase", ["forward", "decode", "train"])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_on_a_gpu(name: str, impl: str, phase: str, dtype: str) -> None:
    allowed = {"bfloat16": 2e-2, "float32": 4e-3}[dtype]
    if impl == "fla":
        pytest.importorskip("fla")
    sizes = {"kv_seq": 300, "seq": 1 if phase == "decode" else 250, "head_dim": 64, "value_dim": 64}
    w, plugin = workload("past", **sizes, heads=2, device="cuda", dtype=dtype, phase=phase), VARIANTS[name](impl=impl)
    query, *tokens = inputs(plugin, w)
    if phase == "decode":
        decoding = plugin.decoding(w)
        state = decoding.start(*(x[:, :, : w.past] for x in tokens), capacity=w.kv_seq)
        out, _ = decoding.step(state, query, *(x[:, :, w.past :] for x in tokens))
        assert rel_l2(out, reference(plugin, w, [query, *tokens])) < allowed
        return
    leaves = [x.requires_grad_() for x in (query, *tokens)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out, should = plugin.build(w).call(*leaves), reference(plugin, w, wide)
    assert rel_l2(out, should) < allowed
    if phase == "train":
        pairs = (torch.autograd.grad(x.sum(), y) for x, y in ((out, leaves), (should, wide)))
        assert all(rel_l2(a, b) < 2 * allowed for a, b in zip(*pairs, strict=True))
