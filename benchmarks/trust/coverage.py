"""How often attnbench's 95% interval of a speedup holds the truth, by simulation.

Rounds of paired ratios are drawn whose true median is 1, with what spoils intervals in practice: rounds that resemble
their neighbours (an AR(1) process), a bias that each process keeps for life, and spikes. They go through the schedule,
the early looks and the interval that a session uses.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from attnbench.stats.intervals import Interval, interval
from attnbench.sweep.stopping import schedule

NOISE = 0.03  # standard deviation of one round's log ratio
SPIKE_SHARE, SPIKE_SIZE = 0.05, 0.3


def draw(rng: np.random.Generator, rounds: int, processes: int, rho: float, bias: float, spikes: bool) -> np.ndarray:
    """Ratios (processes, rounds) with true median 1."""
    noise = rng.standard_normal((processes, rounds))
    for i in range(1, rounds):
        noise[:, i] = rho * noise[:, i - 1] + np.sqrt(1 - rho**2) * noise[:, i]
    log = NOISE * noise + bias * rng.standard_normal((processes, 1))
    if spikes:  # as often in the baseline's turn as in the other's
        hit = rng.random(log.shape) < SPIKE_SHARE
        log = log + hit * SPIKE_SIZE * rng.choice([-1, 1], log.shape)
    return np.exp(log)


def measure(ratios: np.ndarray, precision: float) -> Interval:
    """What a session would report, early stop included."""
    processes, rounds = ratios.shape
    plan = schedule(ratios.size, processes)
    if processes == 1:
        ends = [*plan.looks, rounds]
        parts = [(ratios[0, :n], np.zeros(n)) for n in ends]
    else:
        parts = [(ratios[:n].ravel(), np.repeat(np.arange(n), rounds)) for n in [*plan.looks, processes]]
    for i, (values, numbers) in enumerate(parts):
        found = interval(list(values), list(numbers), plan.confidence(early=i < len(plan.looks)))
        if found.half_width is not None and found.half_width <= precision:
            break
    return found


@click.command()
@click.option("--trials", default=2000, show_default=True)
@click.option("--precision", default=0.02, show_default=True, help="At which a cell stops early.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the figures here, as JSON.")
def main(trials: int, precision: float, seed: int, out: Path | None) -> None:
    """Print coverage, and how often there was an interval at all, for each kind of noise."""
    rng = np.random.default_rng(seed)
    rows = []
    click.echo("processes rounds   rho  bias spikes  coverage  no interval  half-width")
    for processes, rounds in ((1, 6), (1, 12), (1, 25), (1, 50), (1, 100), (5, 2), (5, 6), (10, 6), (20, 10)):
        for rho, bias, spikes in ((0, 0, False), (0, 0, True), (0.5, 0, False), (0, 0.01, False), (0.5, 0.02, True)):
            found = [measure(draw(rng, rounds, processes, rho, bias, spikes), precision) for _ in range(trials)]
            held = [i.low <= 1 <= i.high for i in found if i.low is not None and i.high is not None]
            width = float(np.median([i.half_width for i in found if i.half_width is not None] or [np.nan]))
            row = {
                "processes": processes, "rounds": rounds, "rho": rho, "bias": bias, "spikes": spikes,
                "coverage": float(np.mean(held)), "no_interval": 1 - len(held) / trials, "half_width": width,
            }  # fmt: skip
            rows.append(row)
            click.echo(
                f"{processes:9d} {rounds:6d} {rho:5.1f} {bias:5.1%} {'yes' if spikes else 'no':>6} "
                f"{row['coverage']:9.1%} {row['no_interval']:12.1%} {width:11.2%}"
            )
    if out:
        out.write_text(json.dumps({"trials": trials, "precision": precision, "seed": seed, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
