"""Which variant is the fastest on one workload within limits of error and memory, and why each other is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.analysis import compare
from attnbench.analysis.frames import as_rows, workload_of
from attnbench.errors import AttnbenchError
from attnbench.records.machines import identity, of_run
from attnbench.records.run import as_frame, newest_first, read_meta, rows
from attnbench.records.schema import Row, key
from attnbench.report import units
from attnbench.sizes import Sweep, parse_bytes
from attnbench.sweep.cell import Cell
from attnbench.sweep.contest import Contest
from attnbench.sweep.engine import Plan, planned, settings_here
from attnbench.sweep.precision import FINEST
from attnbench.sweep.returns import verdicts
from attnbench.sweep.rounds import Progress
from attnbench.sweep.session import measure
from attnbench.sweep.settings import TIMEOUT, Asked
from attnbench.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

    from attnbench.plugin import Attention

BUDGET, MAX_ERROR = 60.0, 1e-2


@dataclass(frozen=True)
class Limits:
    """error: the largest relative L2 against exact attention; memory: the largest peak in bytes; None: any."""

    error: float | None = MAX_ERROR
    memory: int | None = None

    def broken_by(self, row: Row) -> str | None:
        """Which of them a row breaks, in words; None where it holds them."""
        if row["status"] != "ok" or not units.known(row["latency_s"]):
            return f"{row['status']}: {row['reason']}"
        return self.over(row)

    def over(self, columns: Mapping[str, Any]) -> str | None:
        """Which of them is broken by the error or the memory among these columns, in words; None where none is."""
        error: Any = columns.get("approximation_rel_l2")
        size: Any = columns.get("peak_bytes")
        if self.error is not None and not units.known(error):
            return "it approximates no softmax attention, so no error of it is known"
        if self.error is not None and error > self.error:
            return f"its error of {units.error(error)} is over {units.error(self.error)}"
        if self.memory is not None and not units.known(size):
            return "its memory is not known"
        if self.memory is not None and size > self.memory:
            return f"its peak of {units.size(size)} is over {units.size(self.memory)}"
        return None


@dataclass(frozen=True)
class Answer:
    """row: the fastest that holds the limits, None where nothing does. others: every other one and why it lost.

    tied: those that are not told apart from it. source: the run that it comes from; empty where it was measured now.
    """

    workload: Workload
    row: Row | None
    others: list[tuple[Row, str]]
    tied: tuple[str, ...]
    source: str = ""

    @property
    def is_certain(self) -> bool:
        return self.row is not None and not self.tied

    def as_dict(self) -> dict[str, Any]:
        names = ("plugin", "variant", "latency_s", "speedup", "approximation_rel_l2", "peak_bytes", "implementation")
        told: dict[str, Any] = {name: self.row[name] if self.row else None for name in names}
        others = [{name: row[name] for name in names} | {"why": why} for row, why in self.others]
        return {
            **told,
            "tied": list(self.tied),
            "others": others,
            "workload": self.workload.as_dict(),
            "source": self.source,
        }


def choose(frame: pd.DataFrame, limits: Limits, source: str = "") -> Answer:
    """The answer that rows of one workload give, as `records.load` has them."""
    every = as_rows(frame)
    broken = {row["plugin"]: why for row in every if (why := limits.broken_by(row))}
    able = frame[~frame["plugin"].isin(broken)]
    found, workload = compare.fastest(able), workload_of(every[0])
    if found is None:
        return Answer(workload, None, [(row, broken[row["plugin"]]) for row in every], (), source)
    best = found.row
    others = [
        (row, broken.get(row["plugin"]) or _slower(row, best)) for row in every if row["plugin"] != best["plugin"]
    ]
    others.sort(key=lambda other: (other[0]["plugin"] in broken, _times(other[0], best)))
    tied = found.tied if found.certain else tuple(row["plugin"] for row, _ in others if row["plugin"] not in broken)
    return Answer(workload, best, others, tied, source)


def _times(row: Row, best: Row) -> float:
    """The seconds of a row over the best's, by their paired speedups where there are such."""
    if units.known(row["speedup"], best["speedup"]):
        return float(best["speedup"] / row["speedup"])
    return float(row["latency_s"] / best["latency_s"]) if units.known(row["latency_s"]) else float("inf")


