"""`attnbench run`."""

import atexit
import os
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import click

from attnbench.commands import options
from attnbench.commands.options import JSON, PATH, Seconds, option, print_json, tell
from attnbench.commands.show import print_numbers
from attnbench.errors import AttnbenchError
from attnbench.sizes import parse_bytes
from attnbench.sweep.settings import BUDGET, PRECISION, TIMEOUT, Asked, Given
from attnbench.workload import flag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from attnbench.records.run import Run
    from attnbench.records.schema import Row
    from attnbench.sweep.cell import Cell
    from attnbench.sweep.costs import Costs
    from attnbench.sweep.engine import Planned
    from attnbench.sweep.rounds import Progress

_RESUMED = {"resume", "budget", "timeout", "memory", "on"}


@click.command()
@options.sweep
@option(
    "--precision",
    default=PRECISION,
    help="Half-width at which a speedup's interval has converged; auto: what the budget buys.",
)
@option("--budget", type=Seconds(1, 1e7), default=BUDGET, help="Seconds for the sweep.")
@option("--timeout", type=Seconds(0.1, 1e6), default=TIMEOUT, help="Seconds for a cell.")
@option("--l2", type=click.Choice(["kept", "flushed"]), help="A GPU's L2 cache before each call.  [default: kept]")
@option("--memory", help="What may be in use at a time, such as 16GiB.  [default: 80% of what is free]")
@option("--on", help="Measure on a cluster's nodes: ray, or ray=ADDRESS as ray.init takes it.")
@option("--out", type=PATH, default=Path("results"), help="Runs go here.")
@option("--name", help="The run's folder is DATE-NAME.  [default: the device]")
@option("--resume", type=PATH, help="Go on with this run; takes its sweep from it.")
@option("--dry-run", is_flag=True, help="Show the cells with predicted memory and time; run nothing.")
@option("--quiet", is_flag=True, help="Say what failed and where the run is, no more.")
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    /,
    on: str | None,
    out: Path,
    name: str | None,
    resume: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **given: Unpack[Given],
) -> None:
    """Measure attention variants over a sweep of workloads.

    \b
    attnbench run                                            # every variant, 512 to 16384 tokens
    attnbench run --plugins sdpa,int8 --seq 4096 --budget 30 # two variants at one length
    attnbench run --preset llama-3-8b --phase decode         # a model's shape, token by token
    attnbench run --resume results/RUN                       # go on where it was cut off
    """
    began = monotonic()
    _let_second_interrupt_stop()
    options.warn_of_packages()
    asked = _asked(ctx, resume, on, given)

    from attnbench.records.run import Run

    if not on:
        options.warn_of_threads(asked.sweep.threads)
    with _ready(asked, on, dry_run) as (plan, door):
        if dry_run:
            _show(plan, as_json)
            return
        if resume:
            record = Run.open(resume)
            door.check(record)
        else:
            record = Run.create(out, name or plan.asked.sweep.device, door.meta(["attnbench", *sys.argv[1:]]))
        with record:
            _measure(plan, door, record, asked, began, quiet, as_json)


class _Door(NamedTuple):
    """What is done of a plan on this machine, or on a cluster. where: in words, for the latter."""

    check: "Callable[[Run], None]"
    meta: "Callable[[Sequence[str]], dict[str, Any]]"
    measure: "Callable[[Run, Progress, float], list[Row]]"
    where: str = ""


@contextmanager
def _ready(asked: Asked, on: str | None, dry_run: bool) -> "Iterator[tuple[Planned, _Door]]":
    from attnbench.sweep import engine, spread

    if on:
        with spread.planned(asked, on, tell, ready=not dry_run) as far:
            whole = (partial(spread.check_same, far), partial(spread.meta, far), partial(spread.measure, far))
            yield far, _Door(*whole, far.where)
    else:
        with engine.planned(asked, tell=tell, ready=not dry_run) as near:
            yield (
                near,
                _Door(partial(engine.check_same, near), partial(engine.meta, near), partial(engine.measure, near)),
            )


