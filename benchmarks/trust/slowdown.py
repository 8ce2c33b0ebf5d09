"""Planted slowdowns: is a kernel that does a few per cent more work found slower, and by how much?

python benchmarks/trust/slowdown.py [--loaded] [--truth FILE] --out FILE

The true ratio of each length comes from one long quiet measurement (`--truth-seconds`), or from an earlier FILE.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import pair

from attnbench.sizes import parse_sizes
from attnbench.workers.server import Forkserver

Ratios = dict[str, dict[str, float]]  # by per cent of more work, by length


def measure_truth(
    server: Forkserver, extras: list[float], seconds: float, threads: int, lengths: tuple[int, ...]
) -> Ratios:
    """The ratio of each extra and length, from so many seconds each."""
    return {
        f"{extra:g}": {
            str(w.seq): pair.attnbench(server, w, extra, seconds, 0).ratio
            for w in pair.workloads(len(lengths), 0, threads, lengths)
        }
        for extra in extras
    }


@click.command()
@click.option("--extra", "extras", multiple=True, type=float, default=(2.0, 5.0, 10.0), show_default=True)
@click.option("--pairs", default=40, show_default=True, help="For each extra.")
@click.option("--seconds", default=10.0, show_default=True, help="Budget of a pair.")
@click.option("--truth-seconds", default=60.0, show_default=True, help="Of one long measurement, for each length.")
@click.option("--truth", "earlier", type=click.Path(path_type=Path, exists=True), help="Take true ratios from here.")
@click.option("--loaded", is_flag=True, help="While another process keeps one core busy on and off.")
@click.option("--lengths", default="512,1024,2048,4096", show_default=True, help="Of the pairs, in turn.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write every answer here, as JSON.")
def main(
    extras: tuple[float, ...],
    pairs: int,
    seconds: float,
    truth_seconds: float,
    earlier: Path | None,
    loaded: bool,
    lengths: str,
    threads: int,
    seed: int,
    out: Path | None,
) -> None:
    """Measure pairs with planted slowdowns and print how many are found, and how far the estimates are off."""
    with Forkserver(threads) as server:
        facts = pair.machine_facts(server)
        if earlier:
            truth: Ratios = json.loads(earlier.read_text())["truth"]
        else:
            truth = measure_truth(server, list(extras), truth_seconds, threads, parse_sizes(lengths))
        noise = "loaded" if loaded else "quiet"
        click.echo(f"{pairs} pairs each, {seconds:g} s a pair, {noise}, {facts['cpu']}, {threads} threads")
        click.echo(f"{'longer by':>9} {'true ratios by length':>33} {'found slower':>14} {'off by (median)':>16}")
        answers = {}
        with pair.load(loaded):
            for extra in extras:
                true, rows = truth[f"{extra:g}"], []
                for i, workload in enumerate(pair.workloads(pairs, seed, threads, parse_sizes(lengths))):
                    answer = pair.attnbench(server, workload, extra, seconds, seed + i)
                    rows.append({"seq": workload.seq, **vars(answer)})
                    click.echo(f"{extra:g}%, pair {i + 1} of {pairs}: {rows[-1]}", err=True)
                found = sum(row["different"] and row["ratio"] < 1 for row in rows)
                off = statistics.median(abs(row["ratio"] / true[str(row["seq"])] - 1) for row in rows)
                ratios = " ".join(f"{ratio:.4f}" for ratio in true.values())
                click.echo(f"{extra:8g}% {ratios:>33} {found:7d} of {pairs:3d} {off:16.2%}")
                answers[f"{extra:g}"] = rows
    if out:
        record = {
            "pairs": pairs, "seconds": seconds, "loaded": loaded, "threads": threads, "seed": seed,
            "machine": facts, "truth_seconds": truth_seconds, "truth": truth, "answers": answers,
        }  # fmt: skip
        out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
