"""One query against a cache of keys and values: the share of the machine's read bandwidth, and the speedup over sdpa.

python benchmarks/decode.py [--rounds 30] [--out FILE]

Each round times, in one process: torch's sum over as many bytes as the cache has, `tiled`, and `sdpa` (bfloat16, batch
1, 8 heads of 64). Bandwidth is that of the sum; the share is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import shared
import torch

from attnbench.devices.device import describe
from attnbench.workload import Workload


@click.command()
@click.option("--seq", "lengths", multiple=True, type=int, default=(8192, 65536), show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write every time here, as JSON.")
def main(lengths: tuple[int, ...], rounds: int, threads: int, out: Path | None) -> None:
    """Measure and print a line for each length."""
    torch.set_num_threads(threads)
    record: dict[str, object] = {"machine": describe(), "threads": threads}
    for length in lengths:
        w = Workload(seq=1, kv_seq=length, dtype="bfloat16", threads=threads)
        tensors = shared.tensors_of(w)
        cache = sum(x.nbytes for x in tensors[1:])
        buffer = torch.ones(cache // 4)
        tiled, sdpa = shared.call_of("tiled", w), shared.call_of("sdpa", w)
        work = {
            "read": buffer.sum,
            "tiled": lambda f=tiled, x=tensors: f(*x),
            "sdpa": lambda f=sdpa, x=tensors: f(*x),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(rounds + 2):
            for name, f in work.items():
                start = time.perf_counter()
                f()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        share, speedup = (
            statistics.median(a / b for a, b in zip(times[name], times["tiled"], strict=True))
            for name in ("read", "sdpa")
        )
        rate = cache / statistics.median(times["read"]) / 1e9
        click.echo(
            f"{length:6d} keys: {cache / 2**20:.0f} MiB, read at {rate:.1f} GB/s; tiled reaches {share:.0%} of that, "
            f"{speedup:.2f} x sdpa"
        )
        record[str(length)] = times
    if out:
        out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
