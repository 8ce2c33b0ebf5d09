"""Everything that a GPU is needed for, in the order of what is wanted most, until the time ends: `make gpu`.

python benchmarks/gpu.py [--minutes N] [--device cuda] [--results DIR] [--reports DIR]

GPU tests; the machine's ceilings; then sweeps, each into a run of its own; then the report of all. A sweep that an
earlier call began goes on where that was cut off, and one that it finished is left alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from attnbench.records import read_meta

# FlashAttention's papers: 16k tokens in all at each length, a hidden size of 2048.
PAPERS = {"--tokens": "16384", "--seq": "512..16384", "--heads": "16", "--head-dim": "128", "--mask": "full,causal"}
DENSE = "sdpa:*,xformers"
OTHERS = "naive,int8,linear,block-sparse:window=256,block-sparse:window=1024"
NARROW = PAPERS | {"--heads": "32", "--head-dim": "64"}
ALTERNATIVES = "retention,gated-delta,gated-linear,ssd"
DECODE = {"--phase": "decode", "--kv-seq": "4096,16384,65536", "--batch": "8", "--heads": "16", "--head-dim": "128"}

# name: share of the time, plugins, arguments
SWEEPS: dict[str, tuple[float, str, dict[str, str]]] = {
    "gpu-dense": (0.25, DENSE, PAPERS | {"--dtype": "bfloat16"}),
    "gpu-others": (0.25, f"{OTHERS},{ALTERNATIVES}", PAPERS | {"--dtype": "bfloat16"}),
    "gpu-float16": (0.1, f"{DENSE},int8", PAPERS | {"--dtype": "float16"}),
    "gpu-narrow": (0.1, f"{DENSE},{OTHERS}", NARROW | {"--dtype": "bfloat16"}),
    "gpu-decode": (0.1, f"{DENSE},{OTHERS},{ALTERNATIVES}", DECODE | {"--dtype": "bfloat16"}),
    "gpu-train": (0.1, f"{DENSE},{ALTERNATIVES}", PAPERS | {"--dtype": "bfloat16", "--phase": "train"}),
    "gpu-llama": (0.1, f"{DENSE},{OTHERS}", {"--preset": "llama-3-8b", "--seq": "1024..16384", "--mask": "causal"}),
}


def sweep(name: str, plugins: str, arguments: dict[str, str], seconds: float, device: str, results: Path) -> list[str]:
    """The command that begins a sweep or goes on with it; nothing where it is finished."""
    base = [sys.executable, "-m", "attnbench", "run", "--budget", f"{seconds:.0f}"]
    for folder in sorted(results.glob(f"*-{name}"), reverse=True):
        meta = read_meta(folder)
        if meta.get("machine", {}).get("gpu") or device == "cpu":
            return [] if meta.get("finished") else [*base, "--resume", str(folder)]
    given = {"--plugins": plugins, "--device": device, "--scope": "attention", "--out": str(results), "--name": name}
    return [*base, *(part for pair in (given | arguments).items() for part in pair)]


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True, help="For all of it.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--reports", type=click.Path(path_type=Path), default=Path("reports/gpu"), show_default=True)
def main(minutes: float, device: str, results: Path, reports: Path) -> None:
    """Test, calibrate, sweep and report on a GPU."""
    ends = time.monotonic() + 60 * minutes
    commands = [["-m", "pytest", "-m", "gpu"], ["-m", "attnbench", "calibrate", "--device", device]]
    failed = [subprocess.run([sys.executable, *command], check=False).returncode for command in commands]
    for_sweeps = ends - time.monotonic() - 20  # the report takes some seconds
    for name, (share, plugins, arguments) in SWEEPS.items():
        left = ends - time.monotonic() - 20
        if left < 5:
            click.echo(f"no time left for {name} and what follows; call again to go on")
            break
        if command := sweep(name, plugins, arguments, min(left, share * for_sweeps), device, results):
            click.echo(f"{datetime.now(UTC):%H:%M:%S} {name}")
            failed.append(subprocess.run(command, check=False).returncode)
    runs = [str(folder) for name in SWEEPS for folder in sorted(results.glob(f"*-{name}"))]
    if runs:
        subprocess.run([sys.executable, "-m", "attnbench", "report", *runs, "--out", str(reports)], check=True)
    sys.exit(max(failed, default=0))


if __name__ == "__main__":
    main()
