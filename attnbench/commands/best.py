"""`attnbench best`."""

import re
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
    from attnbench.advice.best import Answer, Limits
    from attnbench.commands.watch import Watch
    from attnbench.records.schema import Row

_SEVERAL = re.compile(r",|\.\.")
_LENGTHS, _BATCHES = "256..4096", "1..8"  # of a map where no sizes are given


@click.command()
@options.sweep
@option("--max-error", default="1e-2", help="The largest relative L2 against exact attention; none for any.")
@option("--max-memory", help="The largest peak of a call, such as 2GiB.  [default: any]")
@option("--budget", type=Seconds(1, 1e7), default=60.0, help="Seconds, where it has to be measured.")
@option("--results", type=PATH, default=Path("results"), help="Runs that may hold the answer already.")
@option("--fresh", is_flag=True, help="Measure in any case.")
@option("--map", "picture", type=PATH, help="A .png or .svg to draw which is fastest over whole ranges of sizes.")
@JSON
def command(
    max_error: str,
    max_memory: str | None,
    results: Path,
    fresh: bool,
    picture: Path | None,
    as_json: bool,
    **given: Unpack[Given],
) -> None:
    """Name the fastest variant for one workload within limits, and why each other lost.

    Takes it from a run of this machine where one tells, else measures. Exits with 1 where nothing holds the limits.

    With --map it answers for one or two words that have several values, such as --seq 256..4096 --batch 1..8, which
    is what it takes where none has, or --phase forward,decode,train: it measures a part of them within --budget and
    predicts the rest.

    \b
    attnbench best --seq 2048 --max-memory 1GiB
    attnbench best --preset llama-3-8b --phase decode --seq 8192
    attnbench best --map map.png --seq 256..4096 --batch 1..8
    attnbench best --map map.svg --seq 256..4096 --phase forward,decode,train --max-error none
    """
    from rich.console import Console

    from attnbench.advice.best import Limits, answer
    from attnbench.commands.watch import Watch

    limits = Limits(_error(max_error), parse_bytes(max_memory, "max-memory") if max_memory else None)
    given["scope"] = given["scope"] or "attention"
    if picture:
        _check(picture, given)
    asked = Asked.of(**given)
    options.warn_of_packages()
    options.warn_of_threads(asked.sweep.threads)
    with Watch(Console(stderr=True, quiet=as_json), 0) as watch:
        if picture:
            holds = _map(asked, limits, picture, as_json, watch)
        else:
            found = answer(asked, limits, results, fresh, watch)
            holds = found.row is not None
            print_json(found.as_dict()) if as_json else _print(found)
    sys.exit(0 if holds else CELL_FAILED)


def _check(picture: Path, given: Given) -> None:
    """Before anything is measured; and lengths, and batches, where no words have several values."""
    from attnbench.advice import shown

    shown.check(picture)
    if given["batch_spec"]:
        raise AttnbenchError("--map is over sizes, and --batch-spec has its own; drop one of them")
    words = {name: text for name, text in given.items() if isinstance(text, str) and name != "plugins"}
    several = [name for name, text in words.items() if _SEVERAL.search(text)]
    if not given["seq"] and not given["kv_seq"] and not given["tokens"]:
        given["seq"] = _LENGTHS
        several.append("seq")
    if several == ["seq"] and not given["batch"] and not given["tokens"] and not given["lengths"]:
        given["batch"] = _BATCHES


def _map(asked: Asked, limits: "Limits", picture: Path, as_json: bool, watch: "Watch") -> bool:
    """Whether anything holds the limits anywhere."""
    from attnbench.advice import map, shown
    from attnbench.report.names import short_names

    chart = map.chart(asked, limits, watch)
    shown.draw(chart, picture)
    if as_json:
        print_json(chart.as_dict())
    else:
        click.echo(
            f"the fastest, and its gain over {short_names(chart.variants)[chart.baseline]}: {shown.common(chart)}"
        )
        print_table(*shown.table(chart), pad_edge=False)
        click.echo(f"{shown.effort(chart)}; ~ predicted, = not told apart from the next: {picture}")
    return any(spot.plugin for spot in chart.spots)


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
