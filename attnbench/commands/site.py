"""`attnbench site`."""

import sys
from pathlib import Path

import click

from attnbench.commands.options import CELL_FAILED, PATH, option, tell


@click.command()
@click.argument("sources", nargs=-1, required=True, type=PATH)
@option("--out", type=PATH, default=Path("site"), help="The folder to write to.")
def command(sources: tuple[Path, ...], out: Path) -> None:
    """Build a static leaderboard over many machines' runs.

    SOURCES are files that attnbench submit wrote, runs' folders, and folders that hold either. The page asks for no
    network: open index.html, or put the folder on any web server. What can't be read is left out, and the exit code
    is 1.

    \b
    attnbench site results submissions
    attnbench site submissions --out public
    """
    from attnbench.errors import AttnbenchError, refusals
    from attnbench.records.submission import found_in, read
    from attnbench.report.site import Board

    board, broken = Board(), 0
    for path in found_in(sources):
        try:
            if twin := board.add(read(path)):
                tell(f"once: {path} is the run of {twin}")
        except AttnbenchError as error:
            broken += 1
            tell(f"left out: {error}")
    if not board.rows:
        raise AttnbenchError("there is nothing to show: no run of these can be read")
    with refusals(f"write to {out}", "choose another --out"):
        page = board.write(out, broken)
    click.echo(f"site: {page}")
    sys.exit(CELL_FAILED if broken else 0)
