"""The part of `attnbench theory` that holds its formulas against what `attnbench parallel` measured."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from attnbench.commands.options import print_json, print_table, width
from attnbench.errors import AttnbenchError

if TYPE_CHECKING:
    from attnbench.theory.measured import Against


def show(folder: Path, as_json: bool) -> None:
    """Prints, for each scheme and number of processes, what was measured and what was predicted.

    Raises:
        AttnbenchError: the folder can't be read, or holds nothing that a formula is known for.
    """
    from attnbench.devices.machine import usable_cores
    from attnbench.records import ceilings
    from attnbench.records.judged import PARALLEL
    from attnbench.theory import measured

    run = PARALLEL.read(folder)
    rows, machine = run["rows"], run["machine"]
    cores = machine.get("usable_threads") or usable_cores()
    threads = dict.fromkeys([cores, *(row["threads"] for row in rows)])
    stored = (ceilings.stored(machine, device, n) for device in {row["device"] for row in rows} for n in threads)
    known = next(filter(None, stored), None)
    found = measured.against(rows, known, cores)
    if not found:
        raise AttnbenchError(f"{folder} has no finished row of a scheme that a formula is known for")
    if as_json:
        print_json({"rows": [asdict(each) | {"workload": each.workload.as_dict()} for each in found]})
        return
    for label, group in groupby(found, key=lambda each: each.workload.label()):
        click.echo(f"{label}, {cores} cores")
        _table([*group])
    if known is None:
        click.echo("The ceilings of that machine are not known here; attnbench calibrate measures them there.")
    click.echo(
        "Sent, peak memory: of each process in a call, and how far off the formula it is; that knows no kernel's "
        "workspace.\nAt least: at the machine's ceilings. Expected: where processes compute as sdpa in one did, each "
        "with\nits share of the cores, and send at the rate measured between them."
    )


def _table(found: "Sequence[Against]") -> None:
    from attnbench.report import units

    def size(measured: float | None, predicted: float, digits: str) -> str:
        off = f", {measured / predicted - 1:+{digits}}" if measured and predicted else ""
        return units.size(measured) + off

    rows = [
        [
            *(each.scheme, str(each.world)),
            size(each.sent_bytes, each.predicted_sent_bytes, ".2%"),
            size(each.peak_bytes, each.predicted_peak_bytes, ".0%"),
            *map(units.seconds, (each.latency_s, each.least_s, each.expected_s)),
            units.ratio(each.latency_s / each.expected_s if each.expected_s else None),
        ]
        for each in found
    ]
    heads = ("scheme", "processes", "sent", "peak memory", "time", "at least", "expected", "time over expected")
    print_table(heads, rows, pad_edge=False, within=max(width(), 110))
