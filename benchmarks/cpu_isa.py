"""The CPU kernels with AVX2 and with all that the CPU has, in float32 and bfloat16, against sdpa held to the same.

python benchmarks/cpu_isa.py [--budget SECONDS] [--isa avx2|auto]... [--out FILE]

For each instruction set: what a tile of the kernels does from the first cache, on as many threads, before and after one
`attnbench run` (batch 1, 8 heads of 64, 2 threads); then each bar beside what was measured. Bars are AVX2's.
With --from FILE it only prints, from what --out kept and its runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import shared
from attnbench_plugins.native import attention as kernels
from attnbench_plugins.native import compiler
from cpu_kernels import Table
from shared import Bar

import attnbench

THREADS = 2
SEQ = (2048, 8192)
DTYPES = ("float32", "bfloat16")
PLUGINS = "tiled,int8,int8:impl=qkpv,linear"
SECONDS, TIMES = 2.0, 20000  # of each product, and of its tile in a burst
EXACT = {"float32": 1.2, "bfloat16": 1.5}  # over sdpa
INT8, LINEAR, OF_TILE = 1.6, 20.0, 0.85


def tile_rates(isa: str) -> dict[str, float]:
    """Operations a second on all threads together, by dtype of what is multiplied."""
    with shared.kernels_for(isa):
        library = compiler.load(str(Path(__file__).with_name("tile.cpp")), "bfloat16")
        elements = {"float32": 1, "bfloat16": 2 if kernels.pairs("bfloat16") else 1, "int8": 4}
    return {name: _rate(library, name, n) for name, n in elements.items()}


def _rate(library: Any, name: str, elements: int) -> float:
    """Of all threads at work together, each by its fastest burst: what else runs takes away from single bursts."""
    burst, operations = getattr(library, f"tile_{name}"), library.tile_operations(elements) * TIMES

    def timed(_: int) -> float:
        start = time.perf_counter()
        burst(TIMES)
        return float(operations / (time.perf_counter() - start))

    best, end = [0.0] * THREADS, time.perf_counter() + SECONDS
    with ThreadPoolExecutor(THREADS) as pool:
        while time.perf_counter() < end:
            best = [max(pair) for pair in zip(best, pool.map(timed, range(THREADS)), strict=True)]
    return sum(best)


def bars(table: Table, rates: dict[str, float]) -> list[Bar]:
    found = []
    for dtype in DTYPES:
        rows = Table(table.rows[table.rows.dtype == dtype])
        for seq in SEQ:
            what, exact = f"{dtype}, full, {seq}", rows("tiled", "full", seq)
            if exact is not None:
                share = exact.flops_per_s / rates[dtype]
                found.append(Bar(f"tiled, {what}: share of the tile's rate", OF_TILE, share))
                found.append(_over_sdpa(f"tiled, {what}", EXACT[dtype], exact))
            for plugin in ("int8:impl=auto", "int8:impl=qkpv"):
                row = rows(plugin, "full", seq)
                if row is not None:
                    found.append(_over_sdpa(f"{plugin}, {what}", INT8, row))
        row = rows("linear", "causal", 8192)
        if row is not None:
            found.append(_over_sdpa(f"linear, {dtype}, causal, 8192", LINEAR, row))
    return found


def _over_sdpa(what: str, wanted: float, row: Any) -> Bar:
    return Bar(f"{what}: x sdpa", wanted, row.speedup, row.speedup_low, row.speedup_high)


def measure(isa: str, budget: float, name: str) -> dict[str, Any]:
    """Tile rates before and after a run, and its folder."""
    before = tile_rates(isa)
    given = {"plugins": PLUGINS, "dtype": ",".join(DTYPES), "mask": "full,causal", "seq": ",".join(map(str, SEQ))}
    run = shared.run({**given, "scope": "attention", "threads": str(THREADS), "isa": isa, "name": name}, budget)
    if run is None:
        raise click.ClickException(f"{name} made no run")
    after = tile_rates(isa)
    return {"isa": isa, "run": run.name, "tiles": {key: max(before[key], after[key]) for key in before}}


@click.command()
@click.option("--budget", default=400, show_default=True, help="Seconds for all runs.")
@click.option("--isa", "isas", multiple=True, default=("avx2", "auto"), show_default=True)
@click.option("--name", default="cpu-isa", show_default=True, help="Of the runs; the instruction set is put behind it.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep tile rates and the runs' names here, as JSON.")
@click.option("--from", "kept", type=click.Path(path_type=Path, exists=True), help="Print from this file and its runs.")
def main(budget: int, isas: Sequence[str], name: str, out: Path | None, kept: Path | None) -> None:
    """Measure with each instruction set and print each bar."""
    if kept:
        found = json.loads(kept.read_text())["sets"]
    else:
        found = [measure(isa, budget / len(isas), f"{name}-{isa}") for isa in isas]
    for each in found:
        rates = ", ".join(f"{key} {value / 1e9:.0f}" for key, value in each["tiles"].items())
        click.echo(f"{each['isa']}: a tile does {rates} Gop/s on {THREADS} threads; {each['run']}")
        table = Table(attnbench.load([Path("results", each["run"])]))
        for bar in bars(table, each["tiles"]):
            click.echo(str(bar))
    if out:
        out.write_text(json.dumps({"machine": shared.facts(), "sets": found}, indent=1))


if __name__ == "__main__":
    main()
