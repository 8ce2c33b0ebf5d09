"""peers: other libraries' attention computes what each plugin defines. What is not installed is skipped.

sageattention is run by Triton's interpreter, in a process of its own: this file as a script, with assertions off (-O),
as one of its own wants a GPU. fla's kernels do not run there, so on a CPU its plain torch stands in for them.
"""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_compiler
from attnbench_plugins.linear import Linear
from test_int8 import errors, make, rel_l2

from attnbench.judge.conformance import check
from attnbench.judge.reference import expected, gradients
from attnbench.plugin import Plugin, built
from attnbench.registry import load
from attnbench.workload import Workload

PEERS = Path(__file__).parents[1] / "peers"
LIBRARIES = {
    "onnxruntime": ["onnxruntime", "onnx"],
    "onnxruntime-gqa": ["onnxruntime", "onnx"],
    "openvino": ["openvino"],
    "zentorch": ["zentorch"],
    "vllm-cpu": ["vllm"],
    "ggml": ["ggml"],
    "sageattention": ["sageattention"],
    "sageattention-2": ["sageattention.triton"],
    "fla-linear": ["fla", "einops"],
    "flash-attn-2": ["flash_attn.flash_attn_interface"],
    "flash-attn-3": ["flash_attn_interface"],
    "flash-attn-4": ["flash_attn.cute", "cutlass"],
    "hf-kernels": ["kernels"],
    "cudnn": ["cudnn"],
    "flashinfer": ["flashinfer", "tvm_ffi"],
    "natten": ["natten"],
}
PROJECT: dict[str, Any] = tomllib.loads((PEERS / "pyproject.toml").read_text())["project"]
ENTRIES: dict[str, str] = PROJECT["entry-points"]["attnbench.plugins"]
SAGE = [
    {"seq": 128, "kv_seq": 192, "heads": 2, "kv_heads": 1},
    {"seq": 256, "kv_seq": 256, "heads": 1, "kv_heads": 1, "mask": "causal"},
    {"seq": 65, "kv_seq": 64, "heads": 1, "kv_heads": 1, "head_dim": 96, "value_dim": 96},
]


def peer(name: str) -> type[Plugin]:
    """The plugin of that name, as `attnbench` would load it were the package installed."""
    for library in LIBRARIES.get(name, []):
        if not there(library):
            pytest.skip(f"could not import {library!r}")
    return load(ENTRIES[name])


def there(library: str) -> bool:
    try:
        return bool(find_spec(library))
    except ImportError:  # of the package that it is in
        return False


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PEERS)


def interpret(shape: dict[str, Any]) -> dict[str, Any]:
    """sageattn in the interpreter on a CPU: its errors, and whether it left K as it was."""
    w = Workload(**shape, dtype="float16", device="cuda")
    plugin = load(ENTRIES["sageattention"])()
    query, key, value = make(w.replace(device="cpu"), bias=2.0)
    before = key.clone()
    implementation, approximation = errors(plugin, w, (query, key, value))
    return {
        "reason": plugin.supports(w),
        "implementation": implementation,
        "approximation": approximation,
        "kept": torch.equal(key, before),
    }


@pytest.mark.parametrize("name", ENTRIES)
def test_a_missing_library_is_named_and_breaks_its_own_peer_alone(name: str) -> None:
    missing = [library for library in LIBRARIES.get(name, []) if not there(library)]
    if missing:
        with pytest.raises(ImportError, match="|".join(library.split(".")[0] for library in missing)):
            load(ENTRIES[name])
    else:
        assert load(ENTRIES[name])().definition(Workload(seq=1, kv_seq=1))


