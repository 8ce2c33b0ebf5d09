"""`attnbench calibrate`."""

import sys
from typing import TYPE_CHECKING, Any

import click

from attnbench.commands.options import (
    CELL_FAILED,
    DEVICE,
    ISA,
    JSON,
    THREADS,
    Seconds,
    faster_than_auto,
    option,
    print_json,
    print_table,
    tell,
    warn_of_packages,
    warn_of_pinning,
    warn_of_threads,
    width,
)
from attnbench.devices.machine import default_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.records.ceilings import Checked
    from attnbench.theory.roofline import Ceilings
    from attnbench.workers.messages import Facts
    from attnbench.workers.server import Forkserver


@click.command()
@DEVICE
@THREADS
@ISA
@option("--only", type=click.Choice(["ceilings", "auto"]), help="One of the two.  [default: both]")
@option("--seconds", type=Seconds(1, 1e5), default=120.0, help="For what impl=auto takes.")
@JSON
def command(device: str, threads: int | None, isa: str, only: str | None, seconds: float, as_json: bool) -> None:
    """Measure this machine's ceilings, and whether impl=auto takes the fastest of a variant's implementations.

    Ceilings are the fastest matrix products and reads. They are kept for later runs with this device, these threads and
    this --isa, whose report then tells how much of what is attainable each variant reached. Nothing else should run
    meanwhile: a disturbed calibration is not kept, with exit code 1.

    What impl=auto takes is timed by turns with each other implementation that can, on short and long sequences.
    Where another one is certainly faster by over 5%, its name is given, here and by attnbench plugins.

    \b
    attnbench calibrate              # once a machine; later runs know their ceilings
    attnbench calibrate --threads 1 --only ceilings
    attnbench calibrate --only auto --seconds 300
    """
    from attnbench.sweep.engine import device_of
    from attnbench.workers import ask
    from attnbench.workers.server import Forkserver

    threads = threads or default_threads()
    warn_of_packages()
    warn_of_threads(threads)
    told: dict[str, Any] = {}
    kept = True
    with Forkserver(threads, isa) as server:
        machine = ask.ask_machine(server)
        warn_of_pinning(threads, machine.machine)
        on = device_of(device, machine.devices)
        if only != "auto":
            tell("measuring, for less than a minute")
            found = ask.ask_ceilings(server, on, threads)
            kept = _keep(found, machine, as_json)
            told |= found.as_dict() | {"kept": kept}
        if only != "ceilings":
            told["auto"] = _check(server, machine, on, threads, seconds, as_json)
    if as_json:
        print_json(told)
    sys.exit(0 if kept else CELL_FAILED)


def _keep(found: "Ceilings", machine: "Facts", quiet: bool) -> bool:
    from attnbench.records import ceilings
    from attnbench.report import units
    from attnbench.theory import roofline

    rows = [(f"{name} products", units.rate(rate), found.at[name]) for name, rate in found.operations_per_s.items()]
    rows.append(("reading memory", f"{units.size(found.bytes_per_s)}/s", found.at["memory"]))
    if found.cache_bytes:
        rows.append(("last-level cache", units.size(found.cache_bytes), "as the machine says"))
    say = tell if quiet else click.echo
    if not quiet:
        print_table(("", "ceiling", "reached at"), rows, pad_edge=False)
    if found.disturbed > roofline.QUIET:
        say(
            f"not kept: others used {found.disturbed * found.threads:.1f} of the {units.count(found.threads, 'core')} "
            "meanwhile, so these are too low to judge by; calibrate again when the machine is quiet"
        )
        return False
    where = ceilings.store(found, machine.machine)
    say(f"kept for runs on {found.device} with {units.count(found.threads, 'thread')}: {where}")
    return True


def _check(
    server: "Forkserver", machine: "Facts", device: str, threads: int, seconds: float, quiet: bool
) -> list[dict[str, Any]]:
    from attnbench.advice import auto
    from attnbench.records import ceilings

    tell(f"timing what impl=auto takes beside what else can, for about {seconds:.0f} s")
    checked = auto.check(server, machine, device, threads, seconds, lambda variant: tell(f"  {variant}"))
    ceilings.store_checked(checked, machine.machine, device, threads)
    if not quiet:
        _print(checked)
    return [each.as_dict() for each in checked]


def _print(checked: "Sequence[Checked]") -> None:
    from attnbench.records.ceilings import LOSS
    from attnbench.report import units

    if not checked:
        click.echo("no variant has another implementation that can run here")
        return
    rows = [
        (
            *(each.variant, each.where, each.took, each.other or "-", each.fastest or "can't tell"),
            units.ratio(each.times, each.low, each.high) + ", disturbed" * each.disturbed if each.times else each.why,
        )
        for each in checked
    ]
    heads = ("variant", "on", "auto takes", "best other", "fastest", "the other, times as fast as auto")
    print_table(heads, rows, pad_edge=False, within=width())
    for each in checked:
        if each.advice:
            click.echo(f"  {faster_than_auto(each)}")
    slower, open_ = sum(bool(each.advice) for each in checked), sum(not each.fastest for each in checked)
    told = f"auto is certainly slower by over {LOSS - 1:.0%} in {slower} of {len(checked)} cases"
    click.echo(f"{told}, {open_} can't be told: a longer --seconds may" if open_ else told)
    if any(each.disturbed for each in checked):
        click.echo("disturbed: something else used the cores, so nothing is advised of these; try on a quiet machine")