def _asked(ctx: click.Context, resume: Path | None, on: str | None, given: Given) -> Asked:
    if not resume:
        asked = Asked.of(**given)
        if not on:
            return asked
        from attnbench.sweep.spread import at_large

        return at_large(asked, given["threads"])
    from attnbench.sweep.engine import resumed

    typed = options.typed(ctx)
    if extra := sorted(typed - _RESUMED):
        raise AttnbenchError(f"--resume takes the sweep from the run; drop {flag(extra[0])}")
    budget, timeout = (given[name] if name in typed else None for name in ("budget", "timeout"))
    return resumed(resume, budget, timeout, parse_bytes(str(given["memory"])) if given["memory"] else None, on)


def _let_second_interrupt_stop() -> None:
    """Ctrl-C ends a sweep in order, which takes seconds; one more ends this process as it stands.

    The worker processes end in either case: their server sees that this process is gone.
    """

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(options.INTERRUPTED))
        # While Python shuts down it would put the default action back, which turns the exit code into a signal.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, first)


def _measure(
    plan: "Planned", door: _Door, record: "Run", asked: Asked, began: float, quiet: bool, as_json: bool
) -> None:
    from rich.console import Console

    from attnbench import records
    from attnbench.commands.watch import Watch

    record.repair()  # a broken run is refused before anything is said of it
    if not quiet:
        _announce(plan, door, record, asked)
    try:
        with Watch(Console(stderr=True, quiet=quiet), len(plan.cells)) as watch:
            rows = door.measure(record, watch, began)
    except KeyboardInterrupt:
        _summarise(records.rows(record.path), record, len(plan.cells), quiet, as_json)
        on = f" --on {record.meta['on']}" if door.where else ""
        click.echo(f"interrupted; go on with: attnbench run --resume {record.path}{on}", err=True)
        sys.exit(options.INTERRUPTED)
    _summarise(rows, record, len(plan.cells), quiet, as_json)
    sys.exit(0 if all(row["status"] in records.WELL for row in rows) else options.CELL_FAILED)


def _announce(plan: "Planned", door: _Door, record: "Run", asked: Asked) -> None:
    """asked: before the plan settled what it left open."""
    from attnbench import environment

    sweep, masks = plan.asked.sweep, dict.fromkeys(cell.workload.mask for cell in plan.cells)
    on = door.where or f"{sweep.device}, {sweep.threads} threads"
    what = f"{', '.join(masks)} mask, {', '.join(sweep.dtype)} on {on}"
    tell(f"{len(plan.cells)} cells, budget {plan.asked.budget:.0f} s, {what}, into {record.path}")
    if asked.precision is None and plan.asked.precision is not None:
        tell(f"precision {plan.asked.precision * 100:.3g}%: what that buys half of them (--precision for another)")
    if changed := environment.words(plan.facts):
        tell(f"with {changed}: only runs under the same compare with this one")
    options.warn_of_pinning(plan.asked.sweep.threads, plan.facts)
    if not door.where:
        _tell_of_auto(plan)
    for why in dict.fromkeys(plan.facts["unmeasured"].values()):
        what = ", ".join(name for name, reason in plan.facts["unmeasured"].items() if reason == why)
        tell(f"without {what}: {why}")


def _tell_of_auto(plan: "Planned") -> None:
    """Where `attnbench calibrate` found that a variant of this run does not take its fastest implementation."""
    from attnbench.records import ceilings

    works = {(c.variant, c.workload.dtype, c.workload.phase) for c in plan.cells if c.options.get("impl") == "auto"}
    for found in ceilings.checked(plan.facts, plan.asked.sweep.device, plan.asked.sweep.threads):
        if found.advice and (found.variant, found.dtype, found.phase) in works:
            tell(f"attnbench calibrate: {options.faster_than_auto(found)}")


def _summarise(rows: "list[Row]", record: "Run", planned: int, quiet: bool, as_json: bool) -> None:
    from attnbench.records.schema import COLUMNS, WELL

    if as_json:
        cells = [{name: row.get(name) for name in COLUMNS} for row in rows]
        print_json({"run": str(record.path), "planned": planned, "cells": cells})
        return
    if not quiet:
        _count(rows, planned, record.meta["args"]["precision"])
    for row in rows:
        if row["status"] not in WELL:
            click.echo(f"  {row['status']}: {row['plugin']}, {row['scope']} at {row['seq']}: {row['reason']}")
    if not quiet:
        _warn(rows, record)
    if rows and not quiet:
        print_numbers([record.path])
        click.echo("")
    click.echo(f"run: {record.path}")


