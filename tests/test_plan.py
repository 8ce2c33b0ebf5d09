"""Who gets how many rounds: what is left out is left out for its own cost, and never because others came first."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.registry import Found, Request
from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep.cell import Cell
from attnbench.sweep.costs import Costs
from attnbench.sweep.plan import FEW_ROUNDS, affordable, allot, bound_emulated, cells_of, groups, skip_too_dear
from attnbench.sweep.settings import Settings
from attnbench.task.promise import Promise
from attnbench.workers.messages import Described, Instance
from attnbench.workload import Workload


def cell(name: str, call_s: float, seq: int = 64) -> Cell:
    """A cell whose calls are known to take so long: operations are its milliseconds."""
    return Cell(name, name, "", "", Workload(seq=seq, kv_seq=seq), flops=round(call_s * 1e3))


def costs() -> Costs:
    """A call for each millisecond, and 0.1 s to make ready."""
    known = Costs()
    for name in "abcdefgh":
        known.learn(cell(name, 1.0), 1.0, 0.1, 0.1)
    return known


def settings(budget: float, baseline: str = "") -> Settings:
    return Settings(baseline, precision=0.02, budget=budget, timeout=1000, memory=1 << 30)


CALLS = st.lists(st.floats(0.001, 40), min_size=1, max_size=8)


@given(calls=CALLS, budget=st.floats(1, 500))
def test_whoever_is_left_out_needs_more_than_all_that_are_kept(calls: list[float], budget: float) -> None:
    cells, known = [cell(name, s) for name, s in zip("abcdefgh", calls, strict=False)], costs()
    kept = affordable(cells, known, budget)
    assert kept == [c for c in cells if c in kept], "in their order"
    assert sum(map(known.ready, kept)) <= budget + 1e-9
    dropped = [known.ready(c) for c in cells if c not in kept]
    if dropped:
        assert min(dropped) >= max(map(known.ready, kept), default=0.0)
        assert sum(map(known.ready, kept)) + min(dropped) > budget, "the next would not have fitted"


@given(calls=CALLS, budget=st.floats(1, 500), seed=st.randoms())
def test_the_order_of_cells_changes_nothing(calls: list[float], budget: float, seed: random.Random) -> None:
    cells, known = [cell(name, s) for name, s in zip("abcdefgh", calls, strict=False)], costs()
    shuffled = seed.sample(cells, len(cells))
    ready = [known.ready(c) for c in affordable(cells, known, budget)]
    assert sorted(ready) == pytest.approx(sorted(known.ready(c) for c in affordable(shuffled, known, budget)))


def test_a_dear_cell_that_comes_first_does_not_push_out_the_cheap_ones_behind_it() -> None:
    dear, cheap = cell("a", 10.0), [cell(name, 1.0, seq=128) for name in "bcdefgh"]
    skip_too_dear([dear], [dear, *cheap], costs(), budget=100, left=30)
    assert dear.status == "skipped"
    assert dear.reason == (
        "20 s predicted at 10 s a call is more than the cheaper cells leave of the budget of 100 s; --budget 110 would do"
    )
    skip_too_dear(cheap, cheap, costs(), budget=100, left=30)
    assert {c.status for c in cheap} == {None}


def test_a_cell_over_its_part_of_the_budget_names_the_budget_that_would_do() -> None:
    cells = [cell("a", 20.0), *(cell(name, 0.1) for name in "bcd")]
    skip_too_dear(cells, cells, costs(), budget=100, left=100)
    assert [c.status for c in cells] == ["skipped", None, None, None]
    assert cells[0].reason == "40 s predicted at 20 s a call is over 25% of the budget of 100 s; --budget 170 would do"


def test_a_part_of_a_budget_is_told_with_the_whole() -> None:
    cells = [cell("a", 2.0), *(cell(name, 0.1) for name in "bcd")]
    skip_too_dear(cells, cells, costs(), budget=10, left=10, part=0.1)
    assert cells[0].reason == (
        "4.2 s predicted at 2 s a call is over 25% of the 10 s that this workload has of the budget of 100 s; "
        "--budget 170 would do"
    )


@given(calls=CALLS, budget=st.floats(1, 500))
def test_rounds_fit_into_the_time_and_the_dearest_get_fewest(calls: list[float], budget: float) -> None:
    cells, known = [cell(name, s) for name, s in zip("abcdefgh", calls, strict=False)], costs()
    rounds = allot(cells, known, budget, settings(budget))
    assert list(rounds) == affordable(cells, known, budget)
    takes = sum(known.ready(c) + n * known.round(c) for c, n in rounds.items())
    saved = [known.round(c) for c, n in rounds.items() if n >= MIN_ROUNDS and known.round(c) < 1e-3 * budget]
    assert takes <= budget + MIN_ROUNDS * sum(saved) + 1e-6, "but for rounds that are not worth saving"
    for one, other in itertools.pairwise(sorted(rounds, key=known.round)):
        assert rounds[one] >= rounds[other] or known.round(one) == known.round(other)
    assert all(n >= MIN_ROUNDS or n in FEW_ROUNDS or takes <= budget for n in rounds.values())


def test_a_baseline_keeps_its_rounds_longer_as_they_serve_all_cells_beside_it() -> None:
    cells, known = [cell("a", 2.0), *(cell(name, 1.0) for name in "bcd")], costs()
    enough = sum(known.ready(c) + MIN_ROUNDS * known.round(c) for c in cells) / 0.6
    rounds = allot(cells, known, 0.9 * enough, settings(0.9 * enough, "a"))
    assert rounds[cells[0]] == MIN_ROUNDS > min(rounds.values())
    rounds = allot(cells, known, 0.9 * enough, settings(0.9 * enough))
    assert rounds[cells[0]] < MIN_ROUNDS == rounds[cells[1]]


EMULATED = st.lists(st.booleans(), min_size=8, max_size=8)


@given(calls=CALLS, emulated=EMULATED, budget=st.floats(1, 500))
def test_what_is_emulated_takes_what_others_leave(calls: list[float], emulated: list[bool], budget: float) -> None:
    cells, known = [cell(name, s) for name, s in zip("abcdefgh", calls, strict=False)], costs()
    for one, is_emulated in zip(cells, emulated, strict=False):
        one.emulated = is_emulated
    bound_emulated(cells, settings(budget))
    kept, others = affordable(cells, known, budget), [c for c in cells if not c.emulated]
    assert [c for c in kept if not c.emulated] == affordable(others, known, budget), "as if it were not there"
    left = budget - sum(known.ready(c) for c in kept if not c.emulated)
    late = [c for c in cells if c.emulated]
    assert [c for c in kept if c.emulated] == affordable(late, known, left), "as if it were alone with that"
    rounds = allot(cells, known, budget, settings(budget))
    assert not others or all(rounds[c] * known.round(c) <= budget / len(cells) for c in kept if c.emulated)


def test_what_is_emulated_loses_its_rounds_first_and_has_a_number_all_the_same() -> None:
    cells, known = [cell(name, 1.0) for name in "abcd"], costs()
    cells[0].emulated = cells[3].emulated = True
    bound_emulated(cells, settings(40.0, "a"))
    assert [c.comes_last for c in cells] == [False, False, False, True], "a baseline serves the others"
    pair = [cell("a", 1.0), cell("d", 1.0)]
    pair[1].emulated = True
    bound_emulated(pair, settings(40.0, "a"))
    assert [c.comes_last for c in pair] == [False, False], "there is nothing else to spend it on"
    assert allot(cells, known, 1000.0, settings(40.0, "a")) == dict(zip(cells, (6, 6, 6, 6), strict=True))
    assert allot(cells, known, 45.0, settings(40.0, "a")) == dict(zip(cells, (6, 6, 6, 0), strict=True))


def test_an_emulated_cell_that_is_left_out_says_what_came_first() -> None:
    cells = [cell("a", 8.0), *(cell(name, 1.0, seq=128) for name in "bcde")]
    cells[1].emulated = True
    bound_emulated(cells, settings(100.0))
    skip_too_dear(cells, cells, costs(), budget=100, left=23)
    assert [c.status for c in cells] == [None, "skipped", None, None, None]
    assert "more than the cells that are not emulated leave of the budget of 100 s" in cells[1].reason


def test_what_is_ready_has_paid() -> None:
    cells, known = [cell("a", 10.0), cell("b", 1.0)], costs()
    assert affordable(cells, known, 5.0) == [cells[1]]
    assert affordable(cells, known, 5.0, ready=cells) == cells
    assert allot(cells, known, 5.0, settings(5.0), ready=cells)[cells[0]] == 0


def test_a_cell_joins_the_first_group_with_room() -> None:
    cells = [cell(name, 1.0) for name in "abcde"]
    for one in cells:
        one.workspace = 8 << 30 if one.plugin == "c" else 0
    together = groups(cells, cells[0], memory=(8 << 30) + (3 * 200 << 20))
    assert [[c.plugin for c in group] for group in together] == [["a", "b", "d", "e"], ["a", "c"]]


@pytest.mark.parametrize(
    ("says", "named", "cells"),
    [
        ({}, False, 1),
        ({"study": True}, False, 0),
        ({"study": True}, True, 1),
        ({"phases": ["decode"]}, False, 0),
        ({"phases": ["decode"]}, True, 1),
    ],
)
def test_a_study_and_what_is_made_for_another_phase_is_run_where_it_is_named(
    says: dict[str, Any], named: bool, cells: int
) -> None:
    said = {"family": "exact", "devices": ["cpu"], "phases": ["forward"], "options": {}}
    answer = Described(**(said | says), instances=[Instance("a", {}, [Promise(None, None, None)])])
    request = Request(Found("a", "a:A", "mine", "1"), named=named)
    assert len(list(cells_of(request, answer, [Workload(seq=8, kv_seq=8)]))) == cells
