"""The tables of attention across processes: time, what each process sends against what is predicted, and its memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.report.across import done, heading, lacking, problems
from attnbench.report.prepare import machine_name
from attnbench.report.tables.table import Table


def _sent(row: Row) -> str:
    """ "3.00 MiB, +0.05%": payload and framing against the payload that is predicted."""
    sent, predicted = row["sent_bytes"], row["predicted_sent_bytes"]
    if sent is None:
        return units.NOTHING
    if not predicted:
        return units.size(sent)
    return f"{units.size(sent)}, {100 * (sent / predicted - 1):+.2g}%"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "scheme": lambda row: str(row["scheme"]),
    "processes": lambda row: str(row["world"]),
    "a call": lambda row: units.seconds(*(row[f"latency{end}_s"] for end in ("", "_low", "_high"))),
    "over sdpa in one": lambda row: units.ratio(*(row[f"speedup{end}"] for end in ("", "_low", "_high"))),
    "each sends, over predicted": _sent,
    "peak of one": lambda row: units.size(row["peak_bytes"]),
    "error": lambda row: units.error(row["implementation_rel_l2"]),
    "against softmax": lambda row: units.error(row["approximation_rel_l2"]),
    "gradients": lambda row: units.error(_worst_gradient(row)),
    "warnings": lambda row: ", ".join(row["warnings"]) or units.NOTHING,
}


def by_world(judged: Sequence[Mapping[str, Any]]) -> list[Table]:
    """judged: what `attnbench parallel` wrote, see `records.judged`. A table for each problem."""
    return [table_of(rows, machine_name(each)) for each in judged for rows in problems(each["rows"])]


def _worst_gradient(row: Row) -> float | None:
    found = [row.get(f"{name}_gradient_rel_l2") for name in ("query", "key", "value")]
    return max((each for each in found if each is not None), default=None)


def table_of(rows: Sequence[Row], machine: str = "") -> Table:
    """Of one problem; its text says why there is no number where there is none. machine: where it was measured."""
    body = [[text(row) for text in COLUMNS.values()] for row in done(rows)]
    shown = [i for i, _ in enumerate(COLUMNS) if any(texts[i] != units.NOTHING for texts in body)]
    names = [list(COLUMNS)[i] for i in shown]
    return Table(
        names,
        [[texts[i] for i in shown] for texts in body],
        "; ".join(filter(None, [heading(rows[0]), machine])),
        frozenset(names) - {"scheme", "warnings"},
        "; ".join(lacking(rows)),
    )
