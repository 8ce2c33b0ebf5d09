"""Projections per head against fused ones: `python docs/lecture/projections.py`.

The lecture counts 3 k products for k heads: (l x d_m)(d_m x d_k) for each of Q, K, V and head. The same numbers, and
as many operations, are in three products with d_m x d_m, heads side by side, and in one with d_m x 3 d_m.

Look for: ratios per head / three and three / one. Above 1: the fused one is faster. An interval that holds 1 tells
nothing apart. Rounds take all in turn, shuffled; a ratio is taken within its round, and all rounds in one process.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnbench.devices.bursts import burst_size
from attnbench.devices.device import describe, of
from attnbench.devices.machine import usable_cores
from attnbench.sizes import parse_sizes
from attnbench.stats.intervals import Interval, interval

MODELS = ((512, 8), (1024, 16))  # d_m, k
RATIOS = (("per head", "three"), ("three", "one"))


def ways(x: Tensor, weights: Tensor, heads: int) -> dict[str, Callable[[], Any]]:
    """x (l, d_m), weights (d_m, 3 d_m) -> the ways to project; each way's matrices are contiguous."""
    three = [part.contiguous() for part in weights.chunk(3, 1)]
    each = [part.contiguous() for part in weights.chunk(3 * heads, 1)]
    return {
        "per head": lambda: [x @ part for part in each],
        "three": lambda: [x @ part for part in three],
        "one": lambda: x @ weights,
    }


def measure(length: int, width: int, heads: int, rounds: int) -> dict[str, Any]:
    """One row: seconds of each way, round by round, and the ratios with their intervals."""
    x = torch.randn(length, width)
    calls = ways(x, torch.randn(width, 3 * width) * width**-0.5, heads)
    for name in ("per head", "three"):
        torch.testing.assert_close(torch.cat(calls[name](), 1), calls["one"](), rtol=1e-4, atol=1e-4)
    timers = {name: of("cpu").timer(lambda _, f=f: f(), [x]) for name, f in calls.items()}
    bursts = {name: burst_size(each.warm_up()[0]) for name, each in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            burst, _ = timers[name].burst(*bursts[name])
            seconds[name].append(burst.seconds / burst.calls)
    row: dict[str, Any] = {"seq": length, "d_m": width, "heads": heads, "seconds": seconds}
    for over, under in RATIOS:
        paired = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        row[f"{over} / {under}"] = interval(paired, [0] * rounds)._asdict()
    return row


def span(ratio: Interval) -> str:
    return f"{ratio.median:.3f} [{'too few rounds' if ratio.low is None else f'{ratio.low:.3f}, {ratio.high:.3f}'}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", default="128,512,2048", help="lengths, as `attnbench run --seq` writes them")
    parser.add_argument("--rounds", type=int, default=20, help="of each length")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    asked = parser.parse_args()

    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    random.seed(0)
    here, rows = describe(), []
    print(f"{here['cpu']}, {here['cores']} cores, {usable_cores()} threads, torch {torch.__version__}, float32")
    print(f"  d_m   k      l       three{'per head / three [95%]':>30}{'three / one [95%]':>30}")
    for (width, heads), length in ((model, n) for model in MODELS for n in parse_sizes(asked.seq)):
        rows.append(row := measure(length, width, heads, asked.rounds))
        median = sorted(row["seconds"]["three"])[asked.rounds // 2]
        spans = (span(Interval(**row[f"{over} / {under}"])) for over, under in RATIOS)
        print(f"{width:5} {heads:3} {length:6} {1e3 * median:8.2f} ms" + "".join(f"{each:>30}" for each in spans))
    if asked.out:
        asked.out.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
