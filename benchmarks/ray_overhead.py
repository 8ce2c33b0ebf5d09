"""What the driver of a sweep on Ray costs: 2,000 cells on 8 nodes, against the time that their tasks take.

python benchmarks/ray_overhead.py [--nodes 8] [--workloads 100] [--seconds 5] [--out FILE]

The nodes are simulated, all on this machine, and nothing is measured: each task sleeps for a known time and gives back
the rows of a committed run, so that what goes over the network and into the journal has its real size. What is timed is
the driver, the network and the journal: wall time from the first task that is sent to the last row on disk, against
that of the tasks alone, the last round of which may leave nodes idle. Looks at the nodes and the plan come before it.
"""

from __future__ import annotations

import math
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from ray.cluster_utils import Cluster

from attnbench.devices import machine
from attnbench.records import strict
from attnbench.records.run import Run
from attnbench.sweep import spread
from attnbench.sweep.remote import Done, Job
from attnbench.sweep.session import Unwatched
from attnbench.sweep.settings import Asked

BAR = 0.05
ROWS = Path(__file__).parents[1] / "results/2026-11-29-variants/cells.jsonl"
# Twenty, which are asked what they say of each workload, and not run.
PLUGINS = (
    "naive,sdpa,xformers,tiled,int8,int4,fp8,fp4,linear,retention,gated-delta,gated-linear,ssd,kimi-delta,"
    "block-sparse,block-sparse:pattern=bigbird,mla,differential,nystroem,moba"
)
STORE = 80 << 20  # bytes of a node's object store, the least that Ray takes


def asleep(job: Job, seconds: float, rows: Path, variants: int) -> Done:
    """In the place of `remote.measure`: as many rows as there are variants, after so long."""
    end = time.monotonic() + seconds
    found = [row for line in rows.read_text().splitlines() for row in strict.loads(line)["cells"]]
    own = job.workload.as_dict()
    told = [row | own | {"plugin": f"{row['plugin']}:{i}"} for i, row in zip(range(variants), found, strict=False)]
    time.sleep(max(0.0, end - time.monotonic()))
    return Done(told, seconds, seconds, 0.0)


def sweep(address: str, folder: Path, workloads: int, seconds: float) -> dict[str, Any]:
    asked = Asked.of(plugins=PLUGINS, seq=f"128..{128 * workloads}+128", scope="attention", dtype="float32", budget=1e6)
    rows, variants = ROWS, len(PLUGINS.split(","))

    def call(job: Job) -> Done:
        return asleep(job, seconds, rows, variants)

    with spread.planned(spread.at_large(asked, 1), f"ray={address}", click.echo) as plan:
        with Run.at(folder, spread.meta(plan, ["benchmarks/ray_overhead.py"])) as run:
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
            spread.measure(plan, run, Unwatched(), began, call)
            wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
        nodes, planned = len(plan.members.ready), len(plan.cells)
    ideal = math.ceil(workloads / nodes) * seconds
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = (folder / "cells.jsonl").stat().st_size
    return {
        "nodes": nodes, "workloads": workloads, "cells": workloads * variants, "planned": planned, "task_s": seconds,
        "wall_s": round(wall, 2), "ideal_s": ideal, "overhead": round(wall / ideal - 1, 4),
        "driver_cpu_s": round(cpu, 2), "journal_bytes": size,
    }  # fmt: skip


@click.command()
@click.option("--nodes", default=8, show_default=True)
@click.option("--workloads", default=100, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of each task.")
@click.option("--out", type=click.Path(path_type=Path), help="A file for every figure and the machine.")
def main(nodes: int, workloads: int, seconds: float, out: Path | None) -> None:
    """Times the driver over nodes that sleep."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, **small)
        with tempfile.TemporaryDirectory() as name:
            told = sweep(cluster.address, Path(name) / "run", workloads, seconds)
    finally:
        cluster.shutdown()
    cpu, written = f"{told['driver_cpu_s']:.1f} s of a core", f"{told['journal_bytes'] / 2**20:.0f} MiB"
    bar = f"bar {BAR:.0%}: {'met' if told['overhead'] < BAR else 'missed'}"
    click.echo(
        f"{told['cells']} cells in {workloads} tasks on {told['nodes']} nodes: {told['wall_s']:.1f} s, of the tasks "
        f"alone {told['ideal_s']:.1f} s: {told['overhead']:.1%} more ({bar}); the driver took {cpu} and wrote {written}"
    )
    if out:
        out.write_text(strict.dumps(told | {"machine": machine.describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
