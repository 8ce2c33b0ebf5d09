"""`attnbench doctor`."""

import sys

import click

from attnbench.commands.options import (
    CELL_FAILED,
    COUNT,
    ISA,
    JSON,
    Seconds,
    option,
    print_json,
    print_table,
    warn_of_packages,
)
from attnbench.devices.machine import default_threads
from attnbench.sizes import parse_precision


@click.command()
@option("--threads", type=COUNT, help="Threads that variants would use.  [default: all usable cores]")
@option("--seconds", type=Seconds(1), default=10.0, help="How long to try, for the A/A.")
@option("--precision", default="2%", help="What the A/A should reach.")
@ISA
@JSON
def command(threads: int | None, seconds: float, precision: str, isa: str, as_json: bool) -> None:
    """Say whether this machine is fit to measure on, and what to mend.

    The last line is tried: sdpa is measured against itself, and what differs by less than the interval of their
    ratio can't be told apart here. Exit code 1 where something is amiss.

    \b
    attnbench doctor                 # before a run that matters
    attnbench doctor --seconds 60    # what a minute could tell apart
    """
    from attnbench.sweep.doctor import look, smallest_difference
    from attnbench.workers import ask
    from attnbench.workers.server import Forkserver

    wanted, threads = parse_precision(precision), threads or default_threads()
    warn_of_packages()
    with Forkserver(threads, isa) as server:
        checks = look(ask.ask_machine(server).machine, threads, isa=isa)
        checks.append(smallest_difference(server, threads, seconds, wanted))
    amiss = sum(bool(check.advice) for check in checks)
    if as_json:
        print_json({"checks": [check._asdict() for check in checks], "amiss": amiss})
    else:
        print_table(("", "found", "advice"), [(c.name, c.found, c.advice) for c in checks], pad_edge=False)
        click.echo("fit to measure on" if not amiss else f"{amiss} of {len(checks)} to mend")
    sys.exit(CELL_FAILED if amiss else 0)
