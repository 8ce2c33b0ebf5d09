"""What commands share: exit codes, kinds of parameters, and how a table is printed."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from attnbench.devices import cgroup
from attnbench.devices.machine import usable_cores
from attnbench.workload import DEVICES

if TYPE_CHECKING:
    from rich.table import Table

CELL_FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:  # NaN passes every range
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


THREADS = click.option("--threads", type=click.IntRange(1, 4096), help="[default: the cores this process may use]")
DEVICE = click.option("--device", type=click.Choice(["auto", *DEVICES]), default="auto", show_default=True)


def tell(line: str) -> None:
    """Says something beside what was asked for. A full disk behind stderr is no reason to stop."""
    with suppress(OSError):
        click.echo(line, err=True)


def warn_of_threads(threads: int) -> None:
    cores, quota = usable_cores(), cgroup.cpus()
    if threads > cores:
        tell(f"warning: {threads} threads on {cores} usable cores will fight each other")
    elif quota is not None and threads > quota:
        few = f"{threads} thread{'s' * (threads > 1)}"
        tell(f"warning: the cgroup gives {few} the time of {quota:g} cores, so it will halt them in turns (throttled)")


def print_table(table: Table) -> None:
    """On a terminal as wide as that is; into a file or a pipe wide enough for every row."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)
