"""The first lines of a page: what was found, each with its figures."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style
from attnbench.report.tables.best import ERROR_BOUND

_MOST = 5


def findings(panels: Sequence[Panel], style: Style) -> list[str]:
    """At most five: of each problem the fastest exact variant, the fastest of a small error, the fastest of any."""
    told = [_of_panel(panel, style) for panel in panels]
    # The first of each problem before the second of any.
    ranked = [(rank, number, line) for number, lines in enumerate(told) for rank, line in enumerate(lines)]
    kept = sorted(ranked)[:_MOST]
    return [line for _, _, line in sorted(kept, key=lambda each: (each[1], each[0]))]


def _of_panel(panel: Panel, style: Style) -> list[str]:
    done = finished(panel.frame)
    done = done[(done["speedup"] > 0) & (done["plugin"] != done["baseline"])]
    if done.empty:
        return []
    base = style.names.get(str(done["baseline"].iloc[0]), "the baseline")
    where = f"{panel.title[:1].upper()}{panel.title[1:]}" if panel.title else ""
    error, exact = done["approximation_rel_l2"], done["family"] == "exact"
    bound = units.percent(ERROR_BOUND)
    kinds = (
        ("exact", done[exact]),
        (f"within {bound} of softmax attention", done[~exact & (error <= ERROR_BOUND)]),
        ("whatever the error", done[~exact & (error > ERROR_BOUND)]),
    )
    lines, beaten = [], 1.0
    for kind, rows in kinds:
        best = _best(rows)
        begin = f"{where}, {kind}" if where else f"{kind[:1].upper()}{kind[1:]}"
        if best is not None and best["speedup"] > beaten and _is_certain(best):
            beaten = best["speedup"]
            lines.append(f"{begin}: {_figures(best, rows, style, base)}.")
        elif kind == "exact" and len(rows):
            lengths = units.lengths(sorted(set(rows["length"])))
            lines.append(f"{begin}: nothing is faster than {base} for certain at {lengths}.")
    return lines


def _is_certain(row: Row) -> bool:
    """Whether its interval, where it has one, lies above 1."""
    return not units.known(row["speedup_low"]) or row["speedup_low"] > 1


def _best(rows: pd.DataFrame) -> Row | None:
    """The fastest at the longest length at which any has an interval, or else at the longest."""
    known = rows[rows["speedup_low"].notna()]
    if (chosen := known if len(known) else rows).empty:
        return None
    return max(as_rows(chosen[chosen["length"] == chosen["length"].max()]), key=lambda row: float(row["speedup"]))


def _figures(best: Row, rows: pd.DataFrame, style: Style, base: str) -> str:
    """ "tiled is 2.62x sdpa at 8k, 4.36x at 512" """
    error = best["approximation_rel_l2"]
    off = (
        f" for an error of {units.percent(error, digits='.2g')}"
        if best["family"] != "exact" and units.known(error)
        else ""
    )
    own = min(as_rows(rows[rows["plugin"] == best["plugin"]]), key=lambda row: float(row["length"]))
    told = (
        f"{style.names[best['plugin']]} is {units.ratio(best['speedup'])} {base} at {units.length(best['length'])}{off}"
    )
    if own["length"] == best["length"]:
        return told
    return f"{told}; {units.ratio(own['speedup'])} at {units.length(own['length'])}"
