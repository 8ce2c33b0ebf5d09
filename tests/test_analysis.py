"""The statistics, on made-up numbers whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench.analysis import compare
from attnbench.analysis.frames import as_rows
from attnbench.analysis.shares import amdahl, attention_share
from attnbench.stats import powers
from attnbench.workload import Workload

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]


def row(plugin: str = "fast", latency: float | None = 1.0, **values: Any) -> dict[str, Any]:
    """One record of a cell; without a latency it is one that timed out."""
    workload = Workload(seq=512, kv_seq=512).as_dict()
    known = {name: values.pop(name) for name in list(values) if name in workload}
    if "seq" in known:
        known.setdefault("kv_seq", known["seq"])
    cell = {
        "run": "one",
        "plugin": plugin,
        "family": "exact",
        "status": "ok" if latency is not None else "timeout",
        "latency_s": latency,
        "latency_low_s": math.nan,
        "latency_high_s": math.nan,
        "speedup": math.nan,
        "speedup_low": math.nan,
        "speedup_high": math.nan,
        "baseline": "base",
        "approximation_rel_l2": math.nan,
    }
    return cell | workload | known | values


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def test_rows_are_what_pandas_makes_of_them() -> None:
    mixed = pd.DataFrame({"text": ["a", None], "size": [1, 2], "number": [0.5, math.nan], "yes": [True, False]})
    mixed = mixed.assign(any=pd.Series([np.float64(2), [1]], dtype=object))
    for some in (mixed, mixed[["size"]], mixed[:0], mixed[[]]):
        told, wanted = as_rows(some), some.to_dict("records")
        assert repr(told) == repr(wanted)
        assert [[type(x) for x in row.values()] for row in told] == [[type(x) for x in row.values()] for row in wanted]


# Exponents


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    fit = powers.fit_exponent(LENGTHS, [3e-9 * length**power for length in LENGTHS])
    assert fit is not None
    assert fit.value == pytest.approx(power, abs=1e-9)
    assert fit.low == pytest.approx(power, abs=1e-6)
    assert fit.high == pytest.approx(power, abs=1e-6)
    assert fit.lengths == (2048, 4096, 8192, 16384)


def test_fixed_costs_of_short_lengths_do_not_bend_the_exponent() -> None:
    values = [1e-3 + 1e-9 * length**2 for length in LENGTHS]
    fit = powers.fit_exponent(LENGTHS, values)
    over_all = np.polyfit(np.log(LENGTHS), np.log(values), 1)[0]
    assert fit is not None
    assert abs(fit.value - 2) < abs(over_all - 2) / 3


@pytest.mark.parametrize(
    ("lengths", "values", "used"),
    [
        ([512, 1024], [1, 2], None),
        ([512, 512, 1024, 1024], [1, 1, 2, 2], None),
        ([], [], None),
        ([512, 1024, 2048], [1, math.nan, 4], None),
        ([512, 1024, 2048], [1, 0, 4], None),
        ([512, 1024, 2048, 4096], [1, 2, 4, math.inf], (512, 1024, 2048)),
        ([1000, 3000, 4000], [1, 3, 4], (1000, 3000, 4000)),
        ([10, 100, 1000, 10000], [1, 10, 100, 1000], (100, 1000, 10000)),
    ],
)
def test_three_lengths_are_needed(lengths: list[float], values: list[float], used: tuple[int, ...] | None) -> None:
    fit = powers.fit_exponent(lengths, values)
    assert (fit.lengths if fit else None) == used


def test_the_exponents_interval_holds_what_it_says() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.05, (1000, len(LENGTHS)))
    fits = [powers.fit_exponent(LENGTHS, list(np.array(LENGTHS) ** 2 * np.exp(each))) for each in noise]
    held = np.mean([fit is not None and fit.low <= 2 <= fit.high for fit in fits])
    assert 0.93 <= held <= 0.97  # 95%, within three standard errors


# Pareto fronts


@pytest.mark.parametrize(
    ("errors", "speeds", "floor", "front"),
    [
        ([], [], 0, []),
        ([0.1], [1], 0, [True]),
        ([0.1, 0.2], [1, 2], 0, [True, True]),
        ([0.1, 0.2], [2, 1], 0, [True, False]),
        ([0.1, 0.1], [1, 2], 0, [False, True]),
        ([0.1, 0.1], [1, 1], 0, [True, True]),
        ([math.nan, 0.2], [9, 1], 0, [False, True]),
        ([0.1, 0.2], [math.nan, 1], 0, [False, True]),
        # Rounding apart, the second is as exact and faster.
        ([1e-7, 2e-7], [1, 2], 0, [True, True]),
        ([1e-7, 2e-7], [1, 2], 2e-7, [False, True]),
    ],
)
def test_pareto_front(errors: list[float], speeds: list[float], floor: float, front: list[bool]) -> None:
    assert compare.pareto_front(errors, speeds, floor) == front


POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(1, 6).map(float)), max_size=12)


@given(POINTS)
def test_a_front_beats_all_behind_it_and_none_upon_it(points: list[tuple[float, float]]) -> None:
    front = compare.pareto_front([error for error, _ in points], [speed for _, speed in points])
    ahead = [point for point, on in zip(points, front, strict=True) if on]
    for point, on in zip(points, front, strict=True):
        beaten = [a for a in ahead if a[0] <= point[0] and a[1] >= point[1] and a != point]
        assert bool(beaten) is not on


def test_rounding_floor_is_the_worst_exact_variant() -> None:
    rows = frame(
        row("a", approximation_rel_l2=2e-7),
        row("b", approximation_rel_l2=3e-7),
        row("c", latency=None, approximation_rel_l2=0.5),
        row("int8", family="quantized", approximation_rel_l2=9e-3),
    )
    assert compare.rounding_floor(rows) == 3e-7
    assert compare.rounding_floor(rows[rows["family"] == "quantized"]) == 0


# Averages


def test_an_average_leaves_out_what_one_variant_did_not_finish() -> None:
    # "short" fails exactly where it would be slow: over what each survived it would look the faster of the two.
    rows = frame(
        row("long", seq=512, speedup=2.0),
        row("long", seq=1024, speedup=2.0),
        row("long", seq=2048, speedup=16.0),
        row("long", seq=4096, speedup=0.01),
        row("short", seq=512, speedup=4.0),
        row("short", seq=1024, speedup=1.0),
        row("short", seq=2048, latency=None),
        row("short", seq=4096, latency=None),
    )
    found = compare.averages(rows)
    assert found.speedups == pytest.approx({"long": 2.0, "short": 2.0})
    assert (found.cells, found.of, found.absent) == (2, 4, ())


def test_a_variant_that_finished_nothing_is_named_not_compared() -> None:
    found = compare.averages(frame(row("a", speedup=3.0), row("b", latency=None), row("c", speedup=math.nan)))
    assert found.speedups == pytest.approx({"a": 3.0})
    assert (found.cells, found.of, found.absent) == (1, 1, ("b", "c"))


def test_no_common_cell_means_no_average() -> None:
    found = compare.averages(frame(row("a", seq=512, speedup=3.0), row("b", seq=1024, speedup=3.0)))
    assert (found.speedups, found.cells, found.of) == ({}, 0, 2)


def test_the_mean_of_a_speedup_and_its_inverse_is_one() -> None:
    found = compare.averages(frame(row("a", seq=512, speedup=4.0), row("a", seq=1024, speedup=0.25)))
    assert found.speedups == pytest.approx({"a": 1.0})


# The fastest


def timed(plugin: str, middle: float, half: float = math.nan, **values: Any) -> dict[str, Any]:
    return row(plugin, middle, latency_low_s=middle - half, latency_high_s=middle + half, **values)


def sped(plugin: str, latency: float, speedup: float, half: float) -> dict[str, Any]:
    return row(plugin, latency, speedup=speedup, speedup_low=speedup - half, speedup_high=speedup + half)


@pytest.mark.parametrize(
    ("rows", "best", "tied"),
    [
        ([timed("a", 1.0), timed("b", 2.0)], "a", ()),
        ([timed("a", 1.0, 0.1), timed("b", 1.3, 0.1)], "a", ()),
        ([timed("a", 1.0, 0.2), timed("b", 1.3, 0.2)], "a", ("b",)),
        # Drift makes medians' intervals wide, but pairs tell them apart.
        (
            [
                sped("a", 1.0, 2.0, 0.01) | {"latency_low_s": 0.5, "latency_high_s": 1.5},
                sped("b", 1.1, 1.9, 0.01) | {"latency_low_s": 0.5, "latency_high_s": 1.5},
            ],
            "a",
            (),
        ),
        # The baseline is at 1, with nothing to either side.
        ([row("base", 1.02, speedup=1.0), sped("a", 1.0, 1.01, 0.02)], "a", ("base",)),
        ([row("base", 1.02, speedup=1.0), sped("a", 1.0, 1.02, 0.01)], "a", ()),
        ([row("a", None), timed("b", 2.0)], "b", ()),
        # Pairs outrank medians.
        ([sped("a", 1.0, 1.4, 0.01), sped("b", 1.1, 1.5, 0.01)], "b", ()),
    ],
)
def test_fastest(rows: list[dict[str, Any]], best: str, tied: tuple[str, ...]) -> None:
    found = compare.fastest(frame(*rows))
    assert found is not None
    assert (found.plugin, found.tied) == (best, tied)


@pytest.mark.parametrize(
    ("rows", "certain"),
    [
        ([timed("a", 1.0)], True),
        ([timed("a", 1.0, 0.1), timed("b", 2.0, 0.1)], True),
        ([timed("a", 1.0, 0.1), timed("b", 2.0)], False),
        ([timed("a", 1.0, 0.1), timed("b", 2.0, 0.1), timed("c", 9.0)], True),
        ([row("base", 1.0, speedup=1.0), sped("a", 2.0, 0.5, 0.1)], True),
    ],
)
def test_an_order_without_intervals_is_not_certain(rows: list[dict[str, Any]], certain: bool) -> None:
    found = compare.fastest(frame(*rows))
    assert found is not None
    assert found.certain is certain


def test_nobody_is_fastest_where_nobody_finished() -> None:
    assert compare.fastest(frame(row("a", None))) is None


# Attention's share of a block


def block(kind: str, latency: float, **values: Any) -> dict[str, Any]:
    mask = values.pop("mask", "full" if kind == "encoder" else "causal")
    return row("fast", latency, scope="block", block=kind, norm="pre", mask=mask, **values)


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([row("fast", 1.0), block("encoder", 4.0)], 0.25),
        ([row("fast", 1.0, mask="causal"), block("encoder", 4.0, mask="causal")], 0.25),
        ([row("fast", 1.0, mask="causal"), block("decoder-only", 4.0)], 0.25),
        # A decoder attends twice: causally to itself, in full to the encoder.
        (
            [
                row("fast", 1.0, mask="causal"),
                row("fast", 2.0, seq=512, kv_seq=1024),
                block("decoder", 4.0, seq=512, kv_seq=1024),
            ],
            0.75,
        ),
        ([row("fast", 1.0, mask="causal"), block("decoder", 4.0)], None),
        ([row("fast", 1.0, mask="causal"), block("encoder", 4.0)], None),
        ([row("fast", 1.0, dtype="bfloat16"), block("encoder", 4.0)], None),
        ([row("other", 1.0), block("encoder", 4.0)], None),
        ([row("fast", 1.0, run="two"), block("encoder", 4.0)], None),
        ([row("fast", None), block("encoder", 4.0)], None),
    ],
)
def test_attention_share(rows: list[dict[str, Any]], share: float | None) -> None:
    shares = attention_share(frame(*rows))
    assert shares["share"].to_dict() == ({} if share is None else {len(rows) - 1: share})


def test_the_shares_bounds_take_both_intervals_at_their_far_ends() -> None:
    rows = frame(timed("fast", 1.0, 0.1), block("encoder", 4.0, latency_low_s=3.0, latency_high_s=5.0))
    shares = attention_share(rows).drop(columns="attention_workspace_bytes")
    assert shares.loc[1].to_dict() == pytest.approx({"share": 0.25, "share_low": 0.9 / 5, "share_high": 1.1 / 3})


# Amdahl's law


def compared(plugin: str, latency: float, speedup: float, **values: Any) -> dict[str, Any]:
    return row(plugin, latency, baseline="base", speedup=speedup, **values)


ENCODER = {"scope": "block", "block": "encoder", "norm": "pre"}
DECODER = {"scope": "block", "block": "decoder", "norm": "pre", "mask": "causal", "seq": 512, "kv_seq": 1024}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Half of the block's time, four times as fast: 1 / (1/2 + 1/8).
        (
            [
                compared("base", 2.0, 1.0),
                compared("base", 4.0, 1.0, **ENCODER),
                compared("fast", 0.5, 4.0),
                compared("fast", 2.9, 1.4, **ENCODER),
            ],
            1.6,
        ),
        # A decoder's two attentions: 1 of 8 s becomes 0.5, 3 become 1.
        (
            [
                compared("base", 1.0, 1.0, mask="causal"),
                compared("base", 3.0, 1.0, seq=512, kv_seq=1024),
                compared("base", 8.0, 1.0, **DECODER),
                compared("fast", 0.5, 2.0, mask="causal"),
                compared("fast", 1.0, 3.0, seq=512, kv_seq=1024),
                compared("fast", 5.5, 1.4, **DECODER),
            ],
            8 / 5.5,
        ),
        # Alone it took longer than the block did, so nothing would be left of the block.
        (
            [
                compared("base", 6.0, 1.0),
                compared("base", 4.0, 1.0, **ENCODER),
                compared("fast", 1.5, 4.0),
                compared("fast", 2.9, 1.4, **ENCODER),
            ],
            None,
        ),
        ([compared("base", 4.0, 1.0, **ENCODER), compared("fast", 2.9, 1.4, **ENCODER)], None),
        ([compared("fast", 0.5, 4.0), compared("fast", 2.9, 1.4, **ENCODER)], None),
    ],
)
def test_amdahl(rows: list[dict[str, Any]], expected: float | None) -> None:
    found = amdahl(frame(*rows))
    assert found.to_dict() == ({} if expected is None else {len(rows) - 1: pytest.approx(expected)})
