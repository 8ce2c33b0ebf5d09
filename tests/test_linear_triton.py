"""linear's GPU kernels: their arithmetic in Triton's interpreter on a CPU, the code that they compile to, and a GPU.

The interpreter multiplies bfloat16 wrongly (it holds it as 16-bit integers). float16 inputs take the same way through
the kernels with float32 products, and once with products of float16, which stands for bfloat16's.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import triton_compiler
from attnbench_plugins import triton_kit
from attnbench_plugins.linear import Linear
from attnbench_plugins.linear.features import elu
from test_train import errors
from torch import Tensor
from triton_compiler import DIMS, DTYPES, kernels

from attnbench.plugin import Attention
from attnbench.workload import Workload

SHAPES: dict[str, dict[str, Any]] = {
    "1": {"seq": 1, "kv_seq": 1, "heads": 1, "kv_heads": 1},
    "1-100": {"seq": 1, "kv_seq": 100, "heads": 2, "kv_heads": 2},
    "17-mqa": {"seq": 17, "kv_seq": 17, "heads": 4, "kv_heads": 1},
    "128": {"seq": 128, "kv_seq": 128, "heads": 1, "kv_heads": 1},
    "200": {"seq": 200, "kv_seq": 200, "heads": 1, "kv_heads": 1},
    "70-230-gqa": {"seq": 70, "kv_seq": 230, "heads": 4, "kv_heads": 2, "head_dim": 33, "value_dim": 17},
    "batch": {"seq": 65, "kv_seq": 65, "heads": 2, "kv_heads": 1, "batch": 2},
    "wide": {"seq": 66, "kv_seq": 70, "heads": 1, "kv_heads": 1, "head_dim": 20, "value_dim": 130},
}
# Inputs, and what the products' operands are rounded to; the limit of the output's and of the gradients' relative L2.
KINDS = {"float32": (None, 3e-6), "float16": (None, 1e-3), "float16 products": ("float16", 2e-3)}
PROGRAMS = (1, 3, 1000)  # wanted at once: one segment to a head, a few of several chunks, and each as short as may be
CASES = [
    (shape, mask, kind, programs)
    for shape, mask, kind, programs in product(SHAPES, ("full", "causal"), KINDS, PROGRAMS)
    if programs == 1000 or (kind == "float32" and SHAPES[shape]["kv_seq"] >= 128)
]


ROUNDED = [("200", "causal", kind, 1000) for kind in ("float16", "float16 products")]
CORE = [*ROUNDED, *(case for case in CASES if case[2:] == ("float32", 1000) or case[2:] == ("float32", 3))]


def workload(shape: str, mask: str, kind: str) -> Workload:
    sizes = {"head_dim": 16, "value_dim": 16} | SHAPES[shape]
    return Workload(**sizes, mask=mask, dtype=kind.split()[0], phase="train")


class Called(Linear):
    """Linear attention as another function of query, key and value computes it."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def build(self, workload: Workload) -> Attention:
        return Attention(self.call, "")


def interpret(shape: str, mask: str, kind: str, programs: int) -> list[float]:
    """Runs the kernels on strided inputs: errors of the output and of the gradients of query, key and value."""
    import triton.language as tl
    from attnbench_plugins.linear.triton_kernels import attention

    w, rounded = workload(shape, mask, kind), KINDS[kind][0]
    call = partial(
        attention,
        is_causal=w.is_causal,
        programs=programs,
        product=rounded and getattr(tl, rounded),
    )
    return errors(Called(call), w, strided=True)


def held(shape: str, mask: str) -> tuple[int, int]:
    """Bytes that a forward pass makes beside its output, and those that the plugin foretells."""
    from attnbench_plugins.linear.triton_forward import forward
    from attnbench_plugins.linear.triton_states import PROGRAMS, Problem

    w = workload(shape, mask, "float32")
    query, key, value = (
        torch.randn(w.batch, heads, length, dim)
        for heads, length, dim in (
            (w.heads, w.seq, w.head_dim),
            (w.kv_heads, w.kv_seq, w.head_dim),
            (w.kv_heads, w.kv_seq, w.value_dim),
        )
    )
    problem = Problem(query, value, w.is_causal, PROGRAMS)
    _, *rest = forward(problem, query, key, value)
    foretold = Linear(impl="triton").workspace_bytes(w.replace(device="cuda", phase="forward"))
    assert foretold is not None
    return sum(x.nbytes for x in rest), foretold


@pytest.fixture(scope="session")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    cases = list(dict.fromkeys([*ROUNDED, *triton_compiler.selected(request.session, __file__)]))
    found: dict[str, Any] = triton_compiler.interpreted(__file__, cases)
    return found | {"errors": dict(zip(cases, found["errors"], strict=True))}


@pytest.mark.parametrize("case", triton_compiler.marked(CASES, CORE))
def test_the_kernels_compute_what_the_plugin_defines(
    interpreted: dict[str, Any], case: tuple[str, str, str, int]
) -> None:
    found = interpreted["errors"][case]
    assert all(error < KINDS[case[2]][1] for error in found)  # NaN is not


