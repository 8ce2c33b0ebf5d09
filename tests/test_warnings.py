"""Stored samples, replayed, give exactly the warnings they deserve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attnbench.stats.doubts import KINDS, of_samples
from attnbench.sweep import rows
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.settings import Settings
from attnbench.workload import Workload

PRECISION = 0.02
SETTINGS = Settings("", PRECISION, budget=100, timeout=100, memory=1 << 30)
EMULATED = {"emulated": True}
Draw = Callable[[np.random.Generator, int], np.ndarray]


def stored(seconds: np.ndarray, processes: int = 1) -> list[list[float]]:
    """Samples as cells.jsonl holds them: ten calls a block, the rounds shared among the processes."""
    each = len(seconds) // processes
    return [[i // each, i % each, 0.1 * i, 10, 10 * float(s)] for i, s in enumerate(seconds)]


def quiet(draw: np.random.Generator, rounds: int) -> np.ndarray:
    return 1e-3 * np.exp(draw.normal(0, 0.005, rounds))


def noisy(draw: np.random.Generator, rounds: int) -> np.ndarray:
    return 1e-3 * np.exp(np.abs(draw.normal(0, 0.4, rounds)))


def bimodal(draw: np.random.Generator, rounds: int) -> np.ndarray:
    return quiet(draw, rounds) * draw.permutation(np.arange(rounds) % 2 * 0.3 + 1)


def drifting(draw: np.random.Generator, rounds: int) -> np.ndarray:
    return quiet(draw, rounds) * np.linspace(1, 1.2, rounds)


def spiky(draw: np.random.Generator, rounds: int) -> np.ndarray:
    return quiet(draw, rounds) * np.where(np.arange(rounds) % 11 == 5, 3, 1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rounds", [25, 100])
@pytest.mark.parametrize(
    ("draw", "precise", "kinds"),
    [
        (quiet, True, []),
        (quiet, False, ["imprecise"]),
        (noisy, False, ["imprecise", "noisy"]),
        (noisy, True, []),  # enough rounds of it were had
        (bimodal, False, ["imprecise", "bimodal"]),
        (bimodal, True, ["bimodal"]),
        (drifting, False, ["imprecise", "drifting"]),
        (spiky, True, []),  # a median withstands them
    ],
)
def test_samples_give_their_warnings(draw: Draw, precise: bool, kinds: list[str], rounds: int, seed: int) -> None:
    samples = stored(draw(np.random.default_rng(seed), rounds))
    assert of_samples(samples, PRECISION, precise) == kinds


@pytest.mark.parametrize(
    ("seconds", "kinds"),
    [
        ([], ["few-rounds"]),
        ([1e-3] * 5, ["few-rounds"]),
        ([1e-3] * 6, ["coarse-timer"]),
        ([0.0] * 6, ["coarse-timer"]),
        ([0.0] + [1e-3, 1.01e-3] * 10, ["coarse-timer"]),
    ],
)
def test_constant_zero_and_few(seconds: list[float], kinds: list[str]) -> None:
    assert of_samples(stored(np.array(seconds)), PRECISION, False) == kinds


@pytest.mark.parametrize("seed", range(10))
def test_processes_that_differ(seed: int) -> None:
    draw = np.random.default_rng(seed)
    pace = np.repeat([1, 1.05, 0.97, 1.1, 1.02], 10)
    assert of_samples(stored(quiet(draw, 50) * pace, 5), PRECISION, False) == ["imprecise", "processes-differ"]
    assert of_samples(stored(quiet(draw, 50), 5), PRECISION, True) == []


def test_every_kind_has_a_meaning_and_advice() -> None:
    for kind in KINDS.values():
        assert kind.means
        assert kind.advice


def test_work_done_now_and_then_is_uneven_beside_a_baseline_that_does_none() -> None:
    rng = np.random.default_rng(0)
    noise = np.exp(0.03 * rng.standard_t(1.5, 200))
    base, same = stored(1e-3 * noise), stored(1e-3 * np.exp(0.03 * rng.standard_t(1.5, 200)))
    periodic = stored(1e-3 * noise * np.exp(0.02 * rng.standard_t(3, 200)) * np.where(np.arange(200) % 8 == 3, 1.6, 1))
    assert "uneven" in of_samples(periodic, PRECISION, True, base)
    assert "uneven" not in of_samples(same, PRECISION, True, base)
    assert "uneven" not in of_samples(base, PRECISION, True, periodic)
    assert "uneven" not in of_samples(base, PRECISION, True, base)


def test_even_variants_are_seldom_called_uneven() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(300):
        one, other = (stored(1e-3 * np.exp(np.abs(0.05 * rng.standard_t(1.5, 100)))) for _ in range(2))
        found += "uneven" in of_samples(one, PRECISION, True, other)
    assert found <= 3


def test_what_is_emulated_is_warned_of_whatever_its_samples_are() -> None:
    cell = Cell("a", "a", "", "", Workload(seq=64, kv_seq=64))
    for rounds in (1, 25):
        samples = stored(quiet(np.random.default_rng(0), rounds))
        kinds = [rows.figures(cell, Measured(c, samples=samples), None, SETTINGS)["warnings"] for c in ({}, EMULATED)]
        assert set(kinds[1]) - set(kinds[0]) == {"emulated"}
        assert len(kinds[1]) == 1 + len(kinds[0])
