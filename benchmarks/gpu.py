"""Everything that a GPU is needed for, in the order of what is wanted most, until the time ends: `make gpu`.

python benchmarks/gpu.py [--minutes N] [--logs DIR] [--results DIR] [--reports DIR]

GPU tests; the machine's ceilings; sweeps, each into a run of its own; the bars of the kernels; attnbench's clock and
memory against others'; then the report of all sweeps. A part that fails does not stop those behind it. Each gets its
share of the time that is left, so what one does not need goes to the others; one that takes longer is ended. A sweep
that an earlier call began goes on where that was cut off, and one that it finished is left alone.

--device cpu tries the machinery on small sizes; its runs and its report are kept only where --results and --reports
say. It collects the GPU tests without running them, and leaves out what has no meaning without a GPU.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import shared

HERE = Path(__file__).parent
REPORT_SECONDS = 30  # kept back for the report
TOLD = 0.75  # of its limit is the budget that a sweep is told: starting and ending take time beside what it measures

# FlashAttention's papers: 16k tokens in all at each length, a hidden size of 2048.
PAPERS = {"tokens": "16384", "seq": "512..16384", "heads": "16", "head-dim": "128", "mask": "full,causal"}
DENSE = "sdpa:*,xformers"
OTHERS = "naive,int8,linear,block-sparse:window=256,block-sparse:window=1024"
NARROW = PAPERS | {"heads": "32", "head-dim": "64"}
ALTERNATIVES = "retention,gated-delta,gated-linear,ssd"
PEERS = "flash-attn-2,flash-attn-3,flash-attn-4,hf-kernels,cudnn,flashinfer,sageattention,sageattention-2"
DECODE = {"phase": "decode", "kv-seq": "4096,16384,65536", "batch": "8", "heads": "16", "head-dim": "128"}
SMALL = {"tokens": "512", "seq": "256,512", "heads": "2", "kv-seq": "256,512"}  # what --device cpu puts in their place

# name: share of the time, plugins, arguments
SWEEPS: dict[str, tuple[float, str, dict[str, str]]] = {
    "gpu-dense": (0.1, DENSE, PAPERS | {"dtype": "bfloat16"}),
    "gpu-others": (0.1, OTHERS, PAPERS | {"dtype": "bfloat16"}),
    "gpu-float16": (0.04, f"{DENSE},int8", PAPERS | {"dtype": "float16"}),
    "gpu-narrow": (0.05, f"{DENSE},{OTHERS}", NARROW | {"dtype": "bfloat16"}),
    "gpu-decode": (0.05, f"{DENSE},{OTHERS}", DECODE | {"dtype": "bfloat16"}),
    "gpu-train": (0.05, f"{DENSE},linear,block-sparse:window=1024", PAPERS | {"dtype": "bfloat16", "phase": "train"}),
    "gpu-peers": (0.05, f"{PEERS},natten:keys=1024", PAPERS | {"dtype": "bfloat16", "phase": "forward,train"}),
    "gpu-peers-decode": (0.03, PEERS, DECODE | {"dtype": "bfloat16", "mask": "causal"}),
    "gpu-llama": (0.04, f"{DENSE},{OTHERS}", {"preset": "llama-3-8b", "seq": "1024..16384", "mask": "causal"}),
    # Last and not as long: their float64 references go token by token.
    "gpu-alternatives": (0.03, ALTERNATIVES, PAPERS | {"seq": "512..4096", "mask": "causal", "phase": "forward,train"}),
}


@dataclass
class Part:
    """A command with its share of the time, and what came of it. No command: there is nothing to do.

    told: the share of its limit that the command is given as its --budget; 0 where it has no such option.
    """

    name: str
    share: float
    command: list[str]
    told: float = 0.0
    rc: int | None = None
    seconds: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        said = "not run" if self.rc is None else f"rc {self.rc}, {self.seconds:.0f} s"
        return f"{self.name:16} {said}{f': {self.why}' if self.why else ''}"


def parts(device: str, results: Path) -> list[Part]:
    """All of them, in order. Sweeps that an earlier call finished have no command."""
    python, on_gpu = sys.executable, device == "cuda"
    tests = [python, "-m", "pytest", "-m", "gpu and not slow", *([] if on_gpu else ["--collect-only", "-q"])]
    kernels = [python, str(HERE / "gpu_kernels.py"), "--device", device, "--out", str(results)]
    memory = [python, str(HERE / "memory.py"), "--device", device]
    if not on_gpu:
        kernels, memory = [*kernels, "--seq", "256,512"], [*memory, "--mib", "1..64", "--naive", "2048"]
    calibrate = [python, "-m", "attnbench", "calibrate"]
    return [
        Part("tests", 0.10, tests),
        Part("calibrate", 0.05, [*calibrate, "--only", "ceilings", "--device", device] if on_gpu else []),
        *(Part(name, share, sweep(name, plugins, given, device, results), TOLD)
          for name, (share, plugins, given) in SWEEPS.items()),
        Part("gpu-kernels", 0.21, kernels, 0.8 * TOLD),
        Part("do-bench", 0.07, [python, str(HERE / "do_bench.py")] if on_gpu else []),
        Part("memory", 0.03, memory),
    ]  # fmt: skip


def sweep(name: str, plugins: str, arguments: dict[str, str], device: str, results: Path) -> list[str]:
    """The command that begins a sweep or goes on with it, its budget left out; nothing where there is nothing to do."""
    before = shared.earlier(name, results, shared.facts())
    if before is not None:
        return [] if shared.is_finished(before) else shared.run_command({}, before)
    if device == "cpu":
        arguments = {key: SMALL.get(key, value) for key, value in arguments.items()}
    there = shared.installed(plugins.split(","))
    if not there:
        return []
    given = {"plugins": ",".join(there), "device": device, "scope": "attention", "out": str(results), "name": name}
    return shared.run_command(given | arguments)


def do(part: Part, limit: float, log: Path | None) -> None:
    """Runs a part; one that reaches its limit is asked to end, then killed."""
    command = [*part.command, *(["--budget", f"{max(1, part.told * limit):.0f}"] if part.told else [])]
    began = time.monotonic()
    with open(log, "w") if log else nullcontext() as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT if file else None)
        try:
            part.rc = process.wait(limit)
        except subprocess.TimeoutExpired:
            part.why = f"ended after {limit:.0f} s"
            process.send_signal(signal.SIGINT)  # a run of attnbench then keeps what it has
            try:
                part.rc = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                part.rc = process.wait()
            part.rc = part.rc or 1
    part.seconds = time.monotonic() - began


def work(todo: list[Part], ends: float, logs: Path | None) -> None:
    """Runs the parts in order, each within its share of the time that is left."""
    for number, part in enumerate(todo):
        left = [other.share for other in todo[number:] if other.command]
        limit = part.share / sum(left) * (ends - time.monotonic()) if part.command else 0.0
        if not part.command:
            part.why = "nothing to do: finished by an earlier call, only of use on a GPU, or not installed"
        elif limit < 1:
            part.why = "no time left; call again to go on"
        else:
            do(part, limit, logs / f"{number:02d}-{part.name}.log" if logs else None)
        click.echo(f"{datetime.now(UTC):%H:%M:%S} {part}")


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True, help="For all of it.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="What each part says, a file each.  [default: shown]")
@click.option("--results", type=click.Path(path_type=Path), help="[default: results; on a CPU nowhere]")
@click.option("--reports", type=click.Path(path_type=Path), help="[default: reports/gpu; on a CPU nowhere]")
def main(minutes: float, device: str, logs: Path | None, results: Path | None, reports: Path | None) -> None:
    """Test, calibrate, sweep, compare and report on a GPU."""
    ends = time.monotonic() + 60 * minutes - REPORT_SECONDS
    if device == "cuda" and not shared.facts()["gpu"]:
        sys.exit("needs a CUDA device; --device cpu --minutes 2 tries the machinery")
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) if device == "cpu" else Path()
        results, reports = results or kept / "results", reports or kept / "reports" / "gpu"
        todo = parts(device, results)
        work(todo, ends, logs)
        runs = [str(folder) for name in SWEEPS if (folder := shared.earlier(name, results, shared.facts()))]
        if runs:
            report = Part("report", 1, [sys.executable, "-m", "attnbench", "report", *runs, "--out", str(reports)])
            work([report], time.monotonic() + REPORT_SECONDS, logs)
            todo.append(report)
    click.echo("\n" + "\n".join(map(str, todo)))
    sys.exit(1 if any(part.rc for part in todo) else 0)


if __name__ == "__main__":
    main()
