"""`attnbench plugins`."""

from typing import TYPE_CHECKING

import click

from attnbench.commands.options import print_table, warn_of_packages
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
    from attnbench.devices.device import of
    from attnbench.registry import Request, find, select
    from attnbench.workers.ask import ask
    from attnbench.workers.messages import Failure
    from attnbench.workers.server import Forkserver

    warn_of_packages()
    found = find()
    chosen = [request.found for request in select(",".join(names), found)] if names else list(found.values())
    probe = Workload(seq=128, kv_seq=128, device=device, dtype=of(device).dtype)
    rows = []
    with Forkserver(1) as server:
        for plugin in chosen:
            facts = ["", "", "", f"not loaded; attnbench plugins {plugin.name}"]
            if names or plugin.distribution == "attnbench":
                answer = ask(server, Request(plugin), [probe])
                if isinstance(answer, Failure):
                    facts[-1] = f"{answer.status}: {answer.reason}"
                else:
                    options = "\n".join(_option(key, value) for key, value in answer.options.items())
                    fit = answer.instances[0].promises[0].unsupported or "yes"
                    facts = [answer.family, options, " ".join(answer.devices), fit]
            rows.append([plugin.name, *facts, plugin.origin])
    print_table(("plugin", "family", "options", "devices", f"here on {device}", "from"), rows, pad_edge=False)


def _option(name: str, option: "Choice") -> str:
    choices = "|".join(str(c) for c in option.choices)
    return f"{name}={option.default}  {choices and f'({choices}) '}{option.help}"
