"""What further rounds are worth: open verdicts first, cheap cells before dear ones, and never more than fits."""

from __future__ import annotations

import numpy as np
import pytest

from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.contest import Contest
from attnbench.sweep.costs import Costs
from attnbench.sweep.plan import MOST_ROUNDS
from attnbench.sweep.precision import within
from attnbench.sweep.returns import Returns, rounds_needed, verdicts
from attnbench.sweep.settings import Settings
from attnbench.workload import Workload

SETTINGS = Settings("sdpa", precision=0.02, budget=100, timeout=1000, memory=1 << 30)


def contest(seq: int, seconds: dict[str, float], spread: float = 0.03, rounds: int = 6) -> Contest:
    """One whose cells take so long, but for noise of their own."""
    workload = Workload(seq=seq, kv_seq=seq)
    cells = [Cell(name, name, "", "", workload, flops=round(1e6 * s)) for name, s in seconds.items()]
    rng = np.random.default_rng(seq)
    known = {
        cell: Measured({}, samples=[[0, i, 0.0, 1, s * np.exp(rng.normal(0, spread))] for i in range(rounds)])
        for cell, s in zip(cells, seconds.values(), strict=True)
    }
    return Contest(cells, cells[0], known)


def returns(*contests: Contest, settings: Settings = SETTINGS) -> Returns:
    costs = Costs()
    for one in contests:
        for cell in one.measured:
            costs.learn(cell, cell.flops / 1e6, 0.1, 0.1)
    return Returns(costs, {}, settings, verdicts)


def test_an_open_verdict_counts_more_than_precision_and_what_is_precise_nothing() -> None:
    one = contest(64, {"sdpa": 1.0, "same": 1.0, "slow": 3.0, "fast": 0.5, "as fast": 0.5})
    worth = {cell.plugin: value for cell, value in verdicts(one, 0.02).items()}
    assert worth == {"same": 3.0, "slow": 1.0, "fast": 3.0, "as fast": 3.0}
    assert not verdicts(contest(64, {"sdpa": 1.0, "slow": 3.0}, spread=1e-4), 0.02)
    alone = contest(64, {"one": 1.0, "other": 2.0}, spread=0.05)
    alone.baseline = None
    assert list(verdicts(alone, 0.02).values()) == [3.0, 1.0]


@pytest.mark.parametrize("spread", [0.05, 0.1])
def test_as_many_rounds_as_the_spread_calls_for(spread: float) -> None:
    one = contest(64, {"sdpa": 1.0, "other": 1.0}, spread, rounds=40)
    base, other = one.measured.values()
    wanted = (1.96 * 1.2533 * spread * 2**0.5 / 0.02) ** 2
    assert 0.4 * wanted < 40 + rounds_needed(other, base, 0.02) < 5 * wanted
    assert rounds_needed(other, base, 0.0) == MOST_ROUNDS
    assert rounds_needed(other, base, 1.0) == MIN_ROUNDS


def test_the_cheap_come_first_and_what_does_not_fit_is_cut() -> None:
    cheap, dear = contest(64, {"sdpa": 0.01, "other": 0.01}), contest(128, {"sdpa": 1.0, "other": 1.0})
    found = returns(cheap, dear)
    first = found.best([dear, cheap], left=60)
    assert first is not None
    assert (first.contest, first.cut) == (cheap, False)
    assert first.seconds <= 60
    assert first.launches == 4, "with the first look it is the five of an interval by process"
    rest = found.best([dear], left=30)
    assert rest is not None
    assert rest.cut
    assert all(n >= MIN_ROUNDS for n in rest.rounds.values())
    assert sum(n * 1.0 for n in rest.rounds.values()) <= 30
    assert found.best([dear], left=5) is None, "too few rounds for an interval"


def test_a_dear_cell_does_not_keep_the_others_of_its_workload_from_being_measured() -> None:
    one = contest(64, {"sdpa": 0.1, "other": 0.1, "slow": 30.0})
    bout = returns(one).best([one], left=60)
    assert bout is not None
    assert {cell.plugin for cell in bout.rounds} == {"sdpa", "other"}


def test_no_cell_is_given_more_than_its_time_limit() -> None:
    one = contest(64, {"sdpa": 0.1, "other": 0.1}, spread=0.3)
    few = returns(one, settings=Settings("sdpa", 0.02, budget=100, timeout=5, memory=1 << 30)).best([one], 1000)
    assert few is not None
    assert max(few.rounds.values()) <= 40
    assert returns(one, settings=Settings("sdpa", 0.02, budget=100, timeout=0.5, memory=1 << 30)).best([one], 9) is None


def test_what_is_emulated_comes_last_by_itself_and_within_its_share() -> None:
    one = contest(64, {"sdpa": 0.1, "other": 1.0, "emulated": 0.05, "also": 0.05}, spread=0.3)
    _, other, *late = one.cells
    for cell in late:
        cell.share = 4.0
    found = returns(one)
    first = found.best([one], 1000)
    assert first is not None
    assert {cell.plugin for cell in first.rounds} == {"sdpa", "other"}
    cut = found.best([one], 30)
    assert cut is not None
    assert (cut.cut, other in cut.rounds) == (True, True), "before it, even where the rounds are fewer"
    other.end("wrong", "")
    last = returns(one).best([one], 1000)
    assert last is not None
    assert (last.launches, len(last.rounds.keys() & set(late))) == (1, 1)
    assert sum(last.rounds[cell] * 0.05 for cell in late if cell in last.rounds) <= 4.0
    for cell in late:
        cell.share = 0.3
    assert returns(one).best([one], 1000) is None


def test_what_more_time_buys_is_told_by_workload() -> None:
    cheap, dear = contest(64, {"sdpa": 0.01, "other": 0.01}), contest(128, {"sdpa": 9.0, "other": 9.0})
    assert returns(cheap, dear).outlook([dear, cheap], 60) == [(cheap.label, 1)]


@pytest.mark.parametrize(
    ("budget", "precision"),
    [(25.0, 0.1), (24.0, 0.2), (100.0, 0.05), (1e4, 0.02), (6.0, 0.5), (1e-3, 0.5), (300.0, 0.03)],
)
def test_what_a_budget_buys_is_said_beforehand_and_never_finer_than_two_per_cent(
    budget: float, precision: float
) -> None:
    """Ten cells that are open: four times the seconds halve the width; what has ended needs none."""
    cells = contest(64, dict.fromkeys("abcdefghij", 1.0)).cells
    ended = contest(128, {"a": 1.0, "b": 1.0}).cells
    for cell in ended:
        cell.end("skipped", "too large")
    assert within(budget, [*cells, *ended]) == precision
