"""Do the speedups of someone's run hold on this machine? A drawn sample of its cells is measured again, as ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

from attnbench.analysis import between
from attnbench.analysis.between import SAME, Change
from attnbench.devices.machine import usable_cores
from attnbench.errors import AttnbenchError
from attnbench.records.run import as_frame
from attnbench.records.schema import Row, key
from attnbench.registry import requested
from attnbench.report import units
from attnbench.sizes import Listed, parse_precision
from attnbench.sweep import captures
from attnbench.sweep.cell import Cell
from attnbench.sweep.engine import Plan, planned, settings_here
from attnbench.sweep.plan import asked_of
from attnbench.sweep.precision import FINEST
from attnbench.sweep.rounds import Progress
from attnbench.sweep.session import measure
from attnbench.sweep.settings import TIMEOUT, Asked
from attnbench.workload import Workload

CELLS, BUDGET, MARGIN = 8, 60.0, "10%"
HOLDS, FAILS, UNSURE, UNABLE = "holds", "does not hold", "can't tell", "can't run here"
_LONGER = "a longer --budget may tell"


@dataclass(frozen=True)
class Checked:
    """What became of one claim, a cell's speedup over its baseline.

    theirs, ours: the rows; ours is None where the cell can't run here. change: of the speedup, None without one.
    verdict: holds (within the margin for certain), does not hold (outside of it for certain, or wrong here), can't
    tell, or can't run here. why: in the last two cases, and where it is wrong; else empty.
    """

    workload: Workload
    theirs: Row
    ours: Row | None
    change: Change | None
    verdict: str
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        names = ("speedup", "speedup_low", "speedup_high")
        sides = {
            f"{side}_{name}": row.get(name) if row else None
            for side, row in (("theirs", self.theirs), ("ours", self.ours))
            for name in names
        }
        found = {name: getattr(self.change, name) if self.change else None for name in ("ratio", "low", "high")}
        told = {"plugin": self.theirs["plugin"], "baseline": self.theirs["baseline"], "verdict": self.verdict}
        return {**told, "why": self.why, **found, **sides, "workload": self.workload.as_dict()}


@dataclass(frozen=True)
class Verified:
    """The drawn cells, in the order of the run. claims: how many it had to draw from. facts: of this machine."""

    checked: list[Checked]
    claims: int
    facts: Mapping[str, Any]

    def count(self, verdict: str) -> int:
        return sum(each.verdict == verdict for each in self.checked)

    @property
    def failed(self) -> bool:
        """Where nothing is told, too: that would be no pass."""
        told = self.count(HOLDS) + self.count(FAILS)
        return not told or bool(self.count(FAILS))


def claims(rows: Sequence[Row]) -> list[Row]:
    """The cells whose speedup over a baseline has an interval: the others claim nothing that can be checked."""
    names = ("latency_s", "speedup", "speedup_low", "speedup_high")
    return [
        row
        for row in rows
        if row["status"] == "ok"
        and row.get("baseline") not in (None, "", row["plugin"])
        and units.known(*(row.get(name) for name in names))
    ]


def draw(able: Sequence[Row], number: int, seed: int) -> list[Row]:
    """So many of them, each as likely as any other, in their order."""
    chosen = Random(seed).sample(range(len(able)), min(number, len(able)))
    return [able[i] for i in sorted(chosen)]


def verify(
    rows: Sequence[Row],
    *,
    seed: int,
    cells: int = CELLS,
    budget: float = BUDGET,
    timeout: float = TIMEOUT,
    margin: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Verified:
    """Measures a drawn sample of a run's cells here, each workload with its baseline, so that pairs stay paired.

    rows: of the run. margin: up to which share of a difference a speedup holds. threads: in place of the run's.
    budget, timeout: seconds for all and for a cell. tell: is told what will take a while.

    Raises:
        AttnbenchError: the run has no speedup with an interval.
    """
    if not (able := claims(rows)):
        raise AttnbenchError("no cell of it has a speedup with an interval, so there is nothing to verify")
    drawn = draw(able, cells, seed)
    share = parse_precision(MARGIN, "same") if margin is None else margin
    groups: dict[_Way, list[Row]] = {}
    for row in drawn:
        groups.setdefault(_way(row, threads), []).append(row)
    facts: Mapping[str, Any] = {}
    checked: dict[int, Checked] = {}
    for way, group in groups.items():
        seconds = budget * len(group) / len(drawn)
        ours, why, found = _measured(way, group, seconds, timeout, progress, tell)
        facts = facts or found
        for row in group:
            cell = _cell(row, way)
            checked[id(row)] = _judged(row, cell[1], ours.get(cell), why.get(cell, ""), share)
    return Verified([checked[id(row)] for row in drawn], len(able), facts)


class _Way(NamedTuple):
    """What cells that are measured in one session have in common."""

    device: str
    threads: int
    baseline: str
    isa: str
    l2: str


_Cell = tuple[str, Workload]


def _way(row: Row, threads: int | None) -> _Way:
    own = key(row)[1]
    return _Way(own.device, threads or own.threads, row["baseline"], row.get("isa") or "auto", row.get("l2") or "")


def _cell(row: Row, way: _Way) -> _Cell:
    return row["plugin"], key(row)[1].replace(threads=way.threads)


def _measured(
    way: _Way,
    drawn: Sequence[Row],
    budget: float,
    timeout: float,
    progress: Progress | None,
    tell: Callable[[str], object],
) -> tuple[dict[_Cell, Row], dict[_Cell, str], Mapping[str, Any]]:
    """Our rows by the run's cells; why the others can't run here; and what is known of the machine."""
    why: dict[_Cell, str] = {}
    asked = [_cell(row, way) for row in drawn]
    for cell in asked:
        if reason := _unready(cell[1]):
            why[cell] = reason
    able = [cell for cell in asked if cell not in why]
    if not able:
        return {}, why, {}
    listed = Listed(listed=tuple(workload for _, workload in able), device=way.device, threads=way.threads)
    wanted = Asked(
        plugins="",
        baseline=way.baseline,
        sweep=listed,
        precision=FINEST,
        budget=budget,
        timeout=timeout,
        l2=way.l2 or None,
        isa=way.isa,
    )
    try:
        with planned(wanted, ([], requested(way.baseline)), tell) as plan:
            names = _joined(plan, able, why)
            ready = replace(plan, cells=list(names))
            found = measure(plan.server, settings_here(ready), ready.cells, progress)
            ours = _named(found, names, way.baseline)
    except AttnbenchError as error:
        return {}, why | {cell: str(error) for cell in able}, {}
    return {cell: ours[cell] for cell in able if cell in ours}, why, plan.facts


def _unready(workload: Workload) -> str:
    """Why a workload can't be measured here, whatever computes it; empty where it may be."""
    if workload.on_host and workload.threads > (here := usable_cores()):
        few = units.count(here, "core")
        return f"it has {workload.threads} threads, and here are {few}: --threads {here} tries it all the same"
    try:
        captures.installed([workload])
    except AttnbenchError as error:
        return str(error)
    return ""


