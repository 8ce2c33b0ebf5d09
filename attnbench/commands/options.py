"""What commands share: exit codes, kinds of parameters, and how a table is printed."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from attnbench import environment
from attnbench.devices import cgroup
from attnbench.devices.machine import usable_cores
from attnbench.packages import left_out
from attnbench.workload import DEVICES

option = partial(click.option, show_default=True)
CELL_FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:  # NaN passes every range
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


THREADS = option("--threads", type=click.IntRange(1, 4096), help="[default: the cores this process may use]")
COUNT, PATH = click.IntRange(1), click.Path(path_type=Path)
DEVICE = option("--device", type=click.Choice(["auto", *DEVICES]), default="auto")


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


def warn_of_packages() -> None:
    for folder in left_out():
        tell(f"warning: {folder} can't be read, so its package is left out with what it offers; mend or remove it")


def warn_of_pinning(threads: int, facts: Mapping[str, Any]) -> None:
    """facts: of the machine. What `warn_of_threads` sees by itself is not said again."""
    running = facts["threads_at_once"]
    if running is None or running >= min(threads, usable_cores()):
        return
    names = " and ".join(environment.of_threads(facts))
    mend = f"unset {names}, or ask" if names else "ask"
    tell(f"warning: only {running} of {threads} threads can run at a time; {mend} for --threads {running}")


def typed(ctx: click.Context) -> set[str]:
    """The parameters that stand on the command line, as against their defaults."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], pad_edge: bool = True) -> None:
    """On a terminal as wide as that is; into a file or a pipe wide enough for every row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=pad_edge)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)
