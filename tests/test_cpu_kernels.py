"""The C++ kernels: each stage against its plain twin, the whole against float64, and how they are compiled."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from attnbench_plugins.block_sparse import BlockSparse
from attnbench_plugins.int8 import Int8
from attnbench_plugins.int8.plain import multiplies_int8
from attnbench_plugins.int8.quantization import quantize
from attnbench_plugins.linear import Linear
from attnbench_plugins.native import attention as kernels
from attnbench_plugins.native import compiler
from attnbench_plugins.native.attention import KEYS, round_up
from attnbench_plugins.tiled import Tiled
from attnbench_plugins.tiled.plain import Strips
from torch import Tensor

from attnbench.judge.reference import exact, expected
from attnbench.plugin import Plugin, expand_kv, visible
from attnbench.workload import Workload

HERE = Path(__file__).parent / "cpu"
needs_kernels = pytest.mark.skipif(compiler.unsupported() is not None, reason=str(compiler.unsupported()))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.fixture(scope="module")
def stages() -> ctypes.CDLL:
    library = compiler.load(str(HERE / "stages.cpp"))
    library.stage_quantize.restype = library.stage_row_sum.restype = ctypes.c_float
    return library


def whole(n: int) -> ctypes.c_int64:
    return ctypes.c_int64(n)


@needs_kernels
def test_exp2_is_within_what_bf16_can_tell(stages: ctypes.CDLL) -> None:
    x = torch.linspace(-125, 20, 1 << 16)
    out = torch.empty_like(x)
    stages.stage_exp2(pointer(x), whole(len(x)), pointer(out))
    wanted = x.double().exp2()
    assert float(((out - wanted) / wanted).abs().max()) < 1.5e-4
    hidden = torch.full((16,), -torch.inf)
    out = torch.empty(16)
    stages.stage_exp2(pointer(hidden), whole(16), pointer(out))
    assert float(out.max()) < 1e-37


@needs_kernels
@pytest.mark.parametrize("rows", [1, 15, 16, 33, 64])
@pytest.mark.parametrize("width", [2, 4, 34, 64, 66, 128, 256, 510])
def test_keys_are_packed_by_groups_of_dims(stages: ctypes.CDLL, rows: int, width: int) -> None:
    x = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    groups = round_up(width, 4) // 4
    out = torch.empty(groups, KEYS, 4, dtype=torch.uint8)
    stages.stage_pack_groups(pointer(x), whole(rows), whole(width), pointer(out))
    padded = torch.zeros(KEYS, groups * 4, dtype=torch.uint8)
    padded[:rows, :width] = x
    assert torch.equal(out, padded.view(KEYS, groups, 4).transpose(0, 1))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize(("width", "columns"), [(1, 16), (16, 16), (17, 32), (40, 64), (64, 64), (16, 64)])
def test_values_are_packed_by_pairs_of_keys(stages: ctypes.CDLL, rows: int, width: int, columns: int) -> None:
    x = torch.randn(rows, width).bfloat16()
    out = torch.empty(KEYS // 2, columns, 2, dtype=torch.bfloat16)
    stages.stage_pack_pairs(pointer(x), whole(rows), whole(width), whole(columns), pointer(out))
    padded = torch.zeros(KEYS, columns, dtype=torch.bfloat16)
    padded[:rows, :width] = x
    assert torch.equal(out, padded.view(KEYS // 2, 2, columns).transpose(1, 2))


@needs_kernels
@pytest.mark.parametrize(("start", "end"), [(0, 128), (-5, 200), (3, 70), (64, 64), (130, 200), (-9, -1), (100, 20)])
def test_what_is_hidden_is_minus_infinity(stages: ctypes.CDLL, start: int, end: int) -> None:
    s = torch.randn(128)
    at = torch.arange(128)
    wanted = s.masked_fill((at < start) | (at >= end), -torch.inf)
    stages.stage_hide(pointer(s), whole(128), whole(start), whole(end))
    assert torch.equal(s, wanted)


@needs_kernels
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("width", [1, 15, 16, 33, 64, 256])
def test_rows_are_quantized_as_in_torch(stages: ctypes.CDLL, width: int, smoothed: bool) -> None:
    x, mean = torch.randn(width).bfloat16(), torch.randn(width)
    out = torch.empty(width, dtype=torch.int8)
    scale = stages.stage_quantize(pointer(x), pointer(mean) if smoothed else None, whole(width), pointer(out))
    integers, wanted = quantize((x - mean if smoothed else x.float())[None], 1)
    assert torch.equal(out, integers[0])
    assert scale == pytest.approx(float(wanted), rel=1e-6)


@needs_kernels
def test_weights_and_differences_are_softmax_and_its_derivative(stages: ctypes.CDLL) -> None:
    scores, lse, dp, delta = (torch.randn(KEYS) for _ in range(4))
    scores[5] = -torch.inf  # hidden
    lse += 3
    p, weights, differences = scores.clone(), torch.empty(KEYS).bfloat16(), torch.empty(KEYS).bfloat16()
    stages.stage_weights(pointer(p), ctypes.c_float(0.7), pointer(lse), pointer(weights))
    wanted = torch.exp2(scores.double() * 0.7 - lse.double())
    assert rel_l2(p, wanted) < 1e-4
    assert torch.equal(weights, p.bfloat16())
    stages.stage_differences(pointer(p), pointer(dp), pointer(delta), pointer(differences))
    torch.testing.assert_close(differences, (p * (dp - delta)).bfloat16(), rtol=0, atol=1e-37)  # denormals become 0


@needs_kernels
def test_two_keys_are_interleaved(stages: ctypes.CDLL) -> None:
    x, out = torch.randn(2, KEYS).bfloat16(), torch.empty(KEYS, 2).bfloat16()
    stages.stage_interleave(pointer(x[0]), pointer(x[1]), pointer(out))
    assert torch.equal(out, x.T)


@needs_kernels
@pytest.mark.parametrize("width", [1, 15, 16, 33, 256])
def test_delta_is_the_sum_of_a_row(stages: ctypes.CDLL, width: int) -> None:
    a, b = torch.randn(2, width).bfloat16()
    found = stages.stage_row_sum(pointer(a), pointer(b), whole(width))
    assert found == pytest.approx(float(a.double() @ b.double()), rel=1e-5, abs=1e-5)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("width", [1, 15, 16, 33, 64, 256])
def test_keys_are_turned_and_gradients_turned_back(stages: ctypes.CDLL, rows: int, width: int) -> None:
    x, out = torch.randn(rows, width).bfloat16(), torch.empty(width, KEYS).bfloat16()
    stages.stage_pack_turned(pointer(x), whole(rows), whole(width), pointer(out))
    assert torch.equal(out[:, :rows], x.T)
    assert not out[:, rows:].any()
    turned, back = torch.randn(width, KEYS), torch.empty(rows, width).bfloat16()
    stages.stage_finish_turned(pointer(turned), whole(width), ctypes.c_float(0.5), whole(rows), pointer(back))
    assert torch.equal(back, (turned.T[:rows] * 0.5).bfloat16())


def make(w: Workload, strided: bool = False, bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = [(w.heads, w.seq, w.head_dim), (w.kv_heads, w.kv_seq, w.head_dim), (w.kv_heads, w.kv_seq, w.value_dim)]
    made = [torch.randn(w.batch, length, heads, dim) for heads, length, dim in shapes]
    made[1] += bias * torch.randn(w.batch, 1, w.kv_heads, w.head_dim)
    query, key, value = (x.to(getattr(torch, w.dtype)).transpose(1, 2) for x in made)
    return (query, key, value) if strided else (query.contiguous(), key.contiguous(), value.contiguous())


def rel_l2(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


def errors(plugin: Plugin, w: Workload, **how: Any) -> tuple[float, float]:
    """Against what the plugin defines, and against softmax attention."""
    tensors = make(w, **how)
    built = plugin.build(w)
    assert "C++" in built.implementation
    out = built.call(*tensors)
    assert out.shape == (w.batch, w.heads, w.seq, w.value_dim)
    rows = torch.arange(w.seq)
    return rel_l2(out, expected(plugin.definition(w), w, *tensors, rows)), rel_l2(out, exact(w, *tensors, rows))


SHAPES = {
    "one": {"seq": 1, "kv_seq": 1},
    "decode": {"seq": 1, "kv_seq": 1100},
    "decode grouped": {"seq": 1, "kv_seq": 2100, "heads": 8, "kv_heads": 2, "batch": 2, "value_dim": 80},
    "few": {"seq": 4, "kv_seq": 333, "head_dim": 100, "value_dim": 33},
    "tail": {"seq": 331, "kv_seq": 1283},
    "even": {"seq": 1024, "kv_seq": 1024},
    "grouped": {"seq": 130, "kv_seq": 530, "heads": 6, "kv_heads": 3},
    "multi-query": {"seq": 100, "kv_seq": 140, "heads": 5, "kv_heads": 1},
    "batch": {"seq": 65, "kv_seq": 65, "batch": 3},
    "narrow": {"seq": 200, "kv_seq": 200, "head_dim": 1, "value_dim": 1},
    "odd dims": {"seq": 200, "kv_seq": 260, "head_dim": 33, "value_dim": 17},
    "wide value": {"seq": 150, "kv_seq": 150, "head_dim": 16, "value_dim": 144},
    "widest": {"seq": 90, "kv_seq": 700, "head_dim": 256, "value_dim": 256, "heads": 1, "kv_heads": 1},
}
KERNELS = {
    "tiled": (Tiled(impl="avx512"), 4e-3, 4e-3),
    "small tiles": (Tiled(impl="avx512", rows=7, keys=64), 4e-3, 4e-3),
    "qk": (Int8(impl="qk"), 5e-3, 1.6e-2),
    "qkpv": (Int8(impl="qkpv"), 1.8e-2, 2.5e-2),
}


@needs_kernels
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_computes_what_it_defines(kernel: str, shape: str, mask: str) -> None:
    plugin, implementation_limit, exact_limit = KERNELS[kernel]
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    w = Workload(**sizes, dtype="bfloat16", mask=mask)
    implementation, approximation = errors(plugin, w, strided=shape in ("tail", "grouped", "batch"))
    assert implementation < implementation_limit
    assert approximation < exact_limit * (2.5 if shape == "narrow" else 1)


@needs_kernels
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_sum_exp_is_that_of_the_scores(shape: str, mask: str) -> None:
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    w = Workload(**sizes, dtype="bfloat16", mask=mask)
    query, key, value = make(w, strided=shape in ("tail", "grouped", "batch"))
    kernel = compiler.load("tiled.cpp").tiled
    out, lse = kernels.forward(kernel, w, kernels.dense(w, 192), 1024)(query, key, value)
    assert torch.equal(out, kernels.caller(kernel, w, kernels.dense(w, 192), 1024)(query, key, value))
    scores = query.double() @ expand_kv(key.double(), w.heads).mT * w.scale
    scores.masked_fill_(~visible(w, torch.arange(w.seq)[:, None], torch.arange(w.kv_seq)), -torch.inf)
    assert float((lse - scores.logsumexp(-1)).abs().max()) < 2e-4


@needs_kernels
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
def test_both_backward_passes_agree_however_threads_share_them(heads: int, kv_heads: int, mask: str) -> None:
    w = Workload(seq=500, kv_seq=700, heads=heads, kv_heads=kv_heads, dtype="bfloat16", mask=mask, phase="train")
    tensors, up = make(w), torch.randn(w.batch, w.heads, w.seq, w.value_dim).bfloat16()
    out, lse = kernels.forward(compiler.load("tiled.cpp").tiled, w, kernels.dense(w, 192), 1024)(*tensors)
    kernel = kernels.backward(compiler.load("backward.cpp").backward, w, kernels.dense(w, 130), 128)
    wanted = Strips(w, 130, 256).backward(*tensors, out, lse, up)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found, again = (kernel(*tensors, out, lse, up) for _ in range(2))
            for one, other, strip in zip(found, again, wanted, strict=True):
                assert torch.equal(one, other)
                assert rel_l2(one, strip.double()) < 4e-3
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    w = Workload(seq=300, kv_seq=300, heads=3, kv_heads=3, head_dim=64, value_dim=64, dtype="bfloat16")
    tensors, before = make(w), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = Tiled().build(w).call(*tensors)
        torch.set_num_threads(threads)
        assert torch.equal(Tiled().build(w).call(*tensors), wanted)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_channel_bias_costs_int8_nothing_as_k_is_smoothed() -> None:
    w = Workload(seq=1024, kv_seq=1024, heads=2, kv_heads=2, head_dim=64, value_dim=64, dtype="bfloat16")
    assert errors(Int8(impl="qk"), w, bias=5.0)[1] < 1e-2


@needs_kernels
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("pattern", ["window", "bigbird", "strided"])
@pytest.mark.parametrize(
    ("block", "window", "seq", "kv_seq"), [(128, 256, 1500, 1500), (100, 30, 700, 930), (13, 1, 333, 333)]
)
def test_hidden_blocks_are_skipped_in_the_kernel(
    pattern: str, mask: str, block: int, window: int, seq: int, kv_seq: int
) -> None:
    w = Workload(seq=seq, kv_seq=kv_seq, heads=2, kv_heads=1, head_dim=64, value_dim=64, dtype="bfloat16", mask=mask)
    plugin = BlockSparse(impl="avx512", pattern=pattern, block=block, window=window)
    assert errors(plugin, w)[0] < 4e-3


@needs_kernels
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention_computes_what_it_defines(shape: str, dtype: str, mask: str) -> None:
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    w = Workload(**sizes, dtype=dtype, mask=mask)
    implementation, _ = errors(Linear(impl="avx512"), w, strided=shape in ("tail", "grouped", "batch"))
    assert implementation < (1e-6 if dtype == "float32" else 4e-3)


def test_other_dtypes_are_handed_over_and_say_so() -> None:
    w = Workload(seq=64, kv_seq=64)
    assert Tiled().build(w).implementation == "torch sdpa: flash (tiles gain nothing in float32)"
    assert Tiled(impl="avx512").supports(w) == "the AVX-512 kernel is for bfloat16"


PROGRAM = """
import sys, torch
from attnbench_plugins.{module} import {name}
from attnbench.workload import Workload
w = Workload(seq=70, kv_seq=70, dtype="bfloat16")
built = {name}({options}).build(w)
q, k, v = (torch.randn(1, 8, 70, 64).bfloat16() for _ in range(3))
built.call(q, k, v)
print(built.implementation)
"""


def elsewhere(module: str, name: str, options: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The plugin built and called in a process of its own."""
    program = PROGRAM.format(module=module, name=name, options=options)
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("module", "name", "fallback"),
    [
        ("tiled", "Tiled", "strips of 70 rows" if compiler.multiplies_bfloat16() else "torch sdpa"),
        ("int8", "Int8", "torch._int_mm" if multiplies_int8() else "int8 multiplied as float32"),
    ],
)
def test_without_a_compiler_it_falls_back_and_says_why(module: str, name: str, fallback: str, tmp_path: Path) -> None:
    said = elsewhere(module, name, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert said.returncode == 0, said.stderr
    assert fallback in said.stdout
    assert "no C++ compiler (no-such-compiler)" in said.stdout or "this CPU lacks" in said.stdout


@needs_kernels
def test_a_compiler_that_fails_is_a_fallback_or_an_error_where_asked_for(tmp_path: Path) -> None:
    broken = {"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}
    said = elsewhere("tiled", "Tiled", **broken)
    assert "plain torch, strips of 70 rows (exit code 1)" in said.stdout
    asked = elsewhere("tiled", "Tiled", "impl='avx512'", **broken)
    assert asked.stderr.splitlines()[-1].endswith("AttnbenchError: exit code 1")


@needs_kernels
def test_concurrent_first_uses_compile_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrapper = tmp_path / "cxx"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo compiled >> {log};; esac\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(elsewhere, "tiled", "Tiled", CXX=str(wrapper), XDG_CACHE_HOME=str(tmp_path / "cache"))
            for _ in range(3)
        ]
    assert all(run.result().stdout.startswith("C++ AVX512-BF16") for run in runs), runs[0].result().stderr
    assert log.read_text().splitlines() == ["compiled"]


@needs_kernels
@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    program = tmp_path / "sanitize"
    flags = [f for f in compiler.FLAGS if f not in ("-O3", "-fPIC")]
    subprocess.run(
        ["g++", *flags, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         f"-I{compiler.HERE}", str(HERE / "sanitize.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 41
