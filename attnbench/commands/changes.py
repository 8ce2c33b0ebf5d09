"""How the cells of two sides are told beside each other, in a terminal and in Markdown."""

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

import click

from attnbench.commands.options import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnbench.analysis.between import Change, Comparison
    from attnbench.workload import Workload

_HEADS = ("variant", "base", "new", "ratio [95%]", "verdict", "error", "memory")
_ERROR, _MEMORY = 1.5, 1.05  # by how much either has to move for both to be shown


def apart(found: "Comparison") -> "dict[str, list[tuple[str, Workload]]]":
    """The cells that one side alone has."""
    return {"only_base": found.only_base, "only_new": found.only_new}


def print_changes(found: "Comparison", markdown: bool, margin: float) -> None:
    """A table for each workload, without what has no number on either side."""
    from attnbench.report.names import short_names

    told = [change for change in found.changes if "ok" in (change.base["status"], change.new["status"])]
    names = short_names({c.plugin: str(c.base["variant"]) for c in told})
    for label, group in groupby(told, key=lambda change: change.workload.label()):
        rows = [_row(change, names[change.plugin]) for change in group]
        if markdown:
            lines = [_HEADS, ["---"] * len(_HEADS), *rows]
            table = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            click.echo("\n".join([f"**{label}**", "", *table, ""]))
        else:
            click.echo(f"\n{label}")
            print_table(_HEADS, rows, pad_edge=False)
    counts = Counter(change.verdict for change in told)
    text = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    click.echo(f"\n{len(told)} cells: {text or 'none with a number'} (same: within {margin:.3g})")
    for name, cells in apart(found).items():
        if cells:
            click.echo(f"{len(cells)} cells {name.replace('_', ' in ')} alone")


def _row(change: "Change", name: str) -> list[str]:
    from attnbench.report import units

    base, new = change.base, change.new
    sides = [units.seconds(row["latency_s"]) if row["status"] == "ok" else str(row["status"]) for row in (base, new)]
    ratio = units.ratio(change.ratio, change.low, change.high)
    error = _moved(base["approximation_rel_l2"], new["approximation_rel_l2"], units.error, _ERROR)
    memory = _moved(base["peak_bytes"], new["peak_bytes"], units.size, _MEMORY)
    return [name, *sides, ratio, change.verdict, error, memory]


def _moved(one: float, other: float, text: "Callable[[float], str]", by: float) -> str:
    """Both, where one is at least so many times the other."""
    if one > 0 and other > 0:
        return f"{text(one)} to {text(other)}" if max(one / other, other / one) > by else text(other)
    return text(other) if other == other else text(one)
