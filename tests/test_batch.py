"""A server's batch, written in vLLM's grammar: prompts, chunks and decoding steps in one call."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
from attnbench_plugins.int8 import Int8
from attnbench_plugins.linear import Linear
from attnbench_plugins.naive import Naive
from attnbench_plugins.paged import Paged
from attnbench_plugins.tiled import Tiled

from attnbench import batch
from attnbench.errors import AttnbenchError
from attnbench.judge.conformance import check
from attnbench.report.repeat import repeat_command
from attnbench.sweep.settings import Asked
from attnbench.task import inputs
from attnbench.task.call import Task
from attnbench.theory import costs
from attnbench.workload import Workload

SPEC = "q40_q9s33_2q1s50_q70_q1s3"


@pytest.mark.parametrize(
    ("spec", "sizes", "shortest"),
    [
        ("q2k", [(2048, 2048)], "q2k"),
        ("q1s1k", [(1, 1024)], "q1s1k"),
        ("8q1s1k", [(1, 1024)] * 8, "8q1s1k"),
        ("q4s1k", [(4, 1024)], "q4s1k"),
        ("2q1k_32q1s1k", [(1024, 1024)] * 2 + [(1, 1024)] * 32, "2q1k_32q1s1k"),
        ("q2k,8q1s1k", [(2048, 2048)] + [(1, 1024)] * 8, "q2k_8q1s1k"),
        ("8q1kv1k", [(1, 1024)] * 8, "8q1s1k"),  # as older versions write it
        ("q1kkv2k", [(1024, 2048)], "q1ks2k"),
        ("q7, q7, q2048s2048", [(7, 7)] * 2 + [(2048, 2048)], "2q7_q2k"),
        ("q1s9_q7_q1s9", [(1, 9), (7, 7), (1, 9)], "q1s9_q7_q1s9"),
    ],
)
def test_the_grammar_is_vllms(spec: str, sizes: list[tuple[int, int]], shortest: str) -> None:
    assert list(batch.parse(spec)) == sizes
    assert batch.written(sizes) == shortest
    assert list(batch.parse(shortest)) == sizes


@pytest.mark.parametrize(
    "wrong", ["", "2k", "q", "q2m", "qs1", "q4s2", "0q1", "q0", "q1s", "q2k__q1", "-1q2", "5000q1", "q1_q9999999999"]
)
def test_what_is_no_batch_is_refused_in_a_line(wrong: str) -> None:
    with pytest.raises(AttnbenchError, match="--batch-spec") as refused:
        batch.parse(wrong)
    assert "\n" not in str(refused.value)


def small(**more: Any) -> Workload:
    return Workload.of_batch(SPEC, **({"heads": 4, "kv_heads": 2, "head_dim": 40, "value_dim": 24} | more))


def test_each_entry_is_a_problem_of_its_own() -> None:
    w = small()
    assert (w.batch, w.seq, w.kv_seq, w.past, w.new) == (6, 70, 70, 49, 70)
    assert [(e.seq, e.kv_seq, e.past, e.new) for e in w.entries()] == [
        (40, 40, 0, 40), (9, 33, 24, 9), (1, 50, 49, 1), (1, 50, 49, 1), (70, 70, 0, 70), (1, 3, 2, 1),
    ]  # fmt: skip
    assert costs.flops(w) == sum(map(costs.flops, w.entries()))
    assert costs.min_bytes(w) == sum(map(costs.min_bytes, w.entries())) < costs.peak(w, 0)
    forward = w.replace(phase="forward")
    assert (forward.past, forward.new) == (0, 70)
    assert Workload.from_dict(w.as_dict()) == w


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 5}, {"seq": 64}, {"mask": "full"}, {"phase": "train"},
        {"scope": "block", "block": "decoder-only", "norm": "pre"},
    ],
)  # fmt: skip
def test_what_it_is_not_for_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AttnbenchError, match="--batch-spec"):
        small().replace(**wrong)


@pytest.mark.parametrize("phase", ["decode", "forward"])
@pytest.mark.parametrize(
    ("plugin", "how"),
    [
        (Paged(), "all entries together, strips of 192 rows, K and V of few queries read once, pages of 16"),
        (Tiled(), "all entries together"),
        (Tiled(impl="strip"), "entry by entry"),
        (Naive(), "entry by entry"),
        (Int8(), "entry by entry"),
        (Linear(), "entry by entry"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_every_variant_is_right_at_once_or_entry_by_entry(plugin: Any, how: str, phase: str, isa: str) -> None:
    for more in ({"dtype": "bfloat16"}, {"mask": "window:20"}):
        if "window" in str(more) and isinstance(plugin, Linear | Int8):
            continue
        found = check(plugin, small(phase=phase, **more))
        assert found.status == "ok", found.reason
        assert how in found.implementation or "window" in str(more)


@pytest.mark.parametrize("plugin", [Paged(), Tiled(), Naive()], ids=lambda p: type(p).__name__)
def test_what_pads_a_step_is_not_read_and_its_rows_are_0(plugin: Any) -> None:
    w = small()
    task, tensors = Task(plugin, w), inputs.empty(w)
    inputs.fill(tensors, w, 0)
    before = task.call(*tensors)
    for b, entry in enumerate(w.entries()):
        for x in tensors:
            x[b, :, entry.new :] = torch.nan
        assert not before[b, :, entry.seq :].any()
    assert torch.equal(task.call(*tensors), before)


def test_a_sweep_asks_for_it_in_words_and_a_row_repeats_it() -> None:
    asked = Asked.of(batch_spec="q2k,8q1s1k", heads="32", kv_heads="8", dtype="bfloat16", device="cpu")
    (w,) = asked.sweep.workloads()
    assert w == Workload.of_batch("q2k_8q1s1k", heads=32, kv_heads=8, dtype="bfloat16", threads=asked.sweep.threads)
    assert w.label() == "decode attention q2k_8q1s1k 32/8x64 bfloat16 causal"
    words = shlex.split(repeat_command({"plugin": "paged", "baseline": "sdpa", **w.as_dict()}))
    assert words[words.index("--batch-spec") + 1] == "q2k_8q1s1k"
    assert not {"--seq", "--kv-seq", "--batch", "--lengths", "--phase"} & set(words)
    for clash in ("seq", "kv_seq", "batch", "lengths"):
        with pytest.raises(AttnbenchError, match=f"drop --{clash.replace('_', '-')}"):
            Asked.of(batch_spec="q2k", **{clash: "64"})
    with pytest.raises(AttnbenchError, match="drop --scope"):
        Asked.of(batch_spec="q2k", scope="block")
