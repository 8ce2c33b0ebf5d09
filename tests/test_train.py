"""Phase train: the gradients of every variant that has a backward pass, against float64, over odd shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attnbench_plugins.block_sparse import BlockSparse
from attnbench_plugins.block_sparse.patterns import PATTERNS
from attnbench_plugins.int8 import Int8
from attnbench_plugins.linear import Linear
from attnbench_plugins.naive import Naive
from attnbench_plugins.native import compiler
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.tiled import Tiled
from attnbench_plugins.xformers import Xformers
from torch import Tensor

from attnbench.judge.reference import expected, gradients
from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload

SHAPES = {
    "one": {"seq": 1, "kv_seq": 1},
    "one query": {"seq": 1, "kv_seq": 130},
    "odd": {"seq": 67, "kv_seq": 67},
    "tail": {"seq": 131, "kv_seq": 583},
    "even": {"seq": 256, "kv_seq": 256},
    "grouped": {"seq": 70, "kv_seq": 330, "heads": 4, "kv_heads": 2},
    "multi-query": {"seq": 100, "kv_seq": 140, "heads": 5, "kv_heads": 1},
    "batch": {"seq": 65, "kv_seq": 65, "batch": 3},
    "narrow": {"seq": 60, "kv_seq": 60, "head_dim": 1, "value_dim": 1},
    "odd dims": {"seq": 100, "kv_seq": 130, "head_dim": 33, "value_dim": 17},
    "wide value": {"seq": 90, "kv_seq": 90, "head_dim": 16, "value_dim": 144},
    "widest": {"seq": 70, "kv_seq": 200, "head_dim": 256, "value_dim": 256, "heads": 1, "kv_heads": 1},
}
STRIDED = ("tail", "grouped", "batch")

# Each with what it may be off by in bfloat16, where it rounds the scores or does not.
EXACT: dict[str, tuple[Plugin, float]] = {
    "sdpa": (Sdpa(), 7e-3),
    "sdpa math": (Sdpa(backend="math"), 3e-3),
    "naive": (Naive(), 1e-2),
    "xformers": (Xformers(), 1e-2),
    "xformers small": (Xformers(query_chunk=50, key_chunk=70), 1e-2),
    "strip": (Tiled(impl="strip"), 3.5e-3),
    "strip small": (Tiled(impl="strip", rows=7, keys=64), 3.5e-3),
    "native": (Tiled(impl="native"), 3.5e-3),
    "native small": (Tiled(impl="native", rows=7, keys=64), 3.5e-3),
    "tiled": (Tiled(), 3.5e-3 if compiler.multiplies_bfloat16() else 7e-3),
}


def workload(shape: str, **more: str) -> Workload:
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    return Workload(**sizes, **more, phase="train")


def make(w: Workload, strided: bool) -> list[Tensor]:
    """query, key, value and the output's gradient."""
    torch.manual_seed(0)
    sizes = (w.heads, w.seq, w.head_dim), (w.kv_heads, w.kv_seq, w.head_dim), (w.kv_heads, w.kv_seq, w.value_dim)
    made = []
    for heads, length, dim in (*sizes, (w.heads, w.seq, w.value_dim)):
        x = torch.randn(w.batch, length, heads, dim).to(getattr(torch, w.dtype)).transpose(1, 2)
        made.append(x if strided else x.contiguous())
    return made


def built(plugin: Plugin, w: Workload) -> Attention:
    made = plugin.build(w)
    assert isinstance(made, Attention)
    return made


def errors(plugin: Plugin, w: Workload, strided: bool = False) -> list[float]:
    """Relative L2 of the output and of each gradient, over all heads."""
    *tensors, up = make(w, strided)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = built(plugin, w).call(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, up)]
    definition = plugin.definition(w)
    wanted = [expected(definition, w, *tensors, torch.arange(w.seq))]
    wanted += [torch.empty(x.shape, dtype=torch.float64) for x in tensors]
    for b in range(w.batch):
        for h in range(w.kv_heads):
            group = slice(h * w.group, (h + 1) * w.group)
            for i, exact in enumerate(gradients(definition, w, tensors, up, b, h)):
                wanted[1 + i][b, group if i == 0 else h] = exact[0] if i == 0 else exact[0, 0]
    assert all(x.dtype == tensors[0].dtype and x.shape == y.shape for x, y in zip(found, wanted, strict=True))
    # With a single key the gradients of query and key are 0; what is found is measured beside the one that came in.
    norms = [float(y.norm()) for y in wanted]
    norms = [norm if norm > 1e-3 * float(up.norm()) else float(up.norm()) for norm in norms]
    return [float((x.detach().double() - y).norm()) / n for x, y, n in zip(found, wanted, norms, strict=True)]


