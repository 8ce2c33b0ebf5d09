"""The door of a sweep: what was asked becomes a plan of cells, and a plan becomes a run on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby, zip_longest
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from attnbench.devices import machine
from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.records import ceilings
from attnbench.records.run import Run, identity, load, read_meta
from attnbench.records.schema import Row, key
from attnbench.registry import Request, find
from attnbench.sizes import Names, Sizes, Sweep
from attnbench.sweep import captures
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import choose, plan
from attnbench.sweep.precision import within
from attnbench.sweep.rounds import Progress
from attnbench.sweep.session import Session, Unwatched
from attnbench.sweep.settings import BUDGET, PRECISION, TIMEOUT, Asked, Settings
from attnbench.theory.roofline import Ceilings
from attnbench.workers.ask import ask_machine
from attnbench.workers.messages import Found
from attnbench.workers.server import Forkserver
from attnbench.workload import DEVICES

if TYPE_CHECKING:
    import pandas as pd

_OUTLOOK = 60.0  # seconds more, of which a run says what they would buy
_MEMORY_SHARE = 0.8  # of what is available


@dataclass(frozen=True)
class Plan:
    """All that a run will do, while the server that starts its workers is alive.

    asked: with device, dtype, memory, l2 and precision settled for this machine.
    cells: workload by workload, the baseline first.
    baseline: its canonical name, "" for none.
    facts: of the machine, for run.json: `device.describe`, and `unmeasured`, what of a row it can't tell, and why.
    """

    server: Forkserver
    asked: Asked
    cells: list[Cell]
    baseline: str
    facts: dict[str, Any]


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
    early = next(iter(DEVICES)) if asked.sweep.device == "auto" else asked.sweep.device
    # What is wrong whatever the machine is said before anything is started.
    captures.installed(_on(asked.sweep, early, "float32").workloads())
    requests, base = chosen or choose(asked.plugins, asked.baseline)
    with Forkserver(asked.sweep.threads, asked.isa) as server:
        found = ask_machine(server)
        device = device_of(asked.sweep.device, found.devices)
        choices, here = of(device).l2, found.devices[device]
        if asked.l2 and asked.l2 not in choices:
            able = " or ".join(name for name in DEVICES if of(name).l2)
            raise AttnbenchError(f"--l2 is for --device {able}: what the caches of {device} hold can't be chosen")
        settled = replace(
            asked,
            sweep=_on(asked.sweep, device, here.dtype),
            memory=asked.memory or int(_MEMORY_SHARE * here.free_bytes),
            l2=asked.l2 or next(iter(choices), None),
        )
        cells, baseline = plan(server, settled, requests, base)
        if ready:
            captures.capture(server, settled.sweep.workloads(), tell)
        if settled.precision is None:
            settled = replace(settled, precision=within(settled.budget, cells))
        yield Plan(server, settled, cells, baseline, found.machine | {"unmeasured": here.unmeasured})


def device_of(asked: str, devices: Mapping[str, Found]) -> str:
    """The device that is meant; "auto" is the last that is here, so the host where there is no other.

    Raises:
        AttnbenchError: there is none, and it was asked for.
    """
    here = [name for name in DEVICES if devices[name].missing is None]
    if asked != "auto" and asked not in here:
        raise AttnbenchError(f"--device {asked}: {devices[asked].missing}; use --device {' or '.join(here)}")
    return here[-1] if asked == "auto" else asked


def _on(sweep: Sweep, device: str, dtype: str) -> Sweep:
    """dtype: where none is asked for."""
    return replace(sweep, device=device, dtype=sweep.dtype or (dtype,))


def resumed(path: Path, budget: float | None = None, timeout: float | None = None, memory: int | None = None) -> Asked:
    """What a run on disk was asked for, with these changes.

    Raises:
        AttnbenchError: there is no run, it doesn't say, or a plugin is not of the version that it was begun with.
    """
    begun = read_meta(path)
    _check_same_plugins(path, begun.get("distributions", {}))
    old = Asked.from_dict(begun.get("args", {}))
    return replace(old, budget=budget or old.budget, timeout=timeout or old.timeout, memory=memory or old.memory)


def _check_same_plugins(path: Path, begun: Mapping[str, str]) -> None:
    """begun: for each plugin the package and version that brought it, to which the run's rows belong."""
    found = find()
    for name, before in begun.items():
        here = found[name].origin if name in found else "not installed"
        if here != before:
            raise AttnbenchError(
                f"{path} was begun with the plugin {name} from {before}, which is {here} here: "
                f"install {before} again, or start a new run"
            )


