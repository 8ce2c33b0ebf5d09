"""`attnbench report`."""

from pathlib import Path

import click

from attnbench.commands.options import PATH, option


@click.command()
@click.argument("runs", nargs=-1, type=PATH)
@option("--results", type=PATH, default=Path("results"))
@option("--out", type=PATH, default=Path("reports"))
def command(runs: tuple[Path, ...], results: Path, out: Path) -> None:
    """Draw figures and write a page from RUNS (default: the newest run in --results)."""
    from attnbench.records.run import load, newest, read_meta
    from attnbench.report.page import write_report

    folders = list(runs) or [newest(results)]
    metas = [read_meta(folder) for folder in folders]
    click.echo(f"report: {write_report(load(folders), metas, out)}")
