"""What a task of a sweep on a cluster does on its node: what is done on one machine, for one workload.

Nothing here knows the cluster: tasks are these functions, called in a process that is kept from one to the next.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from attnbench.devices.device import of
from attnbench.devices.machine import default_threads
from attnbench.errors import AttnbenchError
from attnbench.records import ceilings
from attnbench.records.schema import Row
from attnbench.sweep import captures, engine
from attnbench.sweep.plan import choose
from attnbench.sweep.rounds import Known
from attnbench.sweep.session import Session, Unwatched
from attnbench.sweep.settings import Asked
from attnbench.theory.roofline import Ceilings
from attnbench.workers.ask import ask_machine
from attnbench.workers.messages import Facts, Found
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

_OF_CLUSTER = "thirdparty_files"  # where Ray keeps packages of its own, which it puts before all others

_LEAST_SECONDS = 0.1  # of a budget of which planning here took all


@dataclass(frozen=True)
class Share:
    """Of a node, what one task has. cpus, memory (bytes): as the cluster counts. threads: asked for, 0 for all."""

    cpus: int
    memory: int
    threads: int = 0

    def take(self) -> int:
        """Threads that a workload computes with here."""
        return self.threads or max(1, min(self.cpus, default_threads()))


@dataclass(frozen=True)
class Refused:
    """Why nothing was done, in a line for whoever asked."""

    why: str


@dataclass(frozen=True)
class Seen:
    """A node as it is before anything is planned for it.

    versions: of what must be the same on all nodes, by what it is called. ceilings: what the machine can do at best.
    """

    facts: Mapping[str, Any]
    devices: Mapping[str, Found]
    versions: Mapping[str, str]
    ceilings: Ceilings | None = None


@dataclass(frozen=True)
class Job:
    """One workload, with the node's threads. budget: seconds for it, of `whole` for the run. share: of the node."""

    asked: Asked
    workload: Workload
    budget: float
    whole: float
    share: Share


@dataclass(frozen=True)
class Done:
    """rows: of all variants. Seconds: took in all, and of that in calls and in compilation."""

    rows: list[Row]
    took: float
    calls: float
    compilation: float


@dataclass
class _House:
    """What a process keeps from task to task. key: what it is of use for."""

    server: Forkserver
    facts: Facts
    key: tuple[Any, ...]
    plans: dict[Asked, engine.Plan] = field(default_factory=dict)
    known: Known = field(default_factory=Known)


_houses: list[_House] = []


def _house(asked: Asked, threads: int) -> _House:
    """This process's, made anew where it has none or one of another kind."""
    key = (threads, asked.isa, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if _houses and _houses[0].key == key:
        return _houses[0]
    for old in _houses:
        old.server.close()
    _houses.clear()
    # Workers would take packages of the cluster's, in its versions, for those that are installed.
    sys.path[:] = [path for path in sys.path if Path(path).name != _OF_CLUSTER]
    server = Forkserver(threads, asked.isa)
    try:
        _houses.append(_House(server, ask_machine(server), key))
    except BaseException:
        server.close()
        raise
    return _houses[0]


def look(asked: Asked, share: Share) -> Seen | Refused:
    """What this node is. asked: with its device settled."""
    try:
        requests, base = choose(asked.plugins, asked.baseline)
        threads = share.take()
        house = _house(asked, threads)
    except AttnbenchError as error:
        return Refused(str(error))
    device = asked.sweep.device
    facts = house.facts.machine | {"unmeasured": house.facts.devices[device].unmeasured}
    git = facts.get("git")
    versions = {
        "attnbench": metadata.version("attnbench") + (f" ({git})" if git else ""),
        **{f"the plugin {r.found.name}": r.found.origin for r in [*requests, *([base] if base else [])]},
        **{name: version for name, version in facts["libraries"].items() if name == "torch"},
    }
    return Seen(facts, house.facts.devices, versions, ceilings.stored(facts, device, threads))


def _planned(asked: Asked, share: Share, ready: bool = True) -> tuple[_House, engine.Plan]:
    """asked: with its device and dtype settled. ready: see `engine.planned`."""
    threads = share.take()
    house = _house(asked, threads)
    key = replace(asked, precision=None)  # which the first plan of all settles for the rest
    if key not in house.plans:
        house.plans.clear()
        captures.installed(engine.early(asked.sweep))
        here = replace(asked, sweep=replace(asked.sweep, threads=threads))
        chosen = choose(asked.plugins, asked.baseline)
        plan = engine.planned_by(house.server, here, house.facts, chosen, ready=ready)
        if asked.memory is None and share.memory and of(here.sweep.device).limits_process:
            most = min(plan.asked.memory or 0, int(engine.MEMORY_SHARE * share.memory))
            plan = replace(plan, asked=replace(plan.asked, memory=most))
        house.plans[key] = plan
    return house, house.plans[key]


def plan(asked: Asked, share: Share, ready: bool) -> engine.Planned | Refused:
    """What would be measured here, all of it. ready: see `engine.planned`."""
    try:
        _, found = _planned(asked, share, ready)
    except AttnbenchError as error:
        return Refused(str(error))
    return engine.Planned(found.asked, found.cells, found.baseline, dict(found.facts))


def measure(job: Job) -> Done | Refused:
    """The rows of one workload, measured here and now."""
    began = time.monotonic()
    try:
        house, plan = _planned(job.asked, job.share)
        workload = job.workload.replace(threads=house.server.threads)
        cells = [replace(cell) for cell in plan.cells if cell.workload == workload]
        left = max(_LEAST_SECONDS, job.budget - (time.monotonic() - began))
        settings = replace(engine.settings_here(plan), budget=left, part=left / job.whole)
        settings = replace(settings, precision=job.asked.precision or settings.precision)
        session = Session(house.server, settings, known=house.known)
        kept = _Kept()
        session.run(cells, kept, Unwatched())
    except AttnbenchError as error:
        return Refused(str(error))
    took = time.monotonic() - began
    return Done(kept.rows, took, session.seconds.calls, session.seconds.compilation)


class _Kept:
    """The newest rows of the one workload."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def append(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