def meta(plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    """What run.json will say of a run that begins now."""
    sweep, known = plan.asked.sweep, _calibrated(plan)
    return {
        "command": list(command),
        "started": _now(),
        "finished": None,
        "args": plan.asked.as_dict(),
        "standard": sweep.standard,
        "machine": plan.facts,
        "distributions": {c.variant: c.distribution for c in plan.cells},
        "ceilings": known.as_dict() if known else None,
    }


def check_same_machine(run: Run, facts: dict[str, Any]) -> None:
    """Raises: AttnbenchError: it was begun on another machine or under other variables; numbers would not compare."""
    before, here = identity(run.meta.get("machine", {})), identity(facts)
    if before != here:
        different = next((a, b) for a, b in zip_longest(before, here, fillvalue="nothing set") if a != b)
        raise AttnbenchError(
            f"{run.path} was measured on another machine or with other variables set "
            f"({different[0]}, here {different[1]}): start a new run"
        )


def _calibrated(plan: Plan) -> Ceilings | None:
    """What this machine can do at best, where that was measured."""
    return ceilings.stored(plan.facts, plan.asked.sweep.device, plan.asked.sweep.threads)


def settings_here(plan: Plan) -> Settings:
    """How a session measures the plan by what this machine can do at best."""
    return settings_of(plan, _calibrated(plan))


def settings_of(plan: Plan, known: Ceilings | None) -> Settings:
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
        run.meta["finished"] = _now()
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Told(Unwatched):
    """Passes the rows of each workload on to a callback."""

    def __init__(self, callback: Callable[[Sequence[Row], float], object]) -> None:
        self._callback = callback

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None:
        self._callback(rows, seconds_left)

    again = rows


def run(
    plugins: str = "all",
    seq: Sizes | None = None,
    *,
    kv_seq: Sizes | None = None,
    batch: Sizes | None = None,
    tokens: int | None = None,
    heads: Sizes | None = None,
    kv_heads: Sizes | None = None,
    head_dim: Sizes | None = None,
    value_dim: Sizes | None = None,
    preset: str | None = None,
    dtype: Names | None = None,
    device: str = "auto",
    mask: Names | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: str | None = None,
    phase: Names | None = None,
    scope: str | None = None,
    block: str | None = None,
    norm: str | None = None,
    style: str | None = None,
    layers: Sizes | None = None,
    lengths: str | None = None,
    batch_spec: str | None = None,
    inputs: Names | None = None,
    baseline: str = "sdpa",
    seed: int | None = None,
    threads: int | None = None,
    precision: str | float = PRECISION,
    budget: float = BUDGET,
    timeout: float = TIMEOUT,
    l2: str | None = None,
    memory: str | int | None = None,
    isa: str = "auto",
    out: str | Path | None = None,
    progress: Callable[[Sequence[Row], float], object] | None = None,
) -> pd.DataFrame:
    """Measures attention variants over a sweep: `attnbench run` for a notebook or a script. It needs no main guard.

    Each argument is the option of that name, None its default; sizes may be numbers and lists.
    plugins: "all", names "a,b", patterns "block*", options "name:key=value", or "name:*" for each choice. seq, kv_seq:
    lengths, such as 1024, [512, 1000] or "512..16384", which doubles; batch, heads, kv_heads, head_dim, value_dim and
    layers likewise. tokens: of the whole batch at each length. preset: a model's sizes, or "standard". dtype, mask,
    phase: one name or several. scope: "attention", "block" or "all". block, norm, style: of it. scale, softcap,
    bias: of the scores. lengths: of a ragged batch. batch_spec: a server's, "q2k_8q1s1k", in the place of sizes.
    inputs: how drawn, or a model's layer, "smollm2:3". baseline: what speedups refer to, or "none". precision: at which
    half-width an interval has converged, or "auto": what the budget can be expected to buy half of the cells. budget,
    timeout: seconds for the sweep and for a cell. memory: what may be in use. isa: "avx2" for no more. out: the run's
    folder, not there yet, or None. progress: gets rows, and seconds left.

    Returns a row a cell, as `attnbench.load(out)` does: latency_s, speedup, peak_bytes, both errors, status and reason.

    Raises:
        AttnbenchError: something asked for is not to be had, said before anything is measured, or `out` can't be made.
    """
    given, began = {name: value for name, value in locals().items() if name not in ("out", "progress")}, monotonic()
    asked = Asked.of(**given)
    spelled = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    return _measured(asked, f"attnbench.run({spelled})", out, progress, began)


def _measured(
    asked: Asked,
    spelled: str,
    out: str | Path | None,
    progress: Callable[[Sequence[Row], float], object] | None,
    began: float,
) -> pd.DataFrame:
    """`run` of what was asked for; spelled: the call, for the record."""
    with ExitStack() as stack:
        ready = stack.enter_context(planned(asked))
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        record = stack.enter_context(Run.at(folder, meta(ready, [spelled])))
        measure(ready, record, _Told(progress) if progress else Unwatched(), began)
        return load(folder)
