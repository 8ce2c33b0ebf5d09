"""A table of a report, as plain text: how it is escaped is the page's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnbench.records.schema import Row
from attnbench.report import units


@dataclass(frozen=True)
class Table:
    """Rows of text under columns of text. numeric: the columns that are set flush right. text: what it tells."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    numeric: frozenset[str] = frozenset()
    text: str = ""


def by_row(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]], title: str) -> Table:
    """Columns of text, without those in which no row has anything to say; the run's name where there are several."""
    if len({row["run"] for row in rows}) > 1:
        columns["run"] = lambda row: str(row["run"])
    body = {name: [text(row) for row in rows] for name, text in columns.items()}
    shown = [name for name, texts in body.items() if set(texts) != {units.NOTHING}]
    table = [list(row) for row in zip(*(body[name] for name in shown), strict=True)]
    return Table(shown, table, title, frozenset(shown) - {"variant", "timed by", "held down by", "run"})
