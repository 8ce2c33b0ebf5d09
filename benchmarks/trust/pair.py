"""Measures one pair of kernels through attnbench, and by two habits of the trade, on the same work and budget."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from planted import Planted
from torch.utils.benchmark import Timer

from attnbench.registry import Found, Request
from attnbench.stats.intervals import Interval
from attnbench.sweep.cell import Cell
from attnbench.sweep.plan import cells_of
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Settings
from attnbench.task import inputs
from attnbench.workers.ask import ask, ask_machine
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload


@dataclass(frozen=True)
class Answer:
    """What a method says of B against A: the ratio of A's time to B's, and whether it calls them different."""

    ratio: float
    different: bool
    half_width: float | None = None


def attnbench(server: Forkserver, workload: Workload, extra: float, seconds: float, seed: int) -> Answer:
    """As `attnbench run` measures two plugins; a copy of one kernel is a plugin of another name."""
    cells: list[Cell] = []
    for name, share in (("one", 0.0), ("other", extra)):
        found = Found(name, "planted:Planted", "benchmarks", "0")
        request = Request(found, (("extra", str(share)),))
        cells += cells_of(request, ask(server, request, [workload]), [workload])
    settings = Settings(
        baseline=cells[0].plugin, precision=1e-4, budget=seconds, timeout=600, memory=8 << 30, seed=seed
    )
    row = measure(server, settings, cells)[1]
    if row["status"] != "ok":
        raise RuntimeError(f"{row['status']}: {row['reason']}")
    found = Interval(row["speedup"], row["speedup_low"], row["speedup_high"])
    if found.low is None or found.high is None:
        return Answer(found.median, False)
    return Answer(found.median, not found.low <= 1 <= found.high, found.half_width)


def _kernels(workload: Workload, extra: float):  # type: ignore[no-untyped-def]
    tensors = inputs.empty(workload)
    inputs.fill(tensors, workload, 0)
    one, other = Planted(extra=0.0).build(workload), Planted(extra=extra).build(workload)
    return [lambda f=f: f(*tensors) for f in (one, other)]


def torch_timer(workload: Workload, extra: float, seconds: float) -> Answer:
    """torch.utils.benchmark, one kernel after the other; different where the quartile ranges lie apart."""
    found = [
        Timer("f()", globals={"f": f}, num_threads=workload.threads).blocked_autorange(min_run_time=seconds / 2)
        for f in _kernels(workload, extra)
    ]
    (low_a, high_a), (low_b, high_b) = [statistics.quantiles(m.times, n=4)[::2] for m in found]
    return Answer(found[0].median / found[1].median, high_a < low_b or high_b < low_a)


def one_after_the_other(workload: Workload, extra: float, seconds: float) -> tuple[Answer, Answer]:
    """Rounds of one, then of the other, read in two ways.

    As pytest-benchmark is used in CI: different where medians are 5% apart. As hyperfine compares programs: the ratio
    of the means, its deviation carried over from both standard deviations; different where that leaves out 1.
    """
    torch.set_num_threads(workload.threads)
    found = []
    for f in _kernels(workload, extra):
        f()
        times, end = [], time.perf_counter() + seconds / 2
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        found.append(times)
    medians = statistics.median(found[0]) / statistics.median(found[1])
    (mean_a, sd_a), (mean_b, sd_b) = [(statistics.mean(times), statistics.stdev(times)) for times in found]
    means = mean_a / mean_b
    deviation = means * math.hypot(sd_a / mean_a, sd_b / mean_b)
    return Answer(medians, abs(medians - 1) > 0.05), Answer(means, abs(means - 1) > deviation, deviation / means)


_BUSY = """
import random, time
while True:
    end = time.perf_counter() + random.uniform(0.3, 2)
    while time.perf_counter() < end:
        sum(range(10000))
    time.sleep(random.uniform(0.3, 2))
"""


@contextmanager
def load(on: bool) -> Iterator[None]:
    """Another process that keeps one core busy, on and off."""
    if not on:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def workloads(count: int, seed: int, threads: int, lengths: Sequence[int]) -> Iterator[Workload]:
    """`count` workloads, the lengths in turn, a seed each."""
    base = Workload(seq=512, kv_seq=512, threads=threads)
    draws = random.Random(seed)
    for i in range(count):
        length = lengths[i % len(lengths)]
        yield replace(base, seq=length, kv_seq=length, seed=draws.randrange(1 << 20))


def machine_facts(server: Forkserver) -> dict[str, object]:
    return dict(ask_machine(server).machine)
