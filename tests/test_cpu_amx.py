"""The kernels for AMX, on machines without: what is compiled for it is executed, its instructions by cpu/tiles.cpp."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_cpu_kernels
import test_ragged
import test_train
import torch
from attnbench_plugins.block_sparse import BlockSparse
from attnbench_plugins.int8 import Int8
from attnbench_plugins.native import attention as kernels
from attnbench_plugins.native import compiler
from attnbench_plugins.tiled import Tiled
from instructions import BEST, hold_to
from test_cpu_kernels import EXACT, check, errors, needs_kernels, sanitize
from test_cpu_stages import Stages, check_products

from attnbench.workload import Workload

EMULATOR = Path(__file__).parent / "cpu/tiles.cpp"
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL | None]:
    """Kernels are compiled for AMX, and executed by it or by the emulator, which is given; all tiles have to be given back."""
    hold_to(BEST, monkeypatch)
    has = compiler.features()
    if not has.issuperset(AVX512):
        pytest.skip("this CPU lacks AVX512-BF16, which is used beside AMX")
    if "amx_tile" in has:
        if reason := compiler.tiles_refused():
            pytest.skip(f"no AMX: {reason}")
        yield None
        return
    emulator = compiler.load(str(EMULATOR), "bfloat16")
    monkeypatch.setattr(compiler, "_all_features", lambda: has | compiler.AMX)
    monkeypatch.setattr(compiler, "_permission", lambda: None)
    emulator.tiles_emulate()
    yield emulator
    emulator.tiles_stop()
    assert emulator.tiles_held() == 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("rows", [1, 7, 16, 35])
@pytest.mark.parametrize("length", [1, 14, 33, 64])
@pytest.mark.parametrize("columns", [16, 64, 144])
def test_products_are_those_of_torch(rows: int, length: int, columns: int) -> None:
    check_products(Stages("bfloat16"), rows, length, columns)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("shape", "mask"),
    [(shape, "causal") for shape in ("tail", "grouped", "narrow", "odd dims", "wide value", "widest")]
    + [("tail", "full")],
)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("tiled", "bfloat16"), ("small tiles", "bfloat16"), ("qk", "bfloat16"), ("qk", "float16"), ("qkpv", "bfloat16")],
)
def test_a_kernel_computes_what_it_defines(kernel: str, dtype: str, shape: str, mask: str) -> None:
    check(kernel, shape, dtype, mask)


@pytest.mark.usefixtures("tiles")
def test_exact_kernels_hold_wide_heads() -> None:
    test_cpu_kernels.test_exact_kernels_hold_wide_heads("many", "bfloat16", BEST)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("pattern", ["window", "bigbird"])
def test_hidden_blocks_are_skipped(pattern: str) -> None:
    w = Workload(seq=333, kv_seq=333, heads=2, kv_heads=1, dtype="bfloat16", mask="causal")
    assert errors(BlockSparse(impl="native", pattern=pattern, block=13, window=30), w)[0] < EXACT["bfloat16"]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", ["one query", "tail", "grouped", "odd dims", "wide value"])
def test_gradients_are_those_of_softmax_attention(shape: str, mask: str) -> None:
    plugin, limit = test_train.EXACT["native"]
    w = test_train.workload(shape, dtype="bfloat16", mask=mask)
    test_train.check(plugin, w, limit, shape in test_train.STRIDED)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("batch", ["long and short", "window"])
def test_a_ragged_batch_is_its_entries(batch: str) -> None:
    test_ragged.test_one_call_computes_every_entry_and_puts_out_nothing_behind(batch, "bfloat16", BEST)


@pytest.mark.usefixtures("tiles")
def test_any_number_of_threads_gives_the_same() -> None:
    w = Workload(seq=130, kv_seq=300, heads=3, kv_heads=3, dtype="bfloat16", mask="causal")
    call, before = Tiled(impl="native").build(w).call, torch.get_num_threads()
    query, key, value = (torch.randn(1, 3, n, 64).bfloat16() for n in (130, 300, 300))
    try:
        found = [(torch.set_num_threads(threads), call(query, key, value))[1] for threads in (1, 2, 5)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_tiles_are_full(tiles: ctypes.CDLL | None) -> None:
    if tiles is None:
        pytest.skip("a CPU that has AMX does not count")
    w = Workload(seq=64, kv_seq=128, heads=3, kv_heads=3, head_dim=96, value_dim=48, dtype="bfloat16")
    call = Tiled(impl="native").build(w).call
    before = tiles.tiles_multiplied()
    call(*(torch.randn(1, 3, n, dim).bfloat16() for n, dim in ((64, 96), (128, 96), (128, 48))))
    assert tiles.tiles_multiplied() - before == 3 * 64 * 128 * (96 + 48) / (16 * 16 * 32)


@pytest.mark.usefixtures("tiles")
def test_implementations_and_workspaces_tell_of_it() -> None:
    w = Workload(seq=200, kv_seq=200, dtype="bfloat16")
    tiled, int8 = Tiled().build(w), Int8(impl="qkpv").build(w)
    assert tiled.implementation.startswith("C++ AVX-512 and AMX in bfloat16, ")
    assert int8.implementation == "C++ AVX-512 and AMX in bfloat16, int8 Q K^T and P V by AMX"
    assert kernels.described("float32") == "C++ AVX-512"
    for built in (tiled, int8):
        built.call(*(torch.randn(1, 8, 200, 64).bfloat16() for _ in range(3)))
    rows, keys = 16, 1024  # of a tile
    with_tiles = Tiled().workspace_bytes(w)
    assert with_tiles is not None
    assert with_tiles > w.threads * rows * keys * (4 + 2)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("most", "has"), [("", True), ("avx512_core_amx", True), ("avx512_core_bf16", False)])
def test_a_name_hides_it(most: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.HIDE, most)
    assert compiler.has_tiles("bf16") == compiler.has_tiles("int8") == has
    assert compiler.multiplies_pairs()
    Stages("bfloat16")


@pytest.mark.parametrize(
    ("source", "has"),
    [("tiled.cpp", {"tilezero", "tdpbf16ps"}), ("int8.cpp", {"tdpbf16ps", "tdpbsud", "tdpbusd"})],
)
def test_it_compiles_to_instructions_of_amx(source: str, has: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And is loaded, but not executed."""
    if platform.machine() != "x86_64" or not (shutil.which("g++") and shutil.which("objdump")):
        pytest.skip("not x86-64, or no g++ and objdump")
    monkeypatch.delenv(compiler.HIDE, raising=False)
    monkeypatch.setattr(compiler, "_all_features", lambda: frozenset((*AVX512, *compiler.AMX)))
    monkeypatch.setattr(compiler, "_permission", lambda: None)
    library = compiler.load(source, "bfloat16")
    text = subprocess.run(["objdump", "-d", library._name], capture_output=True, text=True, check=True).stdout
    found = {word for line in text.splitlines() for word in line.split("\t")[2:3] for word in word.split()[:1]}
    assert found >= has | {"ldtilecfg", "tileloadd", "tilestored", "tilerelease"}


@needs_kernels
def test_a_process_that_is_refused_tiles_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux itself is asked, on a CPU that has none."""
    if platform.machine() != "x86_64" or "amx_tile" in compiler.features():
        pytest.skip("a CPU that has AMX, or is not x86-64")
    has = compiler.features() | compiler.AMX
    monkeypatch.setattr(compiler, "_all_features", lambda: has)
    reason = compiler.tiles_refused()
    assert reason
    assert not compiler.has_tiles("bf16")
    w = Workload(seq=70, kv_seq=70, dtype="bfloat16")
    for plugin in (Tiled(impl="native"), Int8(impl="qk")):
        built = plugin.build(w)
        assert f" (no AMX: {reason})" in built.implementation
        assert built.call(*(torch.randn(1, 8, 70, 64).bfloat16() for _ in range(3))).isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("tiles")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    sanitize(tmp_path, "bfloat16", str(EMULATOR))
