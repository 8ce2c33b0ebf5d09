"""`attnbench guard`."""

import signal
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Unpack

import click

from attnbench.commands import options
from attnbench.commands.changes import print_changes
from attnbench.commands.options import CELL_FAILED, JSON, PATH, Seconds, option, print_json, tell
from attnbench.commands.watch import Watch
from attnbench.sizes import STANDARD, parse_precision
from attnbench.sweep.settings import TIMEOUT, Asked, Given
from attnbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnbench.advice.guard import Guarded


class _Bar(Watch):
    """Without a line for each cell."""

    def rows(self, *_: object) -> None: ...

    def again(self, *_: object) -> None: ...


@click.command()
@click.argument("span", metavar="BASE..NEW")
@option("--package", type=PATH, default=Path("."), help="The package's folder in its repository.")
@option("--plugins", default="all", help="Of the package's plugins: all, names (a,b), patterns, name:key=value.")
@options.workloads
@option("--fail-over", default="1%", help="Exit with 1 if a cell is slower by more than this for certain.")
@option("--same", default="3%", help="Up to which difference two count as the same.")
@option("--budget", type=Seconds(5, 1e7), default=300.0, help="Seconds for all of it.")
@option("--timeout", type=Seconds(0.1, 1e6), default=TIMEOUT, help="Seconds for a cell.")
@option("--markdown", is_flag=True, help="Print Markdown, for a pull request.")
@JSON
def command(
    span: str,
    package: Path,
    fail_over: str,
    same: str,
    markdown: bool,
    as_json: bool,
    **given: Unpack[Given],
) -> None:
    """Tell whether a pull request made a plugin slower, or broke it.

    Installs the plugin package of both commits apart, and measures each cell of NEW in turns with BASE's, on lengths of
    512 to 4096 where none are given. What looks slower is measured again, and longer. BASE...NEW begins where the two
    parted. Exits with 1 where NEW is slower for certain, fails or is wrong.

    \b
    attnbench guard main..HEAD
    attnbench guard origin/main...HEAD --seq 512,2048 --fail-over 2% --markdown
    """
    from rich.console import Console

    from attnbench.advice import guard
    from attnbench.advice.revisions import revisions

    until = monotonic() + guard.IN_TIME * given["budget"]
    margin, close = parse_precision(fail_over, "fail-over"), parse_precision(same, "same")
    if given["preset"] != STANDARD:
        given["seq"] = given["seq"] or (None if given["kv_seq"] else "512..4096")
        given["scope"] = given["scope"] or "attention"
    asked = Asked.of(**given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # in order, so that nothing is left behind
    options.warn_of_packages()
    options.warn_of_threads(asked.sweep.threads)
    with revisions(span, package) as (base, new), _Bar(Console(stderr=True, quiet=as_json), 0) as bar:
        if new.problem:
            click.echo(f"NEW, {new}: {new.problem}")
            sys.exit(CELL_FAILED)
        tell(f"NEW is {new}, BASE {base}{base.problem and f': {base.problem}'}")
        found = guard.guard(asked, base, new, margin, close, until, bar, tell)
    if as_json:
        print_json(guard.as_dict(found, base, new) | {"margin": margin, "same": close})
    else:
        print_changes(found.comparison, markdown, close)
        for line in _lines(found, fail_over):
            click.echo(f"- {line}" if markdown else line)
    sys.exit(CELL_FAILED if found.failed else 0)


def _lines(found: "Guarded", fail_over: str) -> "Iterator[str]":
    from attnbench.report import units

    if not found.told:
        yield "no cell of NEW has a number: nothing is told of it"
    for rows, how in ((found.without, "no number"), (found.broken, "broken")):
        for row in rows:
            yield f"{how}: {row['plugin']}, {Workload.from_dict(row).label()}: {row['status']}: {row['reason']}"
    if found.disturbed:
        yield f"{found.disturbed} disturbed: most of their rounds had to wait for a core, so a slowdown may go unseen"
    if found.unconfirmed:
        yield f"{len(found.unconfirmed)} that looked slower got no long look, for want of time"
    for change in found.slower:
        ratio = units.ratio(change.ratio, change.low, change.high)
        yield f"slower: {change.plugin}, {change.workload.label()}: {ratio}"
    count = len(found.slower)
    yield f"{count or 'no'} cell{'s' * (count != 1)} slower by more than --fail-over {fail_over} for certain"
