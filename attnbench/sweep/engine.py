"""The door of a sweep: what was asked becomes a plan of cells, and a plan becomes a run on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby, zip_longest
from pathlib import Path
from time import monotonic
from typing import Any

from attnbench.devices import machine
from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.records import ceilings
from attnbench.records.machines import identity, name_of
from attnbench.records.run import Run, read_meta
from attnbench.records.schema import Row, key
from attnbench.registry import Request, find
from attnbench.sizes import Sweep
from attnbench.sweep import captures
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import choose, plan
from attnbench.sweep.precision import within
from attnbench.sweep.rounds import Progress
from attnbench.sweep.session import Session
from attnbench.sweep.settings import Asked, Settings
from attnbench.theory.roofline import Ceilings
from attnbench.workers.ask import ask_machine
from attnbench.workers.messages import Facts, Found
from attnbench.workers.server import Forkserver
from attnbench.workload import DEVICES, Workload

_OUTLOOK = 60.0  # seconds more, of which a run says what they would buy
MEMORY_SHARE = 0.8  # of what is available


@dataclass(frozen=True)
class Planned:
    """All that a run will do.

    asked: with device, dtype, memory, l2 and precision settled for this machine.
    cells: workload by workload, the baseline first.
    baseline: its canonical name, "" for none.
    facts: of the machine, for run.json: `device.describe`, and `unmeasured`, what of a row it can't tell, and why.
    """

    asked: Asked
    cells: list[Cell]
    baseline: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plan(Planned):
    """On this machine, while the server that starts its workers is alive."""

    server: Forkserver


@contextmanager
def planned(
    asked: Asked,
    chosen: tuple[Sequence[Request], Request | None] | None = None,
    tell: Callable[[str], object] = lambda line: None,
    ready: bool = True,
) -> Iterator[Plan]:
    """Asks the machine and every plugin; nothing is measured.

    chosen: the plugins and the baseline, in place of those that `asked` names; see `plan.choose`.
    tell: is told what will take a while. ready: whether a model's activations that are asked for are captured.

    Raises:
        AttnbenchError: a size, a plugin, an option or the device is not to be had.
    """
    captures.installed(early(asked.sweep))
    chosen = chosen or choose(asked.plugins, asked.baseline)
    with Forkserver(asked.sweep.threads, asked.isa) as server:
        yield planned_by(server, asked, ask_machine(server), chosen, tell, ready)


def early(sweep: Sweep) -> list[Workload]:
    """The workloads, but for what the machine decides: what is wrong on all of them is said before anything is started.

    Raises:
        AttnbenchError: a combination of sizes is no workload.
    """
    device = next(iter(DEVICES)) if sweep.device == "auto" else sweep.device
    return on(replace(sweep, threads=sweep.threads or 1), device, "float32").workloads()


def planned_by(
    server: Forkserver,
    asked: Asked,
    found: Facts,
    chosen: tuple[Sequence[Request], Request | None],
    tell: Callable[[str], object] = lambda line: None,
    ready: bool = True,
) -> Plan:
    """`planned` with a server that is there. found: what it says of this machine."""
    device = device_of(asked.sweep.device, found.devices)
    choices, here = of(device).l2, found.devices[device]
    if asked.l2 and asked.l2 not in choices:
        able = " or ".join(name for name in DEVICES if of(name).l2)
        raise AttnbenchError(f"--l2 is for --device {able}: what the caches of {device} hold can't be chosen")
    settled = replace(
        asked,
        sweep=on(asked.sweep, device, here.dtype),
        memory=asked.memory or int(MEMORY_SHARE * here.free_bytes),
        l2=asked.l2 or next(iter(choices), None),
    )
    cells, baseline = plan(server, settled, *chosen)
    if ready:
        captures.capture(server, settled.sweep.workloads(), tell)
    if settled.precision is None:
        settled = replace(settled, precision=within(settled.budget, cells))
    return Plan(settled, cells, baseline, found.machine | {"unmeasured": here.unmeasured}, server)


def device_of(asked: str, devices: Mapping[str, Found]) -> str:
    """The device that is meant; "auto" is the last that is here, so the host where there is no other.

    Raises:
        AttnbenchError: there is none, and it was asked for.
    """
    here = [name for name in DEVICES if devices[name].missing is None]
    if asked != "auto" and asked not in here:
        raise AttnbenchError(f"--device {asked}: {devices[asked].missing}; use --device {' or '.join(here)}")
    return here[-1] if asked == "auto" else asked


def on(sweep: Sweep, device: str, dtype: str) -> Sweep:
    """The sweep on a device. dtype: where none is asked for."""
    return replace(sweep, device=device, dtype=sweep.dtype or (dtype,))


def resumed(
    path: Path,
    budget: float | None = None,
    timeout: float | None = None,
    memory: int | None = None,
    on: str | None = None,
) -> Asked:
    """What a run on disk was asked for, with these changes. on: a cluster, which says itself what it has.

    Raises:
        AttnbenchError: there is no run, it doesn't say, it was begun on a cluster and is to go on without, or a plugin
            is of another version than it was begun with.
    """
    begun = read_meta(path)
    old = Asked.from_dict(begun.get("args", {}))
    if not on:
        if cluster := begun.get("on"):
            raise AttnbenchError(f"{path} was begun on a cluster: go on with --resume {path} --on {cluster}")
        check_same_plugins(Run(path, begun), {name: found.origin for name, found in find().items()})
    return replace(old, budget=budget or old.budget, timeout=timeout or old.timeout, memory=memory or old.memory)


def check_same_plugins(run: Run, found: Mapping[str, str]) -> None:
    """found: the package and version that brings each plugin now; the run's rows belong to those it was begun with.

    Raises:
        AttnbenchError: one is another.
    """
    for name, before in run.meta.get("distributions", {}).items():
        if (here := found.get(name, "not installed")) != before:
            raise AttnbenchError(
                f"{run.path} was begun with the plugin {name} from {before}, which is {here} here: "
                f"install {before} again, or start a new run"
            )


def meta(plan: Planned, command: Sequence[str]) -> dict[str, Any]:
    """What run.json will say of a run that begins now on this machine."""
    return meta_of(plan, command, _calibrated(plan))


def meta_of(plan: Planned, command: Sequence[str], known: Ceilings | None) -> dict[str, Any]:
    """The same. known: what the machine can do at best."""
    return {
        "command": list(command),
        "started": now(),
        "finished": None,
        "args": plan.asked.as_dict(),
        "standard": plan.asked.sweep.standard,
        "machine": plan.facts,
        "distributions": {c.variant: c.distribution for c in plan.cells},
        "ceilings": known.as_dict() if known else None,
    }


def check_same(plan: Planned, run: Run) -> None:
    """Raises: AttnbenchError: it was begun on another machine or under other variables; numbers would not compare."""
    before, here = identity(run.meta.get("machine", {})), identity(plan.facts)
    if before != here:
        different = next((a, b) for a, b in zip_longest(before, here, fillvalue="nothing set") if a != b)
        raise AttnbenchError(
            f"{run.path} was measured on another machine or with other variables set "
            f"({different[0]}, here {different[1]}): start a new run"
        )


def _calibrated(plan: Planned) -> Ceilings | None:
    """What this machine can do at best, where that was measured."""
    return ceilings.stored(plan.facts, plan.asked.sweep.device, plan.asked.sweep.threads)


def settings_here(plan: Planned) -> Settings:
    """How a session measures the plan by what this machine can do at best."""
    return settings_of(plan, _calibrated(plan))


def settings_of(plan: Planned, known: Ceilings | None) -> Settings:
    """How a session measures the plan. known: what its machine can do at best."""
    asked = plan.asked
    assert asked.memory is not None
    assert asked.precision is not None
    return Settings(
        baseline=plan.baseline,
        precision=asked.precision,
        budget=asked.budget,
        timeout=asked.timeout,
        memory=asked.memory,
        seed=asked.sweep.seed,
        ceilings=known,
        l2=asked.l2 or "",
        isa=asked.isa,
        reuse=of(asked.sweep.device).reuses,
        at_once=plan.facts["threads_at_once"],
        machine=name_of(plan.facts),
    )


def measure(plan: Plan, run: Run, progress: Progress, began: float) -> list[Row]:
    """Measures what the run, which is open, does not hold yet and returns all its rows.

    began: monotonic seconds at which the command started; wall time counts from there.
    """
    rows = run.repair()
    done = {key(row)[1] for row in rows}
    todo = [c for _, g in groupby(plan.cells, key=lambda c: c.workload) for c in g if c.workload not in done]
    session = Session(plan.server, settings_of(plan, Ceilings.from_dict(run.meta.get("ceilings"))))
    before = run.meta.get("seconds") or {}
    try:
        session.run(todo, run, progress)
        run.meta["finished"] = now()
    except BaseException:
        with suppress(AttnbenchError):  # what ended the run matters more than that this can't be written either
            _account(run, session, before, began)
        raise
    run.meta["outlook"] = {"seconds": _OUTLOOK, "workloads": session.outlook(_OUTLOOK)}
    _account(run, session, before, began)
    return run.settle()


def _account(run: Run, session: Session, before: Mapping[str, float], began: float) -> None:
    """Adds where this command's wall time went to what earlier ones of the run took."""
    wall = monotonic() - began
    spent = {"wall": wall, "calls": session.seconds.calls, "compilation": session.seconds.compilation}
    total = {k: round((before.get(k) or 0.0) + v, 3) for k, v in spent.items()}
    run.meta["seconds"] = total | {"elsewhere": round(total["wall"] - total["calls"] - total["compilation"], 3)}
    run.meta["machine"]["load_end"] = machine.load()
    run.save()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
