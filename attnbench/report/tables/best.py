"""Tables that answer which variant is the best: at each length, on average, and in short for a pull request."""

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from attnbench.analysis import compare
from attnbench.analysis.frames import as_rows
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style
from attnbench.report.tables.table import Table, over_baseline

ERROR_BOUND = 0.01
"""One column names the fastest variant whose approximation error (relative l2) is at most this."""


def best_by_length(panel: Panel, style: Style) -> Table:
    """Per length: the fastest exact variant, the fastest within the error bound, and the fastest whatever its error."""
    rows = []
    for length, cell in panel.frame.groupby("length"):
        error, is_exact = cell["approximation_rel_l2"], cell["family"] == "exact"
        candidates = (cell[is_exact], cell[(error <= ERROR_BOUND) | (error.isna() & is_exact)], cell)
        answers = [_best(candidate, style) for candidate in candidates]
        told = ["the same" if answer == before != units.NOTHING else answer for before, answer in pairwise(answers)]
        rows.append([units.length(float(str(length))), answers[0], *told])
    bound = units.percent(ERROR_BOUND)
    return Table([panel.axis, "fastest exact", f"fastest within {bound} error", "fastest of all"], rows, panel.heading)


def _best(rows: pd.DataFrame, style: Style) -> str:
    found = compare.fastest(rows)
    if not found:
        return units.NOTHING
    best, error = found.row, found.row["approximation_rel_l2"]
    facts = [units.seconds(best["latency_s"]), over_baseline(best)]
    facts += [f"error {units.error(error)}"] if best["family"] != "exact" and units.known(error) else []
    tail = f"; not told apart from {units.listed([style.names[name] for name in found.tied])}" if found.tied else ""
    tail += "" if found.certain else "; by medians alone"
    return f"{style.names[best['plugin']]}: {', '.join(filter(None, facts))}{tail}"


def average_speedups(panels: Sequence[Panel], style: Style) -> Table:
    """Geometric means over what all finished, with how many cells of how many."""
    rows = []
    for panel in panels:
        found = compare.averages(panel.frame)
        over = f"{found.cells} of {found.of}"
        for plugin, mean in sorted(found.speedups.items(), key=lambda item: -item[1]):
            rows.append([panel.name, style.names[plugin], units.ratio(mean), over])
        if not found.speedups:
            rows.append([panel.name, "none: no cell was finished by all", units.NOTHING, over])
        rows += [[panel.name, style.names[plugin], units.NOTHING, "finished none"] for plugin in found.absent]
    return Table(["cells", "variant", "mean speedup", "over cells"], rows, numeric=frozenset({"mean speedup"}))


def pull_request(panels: Sequence[Panel], style: Style) -> list[Table]:
    """Per panel each variant's latency and speedup at each length, small enough for a comment."""
    tables = []
    for panel in panels:
        lengths = sorted(set(panel.frame["length"]))
        body = []
        for plugin in style.plugins:
            cells = {row["length"]: _short(row) for row in as_rows(panel.frame[panel.frame["plugin"] == plugin])}
            if cells:
                body.append([style.names[plugin], *(cells.get(length, "not asked for") for length in lengths)])
        where = ", ".join(part for part in (panel.title, panel.shared) if part)
        tables.append(Table(["variant", *map(units.length, lengths)], body, where))
    return tables


def _short(row: Row) -> str:
    if row["status"] != "ok" or not units.known(row["latency_s"]):
        return str(row["status"])
    return ", ".join(filter(None, [units.seconds(row["latency_s"]), over_baseline(row)]))