def check(plugin: Plugin, w: Workload, limit: float, strided: bool = False) -> None:
    if reason := plugin.supports(w):
        pytest.skip(reason)
    assert max(errors(plugin, w, strided)) < (3e-6 if w.dtype == "float32" else limit)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(
    ("name", "dtype", "isa"),
    [
        (name, dtype, isa)
        for name in EXACT
        for dtype, isa in (("float32", ""), ("bfloat16", ""), ("float32", "avx2"), ("float16", "avx2"))
        if not isa or "native" in name
    ],
    indirect=["isa"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_softmax_attention(name: str, shape: str, dtype: str, isa: str, mask: str) -> None:
    plugin, limit = EXACT[name]
    # A head dim of 1 has few products to average over.
    check(plugin, workload(shape, dtype=dtype, mask=mask), limit * (2.5 if shape == "narrow" else 1), shape in STRIDED)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", ["even", "multi-query", "widest"])
@pytest.mark.parametrize("impl", ["strip", "native"])
def test_bfloat16_gradients_are_about_as_good_as_those_of_sdpa(impl: str, shape: str, mask: str) -> None:
    w = workload(shape, dtype="bfloat16", mask=mask)
    plugin = Tiled(impl=impl)
    if reason := plugin.supports(w):
        pytest.skip(reason)
    assert all(own < 1.5 * torchs for own, torchs in zip(errors(plugin, w), errors(Sdpa(), w), strict=True))


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["one", "tail", "grouped", "multi-query", "batch", "odd dims"])
@pytest.mark.parametrize("features", ["elu", "favor"])
def test_gradients_are_those_of_linear_attention(features: str, shape: str, dtype: str, mask: str) -> None:
    check(Linear(features=features, count=48), workload(shape, dtype=dtype, mask=mask), 3e-3, shape in STRIDED)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["one", "tail", "grouped", "multi-query", "batch", "odd dims"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("impl", "limit"), [("auto", 3.5e-3), ("gather", 1e-2)])
def test_gradients_are_those_of_the_pattern(
    impl: str, limit: float, pattern: str, shape: str, dtype: str, mask: str
) -> None:
    w = workload(shape, dtype=dtype, mask=mask)
    plugin = BlockSparse(impl=impl, pattern=pattern, block=13, window=40)
    check(plugin, w, limit if compiler.unsupported(dtype) is None else 1e-2, shape in STRIDED)


@pytest.mark.parametrize("plugin", [Sdpa(), Tiled(), Tiled(impl="strip"), Naive(), Xformers()])
@pytest.mark.parametrize("make_up", [torch.zeros_like, lambda out: out.new_ones(()).expand(out.shape)])
def test_any_layout_of_the_gradient_will_do(plugin: Plugin, make_up: Callable[[Tensor], Tensor]) -> None:
    """A sum's gradient is one number, expanded: no dimension of it is dense."""
    w = Workload(seq=40, kv_seq=90, heads=2, kv_heads=2, dtype="bfloat16", mask="causal", phase="train")
    *tensors, _ = make(w, strided=False)
    leaves = [x.requires_grad_() for x in tensors]
    out = built(plugin, w).call(*leaves)
    up = make_up(out)
    found = torch.autograd.grad(out, leaves, up, retain_graph=True)
    wanted = torch.autograd.grad(out, leaves, up.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("plugin", [Sdpa(), Tiled(), Tiled(impl="strip")])
def test_a_second_derivative_is_refused(plugin: Plugin) -> None:
    w = Workload(seq=20, kv_seq=40, heads=2, kv_heads=2, dtype="bfloat16", mask="causal", phase="train")
    query, key, value, up = make(w, strided=False)
    query.requires_grad_()
    out = built(plugin, w).call(query, key, value)
    (first,) = torch.autograd.grad(out, query, up.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), query)


def test_a_shifted_causal_mask_is_trained_without_a_mask_in_memory() -> None:
    w = workload("tail", dtype="float32", mask="causal")
    assert built(Sdpa(), w).implementation == "torch sdpa: flash, past keys and causal part merged by log-sum-exp"


def test_implementations_say_what_the_backward_pass_is() -> None:
    w = workload("even", dtype="bfloat16")
    assert built(Tiled(impl="strip"), w).implementation == "plain torch, strips of 256 rows forward and backward"
    assert "checkpointed" in built(Xformers(), w).implementation
    assert "(the C++ kernel has no backward pass)" in built(Linear(), w).implementation
    wide = w.replace(head_dim=300, value_dim=300)
    assert (
        built(BlockSparse(), wide).implementation
        == "plain torch, block gather, checkpointed (the C++ kernel holds head and value dims up to 256)"
    )
    if compiler.unsupported(w.dtype) is None:
        assert "backward" in built(Tiled(), w).implementation
        assert "C++" in built(BlockSparse(), w).implementation


def test_what_has_no_backward_pass_says_so() -> None:
    w = workload("even", dtype="bfloat16")
    assert "train" not in Int8.phases
    assert BlockSparse(impl="flex").supports(w) == "flex_attention has no backward on a CPU"
    assert Linear(impl="native").supports(w) == "the C++ kernel has no backward pass"


@pytest.mark.parametrize("plugin", [Sdpa(), Tiled(), Tiled(impl="strip"), Xformers(), Linear(), BlockSparse()])
def test_workspace_is_unknown_but_for_naive(plugin: Plugin) -> None:
    assert plugin.workspace_bytes(workload("even", dtype="bfloat16")) is None


def test_naive_holds_three_matrices() -> None:
    w = workload("grouped", dtype="float32")
    matrix, key, value = 4 * 4 * 70 * 330, 2 * 4 * 330 * 64, 2 * 4 * 330 * 64
    assert Naive().workspace_bytes(w) == 3 * matrix + 2 * key + 2 * value - value - 4 * 4 * 70 * 64 - key
