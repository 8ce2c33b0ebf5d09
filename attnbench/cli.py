"""The command line: each command parses, calls and prints. What is heavy is imported when a command needs it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from attnbench.errors import AttnbenchError
from attnbench.workload import (
    BLOCKS,
    DTYPES,
    INPUTS,
    MASKS,
    NORMS,
    PHASES,
    Sweep,
    parse_bytes,
    parse_precision,
    parse_sizes,
    usable_cores,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.table import Table

    from attnbench.bench.channel import Message
    from attnbench.bench.plan import Cell
    from attnbench.bench.runner import Asked
    from attnbench.records import Row, Run

CELL_FAILED, USAGE, INTERRUPTED = 1, 2, 130


class _Commands(click.Group):
    """Bad usage, ours and click's, is one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **(kwargs | {"standalone_mode": False}))
        except AttnbenchError as error:
            message = str(error)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            message = " ".join(error.format_message().split())
        # A name may hold a line break or worse: what a terminal can't print goes out as an escape.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        click.echo(f"attnbench: {line}", err=True)
        sys.exit(USAGE)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="attnbench")
def main() -> None:
    """Compare attention variants by time, memory and accuracy."""


def _sizes(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    return None if text is None else parse_sizes(text, str(param.name))


def _names(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...] | None]:
    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
        if text is None:
            return None
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in names:
            if name not in known:
                raise AttnbenchError(f"--{param.name} {text!r}: {name!r} is none of {', '.join(known)}")
        return names

    return parse


class _Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:  # NaN passes every range
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


_SIZES = "512..4096 doubles, 512..4096+512 steps, 512,1000 lists"


@main.command()
@click.option(
    "--plugins", default="all", show_default=True, help="all, names (a,b), patterns (block*), name:key=value."
)
@click.option("--seq", callback=_sizes, help=f"Query lengths: {_SIZES}.  [default: 512..16384]")
@click.option(
    "--kv-seq",
    callback=_sizes,
    help="Key lengths, in the same grammar; to decode, give either for them: one token is new.  [default: as --seq]",
)
@click.option("--batch", callback=_sizes, default="1", show_default=True)
@click.option("--tokens", type=click.IntRange(1), help="Of the whole batch at each length, instead of --batch.")
@click.option("--heads", callback=_sizes, default="8", show_default=True)
@click.option("--kv-heads", callback=_sizes, help="Fewer than --heads is grouped-query.  [default: as --heads]")
@click.option("--head-dim", callback=_sizes, default="64", show_default=True)
@click.option("--value-dim", callback=_sizes, help="[default: as --head-dim]")
@click.option(
    "--preset",
    help="Heads, kv heads and dims of a model, such as llama-3-8b; or standard, the sweep that compares machines.",
)
@click.option("--dtype", callback=_names(tuple(DTYPES)), help="[default: float32 on a CPU, bfloat16 on CUDA]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--mask", callback=_names(MASKS), help="full, causal or both.  [default: full, to decode causal]")
@click.option(
    "--phase", callback=_names(PHASES), default="forward", show_default=True, help=f"{', '.join(PHASES)}; lists too."
)
@click.option(
    "--scope",
    type=click.Choice(["attention", "block", "all"]),
    help="Attention alone, inside the block, or both.  [default: both, the block up to 4096]",
)
@click.option("--block", type=click.Choice(BLOCKS), help="[default: encoder, to decode decoder-only]")
@click.option("--norm", type=click.Choice(NORMS), default="pre", show_default=True)
@click.option("--layers", callback=_sizes, default="1", show_default=True, help="Blocks stacked on each other.")
@click.option("--lengths", default="", help="Of a ragged batch, the tokens of each entry: 512,300,77; or drawn.")
@click.option("--inputs", type=click.Choice(INPUTS), default="normal", show_default=True, help="How inputs are drawn.")
@click.option(
    "--baseline", default="sdpa", show_default=True, help="What speedups refer to; always run. none: nothing."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1, 4096), help="[default: the cores this process may use]")
