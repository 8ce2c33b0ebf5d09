"""A/A: a kernel against its own copy. How often does each method call them different, and by how much is it off?

python benchmarks/trust/aa.py [--loaded] --out FILE
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import pair

from attnbench.sizes import parse_sizes
from attnbench.workers.server import Forkserver

METHODS = ("attnbench", "torch_timer", "medians_apart", "means_apart")


@click.command()
@click.option("--pairs", default=200, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Budget of a pair, for each method.")
@click.option("--loaded", is_flag=True, help="While another process keeps one core busy on and off.")
@click.option("--extra", default=0.0, show_default=True, help="Per cent of more work in the second kernel.")
@click.option("--habits", default=40, show_default=True, help="So many of the pairs by the habits of the trade too.")
@click.option("--lengths", default="512,1024,2048,4096", show_default=True, help="Of the pairs, in turn.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write every answer here, as JSON.")
def main(
    pairs: int,
    seconds: float,
    loaded: bool,
    extra: float,
    habits: int,
    lengths: str,
    threads: int,
    seed: int,
    out: Path | None,
) -> None:
    """Measure pairs and print what each method says of them."""
    answers: dict[str, list[pair.Answer]] = {method: [] for method in METHODS[: None if habits else 1]}
    taken = []
    with Forkserver(threads) as server, pair.load(loaded):
        facts = pair.machine_facts(server)
        for i, workload in enumerate(pair.workloads(pairs, seed, threads, parse_sizes(lengths))):
            taken.append(workload.seq)
            answers["attnbench"].append(pair.attnbench(server, workload, extra, seconds, seed + i))
            if i < habits:
                answers["torch_timer"].append(pair.torch_timer(workload, extra, seconds))
                medians, means = pair.one_after_the_other(workload, extra, seconds)
                answers["medians_apart"].append(medians)
                answers["means_apart"].append(means)
            click.echo(f"pair {i + 1} of {pairs}, {workload.seq}: {answers['attnbench'][-1]}", err=True)
    noise = "loaded" if loaded else "quiet"
    for length in sorted(set(taken)):
        given = [answer for answer, of in zip(answers["attnbench"], taken, strict=True) if of == length]
        width = statistics.median(answer.half_width or float("inf") for answer in given)
        click.echo(f"{length}: {sum(a.different for a in given)} of {len(given)} different, half-width {width:.2%}")
    click.echo(f"{pairs} pairs, {seconds:g} s each, {noise}, {facts['cpu']}, {threads} threads")
    click.echo(f"{'method':14} {'different':>12} {'median ratio':>13} {'off by (median)':>16} {'half-width':>11}")
    for method, given in answers.items():
        different = sum(a.different for a in given)
        ratios = [a.ratio for a in given]
        off = statistics.median(abs(r - 1) for r in ratios)
        widths = [a.half_width for a in given if a.half_width is not None]
        width, middle = f"{statistics.median(widths):.2%}" if widths else "", statistics.median(ratios)
        click.echo(f"{method:14} {different:4d} of {len(given):4d} {middle:13.4f} {off:16.2%} {width:>11}")
    if out:
        record = {
            "pairs": pairs, "seconds": seconds, "loaded": loaded, "extra": extra, "threads": threads, "seed": seed,
            "machine": facts, "lengths": taken,
            "answers": {m: [vars(a) for a in given] for m, given in answers.items()},
        }  # fmt: skip
        out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
