"""What commands share: exit codes, kinds of parameters, and how a table is printed."""

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from attnbench import environment
from attnbench.bias import BIASES
from attnbench.devices import cgroup
from attnbench.devices.machine import usable_cores
from attnbench.packages import left_out
from attnbench.records import strict
from attnbench.style import STYLES
from attnbench.workload import BLOCKS, DEVICES, DTYPES, INPUTS, NORMS, PHASES

if TYPE_CHECKING:
    from attnbench.records.ceilings import Checked

option = partial(click.option, show_default=True)
F = TypeVar("F", bound=Callable[..., Any])
CELL_FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:  # NaN passes every range
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


THREADS = option("--threads", type=click.IntRange(1, 4096), help="[default: the cores this process may use]")
ISA = option(
    "--isa",
    type=click.Choice(list(environment.ISAS)),
    default="auto",
    help="avx2, or with AVX-VNNI: torch, MKL, oneDNN and attnbench's kernels do with that, whatever else the CPU has.",
)
COUNT, PATH = click.IntRange(1), click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DEVICE = option("--device", type=click.Choice(["auto", *DEVICES]), default="auto")


def _plugins(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What may come next of a list of names: for a shell that completes."""
    from attnbench.registry import find

    before, comma, begun = incomplete.rpartition(",")
    return [before + comma + name for name in ("all", *find()) if name.startswith(begun)]


_LENGTHS = "512..4096 doubles, 512..4096+512 steps, 512,1000 lists"
_VARIANTS = (
    option(
        "--plugins",
        default="all",
        shell_complete=_plugins,
        help="all, names (a,b), patterns (block*), name:key=value.",
    ),
    option("--baseline", default="sdpa", help="What speedups refer to; always run. none: nothing."),
)
_WORKLOADS = (
    option("--seq", help=f"Query lengths: {_LENGTHS}.  [default: 512..16384]"),
    option(
        "--kv-seq",
        help="Key lengths, likewise; to decode, give either for them: one token is new.  [default: as --seq]",
    ),
    option("--batch", help="[default: 1]"),
    option("--tokens", type=COUNT, help="Of the whole batch at each length, instead of --batch."),
    option("--heads", help="[default: 8]"),
    option("--kv-heads", help="Fewer than --heads is grouped-query.  [default: as --heads]"),
    option("--head-dim", help="[default: 64]"),
    option("--value-dim", help="[default: as --head-dim]"),
    option(
        "--preset",
        help="Heads, kv heads and dims of a model, such as llama-3-8b; or standard, the sweep that compares machines.",
    ),
    option(
        "--dtype",
        help=f"{', '.join(DTYPES)}; lists too.  [default: bfloat16 where it is multiplied as such, else float32]",
    ),
    DEVICE,
    option(
        "--mask",
        help="full, causal, window:N, to decode tree:2x3 (drafts); lists too.  [default: causal; full for an encoder]",
    ),
    option("--scale", type=float, help="Multiplies the scores.  [default: 1 / sqrt(head dim)]"),
    option("--softcap", type=float, help="Scores s become N tanh(s / N), as in Gemma 2."),
    option("--bias", type=click.Choice(BIASES), help="Added to scores by distance: ALiBi, or as T5 does."),
    option("--phase", help=f"{', '.join(PHASES)}; lists too.  [default: forward]"),
    option(
        "--scope",
        type=click.Choice(["attention", "block", "all"]),
        help="Attention alone, inside the block, or both.  [default: both, the block up to 4096]",
    ),
    option("--block", type=click.Choice(BLOCKS), help="[default: decoder-only; with --mask encoder]"),
    option("--norm", type=click.Choice(NORMS), help="[default: pre]"),
    option("--style", type=click.Choice(list(STYLES)), help="Of the block's layers.  [default: classic]"),
    option("--layers", help="Blocks stacked on each other.  [default: 1]"),
    option("--lengths", help="Of a ragged batch, the tokens of each entry: 512,300,77; or drawn."),
    option(
        "--batch-spec",
        help="A server's batch in vLLM's grammar: q2k_8q1s1k, a prompt beside 8 decoding steps at 1024 keys.",
    ),
    option("--inputs", help=f"{', '.join(INPUTS)} or a model's layer, smollm2:3; lists too.  [default: normal]"),
    option("--seed", type=click.IntRange(0, 2**31 - 1), help="[default: 0]"),
    THREADS,
    ISA,
)


def sweep(command: F) -> F:
    """Adds the options that say which variants are measured on which workloads."""
    command = workloads(command)
    for each in reversed(_VARIANTS):
        command = each(command)
    return command


def workloads(command: F) -> F:
    """Adds the options that say on which workloads."""
    for each in reversed(_WORKLOADS):
        command = each(command)
    return command


def tell(line: str) -> None:
    """Says something beside what was asked for. A full disk behind stderr is no reason to stop."""
    with suppress(OSError):
        click.echo(line, err=True)


def faster_than_auto(found: "Checked") -> str:
    """What `attnbench calibrate` found to be faster than what auto takes, in a line."""
    from attnbench.report import units

    return f"{found.advice} is {units.ratio(found.times, found.low, found.high)} as fast as auto on {found.where}"


def warn_of_threads(threads: int) -> None:
    cores, quota = usable_cores(), cgroup.cpus()
    if threads > cores:
        tell(f"warning: {threads} threads on {cores} usable cores will fight each other")
    elif quota is not None and threads > quota:
        few = f"{threads} thread{'s' * (threads > 1)}"
        tell(f"warning: the cgroup gives {few} the time of {quota:g} cores, so it will halt them in turns (throttled)")


def warn_of_packages() -> None:
    for folder in left_out():
        tell(f"warning: {folder} can't be read, so its package is left out with what it offers; mend or remove it")


def warn_of_pinning(threads: int, facts: Mapping[str, Any]) -> None:
    """facts: of the machine. What `warn_of_threads` sees by itself is not said again."""
    running = facts["threads_at_once"]
    if running is None or running >= min(threads, usable_cores()):
        return
    names = " and ".join(environment.of_threads(facts))
    mend = f"unset {names}, or ask" if names else "ask"
    tell(f"warning: only {running} of {threads} threads can run at a time; {mend} for --threads {running}")


def typed(ctx: click.Context) -> set[str]:
    """The parameters that stand on the command line, as against their defaults."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def width() -> int:
    """Columns of the terminal; into a file or a pipe what COLUMNS says, or a hundred."""
    return shutil.get_terminal_size((100, 24)).columns


def print_json(value: Any) -> None:
    click.echo(strict.dumps(value, indent=1))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    pad_edge: bool = True,
    right: bool = False,
    within: int | None = None,
) -> None:
    """On a terminal as wide as that is; into a file or a pipe wide enough for every row, or `within` so many columns.

    right: flush right.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=pad_edge)
    for column in columns:
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*row)
    Console(width=within or (None if sys.stdout.isatty() else 200), markup=False, highlight=False).print(table)
