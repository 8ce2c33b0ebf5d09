"""Whether attnbench's latencies on a GPU agree with triton.testing.do_bench's: `python benchmarks/do_bench.py`.

One process, one callable, one set of tensors; both zero 256 MB before each call, so that the L2 cache holds none of its
inputs. do_bench's median of its calls beside attnbench's block, in turn: A B, B A and so on. Agreement is a paired
ratio within 3% of 1. bfloat16, 16k tokens in all, 16 heads of 128, full mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import shared
import torch

from attnbench.devices import device, machine
from attnbench.devices.bursts import burst_size
from attnbench.devices.device import describe
from attnbench.sizes import parse_sizes
from attnbench.theory import costs
from attnbench.workload import Workload

PLUGINS = "sdpa:backend=flash,sdpa:backend=cudnn,naive"
TOKENS = 16384
WITHIN = 0.03
_FLUSHED_BYTES = 256 << 20  # of do_bench and of attnbench each


def too_large(plugin: str, w: Workload) -> str | None:
    """Why a workload does not fit in the memory that is free now."""
    need = costs.input_bytes(w) + costs.output_bytes(w) + 2 * _FLUSHED_BYTES
    need += shared.plugin_of(plugin).workspace_bytes(w) or 0
    free, _ = torch.cuda.mem_get_info()
    return f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if need > free else None


def clocks(plugin: str, w: Workload) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of a call: by attnbench, and by do_bench."""
    from triton.testing import do_bench

    tensors = shared.tensors_of(w)
    call = shared.call_of(plugin, w)
    timer = device.of(tensors[0].device.type).timer(call, tensors, "flushed")
    call_s, _ = timer.warm_up()
    calls, head = burst_size(call_s)

    def ours() -> float:
        return timer.burst(calls, head)[0].seconds / calls

    return ours, lambda: do_bench(partial(call, *tensors), return_mode="median") / 1e3


def compare(
    plugin: str, seq: int, ours: Callable[[], float], theirs: Callable[[], float], pairs: int
) -> dict[str, Any]:
    """The row of one cell: both medians, and the paired ratio do_bench / attnbench."""
    ratio, own, other = shared.alternate(ours, theirs, pairs)
    return {
        "plugin": plugin,
        "seq": seq,
        "attnbench_s": median(own),
        "do_bench_s": median(other),
        "paired_ratio": ratio.median,
        "paired_ratio_low": ratio.low,
        "paired_ratio_high": ratio.high,
        "agree": abs(ratio.median - 1) <= WITHIN,
        "samples": {"attnbench_s": own, "do_bench_s": other},
    }


def show(row: dict[str, Any]) -> str:
    start = f"{row['plugin']:22} {row['seq']:6} "
    if "skipped" in row:
        return f"{start}not run: {row['skipped']}"
    low, high = row["paired_ratio_low"], row["paired_ratio_high"]
    interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
    said = f"{1e3 * row['attnbench_s']:12.4g} {1e3 * row['do_bench_s']:12.4g} {row['paired_ratio']:8.4f}{interval:18}"
    return f"{start}{said} {'met' if row['agree'] else 'MISSED'}"


@click.command()
@click.option("--plugins", default=PLUGINS, show_default=True)
@click.option("--seq", default="1024,4096,16384", show_default=True, help="As `attnbench run --seq`.")
@click.option("--pairs", default=10, show_default=True, help="At least 6 for an interval.")
@click.option("--out", type=click.Path(path_type=Path), help="A file for every figure and the machine, as JSON.")
def main(plugins: str, seq: str, pairs: int, out: Path | None) -> None:
    """Time each cell by both and print a line for it."""
    shared.needs_cuda()
    here = describe()
    click.echo(
        f"{here['gpu']}, torch {torch.__version__}; ratios are do_bench over attnbench, to be within {WITHIN:.0%}"
    )
    click.echo(f"{'plugin':22} {'seq':>6} {'attnbench ms':>12} {'do_bench ms':>12} {'paired':>8} [95%]")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for length in parse_sizes(seq):
            w = Workload(
                seq=length, kv_seq=length, batch=max(1, TOKENS // length), heads=16, kv_heads=16, head_dim=128,
                value_dim=128, dtype="bfloat16", device="cuda",
            )  # fmt: skip
            for plugin in plugins.split(","):
                try:
                    reason = shared.plugin_of(plugin).supports(w) or too_large(plugin, w)
                    row = {} if reason else compare(plugin, length, *clocks(plugin, w), pairs)
                except RuntimeError as problem:  # of torch or CUDA: the other cells go on
                    reason = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"
                rows.append({"plugin": plugin, "seq": length, "skipped": reason} if reason else row)
                click.echo(show(rows[-1]))
                torch.cuda.empty_cache()
    timed = [row for row in rows if "skipped" not in row]
    click.echo(f"{sum(row['agree'] for row in timed)} of {len(timed)} agree")
    if out:
        here["load_end"] = machine.load()
        out.write_text(json.dumps({"machine": here, "pairs": pairs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
