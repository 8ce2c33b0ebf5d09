"""`attnbench plugins`."""

from typing import TYPE_CHECKING, Any

import click

from attnbench.commands.options import (
    ISA,
    JSON,
    faster_than_auto,
    print_json,
    print_table,
    tell,
    warn_of_packages,
    width,
)
from attnbench.workload import DEVICES, DTYPES, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.task.promise import Promise
    from attnbench.workers.kinds import Choice


@click.command()
@click.argument("names", nargs=-1)
@click.option("--device", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Asked about.  [default: as for run]")
@ISA
@JSON
def command(names: tuple[str, ...], device: str, dtype: str | None, isa: str, as_json: bool) -> None:
    """List the variants installed, or show NAMES with their options.

    Listing reads package metadata only. What a plugin says of itself is asked in a process of its own, for
    attnbench's own plugins and for those that NAMES asks for: loading a plugin runs its code.

    \b
    attnbench plugins            # what there is, and what would run here
    attnbench plugins int8       # its options
    """
    from attnbench.peers import PEERS
    from attnbench.registry import find, select

    warn_of_packages()
    found = find()
    chosen = [request.found for request in select(",".join(names), found)] if names else list(found.values())
    told = _told(chosen, device, dtype, isa, bool(names))
    if as_json:
        print_json({"device": device, "plugins": told})
        return
    heads = ("plugin", "family", f"here on {device}", "from")
    rows = [[each["plugin"], each["family"], each["here"], each["from"]] for each in told]
    print_table(heads, rows, pad_edge=False, within=width())
    if absent := [] if names else [name for name in PEERS if name not in found]:
        click.echo(f"\nnot installed: {len(absent)} peers, other libraries' attention; see attnbench peers")
    if faster := [line for each in told for line in each["faster"]]:
        click.echo("\n" + "\n".join(f"attnbench calibrate: {line}" for line in faster))
    for each in told if names else ():
        options = [
            (f"{o['name']}={o['default']}", "|".join(map(str, o["choices"])), o["help"]) for o in each["options"]
        ]
        click.echo(f"\n{each['plugin']}, for {' and '.join(each['devices']) or 'no device'}")
        if options:
            print_table(("option", "choices", "what it is"), options, pad_edge=False, within=width())


def _told(chosen: "Sequence[Any]", device: str, dtype: str | None, isa: str, load: bool) -> list[dict[str, Any]]:
    """What each says of itself. load: also those that are not attnbench's own."""
    from attnbench.devices.machine import default_threads
    from attnbench.records import ceilings
    from attnbench.registry import Request
    from attnbench.workers.ask import ask, ask_machine
    from attnbench.workers.messages import Failure
    from attnbench.workers.server import Forkserver

    told = []
    with Forkserver(1, isa) as server:
        machine = ask_machine(server)
        dtype = dtype or machine.devices[device].dtype
        checked = ceilings.checked(machine.machine, device, default_threads())
        same: dict[str, Any] = {"seq": 128, "kv_seq": 128, "device": device, "dtype": dtype}
        probes = [Workload(mask=mask, **same) for mask in ("causal", "full")]
        for plugin in chosen:
            facts: dict[str, Any] = {"plugin": plugin.name, "family": "", "here": "", "from": plugin.origin}
            facts |= {"devices": [], "options": [], "faster": []}
            facts["faster"] = [faster_than_auto(c) for c in checked if c.advice and c.variant == plugin.name]
            told.append(facts)
            if plugin.missing:
                facts["here"] = f"not installed: {plugin.missing}"
                continue
            if not load and plugin.distribution != "attnbench":
                facts["here"] = f"not loaded; attnbench plugins {plugin.name}"
                continue
            answer = ask(server, Request(plugin), probes)
            if isinstance(answer, Failure):
                facts["here"] = f"{answer.status}: {answer.reason}"
                continue
            here = _here(answer.instances[0].promises) + ("; a study: in a run where named" if answer.study else "")
            facts |= {"family": answer.family, "devices": list(answer.devices), "here": here}
            for said in answer.deprecated:
                tell(f"warning: {plugin.name}: {said}")
            facts["options"] = [_option(name, option) for name, option in answer.options.items()]
    return told


def _here(promises: "Sequence[Promise]") -> str:
    """causal, full: what a plugin says of both masks."""
    causal, full = promises
    if causal.unsupported:
        return causal.unsupported if full.unsupported else f"full mask only: {_runs(full)}"
    return f"{'causal mask only: ' if full.unsupported else ''}{_runs(causal)}"


def _runs(promise: "Promise") -> str:
    return f"{promise.runs or 'yes'}{' (emulated)' if promise.emulated else ''}"


def _option(name: str, option: "Choice") -> dict[str, Any]:
    return {"name": name, "default": option.default, "choices": list(option.choices), "help": option.help}
