"""`attnbench compare`."""

import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from attnbench.commands.options import CELL_FAILED, JSON, PATH, option, print_json, print_table
from attnbench.sizes import parse_precision

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnbench.analysis.between import Change, Comparison
    from attnbench.workload import Workload

_HEADS = ("variant", "base", "new", "ratio [95%]", "verdict", "error", "memory")
_ERROR, _MEMORY = 1.5, 1.05  # by how much either has to move for both to be shown


@click.command()
@click.argument("base", type=PATH)
@click.argument("new", type=PATH)
@option("--same", default="2%", help="Up to which difference two count as the same.")
@option("--fail-over", help="Exit with 1 if a cell is slower by more than this for certain, such as 5%, or is broken.")
@option("--any-machine", is_flag=True, help="Compare runs of different machines, too.")
@option("--markdown", is_flag=True, help="Print Markdown, for a pull request.")
@JSON
def command(
    base: Path, new: Path, same: str, fail_over: str | None, any_machine: bool, markdown: bool, as_json: bool
) -> None:
    """Compare the run NEW with the run BASE, cell by cell.

    A ratio is BASE's time over NEW's: above 1x NEW is faster. Where both runs have the same baseline it is the ratio of
    the speedups over it, in which a machine that was slower on one of the days cancels out.

    \b
    attnbench compare results/RUN results/OTHER
    attnbench compare results/RUN results/OTHER --fail-over 5%
    """
    from attnbench.analysis import between
    from attnbench.records.run import load, read_meta

    margin = parse_precision(same, "same")
    allowed = parse_precision(fail_over, "fail-over") if fail_over else None
    metas = [read_meta(base), read_meta(new)]
    if not any_machine:
        between.check_same_machine(metas)
    found = between.compare(load(base), load(new), metas, margin)
    worse = [change for change in found.changes if allowed is not None and change.is_worse(allowed)]
    if as_json:
        told = {name: [[plugin, w.label()] for plugin, w in cells] for name, cells in _apart(found).items()}
        cells = [change.as_dict() for change in found.changes]
        print_json({"base": str(base), "new": str(new), "margin": margin, "cells": cells, **told, "worse": len(worse)})
    else:
        _print(found, markdown, margin)
        if worse:
            click.echo(f"worse than --fail-over {fail_over} for certain: {len(worse)} of {len(found.changes)} cells")
    sys.exit(CELL_FAILED if worse else 0)


def _apart(found: "Comparison") -> "dict[str, list[tuple[str, Workload]]]":
    return {"only_base": found.only_base, "only_new": found.only_new}


def _print(found: "Comparison", markdown: bool, margin: float) -> None:
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
    for name, cells in _apart(found).items():
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
