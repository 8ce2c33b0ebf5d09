"""The numbers of a run for a terminal: lengths down, variants across. Loads no library that draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import Meta, Row
from attnbench.report import units
from attnbench.report.names import display_names
from attnbench.report.prepare import Panel, arrange, machine_name, prepared

_GAP = 2  # columns of a terminal between two of a table


@dataclass(frozen=True)
class Grid:
    """What one panel's variants reached. notes: what the cells have no room for.

    heads: the length, then the variants. rows: a length with some lines for each variant.
    """

    heading: str
    heads: list[str]
    rows: list[list[str]]
    notes: list[str]

    def within(self, width: int) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Heads and rows of as many tables as it takes for none to be wider than this, the lengths in each."""
        sizes = [max(len(line) for text in column for line in text.split("\n")) + _GAP for column in self._columns()]
        shown, used = [0], sizes[0]
        for i in range(1, len(self.heads)):
            if used + sizes[i] > width and len(shown) > 1:
                yield self._part(shown)
                shown, used = [0], sizes[0]
            shown.append(i)
            used += sizes[i]
        yield self._part(shown)

    def _columns(self) -> Iterator[tuple[str, ...]]:
        return zip(self.heads, *self.rows, strict=True)

    def _part(self, shown: Sequence[int]) -> tuple[list[str], list[list[str]]]:
        return [self.heads[i] for i in shown], [[row[i] for i in shown] for row in self.rows]


def grids(frame: pd.DataFrame, runs: Sequence[Meta], memory: bool = False) -> list[Grid]:
    """One for each panel of a report: see `report.prepare.arrange`.

    frame: rows as `records.load` gives them. runs: what run.json says of each. memory: tell of its peak, too.
    """
    frame = prepared(frame, runs)
    names, many = display_names(frame), len(runs) > 1
    machines = {str(run.get("name")): machine_name(run) for run in runs}
    return [_grid(panel, names, machines if many else {}, memory) for panel in arrange(frame, runs)]


def _grid(panel: Panel, names: Mapping[str, str], machines: Mapping[str, str], memory: bool) -> Grid:
    frame = panel.frame
    rows = {str(plugin): as_rows(part) for plugin, part in frame.groupby("plugin", sort=False)}
    able = [plugin for plugin in rows if any(row["status"] != "unsupported" for row in rows[plugin])]
    able.sort(key=lambda plugin: _rank(rows[plugin]))
    base = next((row["baseline"] for row in as_rows(frame) if row["baseline"]), "")
    lengths = sorted({row["length"] for plugin in able for row in rows[plugin]})
    table = []
    for length in lengths:
        found = {plugin: [row for row in rows[plugin] if row["length"] == length] for plugin in able}
        table.append([units.length(length), *(_cell(found[plugin], memory) for plugin in able)])
    if any(units.known(row["approximation_rel_l2"]) for row in as_rows(finished(frame))):
        table.append(["error", *(units.error(_worst(rows[plugin])) for plugin in able)])
    notes = [f"no number, {names[plugin]}: {rows[plugin][0]['reason']}" for plugin in rows if plugin not in able]
    heading = ", ".join(dict.fromkeys(filter(None, (panel.title, panel.shared))))
    where = [f"on {machines[run]}" for run in frame["run"].unique() if run in machines]
    told = "a call (median)" + (f", speedup over {names.get(base, base)} with half its 95% interval" if base else "")
    heads = [names[p] + (" (emulated)" if any(row["emulated"] for row in rows[p]) else "") for p in able]
    return Grid(f"{'; '.join([heading, *where])}: {told}", [panel.axis, *heads], table, notes)


def _rank(rows: Sequence[Row]) -> tuple[bool, float]:
    """The baseline first, then whoever is fastest at the longest length that it finished."""
    done = [row for row in rows if row["status"] == "ok" and units.known(row["latency_s"])]
    last = max(done, key=lambda row: float(row["length"]), default=None)
    if last is None:
        return True, float("inf")
    speed = last["speedup"] if units.known(last["speedup"]) else 1 / last["latency_s"]
    return last["plugin"] != last["baseline"], -float(speed)


def _cell(rows: Sequence[Row], memory: bool) -> str:
    """Seconds of a call, the speedup below it, and below that its memory; or its status."""
    if not rows:
        return ""
    (row, *_) = rows
    if row["status"] != "ok":
        return str(row["status"])
    lines = [units.seconds(row["latency_s"])]
    if row["plugin"] != row["baseline"] and units.known(row["speedup"]):
        lines.append(over(row["speedup"], row["speedup_low"], row["speedup_high"]))
    return "\n".join([*lines, *([units.size(row["peak_bytes"])] if memory else [])])


def over(ratio: float, low: float | None, high: float | None) -> str:
    """ "1.31x ±2%"; without an interval "1.31x ±?"."""
    if low is None or high is None or not units.known(low, high):
        return f"{units.ratio(ratio)} ±?"
    half = max((high - low) / 2 / ratio, 1e-3)
    return f"{ratio:.3g}x ±{units.percent(half, digits='.2g' if half < 0.995 else '.0f')}"


def _worst(rows: Sequence[Row]) -> float | None:
    """The largest error against exact attention, of all lengths."""
    return max((r["approximation_rel_l2"] for r in rows if units.known(r["approximation_rel_l2"])), default=None)
