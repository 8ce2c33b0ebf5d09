"""Small problems: what they catch, whom they leave alone, and what a sweep makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from altered import attnbench
from torch import Tensor

from attnbench.judge import probes
from attnbench.plugin import Call, Plugin
from attnbench.registry import find, load
from attnbench.workload import Workload

W = Workload(seq=512, kv_seq=512, heads=4, kv_heads=2)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def no_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5).exp()
    return weights @ v.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True)


def whole_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = max(1, k.shape[2] // 32 * 32)
    return exact(q, k[:, :, :n], v[:, :, :n])


def most_of_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Leaves the first key out where that is one of many: a small error, but for a key that has all the weight."""
    return exact(q, k[:, :, 1:], v[:, :, 1:]) if k.shape[2] == 65 else exact(q, k, v)


def at_least_sixteen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert q.shape[2] >= 16, "a tile is 16 rows"
    return exact(q, k, v)


def made(call: Call) -> Plugin:
    class Made(Plugin):
        def build(self, workload: Workload) -> Call:
            return call

    return Made()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (no_maximum, "with large scores: output has NaN or infinite values"),
        (whole_tiles, "at attention 1x4/2x7x64 float32 full: implementation error"),
        (most_of_the_keys, "implementation error"),
        (at_least_sixteen, "at attention 1x4/2x1x64 float32 full: AssertionError: a tile is 16 rows"),
        (lambda q, k, v: exact(q, k, v)[:, :, :200][:, :, : q.shape[2] - (q.shape[2] == 129)], "output has shape"),
    ],
)
def test_each_is_caught(call: Callable[..., Tensor], said: str) -> None:
    assert said in str(probes.problem(made(call), W))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("name", sorted(find()))
def test_attnbenchs_own_are_right(name: str, mask: str, dtype: str) -> None:
    assert probes.problem(load(find()[name].target)(), W.replace(mask=mask, dtype=dtype)) is None


def test_none_is_begun_when_time_is_over() -> None:
    tried: list[int] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tried.append(q.shape[2])
        return exact(q, k, v)

    assert probes.problem(made(call), W, go_on=lambda: len(tried) < 2) is None
    assert len(tried) == 2


def test_a_flaw_ends_every_workload_of_its_kind(tmp_path: Path) -> None:
    flawed = """
import attnbench.judge.probes as probes
asked = probes.problem
def problem(plugin, like, go_on):
    return "at 7: too small" if type(plugin).__name__ == "Willing" else asked(plugin, like, go_on)
probes.problem = problem
"""
    said = attnbench(tmp_path, flawed, "run", "--plugins", "willing", "--seq", "64,128", "--heads", "2", "--scope",
                     "attention", "--budget", "300", "--precision", "0.9", codes=(1,))  # fmt: skip
    assert said.count("wrong: willing, attention at 64: at 7: too small") == 1
    assert said.count("wrong: willing, attention at 128: at 7: too small") == 1