@pytest.mark.parametrize("asked", [{"mask": "window:20"}, {"mask": "window:9", "softcap": 1.5, "softmax_scale": 0.3}])
@pytest.mark.parametrize(("name", "options"), [("onnxruntime-gqa", {}), ("ggml", {"cache": "q8_0"})])
def test_windows_softcaps_and_scales(name: str, options: dict[str, Any], asked: dict[str, Any]) -> None:
    plugin = peer(name)(**options)
    for shape in ({"seq": 30, "kv_seq": 70}, {"seq": 1, "kv_seq": 70, "phase": "decode"}):
        found = check(plugin, Workload(**shape, **asked, heads=2, kv_heads=2, head_dim=32, value_dim=32))
        assert (found.status, found.reason) == ("ok", "")


def test_sageattention_computes_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    peer("sageattention")
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    for found in triton_compiler.interpreted(__file__):
        assert found["reason"] is None
        assert found["kept"]
        assert found["implementation"] < 5e-3  # P V is summed in float16
        assert 1e-3 < found["approximation"] < 3e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": "causal", "kv_seq": 384}, "as many queries"),
        ({"mask": "causal", "seq": 192, "kv_seq": 192}, "multiple of 128"),
        ({"kv_seq": 100}, "multiple of 64"),
        ({"head_dim": 80, "value_dim": 80}, "64, 96 and 128"),
        ({"dtype": "float32"}, "float16"),
    ],
)
def test_sageattention_says_what_it_cannot_do(change: dict[str, Any], words: str) -> None:
    shape = {"seq": 256, "kv_seq": 256, "dtype": "bfloat16", "device": "cuda"}
    plugin = peer("sageattention")()
    assert plugin.supports(Workload(**shape)) is None
    assert words in str(plugin.supports(Workload(**shape | change)))


def test_fla_linear_is_our_linear_but_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = peer("fla-linear")()
    module = importlib.import_module("attnbench_peers.fla_linear")
    naive = importlib.import_module("fla.ops.linear_attn.naive")
    monkeypatch.setattr(module, "chunk_linear_attn", naive.naive_recurrent_linear_attn)
    w = Workload(seq=70, kv_seq=70, heads=2, kv_heads=2, batch=2, head_dim=16, value_dim=24, mask="causal")
    inputs = make(w)
    wanted = expected(Linear().definition(w), w, *inputs, torch.arange(w.seq))
    assert rel_l2(built(plugin, w).call(*inputs), wanted) < 2e-6
    assert rel_l2(expected(plugin.definition(w), w, *inputs, torch.arange(w.seq)), wanted) < 1e-12


HOSTED = [
    *((name, {}) for name in ("openvino", "zentorch")),
    *(("onnxruntime-gqa", {"cache": cache}) for cache in ("wide", "int8", "int4")),
    *(("vllm-cpu", {"cache": cache}) for cache in ("wide", "fp8_e4m3")),
    *(("ggml", {"cache": cache}) for cache in ("f16", "q8_0", "q4_0", "f32")),
]


@pytest.mark.parametrize(("name", "options"), HOSTED, ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else x)
def test_a_peer_of_the_cpu_computes_what_it_defines(name: str, options: dict[str, str]) -> None:
    plugin = peer(name)(**options)
    statuses = []
    for shape in (
        {"seq": 65, "kv_seq": 65, "batch": 2},
        {"seq": 65, "kv_seq": 65, "mask": "causal"},
        {"seq": 17, "kv_seq": 97, "mask": "causal"},
        {"seq": 1, "kv_seq": 300, "mask": "causal", "phase": "decode", "batch": 2},
        {"seq": 5, "kv_seq": 300, "mask": "causal", "phase": "decode"},
        {"seq": 1, "kv_seq": 300, "phase": "decode"},
    ):
        for dtype in ("float32", "bfloat16", "float16"):
            w = Workload(**(shape | {"dtype": dtype}), heads=4, kv_heads=2, head_dim=32, value_dim=32, threads=2)
            found = check(plugin, w, strided=True)
            assert found.status in ("ok", "unsupported"), (w, found.reason)
            assert found.status != "ok" or any(digit in found.implementation for digit in "0123456789")  # its version
            statuses.append(found.status)
    assert statuses.count("ok") >= 4


