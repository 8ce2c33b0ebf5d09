"""`attnbench export`."""

from pathlib import Path

import click

from attnbench.commands.options import PATH, option
from attnbench.errors import AttnbenchError, refusals

KINDS = ("csv", "parquet", "pytest-benchmark", "github-action")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@option("--format", "kind", type=click.Choice(KINDS), default="csv")
@option("--out", type=PATH, help="The file to write.  [default: to stdout]")
def command(runs: tuple[Path, ...], kind: str, out: Path | None) -> None:
    """Write RUNS for other tools.

    csv and parquet hold every row. pytest-benchmark is the JSON that `pytest-benchmark compare` reads, github-action
    that of github-action-benchmark's customSmallerIsBetter; both hold the rows that have a value.

    \b
    attnbench export results/RUN > cells.csv
    attnbench export results/RUN --format parquet --out cells.parquet
    """
    from attnbench.records.exports import FORMATS, without_value

    chosen = FORMATS[kind]
    if out is None and not chosen.text:
        raise AttnbenchError(f"--format {kind} is not for a terminal; name a file with --out")
    content = chosen.write(runs)
    if out is None:
        click.echo(content, nl=False)
    else:
        with refusals(f"write {out}", "choose another --out"):
            out.write_bytes(content)
    if not chosen.failed and (missing := without_value(runs)):
        click.echo(f"left out: {missing} rows without a value", err=True)
