"""`attnbench plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from attnbench.commands.options import print_table
from attnbench.workload import DEVICES, Workload

if TYPE_CHECKING:
    from attnbench.workers.messages import Choice


@click.command()
@click.argument("names", nargs=-1)
@click.option("--device", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
def command(names: tuple[str, ...], device: str) -> None:
    """List the variants installed, or show NAMES in full.

    Listing reads package metadata only. What a plugin says of itself is asked in a process of its own, for
    attnbench's own plugins and for those that NAMES asks for: loading a plugin runs its code.
    """
    from rich.table import Table

    from attnbench.devices.device import of
    from attnbench.registry import Request, find, select
    from attnbench.workers.ask import ask
    from attnbench.workers.messages import Failure
    from attnbench.workers.server import Forkserver

    found = find()
    chosen = [request.found for request in select(",".join(names), found)] if names else list(found.values())
    probe = Workload(seq=128, kv_seq=128, device=device, dtype=of(device).dtype)
    table = Table("plugin", "family", "options", "devices", f"here on {device}", "from", box=None, pad_edge=False)
    with Forkserver(1) as server:
        for plugin in chosen:
            if not names and plugin.distribution != "attnbench":
                table.add_row(plugin.name, "", "", "", f"not loaded; attnbench plugins {plugin.name}", plugin.origin)
                continue
            answer = ask(server, Request(plugin), [probe])
            if isinstance(answer, Failure):
                table.add_row(plugin.name, "", "", "", f"{answer.status}: {answer.reason}", plugin.origin)
                continue
            options = "\n".join(_option(key, value) for key, value in answer.options.items())
            fit = answer.instances[0].promises[0].unsupported or "yes"
            table.add_row(plugin.name, answer.family, options, " ".join(answer.devices), fit, plugin.origin)
    print_table(table)


def _option(name: str, option: Choice) -> str:
    choices = "|".join(str(c) for c in option.choices)
    return f"{name}={option.default}  {choices and f'({choices}) '}{option.help}"
