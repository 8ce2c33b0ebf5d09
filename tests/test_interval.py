"""Intervals: exact where that is promised, honest about processes, and stopping early costs no coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from attnbench.stats.intervals import CONFIDENCE, MIN_ROUNDS, effective_size, interval, median_interval
from attnbench.sweep.stopping import further, schedule


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [6, 7, 12, 25, 100, 200])
def test_the_ranks_are_those_of_the_binomial_distribution(n: int, confidence: float) -> None:
    """Against the table's rule: the largest k for which k values on each side may be left out."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    if effective_size(values) != n:
        pytest.skip("this order looks correlated")
    found = median_interval(values, confidence)
    fits = [k for k in range(1, n // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= confidence]
    if not fits:
        assert (found.low, found.high) == (None, None)
    else:
        assert (found.low, found.high) == (max(fits), n + 1 - max(fits))
    assert found.median == (n + 1) / 2


def test_too_few_values_have_no_interval() -> None:
    assert median_interval([1.0] * (MIN_ROUNDS - 1))[1:] == (None, None)
    assert math.isnan(median_interval([]).median)


def test_values_like_their_neighbours_count_for_less() -> None:
    rng = np.random.default_rng(1)
    steps = np.repeat(rng.standard_normal(20), 5)
    assert effective_size(steps) < 50
    assert effective_size(rng.permutation(steps)) == 100


def surpluses(values: np.ndarray, m: float) -> np.ndarray:
    """Of each process (a row), how many more values lie below m than half."""
    return (values < m).sum(1) + (values == m).sum(1) / 2 - values.shape[1] / 2


@pytest.mark.parametrize("bias", [0.0, 0.05])
@pytest.mark.parametrize("count", [5, 8, 20])
def test_several_processes_get_what_students_t_lets_stand_of_their_surpluses(count: int, bias: float) -> None:
    rng = np.random.default_rng(2)
    values = np.exp(rng.normal(0, 0.02, (count, 6)) + rng.normal(0, bias, (count, 1)))
    found = interval(list(values.ravel()), list(np.repeat(np.arange(count), 6)))
    assert found.median == np.median(values)
    assert found.low is not None
    assert found.high is not None

    def stands(m: float) -> bool:
        return bool(stats.ttest_1samp(surpluses(values, m), 0).pvalue >= 0.05)

    ordered = [0.0, *np.sort(values.ravel()), 9.0]
    between = [(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    inside = [m for m in between if found.low < m < found.high]
    assert all(map(stands, inside))
    assert not stands(max(m for m in between if m < found.low))
    assert not stands(min(m for m in between if m > found.high))


@pytest.mark.parametrize(("count", "rounds", "bias"), [(5, 2, 0.0), (5, 6, 0.02), (10, 10, 0.0), (20, 12, 0.01)])
def test_the_interval_by_process_holds_the_truth_as_often_as_it_says(count: int, rounds: int, bias: float) -> None:
    rng = np.random.default_rng(4)
    numbers, held = list(np.repeat(np.arange(count), rounds)), 0
    for _ in range(400):
        noise = 0.02 * rng.standard_t(2, (count, rounds)) + rng.normal(0, bias, (count, 1))
        found = interval(list(np.exp(noise).ravel()), numbers)
        held += found.low is None or found.high is None or found.low <= 1 <= found.high
    assert held >= 400 * 0.92  # 95%, and what chance may take of so few


def test_the_order_of_processes_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    values, numbers = rng.lognormal(0, 0.1, 40), np.repeat(np.arange(8), 5)
    order = rng.permutation(40)
    assert interval(values[order], numbers[order]) == pytest.approx(interval(values, numbers))


@pytest.mark.parametrize(("rounds", "count"), [(6, 1), (13, 1), (200, 1), (30, 5), (100, 10), (200, 20)])
def test_the_looks_share_what_an_interval_may_miss(rounds: int, count: int) -> None:
    plan = schedule(rounds, count)
    early = len(plan.looks) * (1 - plan.confidence(early=True)) if plan.looks else 0
    assert early + 1 - plan.confidence(early=False) == pytest.approx(1 - CONFIDENCE)
    assert all(look < (rounds if count == 1 else count) for look in plan.looks)
    assert plan.rounds * count < rounds + count


@pytest.mark.parametrize(
    ("rounds", "round_s", "start_s", "before", "found"),
    [
        (200, 0.05, 0.2, 1, (200, 16)),
        (200, 0.3, 0.2, 1, (200, 20)),
        (12, 0.8, 0.2, 1, (12, 6)),  # two rounds in each
        (200, 0.01, 0.2, 1, (200, 4)),  # with the one before it is five, for two fifths of the time
        (20, 0.01, 0.2, 1, (160, 4)),  # starting takes half of what the rounds do
        (20, 0.01, 0.2, 5, (20, 1)),  # there are enough already
        (200, 0.01, 2.0, 1, (200, 1)),  # starting takes too long
        (6, 10, 0.1, 1, (8, 4)),
    ],
)
def test_several_processes_where_they_are_affordable(
    rounds: int, round_s: float, start_s: float, before: int, found: tuple[int, int]
) -> None:
    assert further(rounds, round_s, start_s, before) == found
    assert further(rounds, round_s, start_s, before, most=1) == (rounds, 1), "one process serves all"


def test_looks_count_what_was_measured_before() -> None:
    assert schedule(30, 1, rounds_before=20).looks == (25,)
    assert schedule(100, 9, rounds_before=6, processes_before=1).looks == (5,)
    assert schedule(100, 9, rounds_before=60, processes_before=5).looks == ()