@click.option("--precision", default="2%", show_default=True, help="Half-width at which an interval has converged.")
@click.option("--budget", type=_Seconds(1, 1e7), default=280, show_default=True, help="Seconds for the sweep.")
@click.option("--timeout", type=_Seconds(0.1, 1e6), default=120, show_default=True, help="Seconds for a cell.")
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
def run(ctx: click.Context, /, **options: Any) -> None:
    """Measure attention variants over a sweep of workloads."""
    began = monotonic()
    _let_second_interrupt_stop()
    given = {
        str(p.name) for p in ctx.command.params
        if ctx.get_parameter_source(str(p.name)) == click.core.ParameterSource.COMMANDLINE
    }  # fmt: skip
    resumed = options["resume"]
    if resumed and (extra := sorted(given - {"resume", "budget", "timeout", "memory"})):
        raise AttnbenchError(f"--resume takes the sweep from the run; drop --{extra[0].replace('_', '-')}")
    if options["preset"] == "standard":
        from attnbench.presets import STANDARD_SWEEP

        if fixed := sorted(given & set(STANDARD_SWEEP)):
            raise AttnbenchError(f"--preset standard is one fixed sweep; drop --{fixed[0].replace('_', '-')}")
        options |= STANDARD_SWEEP
    elif options["preset"]:
        from attnbench.presets import preset

        shape = preset(options["preset"])
        options |= {n: (getattr(shape, n),) for n in ("heads", "kv_heads", "head_dim", "value_dim") if n not in given}
    precision = parse_precision(options["precision"])
    memory = parse_bytes(options["memory"]) if options["memory"] else None
    # Checks the sweep before anything is started; the device is only known further on.
    _sweep(options, options["device"] if options["device"] != "auto" else "cpu").workloads()

    from rich.console import Console

    from attnbench.bench import ceilings, runner
    from attnbench.bench.forkserver import Forkserver
    from attnbench.records import Run, read_meta

    console = Console(stderr=True)
    runner.choose(options["plugins"], options["baseline"])
    old = runner.Asked.from_dict(read_meta(resumed).get("args", {})) if resumed else None
    threads = old.sweep.threads if old else options["threads"] or usable_cores()
    _warn_of_threads(console, threads)
    with Forkserver(threads) as server:
        facts = runner.ask_machine(server)
        device = _device(options["device"], facts)
        if old:
            asked = _changed(old, {k: options[k] for k in given & {"budget", "timeout"}}, memory)
        else:
            asked = runner.Asked(
                plugins=options["plugins"],
                baseline=options["baseline"],
                sweep=_sweep(options, device),
                precision=precision,
                budget=options["budget"],
                timeout=options["timeout"],
                memory=memory or runner.memory_limit(facts, device),
                l2=_l2(options["l2"], device),
            )
        cells, baseline = runner.plan(server, asked)
        if options["dry_run"]:
            _show_plan(cells, asked)
            return
        meta = {
            "command": ["attnbench", *sys.argv[1:]],
            "started": runner.now(),
            "finished": None,
            "args": asked.as_dict(),
            "standard": _standard(asked),
            "machine": facts,
            "distributions": {c.variant: c.distribution for c in cells},
            "ceilings": known.as_dict() if (known := ceilings.stored(facts, device, threads)) else None,
        }
        record = Run.open(resumed) if resumed else Run.create(options["out"], options["name"] or device, meta)
        if resumed:
            _check_same_machine(record, facts)
        with record:
            _measure(server, record, asked, cells, baseline, began, console)


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


def _sweep(options: dict[str, Any], device: str) -> Sweep:
    names = (
        "seq", "kv_seq", "batch", "tokens", "heads", "kv_heads", "head_dim", "value_dim", "mask", "phase", "scope",
        "block", "norm", "layers", "lengths", "inputs", "seed",
    )  # fmt: skip
    return Sweep(
        **{name: options[name] for name in names},
        dtype=options["dtype"] or (("bfloat16",) if device == "cuda" else ("float32",)),
        device=device,
        threads=options["threads"] or usable_cores(),
    )


def _standard(asked: Asked) -> int | None:
    """The version of the standard sweep, where this is it."""
    from attnbench.presets import STANDARD_SWEEP, STANDARD_VERSION

    is_standard = all(getattr(asked.sweep, name) == value for name, value in STANDARD_SWEEP.items())
    return STANDARD_VERSION if is_standard else None


