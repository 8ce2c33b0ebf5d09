"""Statistics over the rows of `records.load`: averages, the fastest, and the front of speed against error.

Every function takes plain columns or a DataFrame whose columns are those of a record, and draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import WORKLOAD, Row


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
    A cell is a workload (of one run and machine, where the frame has several). It is finished with a finite speedup
    above 0.
    """
    keys = [name for name in ("run", "machine", *WORKLOAD) if name in frame]
    cells = frame.groupby(keys, dropna=False).ngroup()
    done = finished(frame).astype({"speedup": float})
    done = done[np.isfinite(done["speedup"]) & (done["speedup"] > 0)]
    table = pd.DataFrame({"cell": cells[done.index], "plugin": done["plugin"], "log": np.log(done["speedup"])})
    wide = table.pivot_table(index="cell", columns="plugin", values="log", aggfunc="mean").dropna()
    absent = sorted(set(frame["plugin"]) - set(done["plugin"]))
    means = np.exp(wide.mean()) if len(wide) else pd.Series(dtype=float)
    speedups = {str(plugin): float(mean) for plugin, mean in means.items()}
    return Averages(speedups, len(wide), int(cells.nunique()), tuple(absent))


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
    rows = as_rows(finished(frame))
    if not rows:
        return None
    paired = all(row["speedup"] > 0 for row in rows)
    best, *others = sorted(rows, key=lambda row: -row["speedup"] if paired else row["latency_s"])
    overlaps = [(row, _overlap(best, row)) for row in others]
    tied = tuple(sorted(str(row["plugin"]) for row, overlap in overlaps if overlap))
    return Fastest(best, tied, certain=not overlaps or overlaps[0][1] is not None)


def _overlap(one: Row, other: Row) -> bool | None:
    """Whether the intervals of two rows overlap; None where one has none."""
    for interval in (_speedup_interval, lambda row: (row["latency_low_s"], row["latency_high_s"])):
        (low, high), (other_low, other_high) = interval(one), interval(other)
        if not np.isnan([low, high, other_low, other_high]).any():
            return low <= other_high and other_low <= high
    return None


def _speedup_interval(row: Row) -> tuple[float, float]:
    """The baseline's own speedup is 1 by definition, with nothing to either side."""
    return (1.0, 1.0) if row["plugin"] == row["baseline"] else (row["speedup_low"], row["speedup_high"])
