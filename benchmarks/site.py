"""How long `attnbench site` takes over many submissions: made of committed runs, each as if of another machine and day.

python benchmarks/site.py [--runs 5000] [--machines 500] [--folders 0] [--out FILE]

Each is a file as `attnbench submit` writes it, with figures that are drawn around the run's own; `--folders` makes so
many of them run's folders, samples and all. The wall time is that of the command, started anew; the seconds of a core
beside it hang less on what else runs.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from attnbench.devices import machine
from attnbench.records import strict
from attnbench.records.submission import SUFFIX, Shared, content, read

RESULTS = Path(__file__).parents[1] / "results"
RUNS = ("2026-11-29-cpu-3", "2026-11-25-phases-2", "2026-11-29-cpu", "2026-11-29-zen5-isa-auto")
BAR = 60.0  # seconds
_TIMES = ("latency_s", "latency_low_s", "latency_high_s")
_RATIOS = ("speedup", "speedup_low", "speedup_high")


def another(shared: Shared, rng: random.Random, machines: int, number: int) -> Shared:
    """The run as if one of so many machines had measured it on some day."""
    box = rng.randrange(machines)
    own = {"cpu": f"CPU {box % 97}", "memory_bytes": 2**30 * (8 + box), "cores": 2 + box % 64}
    started = f"2026-{1 + number % 12:02}-{1 + number // 12 % 28:02}T{number // 336 % 24:02}:{number % 60:02}:00+00:00"
    meta = shared.meta | {"machine": shared.meta["machine"] | own, "started": started, "name": f"run-{number}"}
    columns: dict[str, list[Any]] = dict(shared.columns)
    for names in (_TIMES, _RATIOS):
        factors = [rng.uniform(0.8, 1.25) for _ in range(shared.length)]
        for name in names:
            columns[name] = [x and float(f"{x * f:.7g}") for x, f in zip(columns[name], factors, strict=True)]
    return replace(shared, meta=meta, columns=columns)


def made(folder: Path, runs: int, machines: int, folders: int) -> int:
    """Makes them, and returns their rows."""
    rng, rows = random.Random(0), 0
    sources = [read(RESULTS / name) for name in RUNS]
    for number in range(runs):
        shared = another(sources[number % len(sources)], rng, machines, number)
        rows += shared.length
        if number < folders:
            path = folder / f"run-{number}"
            shutil.copytree(shared.path, path)
            (path / "run.json").write_text(json.dumps(shared.meta))
        else:
            (folder / f"run-{number}{SUFFIX}").write_bytes(content(shared))
    return rows


def _cpu_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command()
@click.option("--runs", default=5000, show_default=True)
@click.option("--machines", default=500, show_default=True)
@click.option("--folders", default=0, show_default=True, help="How many of them as folders, with their samples.")
@click.option("--out", type=click.Path(path_type=Path), help="A file for every figure and the machine.")
def main(runs: int, machines: int, folders: int, out: Path | None) -> None:
    """Times attnbench site over a generated set."""
    with tempfile.TemporaryDirectory() as name:
        submissions, site = Path(name) / "submissions", Path(name) / "site"
        submissions.mkdir()
        rows = made(submissions, runs, machines, folders)
        given = sum(path.stat().st_size for path in submissions.rglob("*") if path.is_file())
        before, began = _cpu_seconds(), time.monotonic()
        subprocess.run([sys.executable, "-m", "attnbench", "site", str(submissions), "--out", str(site)], check=True)
        seconds, cpu = time.monotonic() - began, _cpu_seconds() - before
        page = (site / "index.html").stat().st_size
        shapes = [path.stat().st_size for path in (site / "data").iterdir()]
    told = {
        "runs": runs, "machines": machines, "folders": folders, "rows": rows, "read_bytes": given,
        "seconds": round(seconds, 1), "cpu_s": round(cpu, 1), "page_bytes": page, "shapes": len(shapes),
        "largest_shape_bytes": max(shapes),
    }  # fmt: skip
    bar = f"bar {BAR:.0f} s: {'met' if seconds < BAR else 'missed'}"
    click.echo(f"{runs} runs, {rows} rows, {given / 2**20:.0f} MiB: {seconds:.1f} s, {cpu:.1f} s of a core; {bar}")
    click.echo(f"index.html {page / 2**20:.1f} MiB, {len(shapes)} shapes of at most {max(shapes) / 2**20:.1f} MiB")
    if out:
        out.write_text(strict.dumps(told | {"machine": machine.describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
