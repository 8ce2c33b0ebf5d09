"""What a plugin says of a workload before anything is built: whether it can, and what it will need."""

from __future__ import annotations

from dataclasses import dataclass

from attnbench.plugin import Choice, Plugin, lacking
from attnbench.theory import costs
from attnbench.workload import PHASES, Workload


@dataclass(frozen=True)
class Promise:
    """A plugin's answer for one workload.

    unsupported: why it can't, None where it can. workspace: bytes beside inputs and output, None if unknown.
    flops: operations as it counts them, those of a block around it included.
    runs: which of its implementations, and why not a better one; empty where it has only one. emulated: as it says.
    chosen, choices: that implementation's name, and those of all that `impl=auto` looks at, in its order.
    """

    unsupported: str | None
    workspace: int | None = None
    flops: int = 0
    runs: str = ""
    emulated: bool = False
    chosen: str = ""
    choices: tuple[str, ...] = ()


def promise(plugin: Plugin, workload: Workload) -> Promise:
    """What the plugin says of all attention problems of a workload. Runs its `supports`, `workspace_bytes`, `flops`."""
    parts = [entry for part in costs.attentions(workload).values() for entry in part.entries()]
    for part in dict.fromkeys(parts):
        if reason := refusal(plugin, part):
            return Promise(reason)
    workspaces = [plugin.workspace_bytes(part) for part in parts]
    passes = costs.passes(workload)  # a plugin counts its forward pass
    own = [costs.flops(part) if (f := plugin.flops(part)) is None else passes * f for part in parts]
    others = costs.flops(workload) - workload.layers * sum(map(costs.flops, parts))
    return Promise(
        None,
        None if None in workspaces else max(int(w) for w in workspaces if w is not None),
        int(others + workload.layers * sum(own)),
        ", ".join(dict.fromkeys(_runs(plugin, part) for part in parts)),
        any(bool(plugin.emulated(part)) for part in parts),
        *_choices(plugin, parts[0]),
    )


def _runs(plugin: Plugin, part: Workload) -> str:
    if not isinstance(plugin, Choice):
        return ""
    chosen, why = plugin.chosen(part)
    return f"{chosen.name} ({why})" if chosen and why else chosen.name if chosen else ""


def _choices(plugin: Plugin, part: Workload) -> tuple[str, tuple[str, ...]]:
    if not isinstance(plugin, Choice):
        return "", ()
    chosen, _ = plugin.chosen(part)
    return chosen.name if chosen else "", tuple(each.name for each in plugin.implementations(part))


def refusal(plugin: Plugin, part: Workload) -> str | None:
    """Why a plugin does not do one attention problem."""
    if part.device not in plugin.devices:
        return f"runs on {' and '.join(plugin.devices) or 'no device'} only"
    if part.phase not in plugin.phases:
        return PHASES[part.phase].without or f"it has no phase {part.phase}"
    if not isinstance(plugin, Choice) and (reason := lacking(part, plugin.honours)):
        return reason  # each implementation of a choice has its own
    reason = plugin.supports(part)
    return str(reason) if reason else None
