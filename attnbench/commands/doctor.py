"""`attnbench doctor`."""

from __future__ import annotations

import sys

import click

from attnbench.commands.options import CELL_FAILED, Seconds, print_table
from attnbench.devices.machine import default_threads
from attnbench.sizes import parse_precision


@click.command()
@click.option("--threads", type=click.IntRange(1), help="Threads that variants would use.  [default: all usable cores]")
@click.option("--seconds", type=Seconds(1), default=10.0, show_default=True, help="How long to try, for the A/A.")
@click.option("--precision", default="2%", show_default=True, help="What the A/A should reach.")
def command(threads: int | None, seconds: float, precision: str) -> None:
    """Say whether this machine is fit to measure on, and what to mend.

    The last line is tried: sdpa is measured against itself, and what differs by less than the interval of their
    ratio can't be told apart here. Exit code 1 where something is amiss.
    """
    from rich.table import Table

    from attnbench.sweep.doctor import look, smallest_difference
    from attnbench.workers import ask
    from attnbench.workers.server import Forkserver

    wanted, threads = parse_precision(precision), threads or default_threads()
    table = Table("", "found", "advice", box=None, pad_edge=False)
    with Forkserver(threads) as server:
        checks = look(ask.ask_machine(server).machine, threads)
        checks.append(smallest_difference(server, threads, seconds, wanted))
    for check in checks:
        table.add_row(check.name, check.found, check.advice)
    print_table(table)
    amiss = sum(bool(check.advice) for check in checks)
    click.echo("fit to measure on" if not amiss else f"{amiss} of {len(checks)} to mend")
    sys.exit(CELL_FAILED if amiss else 0)
