"""Records what `attnbench guard` decides by: a kernel against its own copy, in blocks of its two looks.

python benchmarks/trust/guard_blocks.py --look screen --blocks 40 --out FILE

FILE is added to, so that a long record can be made in pieces. `guard_simulated.py` draws pull requests from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pair

from attnbench.advice.guard import TURN_SECONDS
from attnbench.registry import Found, Request
from attnbench.sizes import parse_sizes
from attnbench.stats.held_up import held_up, paired
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import cells_of
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Settings
from attnbench.workers.ask import ask
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

SECONDS = {"screen": 3.4, "confirm": TURN_SECONDS}  # of forty cells in 300 s


def block(server: Forkserver, workload: Workload, seconds: float, seed: int) -> dict[str, Any]:
    """Two identical kernels, measured for so many seconds: [process, ratio] of each round, and rounds held up."""
    cells: list[Cell] = []
    for name in ("base", "head"):
        request = Request(Found(name, "planted:Planted", "benchmarks", "0"))
        cells += cells_of(request, ask(server, request, [workload]), [workload])
    settings = Settings(cells[0].plugin, precision=1e-4, budget=seconds, timeout=600, memory=8 << 30, seed=seed)
    base, other = measure(server, settings, cells)
    if other["status"] != "ok":
        raise RuntimeError(f"{other['status']}: {other['reason']}")
    ratios = paired(base["samples"], other["samples"])
    held = held_up(base["samples"]) | held_up(other["samples"])
    rounds = [[process, round(ratio, 5)] for (process, _), ratio in ratios.items()]
    return {"held_up": len(held), "of": len(other["samples"]), "ratios": rounds}


@click.command()
@click.option("--look", type=click.Choice(list(SECONDS)), required=True)
@click.option("--blocks", default=40, show_default=True)
@click.option("--lengths", default="256,512,1024,1536", show_default=True, help="Of the blocks, in turn.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(look: str, blocks: int, lengths: str, threads: int, seed: int, out: Path) -> None:
    """Measure blocks of identical kernels and keep the ratios of their rounds."""
    with Forkserver(threads) as server:
        record: dict[str, Any] = {"machine": pair.machine_facts(server), "threads": threads, "blocks": []}
        if out.exists():
            record = json.loads(out.read_text())
        for i, workload in enumerate(pair.workloads(blocks, seed, threads, parse_sizes(lengths))):
            found = block(server, workload, SECONDS[look], seed + i)
            record["blocks"].append({"look": look, "seq": workload.seq, "seed": seed + i, **found})
            click.echo(
                f"{look} {i + 1} of {blocks}, {workload.seq}: {found['held_up']} of {found['of']} held up", err=True
            )
            out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
