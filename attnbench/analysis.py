"""Statistics over the rows of `records.load`: exponents, fronts, averages and shares.

Every function takes plain columns or a DataFrame whose columns are those of a record, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

from attnbench.theory import attentions
from attnbench.workload import Workload

WORKLOAD = tuple(field.name for field in fields(Workload))
"""The columns that name a workload; with `plugin` they are a cell's key."""

Row: TypeAlias = dict[str, Any]
"""One row of a frame, by column."""

FIT_WINDOW = 8
"""An exponent is fitted over the lengths from an eighth of the longest up: shorter ones pay a call's fixed costs."""


@dataclass(frozen=True)
class Exponent:
    """p in "grows as l^p", with its 95% interval and the lengths that it was fitted over."""

    value: float
    low: float
    high: float
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> Exponent | None:
    """The exponent p of values ~ c * lengths^p: the slope of an ordinary least-squares line in log-log.

    Fitted over the lengths from 1 / `FIT_WINDOW` of the longest up, or over the three longest where fewer than
    three are that long. The interval is the slope's, from Student's t with n - 2 degrees of freedom; it tells how
    straight the line is, not how noisy one measurement was. Values that are not finite and above 0 are left out.

    lengths, values: (n,) each; a value's unit does not matter.
    Returns None where fewer than three different lengths are left.
    """
    x, y = np.asarray(lengths, dtype=float), np.asarray(values, dtype=float)
    usable = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    x, y = x[usable], y[usable]
    distinct = sorted(set(x.tolist()), reverse=True)
    if len(distinct) < 3:
        return None
    long = x >= min(distinct[0] / FIT_WINDOW, distinct[2])
    dx, dy = np.log(x[long]) - np.log(x[long]).mean(), np.log(y[long]) - np.log(y[long]).mean()
    slope = float(dx @ dy / (dx @ dx))
    left = dy - slope * dx
    freedom = len(dx) - 2
    # scipy.stats.linregress has no error for a flat line, which memory that does not grow is.
    margin = float(stats.t.ppf(0.975, freedom) * np.sqrt(left @ left / freedom / (dx @ dx)))
    return Exponent(slope, slope - margin, slope + margin, tuple(sorted({int(length) for length in x[long]})))


def pareto_front(errors: Sequence[float], speeds: Sequence[float], floor: float = 0.0) -> list[bool]:
    """Which points no other beats: none is at least as fast and at most as wrong, and better in one of the two.

    errors, speeds: (n,) each, the error better when smaller, the speed when larger. A point that lacks either
        is never on the front and beats nobody.
    floor: errors up to here count as the same (see `rounding_floor`).
    """
    speed = np.asarray(speeds, dtype=float)
    error = np.maximum(np.asarray(errors, dtype=float), floor)
    known = np.isfinite(error) & np.isfinite(speed)
    front = known.copy()
    for i in np.flatnonzero(known):
        no_worse = known & (error <= error[i]) & (speed >= speed[i])
        front[i] = not (no_worse & ((error < error[i]) | (speed > speed[i]))).any()
    return [bool(on) for on in front]


def rounding_floor(frame: pd.DataFrame) -> float:
    """The largest approximation error among the exact variants that finished: an error up to here is rounding.

    Two exact variants differ from the float64 reference by their rounding only, and the one that happens to round
    a little less is no better trade; a front that told them apart would mark the slower one too.
    """
    exact = finished(frame)
    errors = exact.loc[exact["family"] == "exact", "approximation_rel_l2"].dropna()
    return float(errors.max()) if len(errors) else 0.0


def records(frame: pd.DataFrame) -> list[Row]:
    """The rows as dictionaries, with Python's own numbers."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a latency that counts."""
    return frame[(frame["status"] == "ok") & frame["latency_s"].notna()]


@dataclass(frozen=True)
class Averages:
    """Geometric means over the cells that every compared variant finished, and over nothing else.

    speedups: plugin -> geometric mean of its speedups; empty where no cell is common to all.
    cells, of: the common cells, out of all that were planned.
    absent: plugins that finished no cell; they are not compared, since they would leave nothing in common.
    """

    speedups: dict[str, float]
    cells: int
    of: int
    absent: tuple[str, ...]


def averages(frame: pd.DataFrame) -> Averages:
    """The geometric mean of each plugin's speedup over the workloads of `frame` that all its plugins finished.

    An average over whatever each variant survived compares different work; it flatters those that fail early.
    A cell is a workload (of one run, where the frame has several) and is finished with a finite speedup above 0.
    """
    keys = [name for name in ("run", *WORKLOAD) if name in frame]
    cells = frame.groupby(keys, dropna=False).ngroup()
    done = finished(frame)
    speedup = done["speedup"].astype(float)
    done, speedup = done[np.isfinite(speedup) & (speedup > 0)], speedup[np.isfinite(speedup) & (speedup > 0)]
    table = pd.DataFrame({"cell": cells[done.index], "plugin": done["plugin"], "log": np.log(speedup)})
    wide = table.pivot_table(index="cell", columns="plugin", values="log", aggfunc="mean").dropna()
    absent = sorted(set(frame["plugin"]) - set(done["plugin"]))
    means = np.exp(wide.mean()) if len(wide) else pd.Series(dtype=float)
    return Averages(
        {str(plugin): float(mean) for plugin, mean in means.items()}, len(wide), int(cells.nunique()), tuple(absent)
    )


