"""Is what `impl=auto` takes the fastest that can? Its order is known by CPU; here it is checked on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from attnbench.devices.device import of
from attnbench.records.ceilings import LOSS, Checked
from attnbench.records.schema import Row
from attnbench.registry import Found, Request, find
from attnbench.report import units
from attnbench.stats.held_up import Sample, paired
from attnbench.stats.intervals import median_interval
from attnbench.sweep.cell import Cell
from attnbench.sweep.contest import Contest
from attnbench.sweep.plan import cells_of
from attnbench.sweep.precision import intervals
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Settings
from attnbench.workers.ask import ask
from attnbench.workers.messages import Described, Facts
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

LENGTHS = (512, 4096)
DTYPES = ("float32", "bfloat16")
_PRECISION = 0.1  # that further rounds are planned for, in steps: `_open` says when it is enough
_ROUNDS = 12  # of a first look; 10 are the least for an interval of
_SURE = 0.998  # confidence: of 25 comparisons at 95% one may well be wrong
_LONGEST = 20.0  # seconds of a cell: what compiles for longer has lost in any case
_MEMORY_SHARE = 0.8  # of what is free


def workloads(device: str, threads: int) -> list[Workload]:
    """A short and a long sequence, and one token more of the long one, in each dtype; 8 heads of 64, causal."""
    sizes = [{"seq": n, "kv_seq": n} for n in LENGTHS] + [{"seq": 1, "kv_seq": LENGTHS[-1], "phase": "decode"}]
    same: dict[str, Any] = {"device": device, "threads": threads, "mask": "causal"}
    return [Workload(**same, **size, dtype=dtype) for dtype, size in product(DTYPES, sizes)]


class Match(NamedTuple):
    """What auto takes on a workload, and the cells of the others that can."""

    auto: Cell
    chosen: str
    others: list[Cell]


def check(
    server: Forkserver,
    machine: Facts,
    device: str,
    threads: int,
    seconds: float,
    tell: Callable[[str], object],
) -> list[Checked]:
    """Times the implementations that can, by turns with what auto takes, of each of attnbench's variants.

    seconds: for all together; each variant gets what is left by its number of cells.
    tell: called with each variant's name in turn.
    """
    asked, end = workloads(device, threads), time.monotonic() + seconds
    variants = [matches for found in _own() if (matches := _matches(server, found, asked))]
    cells = [[cell for match in matches for cell in (match.auto, *match.others)] for matches in variants]
    checked: list[Checked] = []
    for i, matches in enumerate(variants):
        tell(matches[0].auto.variant)
        settings = Settings(
            baseline=matches[0].auto.plugin,
            precision=_PRECISION,
            budget=max(1.0, (end - time.monotonic()) * len(cells[i]) / sum(map(len, cells[i:]))),
            timeout=_LONGEST,
            memory=int(_MEMORY_SHARE * machine.devices[device].free_bytes),
            isa=server.isa,
            look=_ROUNDS,
            reuse=of(device).reuses,
            at_once=machine.machine["threads_at_once"],
        )
        rows = measure(server, settings, cells[i], worth=_open)
        by = {(row["plugin"], Workload.from_dict(row)): row for row in rows}
        checked += [found for match in matches if (found := _read(match, by))]
    return checked


def _own() -> list[Found]:
    return [found for found in find().values() if found.distribution == "attnbench"]


def _matches(server: Forkserver, found: Found, asked: Sequence[Workload]) -> list[Match]:
    """One for each workload on which another implementation can, and may be asked for by name."""
    told = ask(server, Request(found), asked)
    if not isinstance(told, Described) or "impl" not in told.options:
        return []
    autos = zip(cells_of(Request(found), told, asked), told.instances[0].promises, strict=True)
    matches = {c.workload: (Match(c, p.chosen, []), p.choices) for c, p in autos if not c.status}
    for name in map(str, told.options["impl"].choices):
        able = [w for w, (match, choices) in matches.items() if name in choices and name != match.chosen]
        request = Request(found, (("impl", name),))
        for cell in cells_of(request, ask(server, request, able), able) if able else ():
            if cell.status is None:
                matches[cell.workload][0].others.append(cell)
    return [match for match, _ in matches.values() if match.others]


def _open(contest: Contest, precision: float) -> Mapping[Cell, float]:
    """Those that may be so much faster that it is worth a word, until that is sure."""
    worth = {}
    for cell in contest.rivals:
        known = contest.measured[cell]
        _, speedup = intervals(known, contest.base, known.confidence)
        if contest.base is None or speedup is None or speedup.high is None:
            worth[cell] = 1.0
            continue
        sure = _sure(contest.base.samples, known.samples, speedup.low)
        if speedup.high > LOSS and not sure:
            worth[cell] = 1.0
    return worth


def _sure(base: Sequence[Sample], other: Sequence[Sample], low: float | None) -> bool:
    """Whether it is faster than auto by `LOSS` for certain, also as one of many that are asked.

    low: of its speedup's interval, which counts how processes differ; a few of those can't tell it more surely.
    """
    surely = median_interval([*paired(base, other).values()], _SURE).low
    return low is not None and surely is not None and min(low, surely) > LOSS


def _read(match: Match, rows: Mapping[tuple[str, Workload], Row]) -> Checked | None:
    """Auto beside the fastest of the others; None where what ran was the same, whatever its name."""
    w = match.auto.workload
    base = rows[match.auto.plugin, w]
    others = [(str(cell.options["impl"]), rows[cell.plugin, w]) for cell in match.others]
    others = [(name, row) for name, row in others if base["status"] != "ok" or not _same(row, base)]
    if not others:
        return None
    found = Checked(match.auto.variant, w.dtype, w.phase, w.kv_seq, match.chosen)
    timed = [(name, row) for name, row in others if row["status"] == "ok" and units.known(row["speedup"])]
    if timed:
        name, row = max(timed, key=lambda pair: float(pair[1]["speedup"]))
        return replace(
            found,
            other=name,
            times=row["speedup"],
            low=row["speedup_low"],
            high=row["speedup_high"],
            sure=_sure(base["samples"], row["samples"], row["speedup_low"]),
            disturbed="disturbed" in (*base["warnings"], *row["warnings"]),
        )
    failed = [("auto", base)] if base["status"] != "ok" else others
    return replace(found, why="; ".join(_why(name, row) for name, row in failed))


def _why(name: str, row: Row) -> str:
    """Of what has no number; why it was skipped is long, and always that time or memory was short."""
    return f"{name} {row['status']}" + (f": {row['reason']}" if row["status"] != "skipped" else "")


def _same(row: Row, base: Row) -> bool:
    what = row.get("implementation")
    return bool(what) and what == base.get("implementation")