def _count(rows: "list[Row]", planned: int, precision: float) -> None:
    from attnbench.records.schema import STATUSES

    count = Counter(row["status"] for row in rows)
    text = ", ".join(f"{count[s]} {s}" for s in STATUSES if count[s])
    converged = sum(bool(row.get("converged")) for row in rows)
    click.echo(
        f"{len(rows)} of {planned} cells: {text or 'none'}; {converged} converged, within {precision * 100:.3g}%"
    )


def _warn(rows: "list[Row]", record: "Run") -> None:
    from attnbench.stats.doubts import explain

    warned = Counter(kind for row in rows for kind in row.get("warnings", []))
    for kind, cells in sorted(warned.items(), key=lambda item: -item[1]):
        click.echo(f"  {kind}, {cells} cell{'s' * (cells > 1)}: {'; '.join(explain(kind))}")
    if gained := (outlook := record.meta.get("outlook") or {}).get("workloads"):
        what = ", ".join(f"{count} at {label}" for label, count in gained)
        budget = record.meta["args"]["budget"] + outlook["seconds"]
        click.echo(f"{outlook['seconds']:.0f} s more (--budget {budget:.0f}) may make precise enough: {what}")
    seconds = record.meta.get("seconds")
    if seconds and seconds["wall"]:
        tasks = f", {seconds['tasks']:.0f} s in tasks" if "tasks" in seconds else ""
        of = seconds.get("tasks") or seconds["wall"]
        click.echo(
            f"wall time {seconds['wall']:.0f} s{tasks}: {seconds['calls']:.0f} s in calls of the variants, "
            f"{seconds['compilation']:.0f} s in compilation, {seconds['elsewhere'] / of:.0%} elsewhere"
        )


def _show(plan: "Planned", as_json: bool) -> None:
    from attnbench.sweep.costs import Costs
    from attnbench.sweep.engine import settings_of
    from attnbench.sweep.plan import allot, bound_emulated, skip_too_dear, skip_too_large

    settings = settings_of(plan, None)
    costs, cells, asked = Costs(), plan.cells, plan.asked
    assert asked.memory is not None
    skip_too_large(cells, asked.memory)
    bound_emulated(cells, settings)
    skip_too_dear(cells, cells, costs, asked.budget, asked.budget)
    rounds = allot(cells, costs, asked.budget, settings)
    if as_json:
        print_json({"cells": [_planned(cell, costs, rounds) for cell in cells]})
        return
    rows = []
    for cell in cells:
        need = "unknown" if cell.predicted_bytes is None else f"{cell.predicted_bytes / 2**20:.0f} MiB"
        seconds = f"{costs.call(cell):.3g}" if cell.flops else ""
        times = str(rounds[cell] or "1 call") if cell in rounds else ""
        what = f"{cell.status}: {cell.reason}" if cell.status else "run"
        rows.append([cell.workload.label(), cell.plugin, need, seconds, times, what])
    options.warn_of_pinning(asked.sweep.threads, plan.facts)
    options.print_table(("workload", "plugin", "memory", "s a call", "first rounds", "what will happen"), rows)
    click.echo(
        f"{len(cells)} cells, budget {asked.budget:.0f} s, memory {asked.memory / 2**30:.1f} GiB. Seconds are a guess "
        "from counted operations until a run has measured; nothing was run."
    )


def _planned(cell: "Cell", costs: "Costs", rounds: "dict[Cell, int]") -> dict[str, Any]:
    told = {"plugin": cell.plugin, **cell.workload.as_dict(), "predicted_bytes": cell.predicted_bytes}
    guess = {"seconds_a_call": costs.call(cell) if cell.flops else None, "rounds": rounds.get(cell)}
    return {**told, **guess, "status": cell.status, "reason": cell.reason}