def _warn_of_threads(console: Console, threads: int) -> None:
    if threads > usable_cores():
        console.print(
            f"warning: {threads} threads on {usable_cores()} usable cores will fight each other", markup=False
        )


def _device(asked: str, facts: Message) -> str:
    if asked == "cuda" and not facts["gpu"]:
        raise AttnbenchError("--device cuda: this machine or this torch has no CUDA device; use --device cpu")
    return asked if asked != "auto" else "cuda" if facts["gpu"] else "cpu"


def _l2(asked: str | None, device: str) -> str:
    if asked and device != "cuda":
        raise AttnbenchError("--l2 is for --device cuda: what a CPU's caches hold can't be chosen")
    return asked or "kept"


def _changed(old: Asked, changes: dict[str, Any], memory: int | None) -> Asked:
    from dataclasses import replace

    return replace(old, **changes, memory=memory or old.memory)


def _check_same_machine(record: Run, facts: Message) -> None:
    from attnbench.bench.machine import identity

    before, here = identity(record.meta.get("machine", {})), identity(facts)
    if before != here:
        different = next((a, b) for a, b in zip(before, here, strict=True) if a != b)
        raise AttnbenchError(
            f"{record.path} was measured on another machine ({different[0]}, here {different[1]}): start a new run"
        )


def _measure(
    server: Any, record: Run, asked: Asked, cells: list[Cell], baseline: str, began: float, console: Console
) -> None:
    from attnbench import records
    from attnbench.bench import runner
    from attnbench.progress import Watch

    record.repair()  # a broken run is refused before anything is said of it
    click.echo(f"{len(cells)} cells, budget {asked.budget:.0f} s, into {record.path}", err=True)
    try:
        with Watch(console, len(cells)) as watch:
            rows = runner.execute(server, record, asked, cells, baseline, watch, began)
    except KeyboardInterrupt:
        rows = records.rows(record.path)
        _summarise(rows, record, len(cells))
        click.echo(f"interrupted; go on with: attnbench run --resume {record.path}", err=True)
        sys.exit(INTERRUPTED)
    _summarise(rows, record, len(cells))
    sys.exit(0 if all(row["status"] in records.WELL for row in rows) else CELL_FAILED)


def _summarise(rows: list[Row], record: Run, planned: int) -> None:
    from collections import Counter

    from attnbench.records import STATUSES, WELL
    from attnbench.warnings import explain

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


