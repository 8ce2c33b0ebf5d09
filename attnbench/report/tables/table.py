"""A table of a report, as plain text: how it is escaped is the page's business."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.prepare import Panel
from attnbench.report.style import Style


@dataclass(frozen=True)
class Table:
    """Rows of text under columns of text. numeric: the columns that are set flush right. text: what it tells."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    numeric: frozenset[str] = frozenset()
    text: str = ""


def over_baseline(row: Row) -> str:
    """A row's speedup with its interval; "" for the baseline's own, and where there is none."""
    if row["plugin"] == row["baseline"] or not units.known(row["speedup"]):
        return ""
    return units.ratio(row["speedup"], row["speedup_low"], row["speedup_high"])


def by_row(panel: Panel, rows: Sequence[Row], style: Style, columns: dict[str, Callable[[Row], str]]) -> Table:
    """Rows of a panel: length, variant and `columns`, without those in which no row has anything to say.

    The run's name stands last where there are several.
    """
    first: dict[str, Callable[[Row], str]] = {
        panel.axis: lambda row: units.length(row["length"]),
        "variant": lambda row: style.names[row["plugin"]],
    }
    columns = first | columns
    if len({row["run"] for row in rows}) > 1:
        columns["run"] = lambda row: str(row["run"])
    body = {name: [text(row) for row in rows] for name, text in columns.items()}
    shown = [name for name, texts in body.items() if set(texts) != {units.NOTHING}]
    table = [list(row) for row in zip(*(body[name] for name in shown), strict=True)]
    return Table(shown, table, panel.heading, frozenset(shown) - {"variant", "timed by", "held down by", "run"})
