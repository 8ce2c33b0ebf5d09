"""`attnbench compare`."""

import sys
from pathlib import Path

import click

from attnbench.commands.changes import apart, print_changes
from attnbench.commands.options import CELL_FAILED, JSON, PATH, option, print_json
from attnbench.sizes import parse_precision


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
    from attnbench.records.run import load, read_metas

    margin = parse_precision(same, "same")
    allowed = parse_precision(fail_over, "fail-over") if fail_over else None
    metas = read_metas(base), read_metas(new)
    if any_machine:
        found = between.compare(load(base), load(new), [*metas[0], *metas[1]], margin)
    else:
        found = between.compare_by_machine(load(base), load(new), *metas, margin)
    worse = [change for change in found.changes if allowed is not None and change.is_worse(allowed)]
    if as_json:
        told = {name: [[plugin, w.label()] for plugin, w in cells] for name, cells in apart(found).items()}
        cells = [change.as_dict() for change in found.changes]
        print_json({"base": str(base), "new": str(new), "margin": margin, "cells": cells, **told, "worse": len(worse)})
    else:
        print_changes(found, markdown, margin)
        if worse:
            click.echo(f"worse than --fail-over {fail_over} for certain: {len(worse)} of {len(found.changes)} cells")
    sys.exit(CELL_FAILED if worse else 0)
