"""The nodes of a cluster that take part in a sweep: they come and go, and all have the same versions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnbench.errors import AttnbenchError
from attnbench.sweep import remote
from attnbench.sweep.on_ray import Cluster, Lost, Node
from attnbench.sweep.remote import Refused, Seen, Share
from attnbench.sweep.settings import Asked
from attnbench.workload import DEVICES

POLL_SECONDS = 1.0  # between looks at who came and went
_AGAIN_SECONDS = 3.0  # until a node that did not answer is looked at again
_LOOK_SECONDS = 60.0  # that a run waits at its begin for nodes that others keep busy


@dataclass(eq=False)
class Device:
    """What one task has to itself: the CPUs of a node, or a GPU of it. seen: once it was looked at."""

    node: Node
    share: Share
    gpus: int
    seen: Seen | None = None


def devices_of(node: Node, device: str, threads: int) -> list[Device]:
    """The node's, as tasks have them one at a time."""
    if DEVICES[device].host:
        return [Device(node, Share(node.cpus, node.memory, threads), 0)] if node.cpus else []
    cpus = node.cpus // node.gpus if node.gpus else 0
    return [Device(node, Share(cpus, node.memory // node.gpus, threads), 1) for _ in range(node.gpus)]


class Members:
    """Who takes part: every node that has the device, once it was looked at and found to be like most were at first."""

    def __init__(self, cluster: Cluster, asked: Asked, tell: Callable[[str], object]) -> None:
        self._cluster, self._tell = cluster, tell
        self._nodes: dict[str, list[Device]] = {}
        self._names: dict[str, str] = {}
        self._again: dict[Device, float] = {}
        """Those whose node did not answer, and when they are looked at again as long as it counts as alive."""
        self._looks: dict[Any, Device] = {}
        self._versions: Mapping[str, str] = {}
        self.asked = asked
        """With device and dtype settled by what the cluster has, once `first` has looked at it."""

    @property
    def ready(self) -> list[Device]:
        return [device for devices in self._nodes.values() for device in devices if device.seen]

    @property
    def looks(self) -> list[Any]:
        """Tasks of those that are looked at."""
        return list(self._looks)

    def first(self) -> list[Device]:
        """Looks at all nodes that there are; who has no room for that yet joins later.

        Raises:
            AttnbenchError: none is of use, and why.
        """
        self._settle(self._cluster.nodes())
        self.meet()
        found, end = list[tuple[Device, Seen | Refused]](), time.monotonic() + _LOOK_SECONDS
        while self._looks:
            found += [self._answer(task) for task in self._cluster.ended(self.looks, POLL_SECONDS)]
            if self._looks and time.monotonic() > end:
                if any(isinstance(each, Seen) for _, each in found):
                    break
                self._tell("waiting for a node: what they give out is taken by others, or they are slow to start")
                end += _LOOK_SECONDS
        versions = Counter(tuple(each.versions.items()) for _, each in found if isinstance(each, Seen))
        self._versions = dict(versions.most_common(1)[0][0]) if versions else {}
        refused = [(device, why) for device, each in found if (why := self._judge(device, each))]
        if not self.ready:  # for one reason, most likely: something that is asked for is not to be had
            raise AttnbenchError(refused[0][1])
        for device, why in refused:
            self._leave_out(device, why)
        sweep = self.asked.sweep
        dtypes = {device.seen.devices[sweep.device].dtype for device in self.ready if device.seen}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"  # where some don't multiply what others do
        self.asked = replace(self.asked, sweep=replace(sweep, dtype=sweep.dtype or (dtype,)))
        return self.ready

    def _settle(self, nodes: Sequence[Node]) -> None:
        """The device, by what nodes give out."""
        sweep = self.asked.sweep
        here = [name for name in DEVICES if any(devices_of(node, name, sweep.threads) for node in nodes)]
        if not here:
            raise AttnbenchError("--on ray: no node of the cluster gives out a CPU or a GPU")
        device = here[-1] if sweep.device == "auto" else sweep.device
        if device not in here:
            raise AttnbenchError(f"--device {device}: no node of the cluster gives one out; use --device {here[0]}")
        self.asked = replace(self.asked, sweep=replace(sweep, device=device))

    def meet(self) -> None:
        """Takes note of who came and who is gone; looks at those that are new."""
        alive = {node.id: node for node in self._cluster.nodes()}
        for gone in self._nodes.keys() - alive.keys():
            if self._nodes.pop(gone):
                self._tell(f"node {self._names[gone]} is gone")
        for node in alive.values():
            if node.id not in self._nodes:
                self._names[node.id] = node.name
                self._nodes[node.id] = devices_of(node, self.asked.sweep.device, self.asked.sweep.threads)
                for device in self._nodes[node.id]:
                    self.look(device)
        for device in [device for device, when in self._again.items() if when < time.monotonic()]:
            del self._again[device]
            if device.node.id in alive:
                self.look(device)

    def look(self, device: Device) -> None:
        """Looks at a device, which has no part until it answers."""
        device.seen = None
        given = (self.asked, device.share)
        task = self._cluster.send(remote.look, given, device.node, device.share.cpus, device.gpus)
        self._looks[task] = device

    def seen(self, task: Any) -> None:
        """A look has ended: the device takes part, or it is told why not."""
        device, found = self._answer(task)
        if (why := self._judge(device, found)) and device not in self._again:
            self._leave_out(device, why)

    def _leave_out(self, device: Device, why: str) -> None:
        self._tell(f"node {device.node.name} is left out: {why}")

    def _answer(self, task: Any) -> tuple[Device, Seen | Refused]:
        device = self._looks.pop(task)
        try:
            return device, self._cluster.result(task)
        except Lost as error:
            if not error.ran:
                self._again[device] = time.monotonic() + _AGAIN_SECONDS
            return device, Refused(str(error))

    def _judge(self, device: Device, found: Seen | Refused) -> str:
        """Why a device has no part; empty where it has one from now on."""
        why = found.why if isinstance(found, Refused) else self._unfit(found, device)
        if isinstance(found, Seen) and not why:
            device.seen = found
        return why

    def _unfit(self, found: Seen, device: Device) -> str:
        name = self.asked.sweep.device
        if missing := found.devices[name].missing:
            return missing
        cpus, threads = device.share.cpus, self.asked.sweep.threads
        if DEVICES[name].host and threads > cpus:
            return f"it gives out {cpus} CPU{'s' * (cpus > 1)}, and --threads asks for {threads}"
        for what, version in self._versions.items():
            if (there := found.versions.get(what)) != version:
                return f"{what} is {there or 'missing'} there, {version} on the other nodes"
        return ""
