"""Caches in 8 and 4 bits: what they hold, and what reads them, on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attnbench_plugins import quantized_cache as caches
from attnbench_plugins.fp8 import FORMATS as FLOATS
from attnbench_plugins.int4 import FORMAT as INT4
from attnbench_plugins.int8 import FORMAT as INT8
from attnbench_plugins.native import attention as kernels
from attnbench_plugins.native import compiler
from test_cpu_kernels import EXACT, make, rel_l2

from attnbench.errors import AttnbenchError
from attnbench.judge.reference import exact
from attnbench.workload import Workload

FORMATS = {"int8": INT8, "int4": INT4, **FLOATS}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"seq": 1, "kv_seq": 1000, "heads": 8, "kv_heads": 2, "head_dim": 128, "value_dim": 128},
    "odd": {"seq": 2, "kv_seq": 131, "heads": 6, "kv_heads": 2, "head_dim": 40, "value_dim": 24, "batch": 2},
    "five": {"seq": 1, "kv_seq": 517, "heads": 5, "kv_heads": 1, "head_dim": 100, "value_dim": 80},
    "first": {"seq": 1, "kv_seq": 1, "heads": 2, "kv_heads": 1, "head_dim": 7, "value_dim": 33},
    "widest": {"seq": 3, "kv_seq": 300, "heads": 7, "kv_heads": 1, "head_dim": 256, "value_dim": 256},
    "cross": {"seq": 2, "kv_seq": 70, "heads": 2, "kv_heads": 2, "head_dim": 64, "value_dim": 1, "mask": "full"},
}
COARSE = 1.2e-2  # int4 of bfloat16 has weights of 8 bits


def steps() -> Iterator[tuple[str, str, str]]:
    """Each format in each shape, by turns in bfloat16 and in another dtype."""
    for name, other in zip(FORMATS, ("float16", "float32", "float32", "float32"), strict=True):
        for n, shape in enumerate(SHAPES):
            yield name, shape, ("bfloat16", other)[(n + (name == "e5m2")) % 2]


@pytest.mark.parametrize(("name", "shape", "dtype"), list(steps()))
def test_a_step_is_what_the_format_says(name: str, shape: str, dtype: str, isa: str) -> None:
    check(name, shape, dtype)


@pytest.mark.parametrize("isa", ["avx2_vnni"], indirect=True)
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int")])
def test_it_is_so_with_avx_vnni(name: str, isa: str) -> None:
    check(name, "odd", "bfloat16")


def check(name: str, shape: str, dtype: str) -> None:
    form = FORMATS[name]
    w = Workload(**({"mask": "causal"} | SHAPES[shape]), dtype=dtype, phase="decode")
    query, key, value = make(w, strided=True, bias=3.0)
    cache = caches.PackedCache.of(key[:, :, : w.past], value[:, :, : w.past], w.kv_seq, form)
    cache = cache.append(key[:, :, w.past :], value[:, :, w.past :], form)
    operands = form.operands(w, query, key, value)
    held = cache.widened(form, slice(0, w.kv_seq), w.head_dim, w.value_dim)
    assert all(torch.equal(one.double(), other.double()) for one, other in zip(held, operands[1:], strict=True))
    wanted = exact(w, *operands, torch.arange(w.seq))
    kernel = getattr(compiler.load(form.source, dtype), f"decode_{form.name}")
    arguments = cache.key, cache.value, cache.key_scale, cache.value_scale
    found = kernels.packed_decoder(kernel, w)(query, *arguments)
    limit = max(EXACT[dtype], 1e-4 if form.bits else 0)
    assert rel_l2(found, wanted) < (COARSE if name == "int4" and dtype == "bfloat16" else limit)
    assert rel_l2(caches.in_torch(w, form, cache, query), wanted) < EXACT[dtype]


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_one_by_one_make_the_same_cache(name: str) -> None:
    form = FORMATS[name]
    key, value = torch.randn(1, 2, 70, 24), torch.randn(1, 2, 70, 40)
    whole = caches.PackedCache.of(key, value, 80, form)
    grown = caches.PackedCache.of(key[:, :, :33], value[:, :, :33], 80, form)._replace(mean=whole.mean, length=0)
    for start, stop in ((0, 5), (5, 6), (6, 40), (40, 41), (41, 70)):
        grown = grown.append(key[:, :, start:stop], value[:, :, start:stop], form)
    assert grown.length == whole.length == 70
    assert all(torch.equal(one, other) for one, other in zip(grown[:5], whole[:5], strict=True))
    with pytest.raises(AttnbenchError, match="a cache of 80 tokens has no room for 140"):
        grown.append(key, value, form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_appends_what_torch_does(name: str, dtype: str, isa: str) -> None:
    form = FORMATS[name]
    kernel = getattr(compiler.load(form.source, dtype), f"append_{form.name}")
    for head_dim, value_dim in ((128, 128), (40, 24), (7, 256), (129, 1)):
        x = [torch.randn(2, 70, 3, dim, generator=torch.Generator().manual_seed(dim)) for dim in (head_dim, value_dim)]
        x[0][:, :40] *= torch.logspace(-6, 4, 40)[:, None, None]
        x[1][0, 5], x[1][1, :, 0, : value_dim // 2] = 0, 0
        key, value = (each.to(getattr(torch, dtype)).transpose(1, 2) for each in x)  # (2, 3, 70, dim), strided
        wanted, found = (caches.PackedCache.of(key[:, :, :33], value[:, :, :33], 90, form, k) for k in (None, kernel))
        for start, stop in ((33, 34), (34, 36), (36, 70)):
            new = key[:, :, start:stop], value[:, :, start:stop]
            wanted, found = wanted.append(*new, form), found.append(*new, form, kernel)
        assert found.length == 70
        assert all(torch.equal(one, other) for one, other in zip(found[:5], wanted[:5], strict=True))


@pytest.mark.parametrize(("name", "error"), [("int8", 0.012), ("int4", 0.16), ("e4m3", 0.04), ("e5m2", 0.1)])
def test_a_format_costs_what_its_bits_cost(name: str, error: float) -> None:
    w = Workload(seq=1, kv_seq=500, heads=4, kv_heads=2, dtype="float32", mask="causal", phase="decode")
    query, key, value = make(w, bias=3.0)  # keys less their mean are as if there were no bias
    rows = torch.arange(w.seq)
    found = exact(w, *FORMATS[name].operands(w, query, key, value), rows)
    assert error / 2 < rel_l2(found, exact(w, query, key, value, rows)) < error


def test_numbers_that_no_scale_fits_are_kept_all_the_same() -> None:
    x = torch.tensor([[0.0] * 64, [1e-20] * 64, [3e30] * 64])
    for form in FORMATS.values():
        kept = form.widen(*form.narrow(x))
        assert torch.isfinite(kept).all()
        torch.testing.assert_close(kept[1:], x[1:], rtol=0.02, atol=0)
        assert (kept[0] == 0).all()
