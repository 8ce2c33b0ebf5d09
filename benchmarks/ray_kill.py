"""A run on a Ray cluster of two simulated nodes, one of which is killed while it measures: results/DATE-ray-two-nodes.

python benchmarks/ray_kill.py [--budget 120] [--out results] [-- OPTIONS OF attnbench run]

The nodes are this machine's, with half of its CPUs each. After the first row the other node, which has a task in
flight, is killed: its Ray process and all that it has started, by kill -9. In the end each cell that was planned must
have one row, and the log says what was sent again. Options replace the sweep; they are for a quick try.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psutil
from ray.cluster_utils import Cluster

from attnbench.records.run import read_meta, rows
from attnbench.records.schema import Row, key

STORE = 80 << 20  # bytes of a node's object store, the least that Ray takes
SWEEP = (
    "--plugins",
    "sdpa,naive,tiled,int8,linear",
    "--seq",
    "256..4096",
    "--scope",
    "attention",
    "--dtype",
    "float32",
)


def kill(cluster: Cluster, node: Any) -> None:
    """Ends a node as a machine that loses its power does: all of its processes at once."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)


def wait_for_rows(root: Path, name: str, process: subprocess.Popen[bytes]) -> tuple[Path, list[Row]]:
    """The run's folder and its first rows."""
    while process.poll() is None:
        for path in root.glob(f"*-{name}*"):
            if found := rows(path):
                return path, found
        time.sleep(0.1)
    raise click.ClickException("the run ended before it had a row")


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--budget", default=120.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--name", default="ray-two-nodes", show_default=True)
@click.argument("sweep", nargs=-1)
def main(budget: float, out: Path, name: str, sweep: tuple[str, ...]) -> None:
    """Makes the run, kills the node, and counts the cells."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if list(out.glob(f"*-{name}*")):
        raise click.ClickException(f"{out} has a run called {name} already")
    cpus = max(1, len(os.sched_getaffinity(0)) // 2)
    small = {"include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        nodes = [cluster.add_node(num_cpus=cpus, **small) for _ in range(2)]
        command = [sys.executable, "-m", "attnbench", "run", "--on", f"ray={cluster.address}", "--out", str(out)]
        process = subprocess.Popen([*command, "--name", name, "--budget", f"{budget:g}", *(sweep or SWEEP)])
        path, first = wait_for_rows(out, name, process)
        time.sleep(1.0)  # what was sent next has begun
        other = next(node for node in nodes if node.node_id[:8] not in first[0]["node"])
        click.echo(f"killing node {other.node_id[:8]}")
        kill(cluster, other)
        code = process.wait()
    finally:
        cluster.shutdown()
    found = rows(path)
    counted = Counter(map(key, found))
    statuses = Counter(row["status"] for row in found)
    lines = (path / "cells.jsonl").read_bytes().count(b"\n")
    click.echo(
        f"{path}: {len(found)} rows of {len(counted)} cells in {lines} lines, {dict(statuses)}, exit code {code}; "
        f"by node {dict(Counter(row['node'] for row in found))}; seconds {read_meta(path)['seconds']}"
    )
    sys.exit(0 if code == 0 and max(counted.values()) == 1 and set(statuses) == {"ok"} else 1)


if __name__ == "__main__":
    main()
