"""int8's GPU kernels: their arithmetic in Triton's interpreter on a CPU, the code that they compile to, and a GPU.

The interpreter must be chosen before triton is imported, so it runs in a process of its own: this file as a script.
It multiplies bfloat16 wrongly (it holds it as 16-bit integers); float16 takes the same way through the kernel.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import pytest
import torch
import triton_compiler
from attnbench_plugins.int8 import Int8
from attnbench_plugins.quantization import quantize, smooth
from test_int8 import errors, make, rel_l2
from triton_compiler import DIMS, DTYPES, kernels, slow

from attnbench.judge.reference import exact, expected
from attnbench.workload import Workload

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}
SHAPES: dict[str, dict[str, Any]] = {
    "1": {"seq": 1, "kv_seq": 1, "heads": 1, "kv_heads": 1},
    "1-100": {"seq": 1, "kv_seq": 100, "heads": 2, "kv_heads": 2},
    "17-mqa": {"seq": 17, "kv_seq": 17, "heads": 4, "kv_heads": 1},
    "200": {"seq": 200, "kv_seq": 200, "heads": 1, "kv_heads": 1},
    "100-257-gqa": {"seq": 100, "kv_seq": 257, "heads": 4, "kv_heads": 2, "head_dim": 33, "value_dim": 17},
    "batch": {"seq": 65, "kv_seq": 65, "heads": 2, "kv_heads": 1, "batch": 2},
}
KINDS = [("float32", 1), ("float32", 32), ("float32", 128), ("float16", 1)]
CASES = [(shape, mask, *kind) for shape, mask, kind in product(SHAPES, ("full", "causal"), KINDS)]
CORE = CASES[:: len(KINDS) + 1]  # each kind with some shapes and masks


def workload(shape: str, mask: str, dtype: str) -> Workload:
    """For CUDA, as the definition is the GPU's; the tensors lie on the CPU."""
    return Workload(**SHAPES[shape], mask=mask, dtype=dtype, device="cuda")


def interpret(shape: str, mask: str, dtype: str, rows: int) -> dict[str, Any]:
    """Runs the kernels on strided inputs; what they give, against the definition, softmax and torch's quantize."""
    from attnbench_plugins.int8 import triton_kernels

    w = workload(shape, mask, dtype)
    query, key, value = make(w.replace(device="cpu"), bias=2.0)
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    every_tiles = [tiles for some in (*triton_kernels.CANDIDATES.values(), triton_kernels.FLOAT32) for tiles in some]
    other = every_tiles[CASES.index((shape, mask, dtype, rows)) % len(every_tiles)]
    every = torch.arange(w.seq)
    wanted = expected(Int8(rows=rows).definition(w), w, query, key, value, every)
    outs = [triton_kernels.attention(query, key, value, w.scale, w.is_causal, rows, tiles) for tiles in (None, other)]
    ours = triton_kernels.quantize(query, key, rows)
    return {
        "implementation": max(rel_l2(out, wanted) for out in outs),
        "approximation": rel_l2(outs[0], exact(w, query, key, value, every)),
        "query": same(ours[0], quantize(query.float(), rows)),
        "key": same(ours[1], quantize(smooth(key), rows)),
        "held": sum(x.nbytes for pair in ours for x in pair) + 4 * w.batch * w.kv_heads * w.head_dim,  # and K's mean
        "predicted": Int8(rows=rows).workspace_bytes(w),
    }


def same(ours: tuple[torch.Tensor, torch.Tensor], plain: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether integers and scales are equal, bit by bit, and the padding around ours is 0."""
    length, dim = plain[0].shape[-2:]
    integers, scales = ours[0][:, :, :length, :dim], ours[1][:, :, :length]
    padding_is_zero = bool(ours[0].count_nonzero() == integers.count_nonzero())
    return padding_is_zero and torch.equal(integers, plain[0]) and torch.equal(scales, plain[1][..., 0])


@pytest.fixture(scope="session")
def interpreted(request: pytest.FixtureRequest) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    cases = triton_compiler.selected(request.session, __file__)
    return dict(zip(cases, triton_compiler.interpreted(__file__, cases), strict=True))


@pytest.mark.parametrize("case", triton_compiler.marked(CASES, CORE))
def test_the_kernels_compute_what_the_plugin_defines(
    interpreted: dict[tuple[str, str, str, int], dict[str, Any]], case: tuple[str, str, str, int]
) -> None:
    found = interpreted[case]
    assert found["query"]
    assert found["key"]
    assert found["held"] == found["predicted"]
    assert found["implementation"] < TOLERANCE[case[2]]
    assert found["approximation"] < 3e-2
    if SHAPES[case[0]]["kv_seq"] > 1:
        assert found["approximation"] > 1e-3  # it did quantize


@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [
        (90, "bf16", 64),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((80, "bf16", 128), *product((90,), ("bf16", "fp16", "fp32"), (128, 256)))
        ),
    ],
)
def test_compiled_for_a_gpu_it_multiplies_int8(capability: int, dtype: str, dim: int) -> None:
    from attnbench_plugins.int8 import triton_kernels

    for tiles in triton_kernels.candidates(dim, dim, dtype == "fp32"):
        products = triton_compiler.products(kernels.int8_kernel(dtype, dim, tiles, capability), capability)
        assert any("s32.s8.s8" in name for name in products)
        assert all("s32.s8.s8" in name or "f32" in name for name in products)


@pytest.mark.parametrize("rows", [1, 32, 128])
def test_the_quantizing_kernel_compiles_for_a_gpu(rows: int) -> None:
    from attnbench_plugins.int8 import triton_kernels

    types = {"q_ptr": "*bf16", "k_ptr": "*bf16", "mean_ptr": "*fp32", "q8_ptr": "*i8", "k8_ptr": "*i8"}
    types |= {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32"}
    constants = {"ROWS": rows, "BLOCK": triton_kernels.BLOCK, "DIM": 64, "dim": 64, "q_stride_d": 1, "k_stride_d": 1}
    assert ".entry" in kernels.compiled(triton_kernels.quantize_kernel, 90, types, constants, 8, 3).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, *slow(32, 128)])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_on_a_gpu(dim: int, dtype: str, mask: str, rows: int) -> None:
    for w in triton_compiler.problems(dim, dtype, mask, device="cuda"):
        implementation, approximation = errors(Int8(rows=rows), w, make(w))
        assert implementation < (1e-3 if dtype == "float32" else TOLERANCE[dtype])
        assert 1e-3 < approximation < 3e-2


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dim", [128, *slow(64, 256)])
def test_all_tiles_agree_on_a_gpu(dim: int, mask: str) -> None:
    from attnbench_plugins.int8 import triton_kernels

    shape = {"seq": 500, "kv_seq": 1000, "heads": 4, "kv_heads": 2, "head_dim": dim, "value_dim": dim}
    w = Workload(**shape, dtype="bfloat16", mask=mask, device="cuda")
    inputs = make(w)
    every = (None, *triton_kernels.candidates(dim, dim, is_float32=False))
    default, *others = (triton_kernels.attention(*inputs, w.scale, w.is_causal, 1, tiles) for tiles in every)
    for out in others:
        assert rel_l2(out, default.double()) < TOLERANCE["bfloat16"]


if __name__ == "__main__":
    print(json.dumps([interpret(*case) for case in json.loads(sys.argv[1])]))