def _print(table: Table) -> None:
    """On a terminal as wide as that is; into a file or a pipe wide enough for every row."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)


def _show_plan(cells: list[Cell], asked: Asked) -> None:
    from rich.table import Table

    from attnbench.bench.plan import Costs, allot, skip_too_dear, skip_too_large

    costs = Costs()
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
    _print(table)
    click.echo(
        f"{len(cells)} cells, budget {asked.budget:.0f} s, memory {asked.memory / 2**30:.1f} GiB. Seconds are a guess "
        "from counted operations until a run has measured; nothing was run."
    )


@main.command()
@click.argument("names", nargs=-1)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def plugins(names: tuple[str, ...], device: str) -> None:
    """List the variants installed, or show NAMES in full.

    Listing reads package metadata only. What a plugin says of itself is asked in a process of its own, for
    attnbench's own plugins and for those that NAMES asks for: loading a plugin runs its code.
    """
    from rich.table import Table

    from attnbench.bench.forkserver import Forkserver
    from attnbench.bench.plan import ask
    from attnbench.registry import Request, find, select
    from attnbench.workload import Workload

    found = find()
    chosen = [request.found for request in select(",".join(names), found)] if names else list(found.values())
    probe = Workload(seq=128, kv_seq=128, device=device, dtype="float32" if device == "cpu" else "bfloat16")
    table = Table("plugin", "family", "options", "devices", f"here on {device}", "from", box=None, pad_edge=False)
    with Forkserver(1) as server:
        for plugin in chosen:
            if not names and plugin.distribution != "attnbench":
                table.add_row(plugin.name, "", "", "", f"not loaded; attnbench plugins {plugin.name}", plugin.origin)
                continue
            answer = ask(server, Request(plugin), [probe])
            if "failed" in answer:
                table.add_row(plugin.name, "", "", "", f"{answer['failed']}: {answer['reason']}", plugin.origin)
                continue
            says = answer["instances"][0]["answers"][0]
            options = "\n".join(_option(key, value) for key, value in answer["options"].items())
            fit = says.get("unsupported", "yes")
            table.add_row(plugin.name, answer["family"], options, " ".join(answer["devices"]), fit, plugin.origin)
    _print(table)


def _option(name: str, option: dict[str, Any]) -> str:
    choices = "|".join(str(c) for c in option["choices"])
    return f"{name}={option['default']}  {choices and f'({choices}) '}{option['help']}"


@main.command()
@click.option("--preset", "name", help="A published model, such as gpt2-xl-1.5b or llama-3-8b.")
@click.option("--seq", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Without a preset.")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True, help="Without a preset.")
@click.option("--block", type=click.Choice(BLOCKS), help="[default: encoder, or as the preset is built]")
@click.option("--phase", type=click.Choice(PHASES), default="forward", show_default=True)
@click.option("--device-memory", help="Say whether the preset can be trained in it, such as 32GB.")
@click.pass_context
def theory(
    ctx: click.Context, name: str | None, seq: int, batch: int, heads: int, head_dim: int, block: str | None,
    phase: str, device_memory: str | None,
) -> None:  # fmt: skip
    """Count a block's matrix products, and the memory of a whole model, by formula. Nothing is run."""
    from attnbench import theory_pages
    from attnbench.presets import Model, Shape, preset

    given = [p for p in ("heads", "head_dim")
             if ctx.get_parameter_source(p) == click.core.ParameterSource.COMMANDLINE]  # fmt: skip
    if name and given:
        raise AttnbenchError(f"--preset says it already; drop --{given[0].replace('_', '-')}")
    shape = preset(name) if name else Shape(heads, heads, head_dim, head_dim, "as asked")
    memory = parse_bytes(device_memory, "device-memory") if device_memory else None
    if memory and not isinstance(shape, Model):
        raise AttnbenchError("--device-memory needs --preset with a whole model, such as gpt2-xl-1.5b")
    theory_pages.show(name, shape, seq, batch, block, memory, phase)


@main.command()
@click.option("--plugins", default="sdpa", show_default=True, help="As for run.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the first phase.")
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="New ones, one by one.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--block", type=click.Choice(["decoder-only", "decoder"]), default="decoder-only", show_default=True)
@click.option("--norm", type=click.Choice(NORMS), default="pre", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--kv-heads", type=click.IntRange(1), help="[default: as --heads]")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(1, 4096), help="[default: the cores this process may use]")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Of the whole; medians are shown."
)
@click.option("--timeout", type=_Seconds(0.1, 1e6), default=600, show_default=True, help="Seconds for a plugin.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write generation.json, .png and .svg here.")
def generate(plugins: str, out: Path | None, **sizes: Any) -> None:
    """Generate token by token, with a cache and without: the two phases of inference.

    A prompt goes through a stack of blocks at once, or with --block decoder through a stack of encoder blocks; then new
    tokens come one by one. Each is timed with the state that the variant keeps, and by computing all tokens again.
    """
    from attnbench.bench.forkserver import Forkserver
    from attnbench.generation import measure, show, write

    threads = sizes.pop("threads") or usable_cores()
    with Forkserver(threads) as server:
        found = measure(server, plugins, threads, **sizes)
    show(found)
    if out:
        write(found, out)
        click.echo(f"written: {out / 'generation.json'}")
    sys.exit(0 if all("failed" not in result for result in found.results) else CELL_FAILED)


