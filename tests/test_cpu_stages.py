"""The stages of the C++ kernels, each against its plain twin, for each instruction set and dtype."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from attnbench_plugins.native import attention as kernels
from attnbench_plugins.native import compiler
from attnbench_plugins.native.attention import KEYS, round_up
from attnbench_plugins.quantization import quantize
from instructions import BEST, hold_to
from torch import Tensor

HERE = Path(__file__).parent / "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is compiled: of AVX-512 without its bfloat16 products that dtype alone, as the others do without them anyway.
COMPILED = [(BEST, "float32"), (BEST, "bfloat16"), (BEST, "float16"), ("avx512_core", "bfloat16")]
COMPILED += [("avx2", "float32"), ("avx2", "bfloat16"), ("avx2", "float16"), ("avx2_vnni", "bfloat16")]


class Stages:
    """The stages compiled for tensors of a dtype. wide: of what their products take."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.compiled = DTYPES[dtype], compiler.load(str(HERE / "stages.cpp"), dtype)
        self.wide = torch.bfloat16 if kernels.pairs(dtype) else torch.float32
        self.group = 2 if kernels.pairs(dtype) else 1  # elements
        self.panel = self.compiled.stage_panel()
        self.compiled.stage_quantize.restype = self.compiled.stage_row_sum.restype = ctypes.c_float

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    def __call__(self, name: str, *arguments: Tensor | float | None) -> float:
        return float(getattr(self.compiled, f"stage_{name}")(*map(_passed, arguments)) or 0)


def _passed(x: Tensor | float | None) -> object:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else x if x is None else ctypes.c_int64(x)


@pytest.fixture(params=COMPILED, ids="-".join)
def stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stages:
    isa, dtype = request.param
    hold_to(isa, monkeypatch)
    return Stages(dtype)


@pytest.fixture(params=[isa for isa, dtype in COMPILED if dtype == "bfloat16"])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stages:
    hold_to(request.param, monkeypatch)
    return Stages("bfloat16")


@pytest.mark.parametrize(("fine", "limit"), [(False, 1.5e-4), (True, 2.5e-7)])
def test_exp2_is_within_what_the_dtype_can_tell(bfloat16: Stages, fine: bool, limit: float) -> None:
    x = torch.linspace(-125, 20, 1 << 16)
    out = torch.empty_like(x)
    bfloat16("exp2", x, len(x), fine, out)
    wanted = x.double().exp2()
    assert float(((out - wanted) / wanted).abs().max()) < limit
    hidden, out = torch.full((16,), -torch.inf), torch.empty(16)
    bfloat16("exp2", hidden, 16, fine, out)
    assert float(out.max()) < 1e-37


def test_values_are_rounded_as_in_torch(stages: Stages) -> None:
    x = torch.cat((torch.randn(1000) * torch.logspace(-4, 4, 1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])))
    x = torch.cat((x, (x.bfloat16().float() + 0.5**9)))  # ties
    narrow, out = x.new_zeros(len(x) + 1).to(stages.dtype), torch.zeros(len(x) + 1)
    stages("round", x, len(x), narrow, out)
    assert torch.equal(narrow[:-1], x.to(stages.dtype))
    assert torch.equal(out[:-1], x.to(stages.dtype).float())
    assert not narrow[-1]  # nothing is written beyond the end
    not_a_number = torch.full((16,), torch.nan)
    stages("round", not_a_number, 16, narrow, out)
    assert narrow[:16].isnan().all()


