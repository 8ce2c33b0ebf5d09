"""The part of `attnbench theory` that shares one attention out among devices. Nothing is run."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from attnbench.commands.options import print_json, print_table, width
from attnbench.errors import AttnbenchError
from attnbench.sizes import as_names, parse_rate, parse_sizes
from attnbench.theory import costs, parallel
from attnbench.theory.parallel import Device, Prediction
from attnbench.workload import Workload

if TYPE_CHECKING:
    from attnbench.theory.roofline import Ceilings

USUAL = ("ring", "ulysses", "tensor-parallel", "all-gather")
SCHEMES = (*USUAL, "ring-contiguous", "torch-ring")
_RATES = {"peak": "989TFLOP/s", "bandwidth": "3.35TB/s", "link": "450GB/s"}


def show(workload: Workload, devices: str, schemes: str, rates: dict[str, str | None], as_json: bool) -> None:
    """Prints what each scheme takes on each number of devices.

    rates: "peak", "bandwidth" and "link" as they were given; what is None is taken from this machine's ceilings.

    Raises:
        AttnbenchError: devices or rates are malformed, or a rate is neither given nor known; a scheme is unknown.
    """
    worlds, names = parse_sizes(devices, "devices"), as_names(schemes, "schemes", SCHEMES) or USUAL
    device = _device(workload, rates)
    found = [
        parallel.predict(name, workload, world, device)
        for world, name in product(worlds, names)
        if not parallel.unsupported(name, workload, world)
    ]
    refused = _refused(workload, worlds, names)
    if not found:
        raise AttnbenchError(refused[0]["reason"])
    fastest = {world: min(_at(found, world), key=lambda p: p.time_s, default=None) for world in worlds}
    marked = [asdict(p) | {"fastest": p is fastest[p.devices]} for p in found]
    if as_json:
        print_json({"workload": workload.as_dict(), "device": asdict(device), "rows": marked, "refused": refused})
        return
    _table(workload, device, marked)
    for each in refused:
        names, worlds = each["schemes"], each["devices"]
        click.echo(f"not {' and '.join(names)} on {', '.join(map(str, worlds))} devices: {each['reason']}")


def _refused(workload: Workload, worlds: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """What can't be, by reason: schemes that can't be on the same numbers of devices stand together."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for name in names:
        why = {world: reason for world in worlds if (reason := parallel.unsupported(name, workload, world))}
        if why:
            first = {"schemes": [], "devices": [*why], "reason": next(iter(why.values()))}
            found.setdefault(tuple(why), first)["schemes"].append(name)
    return [*found.values()]


def _at(found: Sequence[Prediction], world: int) -> list[Prediction]:
    return [p for p in found if p.devices == world]


def _table(workload: Workload, device: Device, rows: Sequence[dict[str, Any]]) -> None:
    from attnbench.report import units

    operations, alone = costs.flops(workload), parallel.compute_s("whole", workload, 1, device)
    click.echo(
        f"{workload.label()}: {units.rate(operations).removesuffix('/s')}, which one device does in "
        f"{units.seconds(alone)}\neach device: {units.rate(device.flops_per_s)}, reads {_rate(device.bytes_per_s)}, "
        f"sends {_rate(device.link_bytes_per_s)} while it receives as much"
    )
    shown = [
        [
            *(str(row["devices"]), row["scheme"], units.seconds(row["time_s"]), units.seconds(row["waits_s"])),
            *(units.size(row["sent_bytes"]), units.size(row["peak_bytes"]), _tokens(row["link_bound_below"])),
            *(f"{row['efficiency']:.0%}", "fastest" if row["fastest"] else ""),
        ]
        for row in rows
    ]
    heads = ("devices", "scheme", "time", "waits for link", "sends", "peak memory", "link-bound below", "efficiency")
    print_table((*heads, ""), shown, pad_edge=False, within=max(width(), 120))
    click.echo(
        "By formula, the least that can be: no latency of messages, products at their peak. Sent and held: by each "
        "device.\nLink-bound: a step's message takes longer than its products. Efficiency: against one device."
    )


def _rate(bytes_per_s: float) -> str:
    """ "450 GB/s": links and memories are sold by powers of ten."""
    for factor, unit in ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")):
        if bytes_per_s >= factor:
            return f"{bytes_per_s / factor:.3g} {unit}"
    return f"{bytes_per_s:.3g} B/s"


def _tokens(length: float) -> str:
    return f"{length:,.0f}" if length else "-"


def _device(workload: Workload, rates: dict[str, str | None]) -> Device:
    """Of these rates; a peak and a bandwidth that were not given are this machine's."""
    from attnbench.report import units

    found = {name: parse_rate(text, name, example=_RATES[name]) for name, text in rates.items() if text}
    if not {"peak", "bandwidth"} <= found.keys():
        found = _here(workload) | found
    if missing := [name for name in _RATES if name not in found]:
        example = " ".join(f"--{name} {_RATES[name]}" for name in missing)
        known = missing != ["link"]
        raise AttnbenchError(
            f"a device's {units.listed(missing)} {'is' if len(missing) == 1 else 'are'} not known: give {example}"
            + ("; attnbench calibrate measures this machine's peak and bandwidth" if known else "")
        )
    return Device(found["peak"], found["bandwidth"], found["link"])


def _here(workload: Workload) -> dict[str, float]:
    """This machine's rates, where attnbench calibrate has measured them."""
    found = _ceilings()
    rate = found.of(workload.replace(device=found.device, threads=found.threads), quantized=False) if found else None
    return {"peak": rate[1], "bandwidth": found.bytes_per_s} if found and rate else {}


def _ceilings() -> "Ceilings | None":
    from attnbench.devices.machine import default_threads
    from attnbench.records import ceilings
    from attnbench.sweep.engine import device_of
    from attnbench.workers.ask import ask_machine
    from attnbench.workers.server import Forkserver

    with Forkserver(default_threads()) as server:
        facts = ask_machine(server)
    return ceilings.stored(facts.machine, device_of("auto", facts.devices), default_threads())
