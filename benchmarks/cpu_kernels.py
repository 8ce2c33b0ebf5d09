"""The CPU kernels against torch's SDPA in bf16, through attnbench itself, with the bars they are to reach.

python benchmarks/cpu_kernels.py [--budget SECONDS] [--name NAME]

Runs `attnbench run` three times (batch 1, heads 8, 2 threads; what is quantized or packed is so inside the time): all
kernels with a head dim of 64, linear attention at 16384, and the dense kernels with a head dim of 128 and in training.
Then it prints each bar beside what was measured. With --run FOLDER, once for each, it only prints, from earlier runs.

`pip install './peers[cpu]'` puts other libraries' attention beside them. After `attnbench calibrate` the
share of the machine's bfloat16 products is printed too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import pandas as pd
import shared
from shared import Bar

import attnbench
from attnbench import registry
from attnbench.records.run import read_meta
from attnbench.theory.roofline import Ceilings

PEERS = ("onnxruntime",)
SEQ = (2048, 8192)
SPARSE = "block-sparse:impl={impl}:window={window}"
PLUGINS = (
    "tiled:impl=strip",
    "tiled:impl=native",
    "int8:impl=qk",
    "int8:impl=qkpv",
    *(SPARSE.format(impl=impl, window=window) for impl in ("native", "flex") for window in (256, 1024)),
    "linear",
)
DENSE = "tiled:impl=native,int8:impl=qk,int8:impl=qkpv"
SWEEPS = {  # name: share of the budget, arguments of `attnbench run`
    "": (0.6, {"seq": "2048,8192", "mask": "full,causal"}),
    "-linear": (0.12, {"plugins": "linear", "seq": "16384", "mask": "causal"}),
    "-wide": (0.14, {"plugins": DENSE, "seq": "2048,8192", "mask": "full", "head-dim": "128"}),
    "-train": (0.14, {"plugins": "tiled", "seq": "2048,8192", "mask": "full,causal", "phase": "train"}),
}


class Table:
    """The run's rows by plugin, mask and length."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows[rows.status == "ok"]

    def __call__(self, plugin: str, mask: str, seq: int, dim: int = 64, phase: str = "forward") -> pd.Series | None:
        name, *options = plugin.split(":")
        fits = (self.rows.variant == name) & (self.rows["mask"] == mask) & (self.rows.seq == seq)
        fits &= (self.rows.head_dim == dim) & (self.rows.phase == phase)
        for option in options:
            fits &= (":" + self.rows.plugin + ":").str.contains(f":{option}:", regex=False)
        found = self.rows[fits]
        return found.iloc[0] if len(found) else None


FULL = {  # over sdpa, full, by length; relative L2 at most
    "tiled:impl=strip": (2.1, 2.4, 5e-3),
    "tiled:impl=native": (4.2, 4.6, None),  # 1.05 x sdpa's own
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
            dense, qk = table("tiled:impl=native", mask, seq), table("int8:impl=qk", mask, seq)
            if i == 1 and dense is not None and qk is not None:
                found.append(Bar(f"int8 qk, {mask}, {seq}: x tiled native", 1.15, qk.speedup / dense.speedup))
            for window in (256, 1024):
                ours, flex = (table(SPARSE.format(impl=i, window=window), mask, seq) for i in ("native", "flex"))
                what = f"block-sparse window {window}, {mask}, {seq}"
                if ours is not None and dense is not None:
                    pairs = 1.0 if mask == "full" else (seq + 1) / (2 * seq)  # of seq^2, that the dense kernel needs
                    share = ours.speedup / dense.speedup / (pairs / ours.density)
                    found.append(Bar(f"{what}: share of 1 / density over tiled", 0.75, share))
                if i == 1 and ours is not None and flex is not None:
                    found.append(Bar(f"{what}: x flex_attention", 2.0, ours.speedup / flex.speedup))
    for seq, wanted in ((2048, 8), (8192, 25), (16384, 50)):
        linear = table("linear", "causal", seq)
        if linear is not None:
            what = f"linear, causal, {seq}"
            found.append(Bar(f"{what}: x sdpa", wanted, linear.speedup, linear.speedup_low, linear.speedup_high))
            found.append(Bar(f"{what}: relative L2 to its own", 4e-3, linear.implementation_rel_l2, most=True))
    return found


def beside(table: Table, runs: Sequence[Path]) -> list[str]:
    """What no bar was set for: other libraries, a head dim of 128, training, the share of the machine's products."""
    peers = (table(peer, mask, seq) for peer in PEERS for mask in ("full", "causal") for seq in SEQ)
    said = [
        f"{row.plugin}, {row['mask']}, {row.seq}: {row.speedup:.2f} x sdpa; {row.implementation}"
        for row in peers
        if row is not None
    ]
    for plugin in DENSE.split(","):
        for seq in SEQ:
            narrow, wide = table(plugin, "full", seq), table(plugin, "full", seq, dim=128)
            if narrow is not None and wide is not None:
                rates = wide.flops_per_s / narrow.flops_per_s
                said.append(
                    f"{plugin}, full, {seq}, head dim 128: {wide.speedup:.2f} x sdpa (64: {narrow.speedup:.2f}), "
                    f"{rates:.2f} x the rate"
                )
    for mask in ("full", "causal"):
        for seq in SEQ:
            row = table("tiled", mask, seq, phase="train")
            if row is not None:
                interval = f"[{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
                said.append(f"tiled, {mask}, {seq}, forward and backward: {row.speedup:.2f} {interval} x sdpa")
    ceilings = Ceilings.from_dict(read_meta(runs[0]).get("ceilings"))
    for plugin in ("tiled:impl=strip", "tiled:impl=native"):
        row = table(plugin, "full", 8192)
        if ceilings and row is not None:
            share = row.flops_per_s / ceilings.operations_per_s["bfloat16"]
            said.append(f"{plugin}, full, 8192: {share:.0%} of this machine's fastest bfloat16 products")
    return said


def measure(name: str, budget: float, arguments: Mapping[str, str]) -> Path:
    """Runs one sweep and returns its folder."""
    peers = [peer for peer in PEERS if peer in registry.find()]
    given = {"plugins": ",".join([*PLUGINS, *peers]), **arguments, "name": name}
    run = shared.run({"dtype": "bfloat16", "scope": "attention", "threads": "2", **given}, budget)
    if run is None:
        raise click.ClickException(f"{name} made no run")
    return run


@click.command()
@click.option("--budget", default=900, show_default=True, help="Seconds for all sweeps.")
@click.option("--name", default="cpu-kernels", show_default=True)
@click.option("--run", "runs", multiple=True, type=click.Path(path_type=Path, exists=True), help="Print from this run.")
def main(budget: int, name: str, runs: Sequence[Path]) -> None:
    """Measure the kernels and print each bar."""
    runs = runs or [measure(name + tail, share * budget, given) for tail, (share, given) in SWEEPS.items()]
    table = Table(attnbench.load(runs))
    found = bars(table)
    for line in (*found, *beside(table, runs)):
        click.echo(str(line))
    missed = sum(bar.verdict == "MISSED" for bar in found)
    click.echo(f"{len(found) - missed} of {len(found)} bars met")


if __name__ == "__main__":
    main()
