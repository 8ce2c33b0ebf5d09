"""The table of three levels: kernel, block and model, and what became of the model."""

from collections.abc import Callable

import pandas as pd

from attnbench.analysis.frames import as_rows
from attnbench.analysis.levels import LEVELS
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.style import Style
from attnbench.report.tables.table import Table

_LOST: dict[str, Callable[[Row], str]] = {
    "perplexity over exact's": lambda row: units.ratio(
        *(row[f"perplexity_ratio{end}"] for end in ("", "_low", "_high"))
    ),
    "KL": lambda row: units.error(row["kl_mean"]),
    "same top token": lambda row: units.percent(row["top1_agreement"]),
    "cosine": lambda row: units.NOTHING if not units.known(row["cosine"]) else f"{row['cosine']:.4f}",
}


def by_level(found: pd.DataFrame, style: Style) -> Table | None:
    """found: of `analysis.levels`. A row for each variant in each model at each length; None where there is none."""
    rows = sorted(as_rows(found), key=lambda row: (row["model"], row["seq"], -_number(row["attention"])))
    if not rows:
        return None
    body = [
        [row["model"], units.length(row["seq"]), style.names[row["plugin"]]]
        + [_speedup(row, level) for level in LEVELS]
        + [text(row) for text in _LOST.values()]
        for row in rows
    ]
    columns = ["model", "length", "variant", *LEVELS.values(), *_LOST]
    shown = [i for i, _ in enumerate(columns) if any(line[i] != units.NOTHING for line in body)]
    names = [columns[i] for i in shown]
    return Table(names, [[line[i] for i in shown] for line in body], numeric=frozenset(names) - {"model", "variant"})


def _speedup(row: Row, level: str) -> str:
    return units.ratio(*(row[f"{level}{end}"] for end in ("", "_low", "_high")))


def _number(value: float) -> float:
    return value if units.known(value) else 0.0
