"""Runs of the standard sweep beside each other: what each variant takes on each machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from attnbench.analysis.rows import Row, finished, records
from attnbench.report import units
from attnbench.report.prepare import machine_name
from attnbench.report.style import Style
from attnbench.report.tables.table import Table

_SAME = ("scope", "block", "mask", "seq", "plugin")  # what the standard sweep varies


def side_by_side(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]], style: Style) -> Table | None:
    """A row for each cell that two runs of the same standard sweep finished, a column for each run.

    A cell holds the median latency and the paired speedup over the baseline of that run. None where the report has no
    two such runs.
    """
    standard = [run for run in runs if run.get("standard")]
    if len(standard) < 2 or len({run["standard"] for run in standard}) > 1:
        return None
    names = [str(run.get("name")) for run in standard]
    done = finished(frame)
    cells = {(run, *(row[name] for name in _SAME)): row for run in names for row in records(done[done["run"] == run])}
    keys = dict.fromkeys(key[1:] for key in cells)
    shared = [key for key in keys if sum((run, *key) in cells for run in names) > 1]
    rows = []
    for scope, block, mask, seq, plugin in shared:
        found = (cells.get((run, scope, block, mask, seq, plugin)) for run in names)
        where = "attention" if scope == "attention" else f"{block} block"
        rows.append([where, str(mask), units.length(seq), style.names[str(plugin)], *map(_told, found)])
    heads = [f"{run}: {machine_name(meta)}" for run, meta in zip(names, standard, strict=True)]
    numeric = frozenset(["length", *heads])
    return Table(["scope", "mask", "length", "variant", *heads], rows, numeric=numeric) if rows else None


def _told(row: Row | None) -> str:
    if row is None:
        return units.NOTHING
    speedup = f" ({units.ratio(row['speedup'])})" if units.known(row["speedup"]) else ""
    return units.seconds(row["latency_s"]) + speedup
