"""Whether attnbench's latencies agree with torch.utils.benchmark's: `python benchmarks/torch_timer.py`.

One process, one callable, one set of tensors, as many calls a block: only who holds the clock differs. Both time a
block in each round, in an order that is drawn, so that drift of the machine hits them alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import shared
import torch
from torch.utils.benchmark import Timer

from attnbench.devices import bursts, device, machine
from attnbench.devices.bursts import burst_size
from attnbench.devices.device import describe
from attnbench.devices.machine import usable_cores
from attnbench.sizes import parse_sizes
from attnbench.stats.intervals import median_interval
from attnbench.workload import Workload


def ours(timer: bursts.Timer, calls: int, head: int) -> float:
    """Seconds a call, as a worker times a block."""
    block, _ = timer.burst(calls, head)
    return block.seconds / calls


def theirs(timer: Timer, calls: int) -> float:
    """Seconds a call; torch makes two untimed calls, or a hundredth of `calls`, first."""
    return float(timer.timeit(calls).median)


def compare(plugins: list[str], workload: Workload, rounds: int, draw: random.Random) -> list[dict[str, Any]]:
    """A row for each plugin: both medians and the paired ratio, torch.utils.benchmark's over attnbench's."""
    tensors = shared.tensors_of(workload)
    clocks: dict[tuple[str, str], Callable[[], float]] = {}
    calls = {}
    for plugin in plugins:
        call = shared.call_of(plugin, workload)
        own = device.of("cpu").timer(call, tensors)
        seconds, _ = own.warm_up()
        calls[plugin], head = burst_size(seconds)
        names = {"call": call} | dict(zip("qkv", tensors, strict=True))
        timer = Timer("call(q, k, v)", globals=names, num_threads=workload.threads)
        clocks[plugin, "attnbench"] = partial(ours, own, calls[plugin], head)
        clocks[plugin, "torch"] = partial(theirs, timer, calls[plugin])
    seconds_of: dict[tuple[str, str], list[float]] = {key: [] for key in clocks}
    for _ in range(rounds):
        for key in draw.sample(list(clocks), len(clocks)):
            seconds_of[key].append(clocks[key]())
    rows = []
    for plugin in plugins:
        attnbench, torch_timer = seconds_of[plugin, "attnbench"], seconds_of[plugin, "torch"]
        ratio = median_interval([t / a for a, t in zip(attnbench, torch_timer, strict=True)])
        medians = statistics.median(attnbench), statistics.median(torch_timer)
        rows.append(
            {
                "plugin": plugin,
                "seq": workload.seq,
                "calls": calls[plugin],
                "attnbench_s": medians[0],
                "torch_s": medians[1],
                "ratio_of_medians": medians[1] / medians[0],
                "paired_ratio": ratio.median,
                "paired_ratio_low": ratio.low,
                "paired_ratio_high": ratio.high,
                "samples": {"attnbench_s": attnbench, "torch_s": torch_timer},
            }
        )
    return rows


def show(row: dict[str, Any]) -> None:
    low, high = row["paired_ratio_low"], row["paired_ratio_high"]
    interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
    print(
        f"{row['plugin']:8} {row['seq']:6} {1e3 * row['attnbench_s']:12.4g} {1e3 * row['torch_s']:12.4g} "
        f"{row['ratio_of_medians']:8.4f} {row['paired_ratio']:8.4f}{interval}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", default="sdpa,naive")
    parser.add_argument("--seq", default="512..4096", help="as `attnbench run --seq`")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the figures and every sample, as JSON")
    asked = parser.parse_args()

    torch.set_num_threads(asked.threads)
    here = describe()
    print(f"{here['cpu']}, {asked.threads} threads, torch {torch.__version__}, load {here['load_start']}")
    print("8 heads, head dim 64, float32, full mask; ratios are torch.utils.benchmark over attnbench")
    print(f"{'plugin':8} {'seq':>6} {'attnbench ms':>12} {'torch ms':>12} {'medians':>8} {'paired':>8} [95%]")
    rows, draw = [], random.Random(asked.seed)
    with torch.no_grad():
        for seq in parse_sizes(asked.seq):
            workload = Workload(seq=seq, kv_seq=seq, threads=asked.threads)
            for row in compare(asked.plugins.split(","), workload, asked.rounds, draw):
                show(row)
                rows.append(row)
    furthest = max(abs(row[kind] - 1) for row in rows for kind in ("ratio_of_medians", "paired_ratio"))
    print(f"furthest from 1: {furthest:.2%}")
    if asked.out:
        settings = {"rounds": asked.rounds, "threads": asked.threads, "seed": asked.seed}
        here["load_end"] = machine.load()
        asked.out.write_text(json.dumps({"machine": here, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