@pytest.mark.parametrize("rows", [1, 15, 16, 33, 64])
@pytest.mark.parametrize("width", [1, 2, 17, 64, 65, 256])
def test_keys_are_packed_by_groups_of_dims(stages: Stages, rows: int, width: int) -> None:
    x, group = stages.random(rows, width), stages.group
    groups = round_up(width, group) // group
    out = torch.empty(KEYS // stages.panel, groups, stages.panel, group).to(stages.wide)
    stages("pack_rows", x, rows, width, out)
    padded = torch.zeros(KEYS, groups * group).to(stages.wide)
    padded[:rows, :width] = x
    assert torch.equal(out, padded.view(-1, stages.panel, groups, group).transpose(1, 2))


@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize("width", [4, 36, 64, 256])
def test_bytes_are_packed_by_fours(bfloat16: Stages, rows: int, width: int) -> None:
    x, panel = torch.randint(0, 256, (rows, width), dtype=torch.uint8), bfloat16.panel
    out = torch.empty(KEYS // panel, width // 4, panel, 4, dtype=torch.uint8)
    bfloat16("pack_bytes", x, rows, width, out)
    padded = torch.zeros(KEYS, width, dtype=torch.uint8)
    padded[:rows] = x
    assert torch.equal(out, padded.view(-1, panel, width // 4, 4).transpose(1, 2))


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize(("width", "columns"), [(1, 16), (16, 16), (17, 32), (40, 64), (64, 64), (16, 64), (130, 144)])
def test_values_are_packed_by_groups_of_keys(stages: Stages, rows: int, width: int, columns: int) -> None:
    x, group = stages.random(rows, width), stages.group
    out = torch.empty(KEYS * columns).to(stages.wide)
    stages("pack_panels", x, rows, width, columns, out)
    padded = torch.zeros(KEYS, columns).to(stages.wide)
    padded[:rows, :width] = x
    panels = padded.view(KEYS // group, group, columns).transpose(1, 2).split(stages.panel, 1)
    assert torch.equal(out, torch.cat([panel.reshape(-1) for panel in panels]))


@pytest.mark.parametrize("rows", [1, 7, 35])
@pytest.mark.parametrize("length", [1, 33, 64])
@pytest.mark.parametrize("columns", [16, 64, 144])
def test_products_are_those_of_torch(stages: Stages, rows: int, length: int, columns: int) -> None:
    check_products(stages, rows, length, columns)


def check_products(stages: Stages, rows: int, length: int, columns: int) -> None:
    a, b = torch.randn(rows, KEYS).to(stages.wide), stages.random(length, columns)
    packed, before = torch.empty(KEYS * columns).to(stages.wide), torch.randn(rows + 1, columns)
    stages("pack_panels", b, length, columns, columns, packed)
    c = before.clone()
    stages("accumulate", a, rows, packed, length, columns, c)
    wanted = before[:-1].double() + a[:, :length].double() @ b.double()
    torch.testing.assert_close(c[:-1].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(c[-1], before[-1])  # nothing is written beyond the end


@pytest.mark.parametrize(("start", "end"), [(0, 128), (-5, 200), (3, 70), (64, 64), (130, 200), (-9, -1), (100, 20)])
def test_what_is_hidden_is_minus_infinity(bfloat16: Stages, start: int, end: int) -> None:
    s, at = torch.randn(128), torch.arange(128)
    wanted = s.masked_fill((at < start) | (at >= end), -torch.inf)
    bfloat16("hide", s, 128, start, end)
    assert torch.equal(s, wanted)


@pytest.mark.parametrize("levels", [63, 127])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("width", [1, 15, 16, 33, 256])
def test_rows_are_quantized_as_in_torch(stages: Stages, width: int, smoothed: bool, levels: int) -> None:
    x, mean, out = stages.random(width), torch.randn(width), torch.empty(width, dtype=torch.int8)
    scale = stages("quantize", x, mean if smoothed else None, width, float(levels), out)
    integers, wanted = quantize((x - mean if smoothed else x.float())[None], 1, levels)
    assert torch.equal(out, integers[0])
    assert scale == pytest.approx(float(wanted), rel=1e-6)


def test_weights_and_differences_are_softmax_and_its_derivative(stages: Stages) -> None:
    scores, lse, dp, delta = (torch.randn(KEYS) for _ in range(4))
    scores[5] = -torch.inf  # hidden
    lse += 3
    p, weights, differences = scores.clone(), torch.empty(KEYS).to(stages.wide), torch.empty(KEYS).to(stages.wide)
    stages("weights", p, 0.7, lse, weights)
    wanted = torch.exp2(scores.double() * 0.7 - lse.double())
    assert float((p - wanted).norm() / wanted.norm()) < (1e-4 if stages.dtype == torch.bfloat16 else 3e-7)
    assert torch.equal(weights, p.to(stages.wide))
    stages("differences", p, dp, delta, differences)
    torch.testing.assert_close(
        differences, (p * (dp - delta)).to(stages.wide), rtol=0, atol=1e-37
    )  # denormals become 0


@pytest.mark.parametrize("width", [1, 15, 16, 33, 256])
def test_delta_is_the_sum_of_a_row(stages: Stages, width: int) -> None:
    a, b = stages.random(2, width)
    found = stages("row_sum", a, b, width)
    assert found == pytest.approx(float(a.double() @ b.double()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("width", [1, 16, 33, 256])
def test_keys_are_turned_and_gradients_turned_back(stages: Stages, rows: int, width: int) -> None:
    x, out = stages.random(rows, width), torch.empty(width, KEYS).to(stages.wide)
    stages("pack_turned", x, rows, width, out)
    assert torch.equal(out[:, :rows], x.T.to(stages.wide))
    assert not out[:, rows:].any()
    turned, back = torch.randn(width, KEYS), torch.empty(rows, width).to(stages.dtype)
    stages("finish_turned", turned, width, 0.5, rows, back)
    assert torch.equal(back, (turned.T[:rows] * 0.5).to(stages.dtype))