def _joined(plan: Plan, able: Sequence[_Cell], why: dict[_Cell, str]) -> dict[Cell, str]:
    """The cells to measure, workload by workload and the baseline first, with the run's names of their plugins.

    A plugin's name in the run has every option that it had then; here it may have more. why: is told what can't run.
    """
    names = dict.fromkeys(plan.cells, plan.asked.baseline)
    for plugin in dict.fromkeys(plugin for plugin, _ in able):
        workloads = [workload for name, workload in able if name == plugin]
        try:
            names |= dict.fromkeys(asked_of(plan.server, plan.asked, requested(plugin), workloads), plugin)
        except AttnbenchError as error:
            why |= {(plugin, workload): str(error) for workload in workloads}
    needed = {workload for plugin, workload in able if (plugin, workload) not in why}
    order = [cell for cell in plan.cells if cell.workload in needed]
    return {cell: names[cell] for base in order for cell in names if cell is base or _beside(cell, base)}


def _beside(cell: Cell, base: Cell) -> bool:
    return cell.workload == base.workload and cell.plugin != base.plugin


def _named(found: Sequence[Row], names: Mapping[Cell, str], baseline: str) -> dict[_Cell, Row]:
    """The rows under the names that the run has for them and for its baseline."""
    theirs = {(cell.plugin, cell.workload): name for cell, name in names.items()}
    rows = ((theirs[key(row)], key(row)[1], row) for row in found)
    return {(name, workload): row | {"plugin": name, "baseline": baseline} for name, workload, row in rows}


def _judged(theirs: Row, workload: Workload, ours: Row | None, why: str, margin: float) -> Checked:
    if ours is None:
        return Checked(workload, theirs, None, None, UNABLE, why or "nothing was measured")
    if ours["status"] == "wrong":
        return Checked(workload, theirs, ours, None, FAILS, f"wrong here: {ours['reason']}")
    if ours["status"] != "ok":
        return Checked(workload, theirs, ours, None, UNABLE, f"{ours['status']}: {ours['reason']}")
    same = theirs | {"threads": workload.threads}
    (change,) = between.compare(as_frame([same]), as_frame([ours]), ({}, {}), margin).changes
    if not change.paired:
        return Checked(workload, theirs, ours, None, UNABLE, f"the baseline {theirs['baseline']} has no number here")
    if change.low is None:
        return Checked(workload, theirs, ours, change, UNSURE, f"too few rounds for an interval; {_LONGER}")
    if change.verdict == SAME:
        return Checked(workload, theirs, ours, change, HOLDS)
    if "disturbed" in (ours.get("warnings") or []):
        return Checked(workload, theirs, ours, change, UNSURE, "other processes kept this machine busy (disturbed)")
    if change.is_apart(margin):
        return Checked(workload, theirs, ours, change, FAILS)
    return Checked(workload, theirs, ours, change, UNSURE, f"the two intervals leave it open; {_LONGER}")
