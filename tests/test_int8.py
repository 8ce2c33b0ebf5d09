"""int8 attention on a CPU: its quantization, its integer product, and its two errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from attnbench_plugins.int8 import Int8, plain
from attnbench_plugins.native import compiler
from attnbench_plugins.quantization import quantize, smooth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnbench.judge.reference import exact, expected
from attnbench.workload import Workload

ROWS = (1, 32, 128)
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}


def make(w: Workload, bias: float = 0.0, outlier: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value; K's channels shifted by `bias` * N(0, 1), and N(0, `outlier`^2) added to one value in 1000."""
    torch.manual_seed(w.seed)
    dtype, kv = getattr(torch, w.dtype), (w.batch, w.kv_heads, w.kv_seq)
    shapes = (w.batch, w.heads, w.seq, w.head_dim), (*kv, w.head_dim), (*kv, w.value_dim)
    query, key, value = (torch.randn(shape, device=w.device) for shape in shapes)
    key += bias * torch.randn(w.batch, w.kv_heads, 1, w.head_dim, device=w.device)
    query, key, value = (x + outlier * torch.randn_like(x) * (torch.rand_like(x) < 0.001) for x in (query, key, value))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def rel_l2(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


def errors(plugin: Int8, w: Workload, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Implementation error and approximation error: against its own operands, and against softmax attention."""
    out = plugin.build(w).call(*inputs)
    assert out.shape == (w.batch, w.heads, w.seq, w.value_dim)
    assert out.dtype == inputs[0].dtype
    rows = torch.arange(w.seq)
    return (
        rel_l2(out, expected(plugin.definition(w), w, *inputs, rows)),
        rel_l2(out, exact(w, *inputs, rows)),
    )


SHAPES = [
    pytest.param({"seq": 1, "kv_seq": 1}, id="1"),
    pytest.param({"seq": 1, "kv_seq": 300}, id="1-300"),
    pytest.param({"seq": 17, "kv_seq": 17, "heads": 4, "kv_heads": 1}, id="17-mqa"),
    pytest.param({"seq": 257, "kv_seq": 511, "heads": 6, "kv_heads": 2, "batch": 2}, id="257-511-gqa"),
    pytest.param({"seq": 300, "kv_seq": 300, "head_dim": 33, "value_dim": 17}, id="odd-dims"),
    pytest.param({"seq": 520, "kv_seq": 520, "head_dim": 128, "value_dim": 128, "heads": 2, "kv_heads": 2}, id="128"),
]


@pytest.fixture(params=[True, False], ids=["integers", "emulated"])
def integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Q and K are multiplied as integers, or as the same numbers in float32."""
    if request.param and not plain.multiplies_int8():
        pytest.skip("this CPU lacks fast int8 products")
    monkeypatch.setattr(plain, "multiplies_int8", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_computes_what_it_defines(integers: bool, shape: dict[str, Any], dtype: str, mask: str, rows: int) -> None:
    w = Workload(**shape, dtype=dtype, mask=mask)
    implementation, approximation = errors(Int8(rows=rows, impl="torch"), w, make(w))
    assert implementation < TOLERANCE[dtype]
    assert approximation < 3e-2


@pytest.mark.parametrize(("rows", "low", "high"), [(1, 7e-3, 1e-2), (32, 1e-2, 1.3e-2), (128, 1.1e-2, 1.5e-2)])
def test_its_two_errors_are_of_different_size(rows: int, low: float, high: float) -> None:
    """Right to rounding against its own operands, and off by what quantization costs against softmax."""
    w = Workload(seq=700, kv_seq=700)
    implementation, approximation = errors(Int8(rows=rows, impl="torch"), w, make(w))
    assert implementation < 1e-6
    assert low < approximation < high


def test_smoothing_takes_a_bias_of_channels_away_and_rows_alone_hold_outliers() -> None:
    w = Workload(seq=700, kv_seq=700)
    assert errors(Int8(rows=1), w, make(w, bias=4.0))[1] < 1e-2
    assert errors(Int8(rows=1), w, make(w, outlier=10.0))[1] < 3e-2
    assert errors(Int8(rows=128), w, make(w, outlier=10.0))[1] > 4e-2


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("length", [1, 31, 200, 256])
def test_quantize_is_within_half_a_step(length: int, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, length, 40) * torch.logspace(-3, 3, length)[:, None]
    x[:, :, 0] = 0.0
    integers, scale = quantize(x, rows)
    assert integers.dtype == torch.int8
    assert int(integers.abs().max()) <= 127
    assert bool(((integers * scale - x).abs() <= scale * 0.5001).all())
    for start in range(0, length, rows):
        block, shared = x[:, :, start : start + rows], scale[:, :, start : start + rows]
        peak = block.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
        assert torch.allclose(shared * 127, peak.expand_as(shared), rtol=1e-6, atol=0)


def test_smooth_changes_no_softmax() -> None:
    w = Workload(seq=50, kv_seq=90)
    query, key, value = (x.double() for x in make(w, bias=4.0))
    rows = torch.arange(w.seq)
    assert rel_l2(exact(w, query, smooth(key), value, rows), exact(w, query, key, value, rows)) < 1e-6
    assert float(smooth(key).mean(2).abs().max()) < 1e-6


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_every_score_comes_from_an_integer_product(integers: bool, mask: str) -> None:
    class Products(TorchDispatchMode):
        """Multiplications of matrix products: those of 8-bit integers, however they are held, and all others."""

        int8 = other = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("_int_mm", "mm", "bmm", "addmm", "baddbmm"):
                (rows, inner), columns = args[0].shape, args[1].shape[-1]
                if all(bool((x.abs() <= 127).all() and (x == x.round()).all()) for x in args[:2]):
                    assert {x.dtype for x in args[:2]} == {torch.int8 if integers else torch.float32}
                    self.int8 += rows * inner * columns
                else:
                    self.other += rows * inner * columns
            return func(*args, **(kwargs or {}))

    w = Workload(seq=600, kv_seq=700, mask=mask, heads=2, kv_heads=1, head_dim=32, value_dim=48)
    inputs = make(w)
    call = Int8(impl="torch").build(w).call
    with Products() as products:
        call(*inputs)
    pairs = 2 * (512 * 612 + 88 * 700 if mask == "causal" else 600 * 700)  # a strip ends where its last row sees
    assert products.int8 == pairs * 32
    assert products.other == pairs * 48


def test_a_call_leaves_its_inputs_and_earlier_outputs_alone_and_keeps_no_scale() -> None:
    w = Workload(seq=100, kv_seq=100)
    call = Int8(impl="torch").build(w).call
    inputs = make(w)
    kept = [x.clone() for x in inputs]
    first = call(*inputs)
    copy = first.clone()
    call(*(x * 100 for x in inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))
    assert torch.equal(first, copy)
    assert torch.equal(call(*inputs), copy)


def test_zeros_and_equal_keys_are_averages_of_v() -> None:
    w = Workload(seq=5, kv_seq=8)
    query, key, value = make(w)
    mean = value.double().mean(2, keepdim=True).expand(-1, -1, w.seq, -1)
    call = Int8(impl="torch").build(w).call
    assert rel_l2(call(query * 0, key, value), mean) < 1e-6
    assert rel_l2(call(query, key[:, :, :1].expand_as(key), value), mean) < 1e-6


def test_strided_inputs() -> None:
    w = Workload(seq=100, kv_seq=100, batch=2)
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(w))
    assert errors(Int8(), w, (query, key, value))[0] < TOLERANCE["float32"]


def test_a_head_dim_of_1_is_refused_where_torch_has_it_wrong(integers: bool) -> None:
    w = Workload(seq=10, kv_seq=10)
    assert Int8(impl="torch").supports(w) is None
    narrow = w.replace(head_dim=1)
    if integers:
        assert "head dim" in (Int8(impl="torch").supports(narrow) or "")
    else:
        assert errors(Int8(impl="torch"), narrow, make(narrow))[0] < TOLERANCE["float32"]


def test_integers_without_vnni_give_what_those_with_it_give() -> None:
    """There torch's int8 products are slow, or saturate in pairs: oneDNN is told to take this CPU for an older one."""
    code = (
        "import test_int8 as t\n"
        "w = t.Workload(seq=300, kv_seq=300)\n"
        "plain = t.Int8(impl='torch')\n"
        "print(*t.errors(plain, w, t.make(w, outlier=10.0)), plain.build(w).implementation)\n"
    )
    found = []
    for hidden in ({}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {compiler.HIDE: "avx2"}):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | hidden, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True,
        )  # fmt: skip
        implementation, approximation, *named = run.stdout.split()
        assert float(implementation) < 1e-6
        assert not hidden or "int8 multiplied as float32" in " ".join(named)
        found.append(float(approximation))
    assert found == pytest.approx([found[0]] * 3, rel=1e-3)
