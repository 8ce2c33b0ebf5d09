"""One shape for choices: `impl=auto` is the first that can, and all that a variant says is said by what it builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attnbench_plugins.block_sparse import BlockSparse
from attnbench_plugins.int8 import Int8
from attnbench_plugins.int8.plain import multiplies_int8
from attnbench_plugins.linear import Linear
from attnbench_plugins.naive import Naive
from attnbench_plugins.native import compiler
from attnbench_plugins.sdpa import Sdpa
from attnbench_plugins.tiled import Tiled
from attnbench_plugins.xformers import Xformers

from attnbench.errors import AttnbenchError
from attnbench.judge.conformance import check
from attnbench.plugin import Attention, Choice, Decoding, Implementation, Option
from attnbench.registry import find, instances, load
from attnbench.task.call import Task
from attnbench.task.promise import promise
from attnbench.workload import Workload

W = Workload(seq=4, kv_seq=4)


def says(reason: str | None) -> Any:
    return lambda workload: reason


class Three(Choice):
    """`first` and `second` refuse what they are told to; `last` is offered to nobody by name."""

    options: ClassVar[dict[str, Option]] = {
        "impl": Option("auto", "what computes it", ("auto", "first", "second")),
        "no_first": Option("", "why not"),
        "no_second": Option("", "why not"),
        "slow_second": Option("", "why auto should not"),
    }
    no_first: str
    no_second: str
    slow_second: str

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        def made(name: str, size: int, no: str = "", slow: str = "") -> Implementation:
            def build(workload: Workload) -> Attention:
                return Attention(lambda query, key, value: value, f"the {name}")

            return Implementation(
                name, build, says(no or None), says(slow or None), lambda w: size, lambda w: 10 * size,
                emulated=name == "last",
            )  # fmt: skip

        second = made("second", 2, self.no_second, self.slow_second)
        return made("first", 1, self.no_first), second, made("last", 3)


@pytest.mark.parametrize(
    ("options", "implementation", "size"),
    [
        ({}, "the first", 1),
        ({"no_first": "too long"}, "the second (too long)", 2),
        ({"no_first": "too long", "no_second": "too wide"}, "the last (too long; too wide)", 3),
        ({"no_first": "too long", "slow_second": "too slow"}, "the last (too long; too slow)", 3),
        ({"no_first": "no gain", "no_second": "too wide", "slow_second": "no gain"}, "the last (no gain)", 3),
        ({"impl": "second", "slow_second": "too slow"}, "the second", 2),
    ],
)
def test_auto_is_the_first_that_can_and_says_why_not_the_others(
    options: dict[str, str], implementation: str, size: int
) -> None:
    plugin = Three(**options)
    assert plugin.supports(W) is None
    assert plugin.build(W).implementation == implementation
    assert plugin.decoding(W.replace(phase="decode")).implementation == implementation
    assert (plugin.workspace_bytes(W), plugin.flops(W)) == (size, 10 * size)


def test_what_stands_in_for_a_variant_is_emulated_wherever_it_is_asked() -> None:
    for options, emulated in (({}, False), ({"no_first": "too long", "no_second": "too wide"}, True)):
        plugin = Three(**options)
        assert promise(plugin, W).emulated == Task(plugin, W).emulated == plugin.emulated(W) == emulated
    assert Int8(impl="torch").emulated(W) != multiplies_int8()
    assert Xformers().emulated(W)
    assert not Tiled().emulated(W)


@pytest.mark.parametrize(
    ("features", "dtype", "slow"),
    [
        ({"avx2"}, "float32", False),
        ({"avx2"}, "bfloat16", True),
        ({"avx2", "avx512_bf16"}, "bfloat16", False),
        ({"avx2", "avx512_bf16"}, "float16", True),
        ({"avx2", "avx512_fp16"}, "float16", False),
        (set(), "bfloat16", False),  # nobody says what it has
    ],
)
def test_plain_products_are_emulated_where_the_cpu_lacks_them(
    features: set[str], dtype: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "features", lambda: frozenset(features))
    w = W.replace(dtype=dtype)
    assert Naive().emulated(w) == slow
    assert not Naive().emulated(w.replace(seq=1, phase="decode")), "a single row is fast in any dtype"
    assert not Sdpa().emulated(w)
    if dtype == "bfloat16":
        assert promise(Tiled(impl="strip"), w).emulated == slow


def test_what_is_asked_for_is_never_another() -> None:
    plugin = Three(impl="first", no_first="too long")
    assert plugin.supports(W) == "too long"
    for ask in (plugin.build, plugin.decoding, plugin.workspace_bytes, plugin.flops):
        with pytest.raises(AttnbenchError, match="too long"):
            ask(W)


def test_what_is_not_there_for_a_device_is_refused() -> None:
    class Two(Three):
        def implementations(self, workload: Workload) -> Sequence[Implementation]:
            return super().implementations(workload)[workload.device == "cuda" :]

    assert Two(impl="first").supports(W) is None
    assert Two(impl="first").supports(W.replace(device="cuda")) == "impl=first is not for cuda"


def test_a_bare_function_has_the_name_of_its_implementation() -> None:
    class Bare(Choice):
        options: ClassVar[dict[str, Option]] = {"impl": Option("auto", "what computes it", ("auto",))}

        def implementations(self, workload: Workload) -> Sequence[Implementation]:
            return (Implementation("plain", lambda w: lambda query, key, value: value),)

    assert Bare().build(W).implementation == "plain"
    assert (Bare().supports(W), Bare().workspace_bytes(W), Bare().flops(W)) == (None, None, None)


CHOICES = {
    name: kind
    for name, kind in (
        (name, load(found.target)) for name, found in find().items() if found.distribution == "attnbench"
    )
    if issubclass(kind, Choice)
}
WORKLOADS = [
    Workload(**sizes, heads=4, kv_heads=2, head_dim=16, value_dim=24, dtype=dtype, mask="causal", phase=phase)
    for sizes, dtype, phase in product(
        ({"seq": 1, "kv_seq": 40}, {"seq": 33, "kv_seq": 70}),
        ("float32", "bfloat16", "float16"),
        ("forward", "train", "decode"),
    )
]


def test_every_variant_with_a_choice_is_a_choice() -> None:
    assert set(CHOICES) == {
        name for name, found in find().items()
        if found.distribution == "attnbench" and "impl" in load(found.target).options
    }  # fmt: skip
    assert set(CHOICES) == {
        "tiled", "int8", "int4", "fp8", "linear", "block-sparse", "retention", "gated-delta", "gated-linear", "ssd", "mla",
        "differential", "kimi-delta", "rwkv7",
    }  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_promised_is_said_by_what_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object answers and builds: each answer is labelled with the implementation that gave it."""
    kind = CHOICES[name]
    original = kind.implementations

    def labelled(self: Choice, workload: Workload) -> list[Implementation]:
        def one(i: int, each: Implementation) -> Implementation:
            made = Attention(lambda *tensors: tensors[2], f"={each.name}=")
            stepping = Decoding(lambda *state: state, lambda *state: state, f"={each.name}=")
            decoding = None if each.decoding is None else lambda w: stepping
            return Implementation(each.name, lambda w: made, each.unsupported, each.passed_over, lambda w: i, lambda w: i, decoding)  # fmt: skip

        return [one(i, each) for i, each in enumerate(original(self, workload))]

    monkeypatch.setattr(kind, "implementations", labelled)
    for values, w in product(instances(kind, {}, every=True), WORKLOADS):
        plugin = kind(**values)
        if w.phase not in kind.phases or plugin.supports(w) is not None:
            continue
        if name == "block-sparse" and w.phase == "decode" and w.seq == 1:
            continue  # for a single token all of them hand over to a dense kernel: see below
        names = [each.name for each in original(plugin, w)]
        at = plugin.workspace_bytes(w)
        assert at is not None
        made = plugin.build(w)
        assert made.implementation.startswith(f"={names[at]}=")
        assert "impl" not in values or values["impl"] in ("auto", names[at])
        chosen, _ = plugin.chosen(w)
        assert chosen is not None
        assert chosen.name == names[at]


