"""Generating token by token: both ways say the same, and the command shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_task import Decay, Right

from attnbench import Workload
from attnbench.commands import main
from attnbench.plugin import Plugin
from attnbench.workers.generation import generate


@pytest.mark.parametrize(
    ("plugin", "block"),  # a recurrence has no cross-attention
    [
        pytest.param(Right(), "decoder-only", id="cache"),
        pytest.param(Right(), "decoder", id="cache-decoder"),
        pytest.param(Decay(), "decoder-only", id="state"),
    ],
)
def test_with_a_cache_and_without_the_tokens_are_the_same(plugin: Plugin, block: str) -> None:
    w = Workload(
        seq=1, kv_seq=1, batch=2, heads=4, kv_heads=2, head_dim=8, value_dim=8, mask="causal", phase="decode",
        scope="block", block=block, norm="pre", layers=3, threads=torch.get_num_threads(),
    )  # fmt: skip
    try:
        found = generate(plugin, w, prompt=7, tokens=5, repeats=1)
    finally:
        torch.set_grad_enabled(True)
    assert found.difference < 1e-6
    assert len(found.with_s) == len(found.without_s) == 5
    assert min(found.prompt_s, *found.with_s, *found.without_s) > 0


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    asked = ("--prompt", "16", "--tokens", "3", "--layers", "2", "--heads", "2", "--head-dim", "16", "--repeats", "1")
    result = CliRunner().invoke(main, ["generate", "--plugins", "sdpa,naive", *asked, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "2 decoder-only blocks" in result.output
    content = json.loads((tmp_path / "generation.json").read_text())
    assert [r["variant"] for r in content["results"]] == ["sdpa", "naive"]
    assert all(r["difference"] < 1e-4 for r in content["results"])
    assert (tmp_path / "generation.png").stat().st_size > 1000


def test_an_unknown_plugin_is_one_line() -> None:
    result = CliRunner().invoke(main, ["generate", "--plugins", "nothing"])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
