"""Memory by formula: the lecture's example, and `attnbench theory` that prints it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from attnbench.commands import main
from attnbench.theory import footprint
from attnbench.theory.models import PRESETS, Model, preset

GB = 10**9


def model(name: str) -> Model:
    found = preset(name)
    assert isinstance(found, Model)
    return found


def test_the_lectures_example_of_gpt2() -> None:
    """1.5 B parameters, 1024 tokens, batch 32: 3 GB, 6 with gradients, 18 of optimizer states, 24, and 60 GB."""
    lines = footprint.training(model("gpt2-xl-1.5b"), 32, 1024)
    parameters, gradients, states, activations = (line.bytes / GB for line in lines)
    assert parameters == pytest.approx(3, rel=0.04)
    assert parameters + gradients == pytest.approx(6, rel=0.04)
    assert states == pytest.approx(18, rel=0.04)
    assert parameters + gradients + states == pytest.approx(24, rel=0.04)
    assert activations == pytest.approx(60, rel=0.01)


def test_a_cache_of_keys_and_values() -> None:
    """Llama-3-8B: 2 * 32 layers * 8 kv heads * 128 values in 2 bytes are 128 KiB a token."""
    assert footprint.inference(model("llama-3-8b"), 1, 1)[1].bytes == 128 * 1024
    assert footprint.inference(model("t5-small"), 2, 10)[1].bytes == 2 * 10 * 6 * 2 * 512 * 2


@pytest.mark.parametrize(
    ("memory", "remedies"),
    [
        (32, ["a batch of 3:", "recomputing activations layer by layer:"]),
        (26, ["a batch of 0", "states partitioned over"]),
        (16, ["states partitioned over 3 devices (ZeRO stage 3), with activations recomputed"]),
        (5, ["nothing of this alone"]),
    ],
)
def test_what_would_make_it_fit(memory: int, remedies: list[str]) -> None:
    found = footprint.remedies(model("gpt2-xl-1.5b"), 32, 1024, memory * GB)
    for remedy in remedies:
        assert any(line.startswith(remedy) for line in found) != remedy.startswith("a batch of 0"), found


def run(arguments: str) -> str:
    result = CliRunner().invoke(main, ["theory", *arguments.split()])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_shows_figures_formulas_and_verdict() -> None:
    said = run("--preset gpt2-xl-1.5b --seq 1024 --batch 32 --device-memory 32GB")
    for part in ("1,557,611,200 parameters", "3.12 GB", "18.7 GB", "60.4 GB", "K P, K = 12", "it does not fit",
                 "what would make it fit:", "a batch of 3"):  # fmt: skip
        assert part in said
    assert "it fits" in run("--preset gpt2-small --seq 128 --device-memory 32GB")


@pytest.mark.parametrize(("block", "count"), [("encoder", 5 * 8 + 3), ("decoder", 10 * 8 + 4)])
def test_products_are_counted_as_the_lecture_counts_them(block: str, count: int) -> None:
    last = next(line for line in run(f"--block {block}").splitlines() if line.strip().startswith("all"))
    assert last.split()[1] == str(count)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_shown(name: str) -> None:
    assert name in run(f"--preset {name}")


def test_what_attention_holds_is_what_the_variants_say() -> None:
    from attnbench_plugins.naive import Naive

    from attnbench.workload import Workload

    model = PRESETS["gpt2-small"]
    assert isinstance(model, Model)
    naive, fused, linear = footprint.workspaces(model, 2, 4096)
    w = Workload(batch=2, heads=12, kv_heads=12, seq=4096, kv_seq=4096, dtype="bfloat16")
    output = 2 * 12 * 4096 * 64 * 2
    assert naive.bytes == Naive().workspace_bytes(w) + output  # which comes when one matrix is gone
    assert fused.bytes == 2 * 12 * 4096 * 4
    assert linear.bytes == 2 * 12 * 64 * 65 * 4
