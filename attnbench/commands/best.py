"""`attnbench best`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from attnbench.commands import options
from attnbench.commands.options import CELL_FAILED, JSON, PATH, Seconds, option, print_json, print_table
from attnbench.errors import AttnbenchError
from attnbench.sizes import parse_bytes
from attnbench.sweep.settings import Asked, Given

if TYPE_CHECKING:
    from attnbench.advice.best import Answer
    from attnbench.records.schema import Row


@click.command()
@options.sweep
@option("--max-error", default="1e-2", help="The largest relative L2 against exact attention; none for any.")
@option("--max-memory", help="The largest peak of a call, such as 2GiB.  [default: any]")
@option("--budget", type=Seconds(1, 1e7), default=60.0, help="Seconds, where it has to be measured.")
@option("--results", type=PATH, default=Path("results"), help="Runs that may hold the answer already.")
@option("--fresh", is_flag=True, help="Measure in any case.")
@JSON
def command(
    max_error: str, max_memory: str | None, results: Path, fresh: bool, as_json: bool, **given: Unpack[Given]
) -> None:
    """Name the fastest variant for one workload within limits, and why each other lost.

    Takes it from a run of this machine where one tells, else measures. Exits with 1 where nothing holds the limits.
    """
    from rich.console import Console

    from attnbench.advice.best import Limits, answer
    from attnbench.commands.watch import Watch

    limits = Limits(_error(max_error), parse_bytes(max_memory, "max-memory") if max_memory else None)
    given["scope"] = given["scope"] or "attention"
    asked = Asked.of(**given)
    options.warn_of_packages()
    options.warn_of_threads(asked.sweep.threads)
    with Watch(Console(stderr=True, quiet=as_json), 0) as watch:
        found = answer(asked, limits, results, fresh, watch)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    sys.exit(0 if found.row else CELL_FAILED)


def _error(text: str) -> float | None:
    if text == "none":
        return None
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise AttnbenchError(f"--max-error {text!r} is no error; write 0.01, or none")


def _print(found: "Answer") -> None:
    from attnbench.report import units

    where = f"from {found.source}" if found.source else "measured now"
    if found.row is None:
        click.echo(f"{found.workload.label()}: nothing holds the limits ({where})")
    else:
        row = found.row
        base = row["baseline"]
        over = units.ratio(row["speedup"], row["speedup_low"], row["speedup_high"]) if row["plugin"] != base else ""
        click.echo(f"{found.workload.label()}: {row['plugin']} ({where})")
        facts = [units.seconds(row["latency_s"]), f"{over} over {base}" if over and base else "", *_facts(row)]
        click.echo("  " + ", ".join(filter(None, facts)))
        if found.tied:
            click.echo(f"  not told apart from {units.listed(list(found.tied))}; a longer --budget may tell")
    heads = ("other", "a call", "error", "memory", "why not")
    body = [[str(row["plugin"]), units.seconds(row["latency_s"]), *_figures(row), why] for row, why in found.others]
    print_table(heads, body, pad_edge=False)


def _figures(row: "Row") -> list[str]:
    from attnbench.report import units

    return [units.error(row["approximation_rel_l2"]), units.size(row["peak_bytes"])]


def _facts(row: "Row") -> list[str]:
    error, memory = _figures(row)
    return [f"error {error}", f"peak memory {memory}", str(row["implementation"])]