@main.command()
@click.option("--threads", type=click.IntRange(1), help="Threads that variants would use.  [default: all usable cores]")
@click.option("--seconds", type=_Seconds(1), default=10.0, show_default=True, help="How long to try, for the A/A.")
@click.option("--precision", default="2%", show_default=True, help="What the A/A should reach.")
def doctor(threads: int | None, seconds: float, precision: str) -> None:
    """Say whether this machine is fit to measure on, and what to mend.

    The last line is tried: sdpa is measured against itself, and what differs by less than the interval of their
    ratio can't be told apart here. Exit code 1 where something is amiss.
    """
    from rich.table import Table

    from attnbench.bench import doctor, runner
    from attnbench.bench.forkserver import Forkserver

    wanted, threads = parse_precision(precision), threads or usable_cores()
    table = Table("", "found", "advice", box=None, pad_edge=False)
    with Forkserver(threads) as server:
        checks = doctor.look(runner.ask_machine(server), threads)
        checks.append(doctor.smallest_difference(server, threads, seconds, wanted))
    for check in checks:
        table.add_row(check.name, check.found, check.advice)
    _print(table)
    amiss = sum(bool(check.advice) for check in checks)
    click.echo("fit to measure on" if not amiss else f"{amiss} of {len(checks)} to mend")
    sys.exit(CELL_FAILED if amiss else 0)


@main.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 4096), help="[default: the cores this process may use]")
def calibrate(device: str, threads: int | None) -> None:
    """Measure this machine's ceilings: its fastest matrix products, and its fastest reads.

    They are kept for later runs with this device and these threads, whose report then tells how much of what is
    attainable each variant reached. Nothing else should run meanwhile: a disturbed calibration is not kept, with exit
    code 1.
    """
    from rich.console import Console
    from rich.table import Table

    from attnbench.bench import ceilings, runner
    from attnbench.bench.forkserver import Forkserver
    from attnbench.report import units

    threads = threads or usable_cores()
    _warn_of_threads(Console(stderr=True), threads)
    with Forkserver(threads) as server:
        facts = runner.ask_machine(server)
    click.echo("measuring, for less than a minute", err=True)
    found = ceilings.measure(_device(device, facts), threads)
    table = Table("", "ceiling", "reached at", box=None, pad_edge=False)
    for name, rate in found.operations_per_s.items():
        table.add_row(f"{name} products", units.rate(rate), found.at[name])
    table.add_row("reading memory", f"{units.size(found.bytes_per_s)}/s", found.at["memory"])
    if found.cache_bytes:
        table.add_row("last-level cache", units.size(found.cache_bytes), "as the machine says")
    _print(table)
    if found.disturbed > ceilings.QUIET:
        click.echo(
            f"not kept: others used {found.disturbed * threads:.1f} of the {units.count(threads, 'core')} meanwhile, "
            "so these are too low to judge by; calibrate again when the machine is quiet"
        )
        sys.exit(CELL_FAILED)
    where = ceilings.store(found, facts)
    click.echo(f"kept for runs on {found.device} with {units.count(threads, 'thread')}: {where}")


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True)
def report(runs: tuple[Path, ...], results: Path, out: Path) -> None:
    """Draw figures and write a page from RUNS (default: the newest run in --results)."""
    from attnbench.records import load, newest, read_meta
    from attnbench.report import write_report

    folders = list(runs) or [newest(results)]
    metas = [read_meta(folder) for folder in folders]
    click.echo(f"report: {write_report(load(folders), metas, out)}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["csv", "parquet", "pytest-benchmark", "github-action"]),
    default="csv",
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), help="The file to write.  [default: to stdout]")
def export(runs: tuple[Path, ...], kind: str, out: Path | None) -> None:
    """Write RUNS for other tools.

    csv and parquet hold every row. pytest-benchmark is the JSON that `pytest-benchmark compare` reads, github-action
    that of github-action-benchmark's customSmallerIsBetter; both hold the rows that have a value.
    """
    from attnbench.export import FORMATS, without_value

    chosen = FORMATS[kind]
    if out is None and not chosen.text:
        raise AttnbenchError(f"--format {kind} is not for a terminal; name a file with --out")
    content = chosen.write(runs)
    if out is None:
        click.echo(content, nl=False)
    else:
        try:
            out.write_bytes(content)
        except OSError as error:
            raise AttnbenchError(f"can't write {out}: {error.strerror}; choose another --out") from None
    if not chosen.failed and (missing := without_value(runs)):
        click.echo(f"left out: {missing} rows without a value", err=True)
