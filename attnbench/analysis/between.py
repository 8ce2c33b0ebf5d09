"""Two runs of the same cells: which became faster or slower for certain, and what else changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from attnbench.analysis.frames import as_rows, filled, workload_of
from attnbench.errors import AttnbenchError
from attnbench.records.machines import hardware
from attnbench.records.schema import FAILED, Meta, Row
from attnbench.stats.intervals import MIN_PROCESSES
from attnbench.workload import Workload

FASTER, SLOWER, SAME, UNSURE, BROKEN, MENDED = "faster", "slower", "same", "can't tell", "broken", "mended"
_ONE_PROCESS = 0.03  # what a process may differ by from the next, where too few were measured for the interval to know


@dataclass(frozen=True)
class Change:
    """One cell of both runs.

    ratio: BASE's seconds over NEW's, so that above 1 NEW is faster; low, high: its 95% interval, None without one.
    paired: it is that of the speedups over the same baseline, each paired by round within its run; else of seconds.
    verdict: faster, slower, same (within the margin) or can't tell; broken: NEW failed where BASE has a number; mended:
        the other way.
    """

    plugin: str
    workload: Workload
    base: Row
    new: Row
    ratio: float | None
    low: float | None
    high: float | None
    paired: bool
    verdict: str

    def is_worse(self, share: float) -> bool:
        """Whether NEW is slower by more than this share for certain, or has no number where BASE has one."""
        return self.verdict == BROKEN or (self.high is not None and self.high < 1 - share)

    def is_apart(self, share: float) -> bool:
        """Whether NEW is slower or faster by more than this share for certain."""
        return (self.high is not None and self.high < 1 - share) or (self.low is not None and self.low > 1 + share)

    def as_dict(self) -> dict[str, Any]:
        told = (
            "status",
            "latency_s",
            "latency_low_s",
            "latency_high_s",
            "speedup",
            "peak_bytes",
            "approximation_rel_l2",
        )
        sides = {
            f"{side}_{name}": row.get(name) for side, row in (("base", self.base), ("new", self.new)) for name in told
        }
        figures = {
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "paired": self.paired,
            "verdict": self.verdict,
        }
        return {"plugin": self.plugin, "variant": self.base["variant"], **self.workload.as_dict(), **figures, **sides}


@dataclass(frozen=True)
class Comparison:
    """changes: of the cells that both have, in BASE's order. only_base, only_new: of the others."""

    changes: list[Change]
    only_base: list[tuple[str, Workload]]
    only_new: list[tuple[str, Workload]]


def compare(base: pd.DataFrame, new: pd.DataFrame, metas: Sequence[Meta], margin: float) -> Comparison:
    """base, new: rows as `records.load` gives them, of one run each. metas: what run.json says of both.

    margin: up to which share of a difference two count as the same.
    """
    before, after = _cells(base), _cells(new)
    same_torch = len({((meta.get("machine") or {}).get("libraries") or {}).get("torch") for meta in metas}) == 1
    changes = [_change(*key, before[key], after[key], same_torch, margin) for key in before if key in after]
    return Comparison(changes, [k for k in before if k not in after], [k for k in after if k not in before])


def compare_by_machine(
    base: pd.DataFrame, new: pd.DataFrame, before: Sequence[Meta], after: Sequence[Meta], margin: float
) -> Comparison:
    """`compare` of what both runs measured on one machine; a cell that the other has on another machine alone is apart.

    before, after: what `records.read_metas` says of both: of a run on several machines, one for each.

    Raises:
        AttnbenchError: they have no machine in common.
    """
    found, left = Comparison([], [], []), list(after)
    for meta in before:
        twin = next((other for other in left if _hardware(other) == _hardware(meta)), None)
        theirs = new[new["run"] == twin["name"]] if twin else new[:0]
        part = compare(base[base["run"] == meta["name"]], theirs, [meta, twin or meta], margin)
        for name in ("changes", "only_base", "only_new"):
            getattr(found, name).extend(getattr(part, name))
        left = [other for other in left if other is not twin]
    if len(left) == len(after):
        check_same_machine([before[0], after[0]])
    for other in left:
        found.only_new.extend(_cells(new[new["run"] == other["name"]]))
    return found


def _hardware(meta: Meta) -> tuple[Any, ...]:
    return hardware(meta.get("machine") or {})


def check_same_machine(metas: Sequence[Meta]) -> None:
    """Raises: AttnbenchError: the two runs are of different machines, or of one under other variables."""
    sides = map(_hardware, metas)
    different = [f"{one} against {other}" for one, other in zip(*sides, strict=True) if one != other]
    if different:
        raise AttnbenchError(
            f"the runs are of different machines ({'; '.join(different)}): their seconds do not compare; "
            "--any-machine compares them all the same"
        )


def _cells(frame: pd.DataFrame) -> dict[tuple[str, Workload], Row]:
    return {(str(row["plugin"]), workload_of(row)): row for row in as_rows(filled(frame))}


def _change(plugin: str, workload: Workload, base: Row, new: Row, same_torch: bool, margin: float) -> Change:
    had, has = _has_number(base), _has_number(new)
    if not (had and has):
        verdict = BROKEN if had and new["status"] in (*FAILED, "wrong") else MENDED if has and not had else UNSURE
        return Change(plugin, workload, base, new, None, None, None, False, verdict)
    paired = (
        same_torch and base["baseline"] == new["baseline"] != plugin and _all_finite(base["speedup"], new["speedup"])
    )
    if paired:
        ratio = new["speedup"] / base["speedup"]
        widths = [half_width(row, "speedup", "speedup_low", "speedup_high") for row in (base, new)]
    else:
        ratio = base["latency_s"] / new["latency_s"]
        widths = [half_width(row, "latency_s", "latency_low_s", "latency_high_s") for row in (base, new)]
    if None in widths:
        return Change(plugin, workload, base, new, ratio, None, None, paired, UNSURE)
    # Independent runs: the variances of the logarithms add up, and so do the squares of their half-widths.
    width = math.hypot(*(w for w in widths if w is not None))
    low, high = ratio * math.exp(-width), ratio * math.exp(width)
    return Change(plugin, workload, base, new, ratio, low, high, paired, verdict_of(low, high, margin))


def verdict_of(low: float, high: float, margin: float) -> str:
    """Of a ratio's interval. What is certainly within the margin is the same, even if it is certainly not 1."""
    if 1 - margin <= low and high <= 1 + margin:
        return SAME
    return FASTER if low > 1 else SLOWER if high < 1 else UNSURE


def half_width(row: Mapping[str, Any], middle: str, low: str, high: str) -> float | None:
    """Of a row's figure, as a logarithm; with what processes differ by where the interval does not know; or None."""
    if not _all_finite(row[low], row[high]) or row[low] <= 0:
        return None
    own = math.log(row[high] / row[low]) / 2
    processes = row["processes"]
    few = not _all_finite(processes) or processes < MIN_PROCESSES
    return math.hypot(own, _ONE_PROCESS) if few else own


def _has_number(row: Row) -> bool:
    return row["status"] == "ok" and _all_finite(row["latency_s"])


def _all_finite(*values: Any) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)