@pytest.mark.parametrize(("kept", "levels"), [("q8_0", 127), ("q4_0", 8)])
def test_a_block_keeps_its_largest_number_and_rounds_the_others(kept: str, levels: int) -> None:
    x = make(Workload(seq=50, kv_seq=50, head_dim=96))[0]
    x[0, 0, 0] = 0
    narrow = getattr(importlib.import_module("attnbench_peers.blocks"), kept)(x)
    peak = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    off = (narrow - x).unflatten(-1, (-1, 32)).abs()
    largest = x.unflatten(-1, (-1, 32)).abs() == peak
    assert bool((off[largest] <= peak.expand_as(off)[largest] * 2**-10).all())
    steps = (off / (peak / levels).clamp(min=1e-9)).amax()
    assert 0.49 < steps < (0.6 if kept == "q8_0" else 1.01)  # of 4 bits, what would be 8 becomes 7


def test_onnxruntime_computes_softmax_attention() -> None:
    plugin = peer("onnxruntime")()
    for mask in ("full", "causal"):
        w = Workload(seq=65, kv_seq=65, heads=2, kv_heads=2, batch=2, mask=mask)
        assert plugin.supports(w) is None
        inputs = make(w)
        assert (
            rel_l2(built(plugin, w).call(*inputs), expected(plugin.definition(w), w, *inputs, torch.arange(65))) < 1e-5
        )


def test_flex_dense_computes_softmax_attention() -> None:
    plugin = peer("flex-dense")()
    asked: list[dict[str, Any]] = [
        {}, {"kv_seq": 300, "mask": "causal"}, {"mask": "window:50", "softcap": 2.0, "bias": "relative"},
        {"kv_seq": 300, "heads": 6, "bias": "alibi"},
    ]  # fmt: skip
    for each in asked:
        w = Workload(**{"seq": 200, "kv_seq": 200, "heads": 4, "kv_heads": 2} | each)
        if reason := plugin.supports(w):
            pytest.skip(reason)
        assert max(errors(plugin, w, make(w))) < 2e-6


TRAINED = (
    "fla-linear", "flex-dense", "flash-attn-2", "flash-attn-3", "flash-attn-4", "hf-kernels", "cudnn", "natten",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dim", [128, *triton_compiler.slow(64)])
@pytest.mark.parametrize("name", ["sageattention", "sageattention-2", "flashinfer", *TRAINED])
def test_on_a_gpu(name: str, mask: str, dim: int) -> None:
    plugin = peer(name)()
    w = Workload(seq=1024, kv_seq=1024, heads=4, kv_heads=4, head_dim=dim, value_dim=dim, dtype="bfloat16", mask=mask,
                 device="cuda")  # fmt: skip
    if reason := plugin.supports(w):
        pytest.skip(reason)
    inputs = make(w)
    wanted = expected(plugin.definition(w), w, *inputs, torch.arange(w.seq))
    assert rel_l2(built(plugin, w).call(*inputs), wanted) < 1.5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_on_a_gpu(name: str) -> None:
    plugin = peer(name)()
    w = Workload(
        seq=512, kv_seq=512, heads=2, kv_heads=2, dtype="bfloat16", mask="causal", device="cuda", phase="train"
    )
    if reason := plugin.supports(w):
        pytest.skip(reason)
    inputs = [x.requires_grad_() for x in make(w)]
    out = built(plugin, w).call(*inputs)
    up = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, up)
    for ours, wanted in zip(found, gradients(plugin.definition(w), w, inputs, up, 0, 1), strict=True):
        assert rel_l2(ours[:1, 1:], wanted) < 2e-2


if __name__ == "__main__":
    sys.path.insert(0, str(PEERS))
    print(json.dumps([interpret(shape) for shape in SAGE]))
