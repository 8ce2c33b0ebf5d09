"""`attnbench export`."""

from __future__ import annotations

from pathlib import Path

import click

from attnbench.errors import AttnbenchError


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["csv", "parquet", "pytest-benchmark", "github-action"]),
    default="csv",
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), help="The file to write.  [default: to stdout]")
def command(runs: tuple[Path, ...], kind: str, out: Path | None) -> None:
    """Write RUNS for other tools.

    csv and parquet hold every row. pytest-benchmark is the JSON that `pytest-benchmark compare` reads, github-action
    that of github-action-benchmark's customSmallerIsBetter; both hold the rows that have a value.
    """
    from attnbench.records.exports import FORMATS, without_value

    chosen = FORMATS[kind]
    if out is None and not chosen.text:
        raise AttnbenchError(f"--format {kind} is not for a terminal; name a file with --out")
    content = chosen.write(runs)
    if out is None:
        click.echo(content, nl=False)
    else:
        try:
            out.write_bytes(content)
        except OSError as error:
            raise AttnbenchError(f"can't write {out}: {error.strerror}; choose another --out") from None
    if not chosen.failed and (missing := without_value(runs)):
        click.echo(f"left out: {missing} rows without a value", err=True)
