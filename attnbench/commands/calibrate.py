"""`attnbench calibrate`."""

import sys

import click

from attnbench.commands.options import (
    CELL_FAILED,
    DEVICE,
    ISA,
    JSON,
    THREADS,
    print_json,
    print_table,
    tell,
    warn_of_packages,
    warn_of_pinning,
    warn_of_threads,
)
from attnbench.devices.machine import default_threads


@click.command()
@DEVICE
@THREADS
@ISA
@JSON
def command(device: str, threads: int | None, isa: str, as_json: bool) -> None:
    """Measure this machine's ceilings: its fastest matrix products, and its fastest reads.

    They are kept for later runs with this device, these threads and this --isa, whose report then tells how much of
    what is attainable each variant reached. Nothing else should run meanwhile: a disturbed calibration is not kept,
    with exit code 1.

    \b
    attnbench calibrate              # once a machine; later runs know their ceilings
    attnbench calibrate --threads 1
    """
    from attnbench.records import ceilings
    from attnbench.report import units
    from attnbench.sweep.engine import device_of
    from attnbench.theory import roofline
    from attnbench.workers import ask
    from attnbench.workers.server import Forkserver

    threads = threads or default_threads()
    warn_of_packages()
    warn_of_threads(threads)
    with Forkserver(threads, isa) as server:
        machine = ask.ask_machine(server)
        warn_of_pinning(threads, machine.machine)
        facts, on = machine.machine, device_of(device, machine.devices)
        click.echo("measuring, for less than a minute", err=True)
        found = ask.ask_ceilings(server, on, threads)
    rows = [(f"{name} products", units.rate(rate), found.at[name]) for name, rate in found.operations_per_s.items()]
    rows.append(("reading memory", f"{units.size(found.bytes_per_s)}/s", found.at["memory"]))
    if found.cache_bytes:
        rows.append(("last-level cache", units.size(found.cache_bytes), "as the machine says"))
    say = tell if as_json else click.echo
    if as_json:
        print_json(found.as_dict() | {"kept": found.disturbed <= roofline.QUIET})
    else:
        print_table(("", "ceiling", "reached at"), rows, pad_edge=False)
    if found.disturbed > roofline.QUIET:
        say(
            f"not kept: others used {found.disturbed * threads:.1f} of the {units.count(threads, 'core')} meanwhile, "
            "so these are too low to judge by; calibrate again when the machine is quiet"
        )
        sys.exit(CELL_FAILED)
    where = ceilings.store(found, facts)
    say(f"kept for runs on {found.device} with {units.count(threads, 'thread')}: {where}")
