"""`attnbench run`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Unpack

import click

from attnbench.commands.options import (
    CELL_FAILED,
    DEVICE,
    INTERRUPTED,
    THREADS,
    Seconds,
    print_table,
    tell,
    warn_of_threads,
)
from attnbench.errors import AttnbenchError
from attnbench.sizes import parse_bytes
from attnbench.sweep.settings import BUDGET, PRECISION, TIMEOUT, Asked, Given
from attnbench.workload import BLOCKS, DTYPES, INPUTS, NORMS, PHASES, flag

if TYPE_CHECKING:
    from attnbench.records.run import Run
    from attnbench.records.schema import Row
    from attnbench.sweep.engine import Plan

_SIZES = "512..4096 doubles, 512..4096+512 steps, 512,1000 lists"
_RESUMED = {"resume", "budget", "timeout", "memory"}


@click.command()
@click.option(
    "--plugins", default="all", show_default=True, help="all, names (a,b), patterns (block*), name:key=value."
)
@click.option("--seq", help=f"Query lengths: {_SIZES}.  [default: 512..16384]")
@click.option(
    "--kv-seq",
    help="Key lengths, in the same grammar; to decode, give either for them: one token is new.  [default: as --seq]",
)
@click.option("--batch", help="[default: 1]")
@click.option("--tokens", type=click.IntRange(1), help="Of the whole batch at each length, instead of --batch.")
@click.option("--heads", help="[default: 8]")
@click.option("--kv-heads", help="Fewer than --heads is grouped-query.  [default: as --heads]")
@click.option("--head-dim", help="[default: 64]")
@click.option("--value-dim", help="[default: as --head-dim]")
@click.option(
    "--preset",
    help="Heads, kv heads and dims of a model, such as llama-3-8b; or standard, the sweep that compares machines.",
)
@click.option("--dtype", help=f"{', '.join(DTYPES)}; lists too.  [default: float32 on a CPU, bfloat16 on CUDA]")
@DEVICE
@click.option("--mask", help="full, causal or both.  [default: full, to decode causal]")
@click.option("--phase", help=f"{', '.join(PHASES)}; lists too.  [default: forward]")
@click.option(
    "--scope",
    type=click.Choice(["attention", "block", "all"]),
    help="Attention alone, inside the block, or both.  [default: both, the block up to 4096]",
)
@click.option("--block", type=click.Choice(BLOCKS), help="[default: encoder, to decode decoder-only]")
@click.option("--norm", type=click.Choice(NORMS), help="[default: pre]")
@click.option("--layers", help="Blocks stacked on each other.  [default: 1]")
@click.option("--lengths", help="Of a ragged batch, the tokens of each entry: 512,300,77; or drawn.")
@click.option("--inputs", type=click.Choice(INPUTS), help="How inputs are drawn.  [default: normal]")
@click.option(
    "--baseline", default="sdpa", show_default=True, help="What speedups refer to; always run. none: nothing."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="[default: 0]")
@THREADS
@click.option(
    "--precision", default=PRECISION, show_default=True, help="Half-width at which an interval has converged."
)
@click.option("--budget", type=Seconds(1, 1e7), default=BUDGET, show_default=True, help="Seconds for the sweep.")
@click.option("--timeout", type=Seconds(0.1, 1e6), default=TIMEOUT, show_default=True, help="Seconds for a cell.")
@click.option(
    "--l2", type=click.Choice(["kept", "flushed"]), help="A GPU's L2 cache before each call.  [default: kept]"
)
@click.option("--memory", help="What may be in use at a time, such as 16GiB.  [default: 80% of what is free]")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Runs go here."
)
@click.option("--name", help="The run's folder is DATE-NAME.  [default: the device]")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this run; takes its sweep from it.")
@click.option("--dry-run", is_flag=True, help="Show the cells with predicted memory and time; run nothing.")
@click.pass_context
def command(
    ctx: click.Context, /, out: Path, name: str | None, resume: Path | None, dry_run: bool, **given: Unpack[Given]
) -> None:
    """Measure attention variants over a sweep of workloads."""
    began = monotonic()
    _let_second_interrupt_stop()
    asked = _asked(ctx, resume, given)

    from attnbench.records.run import Run
    from attnbench.sweep import engine

    warn_of_threads(asked.sweep.threads)
    with engine.planned(asked) as plan:
        if dry_run:
            _show(plan)
            return
        if resume:
            record = Run.open(resume)
            engine.check_same_machine(record, plan.facts)
        else:
            meta = engine.meta(plan, ["attnbench", *sys.argv[1:]])
            record = Run.create(out, name or plan.asked.sweep.device, meta)
        with record:
            _measure(plan, record, began)


def _asked(ctx: click.Context, resume: Path | None, given: Given) -> Asked:
    if not resume:
        return Asked.of(**given)
    from attnbench.sweep.engine import resumed

    typed = {
        str(p.name) for p in ctx.command.params
        if ctx.get_parameter_source(str(p.name)) == click.core.ParameterSource.COMMANDLINE
    }  # fmt: skip
    if extra := sorted(typed - _RESUMED):
        raise AttnbenchError(f"--resume takes the sweep from the run; drop {flag(extra[0])}")
    memory = given["memory"]
    return resumed(
        resume,
        given["budget"] if "budget" in typed else None,
        given["timeout"] if "timeout" in typed else None,
        parse_bytes(str(memory)) if memory else None,
    )


def _let_second_interrupt_stop() -> None:
    """Ctrl-C ends a sweep in order, which takes seconds; one more ends this process as it stands.

    The worker processes end in either case: their server sees that this process is gone.
    """

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        # While Python shuts down it would put the default action back, which turns the exit code into a signal.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, first)


def _measure(plan: Plan, record: Run, began: float) -> None:
    from rich.console import Console

    from attnbench import records
    from attnbench.commands.watch import Watch
    from attnbench.sweep import engine

    record.repair()  # a broken run is refused before anything is said of it
    tell(f"{len(plan.cells)} cells, budget {plan.asked.budget:.0f} s, into {record.path}")
    for why in dict.fromkeys(plan.facts["unmeasured"].values()):
        what = ", ".join(name for name, reason in plan.facts["unmeasured"].items() if reason == why)
        tell(f"without {what}: {why}")
    try:
        with Watch(Console(stderr=True), len(plan.cells)) as watch:
            rows = engine.measure(plan, record, watch, began)
    except KeyboardInterrupt:
        _summarise(records.rows(record.path), record, len(plan.cells))
        click.echo(f"interrupted; go on with: attnbench run --resume {record.path}", err=True)
        sys.exit(INTERRUPTED)
    _summarise(rows, record, len(plan.cells))
    sys.exit(0 if all(row["status"] in records.WELL for row in rows) else CELL_FAILED)


def _summarise(rows: list[Row], record: Run, planned: int) -> None:
    from collections import Counter

    from attnbench.records.schema import STATUSES, WELL
    from attnbench.stats.doubts import explain

    count = Counter(row["status"] for row in rows)
    text = ", ".join(f"{count[s]} {s}" for s in STATUSES if count[s])
    converged = sum(bool(row.get("converged")) for row in rows)
    click.echo(f"{len(rows)} of {planned} cells: {text or 'none'}; {converged} converged")
    for row in rows:
        if row["status"] not in WELL:
            click.echo(f"  {row['status']}: {row['plugin']}, {row['scope']} at {row['seq']}: {row['reason']}")
    warned = Counter(kind for row in rows for kind in row.get("warnings", []))
    for kind, cells in sorted(warned.items(), key=lambda item: -item[1]):
        click.echo(f"  {kind}, {cells} cell{'s' * (cells > 1)}: {'; '.join(explain(kind))}")
    seconds = record.meta.get("seconds")
    if seconds and seconds["wall"]:
        click.echo(
            f"wall time {seconds['wall']:.0f} s: {seconds['calls']:.0f} s in calls of the variants, "
            f"{seconds['compilation']:.0f} s in compilation, {seconds['elsewhere'] / seconds['wall']:.0%} elsewhere"
        )
    click.echo(f"run: {record.path}")


def _show(plan: Plan) -> None:
    from rich.table import Table

    from attnbench.sweep.costs import Costs
    from attnbench.sweep.plan import allot, skip_too_dear, skip_too_large

    costs, cells, asked = Costs(), plan.cells, plan.asked
    assert asked.memory is not None
    skip_too_large(cells, asked.memory)
    skip_too_dear(cells, cells, costs, asked.budget, asked.budget)
    rounds = allot(cells, costs, asked.budget)
    table = Table("workload", "plugin", "memory", "s a call", "rounds", "what will happen", box=None)
    for cell in cells:
        need = cell.predicted_bytes
        table.add_row(
            cell.workload.label(),
            cell.plugin,
            "unknown" if need is None else f"{need / 2**20:.0f} MiB",
            f"{costs.call(cell):.3g}" if cell.flops else "",
            str(rounds[cell] or "1 call") if cell in rounds else "",
            f"{cell.status}: {cell.reason}" if cell.status else "run",
        )
    print_table(table)
    click.echo(
        f"{len(cells)} cells, budget {asked.budget:.0f} s, memory {asked.memory / 2**30:.1f} GiB. Seconds are a guess "
        "from counted operations until a run has measured; nothing was run."
    )