@pytest.mark.parametrize("name", CHOICES)
def test_auto_can_wherever_one_of_its_choices_can(name: str) -> None:
    kind = CHOICES[name]
    for values, w in product(instances(kind, {}, every=True), WORKLOADS):
        if w.phase in kind.phases and values["impl"] != "qkpv" and kind(**values).supports(w) is None:
            assert kind(**values | {"impl": "auto"}).supports(w) is None


PROGRAM = """
import json, sys
from test_choice import KERNELS, W16
print(json.dumps([
    [[auto.supports(w), auto.workspace_bytes(w), auto.flops(w), auto.build(w).implementation], asked.supports(w)]
    for auto, asked, w in KERNELS
]))
"""
ABSENT = compiler.unsupported("bfloat16")
W16 = Workload(seq=70, kv_seq=70, heads=2, kv_heads=2, dtype="bfloat16", mask="causal", threads=1)
KERNELS = [
    (Tiled(), Tiled(impl="native"), W16),
    (Tiled(), Tiled(impl="native"), W16.replace(seq=1)),
    (Tiled(), Tiled(impl="native"), W16.replace(phase="train")),
    (Int8(), Int8(impl="qk"), W16),
    (Linear(), Linear(impl="native"), W16),
    (BlockSparse(), BlockSparse(impl="native"), W16),
]
WITHOUT = Tiled(impl="strip") if compiler.multiplies_bfloat16() else Sdpa()
NEXT = [WITHOUT, WITHOUT, WITHOUT, Int8(impl="torch"), Linear(impl="torch"), BlockSparse(impl="gather")]