@dataclass(frozen=True)
class Fastest:
    """The fastest row among those of one workload.

    tied: the plugins that are not told apart from it.
    certain: whether it and the runner-up have intervals; without, their order is that of two medians, no more.
    """

    row: Row
    tied: tuple[str, ...]
    certain: bool

    @property
    def plugin(self) -> str:
        return str(self.row["plugin"])


def fastest(frame: pd.DataFrame) -> Fastest | None:
    """The row with the largest speedup, or with the smallest latency where not every row has a speedup.

    Paired speedups come first since they hold where medians drift with the machine. Two variants are told apart where
    their intervals do not overlap: those of the speedup where both have one, otherwise those of the latency.
    frame: rows of one workload. Returns None where none of them finished.
    """
    rows = records(finished(frame))
    if not rows:
        return None
    paired = all(_number(row["speedup"]) > 0 for row in rows)
    best, *others = sorted(rows, key=lambda row: -row["speedup"] if paired else row["latency_s"])
    overlaps = [(row, _overlap(best, row)) for row in others]
    tied = tuple(sorted(str(row["plugin"]) for row, overlap in overlaps if overlap))
    return Fastest(best, tied, certain=not overlaps or overlaps[0][1] is not None)


def _overlap(one: Row, other: Row) -> bool | None:
    """Whether the intervals of two rows overlap; None where one has none."""
    for interval in (_speedup_interval, _latency_interval):
        (low, high), (other_low, other_high) = interval(one), interval(other)
        if not np.isnan([low, high, other_low, other_high]).any():
            return low <= other_high and other_low <= high
    return None


def _speedup_interval(row: Row) -> tuple[float, float]:
    """The baseline's own speedup is 1 by definition, with nothing to either side."""
    if row["plugin"] == row["baseline"]:
        return 1.0, 1.0
    return _number(row["speedup_low"]), _number(row["speedup_high"])


def _latency_interval(row: Row) -> tuple[float, float]:
    return _number(row["latency_low_s"]), _number(row["latency_high_s"])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def attention_share(frame: pd.DataFrame) -> pd.DataFrame:
    """Attention's share of a block's time: latency of attention alone over that of the block around it.

    Both are of the same run, plugin and sizes; a decoder block's share is of its two attentions together (see
    `theory.attentions`). The projections W_Q, W_K, W_V and W_O count as the block's. The bounds take both intervals
    at their far ends, so they hold more than 95%.

    Returns (index of the block's row, columns share, share_low, share_high), a fraction each; blocks whose attention
    was not measured alone are left out.
    """
    rows = finished(frame)
    times = ["latency_s", "latency_low_s", "latency_high_s"]
    alone = {
        (row["run"], row["plugin"], workload_of(row)): np.array([row[name] for name in times], dtype=float)
        for row in records(rows[rows["scope"] == "attention"])
    }
    blocks = rows[rows["scope"] == "block"]
    shares: dict[object, list[float]] = {}
    for index, row in zip(blocks.index, records(blocks), strict=True):
        keys = [(row["run"], row["plugin"], part) for part in attentions(workload_of(row)).values()]
        if all(key in alone for key in keys):
            middle, low, high = np.sum([alone[key] for key in keys], axis=0)
            shares[index] = [middle / row["latency_s"], low / row["latency_high_s"], high / row["latency_low_s"]]
    return pd.DataFrame.from_dict(shares, orient="index", columns=["share", "share_low", "share_high"], dtype=float)


def amdahl(frame: pd.DataFrame) -> pd.Series:
    """The speedup that Amdahl's law gives a block: 1 / (1 - sum of f (1 - 1 / x)), by index of the block's row.

    f is the share of an attention (see `theory.attentions`) in the baseline's block, x what the variant speeds it up
    when measured alone. Amdahl 1967, "Validity of the single processor approach". Blocks of which a part was not
    measured are left out, and those where more is saved than the block took.
    """
    rows = finished(frame)
    cells = {(row["run"], row["plugin"], workload_of(row)): row for row in records(rows)}
    found: dict[object, float] = {}
    for index, row in zip(rows.index, records(rows), strict=True):
        workload, base = workload_of(row), (row["run"], row.get("baseline"))
        if row["scope"] != "block" or row["plugin"] == row.get("baseline") or (*base, workload) not in cells:
            continue
        parts = attentions(workload).values()
        pairs = [(cells.get((*base, part)), cells.get((row["run"], row["plugin"], part))) for part in parts]
        times = [(b["latency_s"], v["speedup"]) for b, v in pairs if b is not None and v is not None]
        if len(times) == len(pairs):
            saved = sum(seconds * (1 - 1 / speedup) for seconds, speedup in times)
            left = 1 - saved / cells[(*base, workload)]["latency_s"]
            if left > 0:  # on a noisy machine attention alone may take longer than the block around it did
                found[index] = 1 / left
    return pd.Series(found, name="amdahl", dtype=float)


def workload_of(row: Mapping[Any, Any]) -> Workload:
    """The workload of a row; pandas' missing texts and its own integers become Python's."""
    values = {field.name: row[field.name] for field in fields(Workload)}
    numbers = ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_dim", "value_dim", "layers", "seed", "threads")
    texts = {name: value if isinstance(value, str) else "" for name, value in values.items() if name not in numbers}
    return Workload.from_dict({**texts, **{name: int(values[name]) for name in numbers}})
