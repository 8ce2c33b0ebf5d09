"""What the page's chart and tables are fed: panels, variants and numbers, small enough to stand in the page as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnbench.analysis.frames import as_rows
from attnbench.records.schema import Row
from attnbench.report.prepare import Panel
from attnbench.report.style import SHADES, Style, shade

NUMBERS = (
    "length", "latency_s", "latency_low_s", "latency_high_s", "speedup", "speedup_low", "speedup_high", "peak_bytes",
    "approximation_rel_l2",
)  # fmt: skip
"""Of each row, in this order, behind the number of its plugin; then flags, and status and reason where it has none."""

_USUAL = {"phase": "forward", "layers": "1 layer", "inputs": "normal inputs", "seed": "seed 0", "l2": "L2 kept"}
_ALWAYS = ("phase", "dtype")
"""What can be chosen, or is told, even where there is one of it."""


def explorer(panels: Sequence[Panel], style: Style) -> dict[str, Any]:
    """The page's data: see NUMBERS for a row. The page has the commands already, in the order of the rows."""
    words = [dict(panel.words) for panel in panels]
    told = [name for name in (words[0] if words else ()) if name in _ALWAYS or len({each[name] for each in words}) > 1]
    number = {plugin: i for i, plugin in enumerate(style.plugins)}
    return {
        "families": [[family, shade(family, 0), shade(family, 1)] for family in SHADES],
        "plugins": [[style.names[p], style.families[p], style.colours[p], style.night[p]] for p in style.plugins],
        "choices": told,
        "panels": [
            {
                "words": {name: each[name] or _USUAL.get(name, "usual") for name in told},
                "name": panel.heading,
                "axis": panel.axis,
                "baseline": _baseline(panel, number),
                "rows": [_row(row, number) for row in as_rows(panel.frame)],
            }
            for panel, each in zip(panels, words, strict=True)
        ],
    }


def _baseline(panel: Panel, number: Mapping[str, int]) -> int | None:
    named = [number[name] for name in panel.frame["baseline"].dropna().unique() if name in number]
    return named[0] if len(named) == 1 else None


def _row(row: Row, number: Mapping[str, int]) -> list[Any]:
    done = row["status"] == "ok"
    figures = [_short(row[name]) if done or name == "length" else None for name in NUMBERS]
    reason = row["reason"] if isinstance(row["reason"], str) else ""
    flags = (2 if row["emulated"] else 0) + (1 if row["converged"] else 0)
    return [number[row["plugin"]], *figures, flags, *([] if done else [str(row["status"]), reason])]


def _short(value: float) -> float | int | None:
    """Six digits, so that the page's three are not rounded twice, or as many as a whole number has; None for none."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.6g}") if value != int(value) or abs(value) > 1e7 else int(value)
    return int(short) if short == int(short) else short
