"""What the scripts of this folder share: a plugin's call, two clocks in turn, runs of attnbench, and bars."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from attnbench_plugins.native.compiler import HIDE
from torch import Tensor

from attnbench.plugin import Call, Plugin, built
from attnbench.records.machines import identity
from attnbench.records.run import read_meta
from attnbench.records.schema import Row
from attnbench.registry import Found, find, instances, load, select
from attnbench.stats.intervals import Interval, interval, median_interval
from attnbench.task import inputs
from attnbench.workers import ask
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload


def plugin_of(spec: str) -> Plugin:
    """A plugin as `attnbench run --plugins` names it, such as "sdpa:backend=flash", loaded into this process."""
    request = select(spec, find())[0]
    kind = load(request.found.target)
    return kind(**instances(kind, dict(request.options), every=False)[0])


def installed(specs: Iterable[str]) -> list[str]:
    """Those whose plugin is here, and the library behind it where it is a peer."""
    known = _known()
    return [spec for spec in specs if (own := known.get(spec.split(":")[0])) and not own.missing]


@cache
def _known() -> Mapping[str, Found]:
    return find()


def call_of(spec: str, workload: Workload) -> Call:
    return built(plugin_of(spec), workload).call


def tensors_of(workload: Workload) -> list[Tensor]:
    """query, key, value: (batch, heads, seq, head_dim) and (batch, kv_heads, kv_seq, ..), filled from the seed."""
    tensors = inputs.empty(workload)
    inputs.fill(tensors, workload, 0)
    return tensors


def alternate(
    one: Callable[[], float], other: Callable[[], float], pairs: int
) -> tuple[Interval, list[float], list[float]]:
    """What both clocks say, one other, other one, ...: the paired ratio other / one, and all that each said."""
    said: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            said[which].append((one, other)[which]())
    return median_interval([b / a for a, b in zip(*said, strict=True)]), *said


@contextmanager
def kernels_for(isa: str) -> Iterator[None]:
    """Within it attnbench's C++ kernels are made for this instruction set; "" or "auto": for all that the CPU has."""
    before = os.environ.get(HIDE, "")
    os.environ[HIDE] = "" if isa == "auto" else isa
    try:
        yield
    finally:
        os.environ[HIDE] = before


def needs_cuda() -> None:
    """Ends the script where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")


@dataclass(frozen=True)
class Bar:
    """Something that is to be reached.

    low, high: of its 95% interval. most: the bar is an upper one. why: the reason where nothing was measured.
    """

    what: str
    wanted: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    most: bool = False
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return f"not run: {self.why}"
        met = self.measured <= self.wanted if self.most else self.measured >= self.wanted
        return "met" if met else "MISSED"

    def __str__(self) -> str:
        sign, number = ("<=", "{:.2g}") if self.most else (">=", "{:.2f}")
        interval = f" [{self.low:.2f}, {self.high:.2f}]" if self.low and self.high else ""
        found = "" if self.measured is None else number.format(self.measured)
        return f"{self.what:58} {sign} {number.format(self.wanted):>7} {found:>8}{interval:15} {self.verdict}"


@cache
def facts() -> dict[str, Any]:
    """This machine, asked for in a process of its own: the GPU is left alone in this one."""
    with Forkserver(1) as server:
        return dict(ask.ask_machine(server).machine)


def earlier(name: str, results: Path, here: dict[str, Any]) -> Path | None:
    """The newest run of this name that was measured on this very machine."""
    name_of_run = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(name)}(-\d+)?")
    metas = {run: read_meta(run) for run in results.glob(f"*-{name}*") if name_of_run.fullmatch(run.name)}
    ours = [run for run, meta in metas.items() if identity(meta.get("machine", {})) == identity(here)]
    return max(ours, key=lambda run: (str(metas[run].get("started", "")), run.name), default=None)


def is_finished(run: Path) -> bool:
    return bool(read_meta(run).get("finished"))


def run_command(arguments: Mapping[str, str], resume: Path | None = None) -> list[str]:
    """The command that begins a run, or goes on with one that was cut off. arguments: without their dashes."""
    given = {"resume": str(resume)} if resume else arguments
    return [sys.executable, "-m", "attnbench", "run", *(x for key, value in given.items() for x in (f"--{key}", value))]


def run(arguments: Mapping[str, str], seconds: float, resume: Path | None = None) -> Path | None:
    """Runs it, prints what it says, and returns the run's folder; None where there is none, for whatever reason."""
    command = [*run_command(arguments, resume), "--budget", f"{seconds:.0f}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # it then ends in order, with what it has
        process.wait()
        raise
    click.echo(output)
    said = [line.removeprefix("run: ") for line in output.splitlines() if line.startswith("run: ")]
    return Path(said[-1]) if said else None


def speedup(of: Row, over: Row) -> Interval:
    """How many times faster `of` is than `over`, from the rounds in which both were timed."""
    one, other = ({(s[0], s[1]): s[4] / s[3] for s in row["samples"]} for row in (of, over))
    both = [key for key in one if key in other]
    return interval([other[key] / one[key] for key in both], [key[0] for key in both])
