"""The C++ kernels against float64, on each instruction set, and how they are compiled."""

from __future__ import annotations

import os
import platform
import shutil
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
from attnbench_plugins.linear import Linear
from attnbench_plugins.native import attention as kernels
from attnbench_plugins.native import compiler
from attnbench_plugins.tiled import Tiled
from attnbench_plugins.tiled.plain import Strips
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.judge.reference import exact, expected
from attnbench.plugin import Plugin, expand_kv, visible
from attnbench.workload import Workload

HERE = Path(__file__).parent / "cpu"
ABSENT = compiler.unsupported("float32")
needs_kernels = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
EXACT = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}  # relative L2 errors up to which a dtype is exact


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
KERNELS = {  # with limits of the error from what it defines, but for the dtype's own, and from softmax attention
    "tiled": (Tiled(impl="native"), 0, 0),
    "small tiles": (Tiled(impl="native", rows=7, keys=64), 0, 0),
    "qk": (Int8(impl="qk"), 1e-3, 2.5e-2),
    "qkpv": (Int8(impl="qkpv"), 2e-2, 3e-2),
}


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("tiled", "bfloat16"), ("tiled", "float32"), ("small tiles", "float16"), ("qk", "float16"), ("qkpv", "bfloat16")],
)
def test_a_kernel_computes_what_it_defines(kernel: str, shape: str, dtype: str, mask: str, isa: str) -> None:
    check(kernel, shape, dtype, mask)


LATENTS = {"head_dim": 576, "value_dim": 512, "heads": 8, "kv_heads": 1}  # as DeepSeek-V2 decodes
WIDE = {  # heads that the other kernels don't hold
    "few": {"seq": 3, "kv_seq": 700, **LATENTS},
    "many": {"seq": 70, "kv_seq": 150, **LATENTS},
    "the widest": {"seq": 2, "kv_seq": 40, "head_dim": 1023, "value_dim": 1024, "heads": 1, "kv_heads": 1},
}


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", EXACT)
def test_exact_kernels_hold_wide_heads(shape: str, dtype: str, isa: str) -> None:
    w = Workload(**WIDE[shape], dtype=dtype, mask="causal")
    assert errors(Tiled(impl="native"), w, strided=True)[1] < EXACT[dtype]
    wider = w.replace(head_dim=1025)
    assert Tiled(impl="native").supports(wider) == "the C++ kernel holds head and value dims up to 1024"


@pytest.mark.parametrize("isa", ["avx512_core_bf16", "avx512_core", "avx2_vnni"], indirect=True)
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_does_so_with_the_products_of_other_cpus(kernel: str, isa: str) -> None:
    check(kernel, "tail", "bfloat16", "causal")


def check(kernel: str, shape: str, dtype: str, mask: str) -> None:
    plugin, implementation_limit, exact_limit = KERNELS[kernel]
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    w = Workload(**sizes, dtype=dtype, mask=mask)
    implementation, approximation = errors(plugin, w, strided=shape in ("tail", "grouped", "batch"))
    few = 2.5 if shape == "narrow" else 1  # a head dim of 1 has few products to average over
    assert implementation < max(EXACT[dtype], implementation_limit) * few
    assert approximation < max(EXACT[dtype], exact_limit) * few


def test_p_in_8_bits_has_some_left_beside_a_first_token_that_takes_much_of_the_weight(isa: str) -> None:
    """As in trained models. In SmolLM2's layers it was off by up to 3.6e-2 where that token set the scale of 512 keys."""
    w = Workload(seq=600, kv_seq=600, heads=2, kv_heads=2, dtype="bfloat16")
    query, key, value = make(w)
    query += 1
    key[:, :, 0] = 0.68  # a seventh of each row's weight
    value[:, :, 0] *= 0.3
    plugin, rows = Int8(impl="qkpv"), torch.arange(w.seq)
    out = plugin.build(w).call(query, key, value)
    off = rel_l2(out, expected(plugin.definition(w), w, query, key, value, rows))
    assert off < (2.5e-2 if compiler.multiplies_bytes() else 4e-2)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_sum_exp_is_that_of_the_scores(shape: str, dtype: str, mask: str, isa: str) -> None:
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    w = Workload(**sizes, dtype=dtype, mask=mask)
    query, key, value = make(w, strided=shape in ("tail", "grouped", "batch"))
    kernel = compiler.load("tiled.cpp", dtype).tiled
    out, lse = kernels.forward(kernel, w, kernels.dense(w, 192), 1024)(query, key, value)
    assert torch.equal(out, kernels.caller(kernel, w, kernels.dense(w, 192), 1024)(query, key, value))
    scores = query.double() @ expand_kv(key.double(), w.heads).mT * w.scale
    scores.masked_fill_(~visible(w, torch.arange(w.seq)[:, None], torch.arange(w.kv_seq)), -torch.inf)
    assert float((lse - scores.logsumexp(-1)).abs().max()) < (2e-4 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
def test_both_backward_passes_agree_however_threads_share_them(heads: int, kv_heads: int, mask: str, isa: str) -> None:
    w = Workload(seq=500, kv_seq=700, heads=heads, kv_heads=kv_heads, dtype="bfloat16", mask=mask, phase="train")
    tensors, up = make(w), torch.randn(w.batch, w.heads, w.seq, w.value_dim).bfloat16()
    out, lse = kernels.forward(compiler.load("tiled.cpp", w.dtype).tiled, w, kernels.dense(w, 192), 1024)(*tensors)
    kernel = kernels.backward(compiler.load("backward.cpp", w.dtype).backward, w, kernels.dense(w, 130), 128)
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


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads: int, isa: str) -> None:
    w = Workload(seq=300, kv_seq=300, heads=3, kv_heads=3, head_dim=64, value_dim=64, dtype="bfloat16")
    tensors, before = make(w), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = Tiled().build(w).call(*tensors)
        torch.set_num_threads(threads)
        assert torch.equal(Tiled().build(w).call(*tensors), wanted)
    finally:
        torch.set_num_threads(before)


