"""`attnbench report`."""

from pathlib import Path

import click

from attnbench.commands.options import PATH, option


@click.command()
@click.argument("runs", nargs=-1, type=PATH)
@option("--results", type=PATH, multiple=True, help="The newest run in it; several may be given.  [default: results]")
@option("--out", type=PATH, default=Path("reports"))
def command(runs: tuple[Path, ...], results: tuple[Path, ...], out: Path) -> None:
    """Draw figures and write a page from RUNS and the newest one in each of --results.

    Among RUNS may be what `attnbench model` wrote, whose rows stand beside those of runs at the model's shape, and what
    `attnbench cache` and `attnbench parallel` wrote.

    \b
    attnbench report                 # the newest run under results, into reports
    attnbench report results/RUN results/OTHER
    attnbench report results/RUN results/DATE-model
    """
    from attnbench.records.judged import CACHE, MODEL, PARALLEL
    from attnbench.records.run import load, newest, read_metas
    from attnbench.report.page import write_report

    kinds = (MODEL, CACHE, PARALLEL)
    models, caches, shared = judged = [[folder for folder in runs if kind.is_one(folder)] for kind in kinds]
    folders = [folder for folder in runs if not any(folder in those for those in judged)]
    folders = [*folders, *(newest(root) for root in results)]
    if not folders and not shared:
        folders = [newest(Path("results"))]
    page = write_report(
        load(folders),
        read_metas(folders),
        out,
        MODEL.rows(models),
        [*map(CACHE.read, caches)],
        [*map(PARALLEL.read, shared)],
    )
    click.echo(f"report: {page}")
