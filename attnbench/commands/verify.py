"""`attnbench verify`."""

import secrets
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnbench.commands import options
from attnbench.commands.options import CELL_FAILED, COUNT, JSON, PATH, Seconds, option, print_json, print_table, tell
from attnbench.sizes import parse_precision
from attnbench.sweep.settings import TIMEOUT

if TYPE_CHECKING:
    from attnbench.advice.verify import Verified


@click.command()
@click.argument("run", type=PATH)
@option("--cells", type=COUNT, default=8, help="How many to draw.")
@option("--budget", type=Seconds(1, 1e7), default=60.0, help="Seconds for all of them.")
@option("--timeout", type=Seconds(0.1, 1e6), default=TIMEOUT, help="Seconds for a cell.")
@option("--seed", type=click.IntRange(0), help="Of the draw.  [default: another one each time, and said]")
@option("--same", default="10%", help="Up to which difference a speedup holds.")
@option("--threads", type=click.IntRange(1, 4096), help="In place of the run's.")
@JSON
def command(
    run: Path,
    cells: int,
    budget: float,
    timeout: float,
    seed: int | None,
    same: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure a drawn sample of the cells of RUN on this machine, and say which hold as ratios.

    RUN is a run's folder, or a file that attnbench submit wrote. A cell claims a speedup over its baseline. It holds
    where the speedup here is the same within --same for certain, and does not hold where it is not for certain, or
    where the variant is wrong here. Exits with 1 where a cell does not hold, or nothing can be told of any.

    \b
    attnbench verify results/RUN
    attnbench verify submissions/FILE --cells 20 --budget 300 --seed 1
    """
    from rich.console import Console

    from attnbench.advice.verify import verify
    from attnbench.commands.watch import Watch
    from attnbench.records.submission import read

    margin = parse_precision(same, "same")
    seed = secrets.randbelow(10**6) if seed is None else seed
    shared = read(run)
    options.warn_of_packages()
    with Watch(Console(stderr=True, quiet=as_json), 0) as watch:
        found = verify(
            shared.rows(),
            seed=seed,
            cells=cells,
            budget=budget,
            timeout=timeout,
            margin=margin,
            threads=threads,
            progress=watch,
            tell=tell,
        )
    if as_json:
        counts = {"claims": found.claims, "seed": seed, "margin": margin, "failed": found.failed}
        print_json({"run": str(run), **counts, "cells": [each.as_dict() for each in found.checked]})
    else:
        _print(found, shared.meta, seed, same)
    sys.exit(CELL_FAILED if found.failed else 0)


def _print(found: "Verified", meta: Mapping[str, Any], seed: int, same: str) -> None:
    from attnbench.advice.verify import FAILS, HOLDS, UNABLE, UNSURE
    from attnbench.records.machines import of_run
    from attnbench.report import units
    from attnbench.report.names import short_names

    for theirs in of_run(meta).values():
        click.echo(f"theirs: {_machine(theirs)}")
    if found.facts:
        click.echo(f"here:   {_machine(found.facts)}")
    pairs = ((each.theirs.get("distribution"), each.ours.get("distribution")) for each in found.checked if each.ours)
    for one, other in dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]):
        click.echo(f"theirs came with {one or 'what it does not say'}, here with {other}")
    names = short_names({each.theirs["plugin"]: each.theirs["variant"] for each in found.checked})
    for workload, group in groupby(found.checked, key=lambda each: each.workload):
        click.echo(f"\n{workload.label()}")
        rows = []
        for each in group:
            sides = [
                units.ratio(*(row.get(f"speedup{end}") for end in ("", "_low", "_high"))) if row else units.NOTHING
                for row in (each.theirs, each.ours)
            ]
            change = each.change
            ratio = units.ratio(change.ratio, change.low, change.high) if change else units.NOTHING
            rows.append([names[each.theirs["plugin"]], *sides, ratio, each.verdict, each.why])
        print_table(("variant", "theirs [95%]", "here [95%]", "here / theirs", "verdict", "why"), rows, pad_edge=False)
    counts = ", ".join(
        f"{number} {verdict}" for verdict in (HOLDS, FAILS, UNSURE, UNABLE) if (number := found.count(verdict))
    )
    click.echo(
        f"\n{units.count(len(found.checked), 'cell')} of {found.claims} with a speedup and its interval "
        f"(--seed {seed}): {counts} (holds: within {same})"
    )


def _machine(machine: Mapping[str, Any]) -> str:
    from attnbench.report.prepare import machine_name

    torch = (machine.get("libraries") or {}).get("torch")
    return ", ".join(filter(None, [machine_name({"machine": machine}), torch and f"torch {torch}"]))