def test_channel_bias_costs_int8_nothing_as_k_is_smoothed(isa: str) -> None:
    w = Workload(seq=1024, kv_seq=1024, heads=2, kv_heads=2, head_dim=64, value_dim=64, dtype="bfloat16")
    assert errors(Int8(impl="qk"), w, bias=5.0)[1] < (1e-2 if compiler.multiplies_bytes() else 1.5e-2)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("pattern", ["window", "bigbird", "strided"])
@pytest.mark.parametrize(
    ("block", "window", "seq", "kv_seq", "dtype"),
    [(128, 256, 1500, 1500, "bfloat16"), (100, 30, 700, 930, "float32"), (13, 1, 333, 333, "bfloat16")],
)
def test_hidden_blocks_are_skipped_in_the_kernel(
    pattern: str, mask: str, block: int, window: int, seq: int, kv_seq: int, dtype: str, isa: str
) -> None:
    w = Workload(seq=seq, kv_seq=kv_seq, heads=2, kv_heads=1, head_dim=64, value_dim=64, dtype=dtype, mask=mask)
    plugin = BlockSparse(impl="native", pattern=pattern, block=block, window=window)
    assert errors(plugin, w)[0] < EXACT[dtype]


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention_computes_what_it_defines(shape: str, dtype: str, mask: str, isa: str) -> None:
    sizes = {"heads": 3, "kv_heads": 3, "head_dim": 64, "value_dim": 64} | SHAPES[shape]
    w = Workload(**sizes, dtype=dtype, mask=mask)
    implementation, _ = errors(Linear(impl="native"), w, strided=shape in ("tail", "grouped", "batch"))
    assert implementation < EXACT[dtype]


def test_a_name_that_is_no_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.HIDE, "sse2")
    with pytest.raises(AttnbenchError, match="the instruction sets to stop at are avx2, avx2_vnni, avx512_core"):
        compiler.features()


@pytest.mark.parametrize("source", ["int8.cpp", "decode_int4.cpp"])
@pytest.mark.parametrize("more", [("avx_vnni",), ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")])
def test_what_this_cpu_lacks_compiles_all_the_same(
    source: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("this CPU lacks AVX2, or no C++ compiler (g++)")
    monkeypatch.setattr(compiler, "_all_features", lambda: frozenset(("avx2", "fma", "f16c", "bmi2", *more)))
    assert "vnni" in " ".join(compiler.flags("bfloat16"))
    compiler.load(source, "bfloat16")


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
    assert "(exit code 1)" in said.stdout
    assert "C++" not in said.stdout
    asked = elsewhere("tiled", "Tiled", "impl='native'", **broken)
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
    assert all(run.result().stdout.startswith("C++ AVX") for run in runs), runs[0].result().stderr
    assert log.read_text().splitlines() == ["compiled"]


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "dtype"), [("", "bfloat16"), ("avx2", "float32")], indirect=["isa"])
def test_sanitizers_find_nothing(tmp_path: Path, dtype: str, isa: str) -> None:
    sanitize(tmp_path, dtype)


def sanitize(tmp_path: Path, dtype: str, *more: str) -> None:
    """more: for the compiler."""
    program = tmp_path / "sanitize"
    flags = [f for f in compiler.flags(dtype) if f not in ("-O3", "-fPIC")]
    subprocess.run(
        ["g++", *flags, "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         f"-I{compiler.HERE}", str(HERE / "sanitize.cpp"), *more, "-o", str(program)],
        check=True,
    )  # fmt: skip
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 57


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype"), [("armv8-a", "float32"), ("armv8.2-a+dotprod", "float16"), ("armv8.6-a", "bfloat16")]
)
def test_a_64_bit_arm_computes_the_same(tmp_path: Path, arch: str, dtype: str) -> None:
    """Compiled for it and emulated: of right or wrong this tells, of speed nothing."""
    cross, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if not (shutil.which(cross) and shutil.which(emulator)):
        pytest.skip(f"no {cross} and {emulator}: NEON is not tried")
    program = tmp_path / "arm"
    flags = ["-std=c++17", "-O1", "-fopenmp", f"-march={arch}", f"-DVALUE={compiler.TYPES[dtype]}", "-static"]
    command = [cross, *flags, f"-I{compiler.HERE}", str(HERE / "sanitize.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([emulator, "-cpu", "max", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 57
