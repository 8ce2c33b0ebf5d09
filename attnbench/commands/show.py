"""`attnbench show`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from attnbench.commands.options import JSON, PATH, option, print_json, print_table, width

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command()
@click.argument("runs", nargs=-1, type=PATH)
@option("--results", type=PATH, default=Path("results"), help="Without RUNS, the newest one in it.")
@option("--memory", is_flag=True, help="Peak memory, too.")
@JSON
def command(runs: tuple[Path, ...], results: Path, memory: bool, as_json: bool) -> None:
    """Print the numbers of RUNS, as `attnbench run` does when it ends.

    \b
    attnbench show                   # the newest run
    attnbench show results/RUN --memory
    """
    from attnbench.analysis.frames import as_rows
    from attnbench.records.run import load, newest

    folders = runs or (newest(results),)
    if as_json:
        print_json({"runs": [str(folder) for folder in folders], "cells": as_rows(load(folders))})
    else:
        print_numbers(folders, memory)


def print_numbers(folders: "Sequence[Path]", memory: bool = False) -> None:
    """A table for each problem that the runs measured, none wider than the terminal."""
    from attnbench.records.run import load, read_metas
    from attnbench.report.numbers import grids

    for grid in grids(load(folders), read_metas(folders), memory):
        click.echo(f"\n{grid.heading}")
        for heads, rows in grid.within(width()):
            print_table(heads, rows, pad_edge=False, right=True)
        for note in grid.notes:
            click.echo(note)