def test_rounded_products_are_rounded(interpreted: dict[str, Any]) -> None:
    """So the cases that round test something else than those that don't."""
    exact, rounded = (interpreted["errors"][case] for case in ROUNDED)
    assert all(more > 1.2 * less for more, less in zip(rounded[1:], exact[1:], strict=True))


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", ["1", "200", "70-230-gqa"])
def test_the_plugin_foretells_what_they_hold(interpreted: dict[str, Any], shape: str, mask: str) -> None:
    made, foretold = interpreted["held"][f"{shape} {mask}"]
    assert made == foretold


PRODUCTS = {"bf16": "f32.bf16.bf16", "fp16": "f32.tf32.tf32"}


@pytest.mark.parametrize(
    ("name", "how"), kernels.LINEAR, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
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
def test_compiled_for_a_gpu_they_fit_and_multiply_on_tensor_cores(
    capability: int, dtype: str, dim: int, name: str, how: dict[str, bool]
) -> None:
    products = triton_compiler.products(kernels.linear_kernel(name, how, dtype, dim, capability), capability)
    if dtype == "fp32":  # no digit may be lost
        assert not products
    else:
        assert products
        assert all(PRODUCTS[dtype] in word for word in products)


def test_the_scan_compiles_for_a_gpu() -> None:
    from attnbench_plugins.linear.triton_states import scan_kernel

    constants = {"SIZE": 64 * 65, "BLOCK": 256}
    assert ".entry" in kernels.compiled(scan_kernel, 90, {"state_ptr": "*fp32"}, constants, 4, 3).asm["ptx"]


def on_cuda(**changes: Any) -> Workload:
    return Workload(**{"seq": 300, "kv_seq": 300, "dtype": "bfloat16", "device": "cuda", "mask": "causal"} | changes)


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_on_cuda_they_are_what_runs(phase: str) -> None:
    made = Linear().build(on_cuda(phase=phase))
    assert made.implementation == "triton, elu(x) + 1, chunks of 64 in segments of 64"
    assert Linear(impl="triton").supports(on_cuda(phase=phase)) is None


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"features": "favor"}, {}, "the Triton kernels are for elu features and their own chunk"),
        ({"chunk": 32}, {}, "the Triton kernels are for elu features and their own chunk"),
        ({}, {"head_dim": 257}, "the Triton kernels hold head and value dims up to 256"),
        ({}, {"value_dim": 300}, "the Triton kernels hold head and value dims up to 256"),
    ],
)
def test_elsewhere_it_says_why_not(options: dict[str, Any], changes: dict[str, int], reason: str) -> None:
    w = on_cuda(**changes)
    assert Linear(**options, impl="triton").supports(w) == reason
    assert Linear(**options).supports(w) is None
    plain = Linear(**options)
    plain._phi = lambda workload: elu  # type: ignore[method-assign]  # FAVOR+ would put its matrix on the GPU
    assert plain.build(w).implementation.endswith(f"({reason})")


def test_float32_is_for_those_who_ask() -> None:
    w = on_cuda(dtype="float32")
    assert Linear(impl="triton").supports(w) is None
    assert Linear().build(w).implementation.endswith("(in float32 the Triton kernels do without tensor cores)")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kit, "find_spec", lambda name: None)
    assert Linear(impl="triton").supports(on_cuda()) == "the Triton kernels need triton"
    assert Linear().build(on_cuda()).implementation.endswith("(the Triton kernels need triton)")
    assert Linear().workspace_bytes(on_cuda()) == Linear(impl="torch").workspace_bytes(on_cuda())


def test_decoding_and_a_cpu_are_refused() -> None:
    assert Linear(impl="triton").supports(on_cuda(phase="decode")) == "the Triton kernels go through all keys"
    assert Linear(impl="triton").supports(on_cuda(device="cpu")) == "the Triton kernels are for CUDA"
    assert Linear().decoding(on_cuda(phase="decode")).implementation.startswith("plain torch")


def test_they_do_less_than_plain_torch_with_its_larger_chunks() -> None:
    causal, full = on_cuda(seq=4096, kv_seq=4096), on_cuda(seq=4096, kv_seq=4096, mask="full")
    assert Linear().flops(causal) < Linear(impl="torch").flops(causal)
    assert Linear().flops(full) == Linear(impl="torch").flops(full)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_on_a_gpu(dim: int, dtype: str, mask: str) -> None:
    limit = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}[dtype]
    for w in triton_compiler.problems(dim, dtype, mask, phase="train"):
        made = Linear(impl="triton").build(w.replace(device="cuda"))

        def call(*tensors: Tensor, made: Attention = made) -> Tensor:
            return made.call(*(x.cuda() for x in tensors)).cpu()

        assert all(error < limit for error in errors(Called(call), w, strided=True))


@pytest.mark.gpu
def test_gradients_are_the_same_each_time() -> None:
    w = on_cuda(seq=2048, kv_seq=2048, heads=4, kv_heads=2, phase="train")
    call = Linear(impl="triton").build(w).call
    torch.manual_seed(0)
    leaves = [
        torch.randn(1, heads, 2048, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)
    ]
    first, second = (torch.autograd.grad(call(*leaves).square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


if __name__ == "__main__":
    shapes = product(("1", "200", "70-230-gqa"), ("full", "causal"))
    print(
        json.dumps(
            {
                "errors": [interpret(*case) for case in json.loads(sys.argv[1])],
                "held": {f"{shape} {mask}": held(shape, mask) for shape, mask in shapes},
            }
        )
    )
