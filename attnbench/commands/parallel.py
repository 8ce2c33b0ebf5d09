"""`attnbench parallel`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnbench.commands.kept import Kept
from attnbench.commands.kinds import show_kinds
from attnbench.commands.options import (
    CELL_FAILED,
    DEVICE,
    INTERRUPTED,
    ISA,
    JSON,
    PATH,
    Seconds,
    option,
    print_json,
    print_table,
    tell,
    warn_of_packages,
)
from attnbench.devices.machine import default_threads, usable_cores
from attnbench.sizes import Sweep, as_masks, as_names, as_sizes, parse_precision
from attnbench.workload import DEVICES, DTYPES

if TYPE_CHECKING:
    from attnbench.sweep.parallel import Found


@click.command()
@click.option("--list", "listed", is_flag=True, help="Show the schemes that are installed; measure none.")
@option("--plugins", default="all", help="all, names (a,b), patterns (ring*), name:key=value, name:*.")
@option("--world", default="1,2,4", help="Numbers of processes.")
@option("--seq", default="1024,4096", help="Lengths: 512..4096 doubles, 512,1000 lists.")
@option("--batch", default="1")
@option("--heads", default="8")
@option("--kv-heads", help="Fewer than --heads is grouped-query.  [default: as --heads]")
@option("--head-dim", default="64")
@option("--value-dim", help="[default: as --head-dim]")
@option("--dtype", help=f"{', '.join(DTYPES)}.  [default: bfloat16 where it is multiplied as such, else float32]")
@DEVICE
@option("--mask", default="causal", help="full or causal; lists too.")
@option("--phase", default="forward", help="forward or train; lists too.")
@option(
    "--threads", type=click.IntRange(1, 4096), help="Of each process.  [default: the cores over the most processes]"
)
@ISA
@option("--precision", default="5%", help="Half-width of a speedup's interval at which a group may stop.")
@option("--budget", type=Seconds(1, 1e7), default=120, help="Seconds for all.")
@option("--timeout", type=Seconds(1, 1e6), default=60, help="Seconds in which each process must answer.")
@option("--out", type=PATH, default=Path("results"), help="DATE-NAME with parallel.json and figures goes here.")
@option("--name", default="parallel")
@JSON
def command(listed: bool, out: Path, name: str, as_json: bool, **given: Any) -> None:
    """What does it take, and what does it save, to share one attention among processes?

    Each scheme among each number of processes, by turns and beside one process: time, the bytes that a process sends
    against those predicted, the memory that it holds, and both errors. Gloo on CPUs, NCCL on GPUs.

    \b
    attnbench parallel --world 1,2,4 --seq 4096,16384
    attnbench parallel --plugins ring:*,ulysses --phase train --kv-heads 2
    attnbench parallel --list                                # which there are, and their options
    """
    from attnbench.records.judged import PARALLEL
    from attnbench.report import units
    from attnbench.sweep.parallel import Asked, measure

    warn_of_packages()
    if listed:
        show_offered(given["isa"], as_json)
        return
    worlds = as_sizes(given["world"], "world") or ()
    sizes = {name: as_sizes(given[name], name) for name in _SIZES if given[name] is not None}
    names = {name: as_names(given[name], name, known) for name, known in _NAMES.items() if given[name]}
    threads = given["threads"] or max(1, default_threads() // max(worlds))
    sweep = Sweep(
        **({"dtype": ()} | sizes | names),  # type: ignore[arg-type]
        mask=as_masks(given["mask"]), scope="attention", device=given["device"], threads=threads,
    )  # fmt: skip
    asked = Asked(
        plugins=given["plugins"], worlds=worlds, sweep=sweep, precision=parse_precision(given["precision"]),
        budget=given["budget"], timeout=given["timeout"], isa=given["isa"],
    )  # fmt: skip
    kind = DEVICES.get(given["device"])
    if (kind is None or kind.host) and max(worlds) * threads > (cores := usable_cores()):
        most = f"{max(worlds)} processes of {units.count(threads, 'thread')}"
        tell(f"warning: {most} on {cores} usable cores wait for each other; their times will say little")
    kept = Kept(asked, out, name, PARALLEL)
    try:
        found = measure(asked, tell, lambda found: kept.write(_content(found)))
    except KeyboardInterrupt:
        tell(f"interrupted; what there is: {kept.folder}" if kept.folder else "interrupted")
        sys.exit(INTERRUPTED)
    if as_json:
        print_json(_content(found))
    else:
        show(found)
    _draw(found, kept)
    (tell if as_json else click.echo)(f"written: {kept.folder}")
    sys.exit(CELL_FAILED if any(row["status"] not in ("ok", "unsupported", "skipped") for row in found.rows) else 0)


_SIZES = ("seq", "batch", "heads", "kv_heads", "head_dim", "value_dim")
_NAMES = {"dtype": tuple(DTYPES), "phase": ("forward", "train")}


def show_offered(isa: str, as_json: bool) -> None:
    """Prints the schemes that are installed, and their options."""
    from attnbench.registry import SCHEMES
    from attnbench.sweep.parallel import offered

    show_kinds(SCHEMES.word, [(found, said, {}) for found, said in offered(isa)], as_json)


def show(found: "Found") -> None:
    """Prints a table for each problem, and why what is missing is."""
    from attnbench.report.across import lacking, problems
    from attnbench.report.tables.parallel import table_of

    for rows in problems(found.rows):
        table = table_of(rows)
        click.echo(f"\n{table.title}")
        if table.rows:
            print_table(table.columns, table.rows, pad_edge=False)
        for reason in lacking(rows):
            click.echo(f"no number: {reason}")


def _content(found: "Found") -> dict[str, Any]:
    return {"machine": found.machine, "rows": found.rows}


def _draw(found: "Found", kept: Kept) -> None:
    from attnbench.report.across import done, problems
    from attnbench.report.figures.parallel import parallel

    for number, rows in enumerate((each for each in map(done, problems(found.rows)) if each), 1):
        kept.draw(parallel(rows), "" if number == 1 else f"-{number}")
