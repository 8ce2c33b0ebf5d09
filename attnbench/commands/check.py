"""`attnbench check`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from attnbench.commands.options import (
    CELL_FAILED,
    ISA,
    JSON,
    THREADS,
    Seconds,
    option,
    print_json,
    print_table,
    tell,
    typed,
    warn_of_packages,
    width,
)
from attnbench.devices.machine import default_threads
from attnbench.workload import DEVICES

if TYPE_CHECKING:
    from attnbench.advice.conforms import Outcome, Trials
    from attnbench.judge.cases import Case

_SHOWN = 8  # failures that are told of in full


@click.command()
@click.argument("names", nargs=-1, required=True)
@option("--device", type=click.Choice(list(DEVICES)), default="cpu")
@click.option(
    "--case", "texts", multiple=True, help="Only this one, as a failure names it; a group, a name, a pattern."
)
@click.option("--compile", "compiles", is_flag=True, help="Also torch.compile of a block around it; takes minutes.")
@option("--examples", type=click.IntRange(0), default=40, help="Shapes that Hypothesis draws, the same each time.")
@click.option("-x", "--first", is_flag=True, help="No more behind the first that fails.")
@THREADS
@ISA
@option("--timeout", type=Seconds(0.1, 1e6), default=120.0, help="Seconds for a case.")
@click.option("--list", "lists", is_flag=True, help="Print the cases, and try none.")
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    names: tuple[str, ...],
    device: str,
    texts: tuple[str, ...],
    compiles: bool,
    examples: int,
    first: bool,
    threads: int | None,
    isa: str,
    timeout: float,
    lists: bool,
    as_json: bool,
) -> None:
    """Tell whether plugins are right, and do what they promise. Nothing is timed.

    NAMES are as --plugins of run takes them. Hundreds of small cases: shapes, dtypes, masks, how inputs lie, extreme
    values, repeated calls, decoding step by step, gradients, blocks, the workspace promised. Each failure comes with
    the command that repeats it alone. Exits with 1 where a case fails, or where none could be tried.

    \b
    attnbench check my-attention
    attnbench check tiled,int8 --case gradients --case decoding
    attnbench check tiled --case grouped:dtype=bfloat16:mask=causal
    """
    from attnbench.advice.conforms import conform
    from attnbench.judge.cases import chosen, listed

    count = threads or default_threads()
    named = [text for text in texts if text != "drawn"]
    cases = chosen(named, device, count) if texts else listed(device, count, ["compile"] if compiles else [])
    draws = examples if not texts or "drawn" in texts else 0
    if lists:
        click.echo("\n".join(case.spec for case in cases))
        return
    warn_of_packages()
    given = [f"--{name}={ctx.params[name]}" for name in ("device", "threads", "isa") if name in typed(ctx)]
    found: list[tuple[Trials, list[Outcome]]] = []
    try:
        for trials in _each(names, count, isa, timeout, given):
            found.append((trials, []))
            draw = partial(trials.drawn, device, count, draws) if draws else None
            with trials, _shown(trials, cases, as_json) as show:
                for outcome in conform(trials, cases, draw, first):
                    found[-1][1].append(outcome)
                    show(found[-1][1])
            if not as_json:
                _print(*found[-1], device)
    except KeyboardInterrupt:
        if found and not as_json:
            _print(*found[-1], device)
        raise
    if as_json:
        print_json({"device": device, "plugins": [_told(trials, outcomes) for trials, outcomes in found]})
    sys.exit(CELL_FAILED if any(not _well(outcomes) for _, outcomes in found) else 0)


@contextmanager
def _shown(trials: "Trials", cases: "Sequence[Case]", quiet: bool) -> "Iterator[Callable[[Sequence[Outcome]], None]]":
    """On a terminal, while cases are tried: how many, and how many failed; and what of the plugin goes soon."""
    from rich.console import Console

    for said in trials.deprecated:
        tell(f"warning: {trials.plugin}: {said}")
    with Console(stderr=True, quiet=quiet).status(trials.plugin) as status:

        def show(outcomes: "Sequence[Outcome]") -> None:
            failed = sum(outcome.failed for outcome in outcomes)
            last = outcomes[-1].case.spec if len(outcomes) < len(cases) else "shapes that are drawn"
            status.update(f"{trials.plugin}: {len(outcomes)} cases, {failed} failed; {last}")

        yield show


def _each(names: Sequence[str], threads: int, isa: str, timeout: float, given: Sequence[str]) -> Iterator["Trials"]:
    """What the names stand for, each with its options set."""
    from attnbench.advice.conforms import instances
    from attnbench.registry import find, select
    from attnbench.workers.server import Forkserver

    requests = select(",".join(names), find())
    with Forkserver(threads, isa) as server:
        for request in requests:
            yield from instances(server, request, timeout, given)


def _well(outcomes: "Iterable[Outcome]") -> bool:
    statuses = {outcome.status for outcome in outcomes}
    return "ok" in statuses and statuses <= {"ok", "unsupported"}


def _print(trials: "Trials", outcomes: "Sequence[Outcome]", device: str) -> None:
    failed = [outcome for outcome in outcomes if outcome.failed]
    tried = sum(outcome.status != "unsupported" for outcome in outcomes)
    click.echo(f"{trials.plugin} on {device}: {tried - len(failed)} of {tried} cases well")
    groups = list(dict.fromkeys(outcome.case.group for outcome in outcomes))
    rows = [_group(group, [o for o in outcomes if o.case.group == group]) for group in groups]
    print_table(("cases", "well", "failed", "refused", "why refused"), rows, pad_edge=False, within=width())
    if errors := list(_errors(outcomes)):
        heads = ("dtype", "implementation error", "tolerance", "approximation error", "worst gradient")
        click.echo("\nlargest relative L2 errors")
        print_table(heads, errors, pad_edge=False, within=width())
    for outcome in failed[:_SHOWN]:
        click.echo(f"\n{outcome.case.spec}: {outcome.status}: {outcome.reason}\n    {trials.repeat(outcome)}")
    if len(failed) > _SHOWN:
        click.echo(f"\nand {len(failed) - _SHOWN} more; --json has all")
    if not tried:
        click.echo("\nnothing could be tried: it refuses every case")
    click.echo()


def _group(group: str, outcomes: "Sequence[Outcome]") -> tuple[str, ...]:
    refused = Counter(outcome.reason for outcome in outcomes if outcome.status == "unsupported")
    ok, failed = sum(o.status == "ok" for o in outcomes), sum(o.failed for o in outcomes)
    why = "; ".join(reason for reason, _ in refused.most_common(2)) + ("; ..." if len(refused) > 2 else "")
    return group, str(ok), str(failed or "-"), str(sum(refused.values()) or "-"), why


def _errors(outcomes: "Sequence[Outcome]") -> Iterator[tuple[str, ...]]:
    """Of each dtype the largest."""
    for dtype in dict.fromkeys(outcome.case.workload.dtype for outcome in outcomes):
        mine = [o.measures for o in outcomes if o.case.workload.dtype == dtype and o.status == "ok"]
        gradients = [value for m in mine for name, value in m.items() if name.endswith("_gradient_rel_l2")]
        each = [[m[n] for m in mine if n in m] for n in ("implementation_rel_l2", "tolerance", "approximation_rel_l2")]
        if any(each):
            yield dtype, *(f"{max(values):.1e}" if values else "-" for values in (*each, gradients))


def _told(trials: "Trials", outcomes: "Sequence[Outcome]") -> dict[str, Any]:
    return {
        "plugin": trials.plugin,
        "well": _well(outcomes),
        "cases": [
            {
                "case": o.case.spec,
                "group": o.case.group,
                "status": o.status,
                "reason": o.reason,
                "implementation": o.implementation,
                "measures": o.measures,
                "traceback": o.traceback,
                "repeat": trials.repeat(o) if o.failed else "",
            }
            for o in outcomes
        ],
    }