@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_a_kernel_that_cannot_be_compiled_is_neither_promised_nor_built(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for (auto, asked), plugin, (_, _, w) in zip(json.loads(said.stdout), NEXT, KERNELS, strict=True):
        made = plugin.build(w).implementation.removesuffix(" (as asked)")
        assert auto == [None, plugin.workspace_bytes(w), plugin.flops(w), f"{made} (exit code 1)"]
        assert asked == "exit code 1"


@pytest.mark.parametrize("impl", ["torch", "qk"])
def test_an_int8_cache_is_read_in_torch_where_that_is_asked_for(impl: str) -> None:
    w = Workload(seq=1, kv_seq=70, heads=4, kv_heads=2, head_dim=32, value_dim=32, mask="causal", phase="decode")
    found = check(Int8(impl=impl), w)
    if impl == "torch":
        assert (found.status, found.implementation) == ("ok", "plain torch, over a cache of int8")
    else:
        assert (found.status, "rows=1" in found.reason) == ("unsupported", True)


def test_tiled_hands_over_where_that_is_asked_for() -> None:
    plugin = Tiled(impl="sdpa")
    assert plugin.chosen(W)[0].name == "sdpa"  # type: ignore[union-attr]
    assert check(plugin, W).status == "ok"


def test_an_int8_caches_step_is_promised_by_what_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    w = Workload(seq=1, kv_seq=70, dtype="bfloat16", mask="causal", phase="decode")
    monkeypatch.setattr(compiler, "unsupported", lambda dtype, *sources: f"no {', '.join(sources)} for {dtype}")
    assert Int8().decoding(w).implementation == ("plain torch, over a cache of int8 (no decode_int8.cpp for bfloat16)")
    assert Int8().workspace_bytes(w) == 4 * (3 * 8 * 70 + 3 * 70 * 8 * (64 + 64))
    with pytest.raises(AttnbenchError, match="step by step"):
        Int8().build(w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sparse_step_needs_what_its_dense_kernel_needs(dtype: str) -> None:
    w = Workload(seq=1, kv_seq=4000, heads=64, kv_heads=1, dtype=dtype, mask="causal", phase="decode", threads=1)
    window = w.replace(phase="forward", mask="full", kv_seq=256)
    assert BlockSparse().workspace_bytes(w) == Tiled().workspace_bytes(window)
    assert Tiled().build(window).implementation in BlockSparse().decoding(w).implementation
    strided = BlockSparse(pattern="strided")
    seen = round((strided.decoding(w).density or 0) * w.kv_seq)
    held = Tiled().workspace_bytes(window.replace(kv_seq=seen))
    assert held is not None
    assert strided.workspace_bytes(w) == held + seen * (64 + 64) * w.itemsize


def test_a_source_is_compiled_only_when_its_kernel_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(compiler, "unsupported", lambda dtype, *sources: asked.extend(sources))
    for w, sources in (
        (W16, ["tiled.cpp"]),
        (W16.replace(seq=1), ["decode.cpp"]),
        (W16.replace(phase="train"), ["tiled.cpp", "backward.cpp"]),
        (W16.replace(dtype="float32"), ["tiled.cpp"]),
        (W16.replace(head_dim=1100), []),
    ):
        asked.clear()
        assert Tiled().supports(w) is None
        assert asked == sources
    assert Tiled(impl="strip").supports(W16) is None
    assert not asked
