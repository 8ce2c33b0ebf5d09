"""The CPU kernels against torch's SDPA in bf16, through attnbench itself, with the bars they are to reach.

python benchmarks/cpu_kernels.py [--budget SECONDS] [--name NAME]

Runs `attnbench run` (batch 1, heads 8, head dim 64, 2 threads; what is quantized or packed is so inside the time), then
prints each bar beside what was measured. With --run FOLDER it only prints, from an earlier run.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

import attnbench

SEQ = (2048, 8192)
SPARSE = "block-sparse:impl={impl}:window={window}"
PLUGINS = (
    "tiled:impl=strip",
    "tiled:impl=avx512",
    "int8:impl=qk",
    "int8:impl=qkpv",
    *(SPARSE.format(impl=impl, window=window) for impl in ("avx512", "flex") for window in (256, 1024)),
    "linear",
)


@dataclass(frozen=True)
class Bar:
    what: str
    wanted: float
    measured: float
    low: float | None = None  # of its 95% interval
    high: float | None = None
    most: bool = False  # the bar is an upper one

    def __str__(self) -> str:
        met = self.measured <= self.wanted if self.most else self.measured >= self.wanted
        sign, number = ("<=", "{:.2g}") if self.most else (">=", "{:.2f}")
        interval = f" [{self.low:.2f}, {self.high:.2f}]" if self.low and self.high else ""
        figures = f"{sign} {number.format(self.wanted):>7} {number.format(self.measured):>8}{interval:15}"
        return f"{self.what:58} {figures} {'met' if met else 'MISSED'}"


class Table:
    """The run's rows by plugin, mask and length."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows[rows.status == "ok"]

    def __call__(self, plugin: str, mask: str, seq: int) -> pd.Series | None:
        name, *options = plugin.split(":")
        fits = (self.rows.variant == name) & (self.rows["mask"] == mask) & (self.rows.seq == seq)
        for option in options:
            fits &= (":" + self.rows.plugin + ":").str.contains(f":{option}:", regex=False)
        found = self.rows[fits]
        return found.iloc[0] if len(found) else None


FULL = {  # over sdpa, full, by length; relative L2 at most
    "tiled:impl=strip": (2.1, 2.4, 5e-3),
    "tiled:impl=avx512": (4.2, 4.6, None),  # 1.05 x sdpa's own
    "int8:impl=qk": (4.5, 5.5, 1e-2),
    "int8:impl=qkpv": (5.0, 7.0, 1.7e-2),
}


def bars(table: Table) -> list[Bar]:
    found = []
    for i, seq in enumerate(SEQ):
        for mask in ("full", "causal"):
            sdpa = table("sdpa", mask, seq)
            for plugin, (*ratios, limit) in FULL.items():
                row, full = table(plugin, mask, seq), table(plugin, "full", seq)
                if row is None or full is None or sdpa is None:
                    continue
                wanted = ratios[i] if mask == "full" else 0.85 * full.speedup
                what = f"{plugin}, {mask}, {seq}"
                found.append(Bar(f"{what}: x sdpa", wanted, row.speedup, row.speedup_low, row.speedup_high))
                found.append(
                    Bar(
                        f"{what}: relative L2",
                        limit or 1.05 * sdpa.approximation_rel_l2,
                        row.approximation_rel_l2,
                        most=True,
                    )
                )
            dense, qk = table("tiled:impl=avx512", mask, seq), table("int8:impl=qk", mask, seq)
            if i == 1 and dense is not None and qk is not None:
                found.append(Bar(f"int8 qk, {mask}, {seq}: x tiled avx512", 1.15, qk.speedup / dense.speedup))
            for window in (256, 1024):
                ours, flex = (table(SPARSE.format(impl=i, window=window), mask, seq) for i in ("avx512", "flex"))
                what = f"block-sparse window {window}, {mask}, {seq}"
                if ours is not None and dense is not None:
                    pairs = 1.0 if mask == "full" else (seq + 1) / (2 * seq)  # of seq^2, that the dense kernel needs
                    share = ours.speedup / dense.speedup / (pairs / ours.density)
                    found.append(Bar(f"{what}: share of 1 / density over tiled", 0.75, share))
                if i == 1 and ours is not None and flex is not None:
                    found.append(Bar(f"{what}: x flex_attention", 2.0, ours.speedup / flex.speedup))
        linear = table("linear", "causal", seq)
        if linear is not None:
            what = f"linear, causal, {seq}"
            found.append(Bar(f"{what}: x sdpa", (8, 25)[i], linear.speedup, linear.speedup_low, linear.speedup_high))
            found.append(Bar(f"{what}: relative L2 to its own", 4e-3, linear.implementation_rel_l2, most=True))
    return found


@click.command()
@click.option("--budget", default=900, show_default=True, help="Seconds for the sweep.")
@click.option("--name", default="cpu-kernels", show_default=True)
@click.option("--run", "earlier", type=click.Path(path_type=Path, exists=True), help="Only print, from this run.")
def main(budget: int, name: str, earlier: Path | None) -> None:
    """Measure the kernels and print each bar."""
    if earlier is None:
        command = [
            sys.executable, "-m", "attnbench", "run", "--plugins", ",".join(PLUGINS), "--seq",
            ",".join(map(str, SEQ)), "--dtype", "bfloat16", "--mask", "full,causal", "--scope", "attention",
            "--threads", "2", "--budget", str(budget), "--name", name,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        click.echo(done.stdout)
        earlier = Path(next(line for line in done.stdout.splitlines() if line.startswith("run: "))[len("run: ") :])
    found = bars(Table(attnbench.load(earlier)))
    for bar in found:
        click.echo(str(bar))
    missed = sum(str(bar).endswith("MISSED") for bar in found)
    click.echo(f"{len(found) - missed} of {len(found)} bars met")


if __name__ == "__main__":
    main()