def _slower(row: Row, best: Row) -> str:
    return f"takes {_times(row, best):.3g} times as long"


def answer(
    asked: Asked, limits: Limits, results: Path | None = None, fresh: bool = False, progress: Progress | None = None
) -> Answer:
    """Of the one workload that is asked for: from records of this machine where they suffice, else measured now.

    results: where to look for runs. fresh: measure in any case.

    Raises:
        AttnbenchError: several workloads are asked for, or something that is not to be had.
    """
    with planned(asked) as plan:
        workloads = list(dict.fromkeys(cell.workload for cell in plan.cells))
        if len(workloads) != 1:
            raise AttnbenchError(
                f"best answers for one workload, not for {len(workloads)}: give one length, dtype and so on"
            )
        if not fresh and results and (found := _recorded(plan, limits, results)):
            return found
        return choose(_measured(plan, limits, progress), limits)


def _recorded(plan: Plan, limits: Limits, results: Path) -> Answer | None:
    """By the newest run of this machine that has each cell, of the same plugins, and tells which is the fastest."""
    wanted = {(cell.plugin, cell.workload): cell for cell in plan.cells}
    for path in newest_first(results):
        meta = read_meta(path)
        begun = meta.get("distributions") or {}
        same = all(begun.get(cell.variant) == cell.distribution for cell in plan.cells)
        here = [name for name, facts in of_run(meta).items() if identity(facts) == identity(plan.facts)]
        if not same or not here:
            continue
        try:
            had = [row for row in rows(path) if key(row) in wanted and row["machine"] in here]
        except AttnbenchError:
            continue
        if {key(row) for row in had} == wanted.keys() and (
            found := choose(as_frame(had), limits, str(path))
        ).is_certain:
            return found
    return None


def _measured(plan: Plan, limits: Limits, progress: Progress | None) -> pd.DataFrame:
    """A number for all; what time is left is for those that hold the limits and are not told from the fastest."""

    def worth(contest: Contest, precision: float) -> Mapping[Cell, float]:
        able = {c: m for c, m in contest.measured.items() if c is contest.baseline or not limits.over(m.columns)}
        return {cell: 1.0 for cell, value in verdicts(replace(contest, measured=able), precision).items() if value > 1}

    return as_frame(measure(plan.server, settings_here(plan), plan.cells, progress, worth))


def best(
    workload: Workload,
    *,
    max_error: float | None = MAX_ERROR,
    max_memory: str | int | None = None,
    plugins: str = "all",
    budget: float = BUDGET,
) -> Attention:
    """The callable (query, key, value) -> out of the fastest variant for this workload, measured here and now.

    max_error: relative L2 against exact attention; max_memory: of a call's peak, such as "2GiB"; None for any.
    plugins, budget: as `attnbench.run` takes them. Its `.implementation` says what runs.

    Raises:
        AttnbenchError: nothing holds the limits, or the workload is none of attention alone.
    """
    from attnbench.task.attend import attend

    if workload.scope != "attention" or workload.decodes:
        raise AttnbenchError("best gives attention alone, forward or training: a block or a past is for a run")
    limits = Limits(max_error, parse_bytes(str(max_memory), "max-memory") if max_memory is not None else None)
    asked = Asked(
        plugins=plugins,
        baseline="sdpa",
        sweep=Sweep.of(workload),
        precision=FINEST,
        budget=budget,
        timeout=TIMEOUT,
    )
    found = answer(asked, limits)
    if found.row is None:
        raise AttnbenchError(
            "nothing holds the limits: " + "; ".join(f"{row['plugin']}: {why}" for row, why in found.others)
        )
    return attend(str(found.row["plugin"]), workload)
