"""What will be measured, what it is predicted to cost, and how many rounds each cell gets of the budget.

Nothing here runs a variant: plugins answer in worker processes, and costs are predicted from cells already measured.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from math import ceil
from typing import Any

from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.registry import Request, find, select
from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep.cell import Cell
from attnbench.sweep.costs import Costs
from attnbench.sweep.settings import Asked, Settings
from attnbench.workers.ask import ask
from attnbench.workers.messages import Described, Failure
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

# Rounds where a first look is too dear: for a median without an interval; none leaves the call that measured memory.
FEW_ROUNDS = (3, 0)
MOST_ROUNDS = 600
_BUDGET_SHARE = 1 / 4  # no single cell may take more of the budget
_CHEAP = 1e-3  # of the time left: a round that costs less is not worth saving


def cells_of(request: Request, answer: Described | Failure, workloads: Sequence[Workload]) -> Iterator[Cell]:
    """The cells that a request stands for, by what its plugin answered.

    A study, and a variant that is made for another phase than those of the workloads, is no part of "all" and of
    patterns.

    Raises:
        AttnbenchError: the request has an option or value that the plugin doesn't know.
    """
    found = request.found
    if isinstance(answer, Failure):
        if answer.status == "usage":
            raise AttnbenchError(f"--plugins {found.name}: {answer.reason}")
        name = ":".join([found.name, *(f"{k}={v}" for k, v in request.options), *(["*"] if request.every else [])])
        for workload in workloads:
            cell = Cell(name, found.name, found.origin, found.target, workload, path=found.path)
            cell.end(answer.status, answer.reason, answer.traceback)
            yield cell
        return
    made_for = answer.phases[0] if answer.phases else "forward"
    out_of_place = answer.study or made_for not in {"forward", *(workload.phase for workload in workloads)}
    if out_of_place and not request.named:
        return
    for instance in answer.instances:
        for workload, promise in zip(workloads, instance.promises, strict=True):
            cell = Cell(
                plugin=instance.plugin,
                variant=found.name,
                distribution=found.origin,
                target=found.target,
                workload=workload,
                family=answer.family,
                options=instance.options,
                workspace=promise.workspace,
                flops=promise.flops,
                path=found.path,
                emulated=promise.emulated,
            )
            if promise.unsupported:
                cell.end("unsupported", promise.unsupported)
            yield cell


def skip_too_large(cells: Iterable[Cell], memory: int) -> None:
    """Ends cells whose predicted memory is over the limit."""
    for cell in cells:
        need = cell.predicted_bytes
        if cell.status is None and need is not None and need > memory:
            cell.end(
                "skipped",
                f"predicted memory {need / 2**30:.1f} GiB is over the limit of {memory / 2**30:.1f} GiB (--memory)",
            )


def bound_emulated(cells: Iterable[Cell], settings: Settings) -> None:
    """What is emulated comes last and has an even share of the budget, where there is anything else to spend it on.

    Not the baseline, which serves all others.
    """
    open_cells = [cell for cell in cells if cell.status is None]
    rivals = [cell for cell in open_cells if cell.plugin != settings.baseline]
    late = [cell for cell in rivals if cell.emulated]
    for cell in late if len(late) < len(rivals) else ():
        cell.share = settings.budget / len(open_cells)


def skip_too_dear(
    cells: Iterable[Cell], pending: Sequence[Cell], costs: Costs, budget: float, left: float, part: float = 1.0
) -> None:
    """Ends those of `cells` of which even one number costs too much: over a quarter of the budget, or over their share.

    pending: all cells still to come, these among them. Where fewer than four share the budget, each may take its part.
    part: which share of the run's the budget is.
    """
    share = max(_BUDGET_SHARE, 1 / max(1, sum(c.status is None for c in pending)))
    within = set(affordable(pending, costs, left))
    total = budget - left + sum(costs.ready(c) for c in pending if c.status is None)
    whose = f"the budget of {budget / part:.0f} s"
    whose = whose if part == 1 else f"the {budget:.2g} s that this workload has of {whose}"
    for cell in cells:
        if cell.status is not None:
            continue
        need = costs.ready(cell)
        each = f"{need:.2g} s predicted at {costs.call(cell):.2g} s a call"
        if need > budget * share:
            why = f"over {share:.0%} of {whose}; --budget {_tens(need / share / part)} would do"
            cell.end("skipped", f"{each} is {why}")
        elif cell not in within:
            others = "cells that are not emulated" if cell.comes_last else "cheaper cells"
            why = f"more than the {others} leave of {whose}; --budget {_tens(total / part)} would do"
            cell.end("skipped", f"{each} is {why}")


def _tens(seconds: float) -> int:
    return ceil(seconds / 10) * 10


def affordable(cells: Sequence[Cell], costs: Costs, seconds: float, ready: Sequence[Cell] = ()) -> list[Cell]:
    """The open cells, without the dearest where the least that each needs is too much for `seconds` together.

    So what is left out is left out for its own cost, wherever in the sweep it stands. Cells that are `ready` have paid;
    those that come last share what the others leave.
    """
    need = {c: 0.0 if c in ready else costs.ready(c) for c in cells if c.status is None}
    kept: set[Cell] = set()
    for last in (False, True):
        cheapest_first = sorted((c for c in need if c.comes_last is last), key=need.__getitem__)
        totals = accumulate(need[c] for c in cheapest_first)
        left = seconds - sum(need[c] for c in kept)
        kept |= {c for c, total in zip(cheapest_first, totals, strict=True) if total <= left}
    return [c for c in need if c in kept or c in ready]


def allot(
    cells: Sequence[Cell], costs: Costs, seconds: float, settings: Settings, ready: Sequence[Cell] = ()
) -> dict[Cell, int]:
    """Rounds for a first look at each cell, within `seconds`; none for those that are not `affordable`.

    Every cell gets the rounds that are asked for; where that is too much, some get fewer, those first that save
    most by it, and before them those that come last; the baseline's serve all cells beside them. A part of the budget
    is kept for what `Returns` makes of it. Cells that are `ready` have paid for that already.
    """
    open_cells = affordable(cells, costs, seconds, ready)
    each = {c: costs.round(c) for c in open_cells}
    beside = Counter(c.workload for c in open_cells)
    most = settings.look or MIN_ROUNDS
    rounds = {c: next(n for n in (most, *FEW_ROUNDS) if n <= most and n * each[c] <= c.share) for c in open_cells}
    left = seconds - min(seconds, settings.later * settings.budget)
    left -= sum(costs.ready(c) for c in open_cells if c not in ready) + sum(rounds[c] * each[c] for c in open_cells)
    saves = [
        (not c.comes_last, -each[c] / (beside[c.workload] if c.plugin == settings.baseline else 1), i)
        for i, c in enumerate(open_cells)
        if rounds[c]
    ]
    heapq.heapify(saves)
    while left < 0 and saves:
        first, weight, i = heapq.heappop(saves)
        cell = open_cells[i]
        if each[cell] < _CHEAP * seconds:
            continue
        fewer = next(n for n in FEW_ROUNDS if n < rounds[cell])
        left += (rounds[cell] - fewer) * each[cell]
        rounds[cell] = fewer
        if fewer:
            heapq.heappush(saves, (first, weight, i))
    return rounds


def groups(cells: Sequence[Cell], baseline: Cell | None, memory: int) -> list[list[Cell]]:
    """Cells that are alive together: resident bytes of all and the largest workspace fit; each with the baseline.

    A cell joins the first group that has room for it: the baseline is measured once more in each.
    """
    result: list[list[Cell]] = []
    for cell in cells:
        if cell is baseline:
            continue
        room = next((group for group in result if _bytes_together([*group, cell]) <= memory), None)
        if room is not None:
            room.append(cell)
        else:
            result.append([baseline, cell] if baseline else [cell])
    return result or ([[baseline]] if baseline else [])


def _bytes_together(cells: Sequence[Cell]) -> int:
    return sum(of(c.workload.device).worker_bytes + c.tensor_bytes for c in cells) + max(
        c.workspace or 0 for c in cells
    )


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


def asked_of(server: Forkserver, asked: Asked, request: Request, workloads: Sequence[Workload]) -> list[Cell]:
    """The cells of one request. Raises: AttnbenchError: see `cells_of`."""
    limit = asked.memory if of(asked.sweep.device).limits_process else None
    return list(cells_of(request, ask(server, request, workloads, limit), workloads))


def plan(server: Forkserver, asked: Asked, requests: Sequence[Request], base: Request | None) -> tuple[list[Cell], str]:
    """All cells, workload by workload with the baseline first, and the baseline's canonical name ("" for none).

    Raises:
        AttnbenchError: a plugin, an option or a combination of sizes is not to be had.
    """
    workloads = asked.sweep.workloads()
    base_cells = asked_of(server, asked, base, workloads) if base else []
    cells = [c for r in requests for c in asked_of(server, asked, r, workloads)]
    unique: dict[tuple[str, Any], Cell] = {}
    for cell in [*base_cells, *cells]:
        unique.setdefault((cell.plugin, cell.workload), cell)
    order = {w: i for i, w in enumerate(workloads)}
    return sorted(unique.values(), key=lambda c: order[c.workload]), base_cells[0].plugin if base_cells else ""
