"""From what was asked to cells, and from cells to a run on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import groupby
from time import monotonic
from typing import Any

from attnbench.bench import machine
from attnbench.bench.channel import Message
from attnbench.bench.forkserver import Forkserver
from attnbench.bench.plan import Cell, ask, cells_of
from attnbench.bench.session import Progress, Session, Settings
from attnbench.errors import AttnbenchError
from attnbench.records import Row, Run, key
from attnbench.registry import Request, find, select
from attnbench.roofline import Ceilings
from attnbench.workload import Sweep

_MEMORY_SHARE = 0.8  # of what is available


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that a run was asked for; `run.json` keeps it, so that a resumed run asks the same."""

    plugins: str
    baseline: str
    sweep: Sweep
    precision: float
    budget: float
    timeout: float
    memory: int
    l2: str = "kept"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Asked:
        """The inverse of `as_dict`, from JSON.

        Raises:
            AttnbenchError: something is missing.
        """
        try:
            sweep: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["sweep"].items()}
            rest = {f.name: values[f.name] for f in fields(cls) if f.name not in ("sweep", "l2")}
            return cls(sweep=Sweep(**sweep), l2=values.get("l2", "kept"), **rest)  # runs from before GPUs have none
        except (KeyError, TypeError, AttributeError):
            raise AttnbenchError("run.json does not say what the run was asked for; start a new run") from None


def ask_machine(server: Forkserver) -> Message:
    """The facts of this machine, from a worker: what asks for the GPU should not live on here."""
    worker = server.start()
    try:
        return worker.request({"op": "machine"}, 120)
    finally:
        worker.end()


def memory_limit(facts: Message, device: str) -> int:
    """Bytes a run may use where nothing else is asked for."""
    free = int(facts["gpu_free_bytes"]) if device == "cuda" else machine.available_memory()
    return int(_MEMORY_SHARE * free)


def choose(plugins: str, baseline: str) -> tuple[list[Request], Request | None]:
    """The plugins asked for and the baseline (None for "none"), by metadata alone.

    Raises:
        AttnbenchError: a name is unknown, or the baseline is not one plugin.
    """
    found = find()
    requests = select(plugins, found)
    if baseline == "none":
        return requests, None
    base = select(baseline, found)
    if len(base) != 1 or base[0].every:
        raise AttnbenchError(f"--baseline {baseline!r} must name one plugin")
    return requests, base[0]


def plan(server: Forkserver, asked: Asked) -> tuple[list[Cell], str]:
    """All cells, workload by workload with the baseline first, and the baseline's canonical name ("" for none).

    Raises:
        AttnbenchError: a plugin, an option or a combination of sizes is not to be had.
    """
    workloads = asked.sweep.workloads()
    requests, base = choose(asked.plugins, asked.baseline)
    limit = asked.memory if asked.sweep.device == "cpu" else None  # CUDA maps far more than it uses
    base_cells = list(cells_of(base, ask(server, base, workloads, limit), workloads)) if base else []
    cells = [c for r in requests for c in cells_of(r, ask(server, r, workloads, limit), workloads)]
    unique: dict[tuple[str, Any], Cell] = {}
    for cell in [*base_cells, *cells]:
        unique.setdefault((cell.plugin, cell.workload), cell)
    order = {w: i for i, w in enumerate(workloads)}
    return sorted(unique.values(), key=lambda c: order[c.workload]), base_cells[0].plugin if base_cells else ""


def execute(
    server: Forkserver,
    run: Run,
    asked: Asked,
    cells: Sequence[Cell],
    baseline: str,
    progress: Progress,
    began: float,
) -> list[Row]:
    """Measures what the run does not hold yet and returns all its rows.

    began: monotonic seconds at which the command started; wall time counts from there.
    """
    rows = run.repair()
    done = {key(row)[1] for row in rows}
    todo = [c for _, g in groupby(cells, key=lambda c: c.workload) for c in g if c.workload not in done]
    settings = Settings(
        baseline=baseline,
        precision=asked.precision,
        budget=asked.budget,
        timeout=asked.timeout,
        memory=asked.memory,
        seed=asked.sweep.seed,
        ceilings=Ceilings.from_dict(run.meta.get("ceilings")),
        l2=asked.l2,
        reuse=asked.sweep.device == "cuda",
    )
    session = Session(server, settings)
    before = run.meta.get("seconds", {})
    try:
        session.run(todo, run, progress)
        run.meta["finished"] = now()
    except BaseException:
        with suppress(AttnbenchError):  # what ended the run matters more than that this can't be written either
            _account(run, session, before, began)
        raise
    _account(run, session, before, began)
    return run.repair()


def _account(run: Run, session: Session, before: Mapping[str, float], began: float) -> None:
    """Adds where this command's wall time went to what earlier ones of the run took."""
    wall = monotonic() - began
    spent = {"wall": wall, "calls": session.seconds.calls, "compilation": session.seconds.compilation}
    total = {k: round(before.get(k, 0.0) + v, 3) for k, v in spent.items()}
    run.meta["seconds"] = total | {"elsewhere": round(total["wall"] - total["calls"] - total["compilation"], 3)}
    run.meta["machine"]["load_end"] = machine.load()
    run.save()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
