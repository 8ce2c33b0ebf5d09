"""Is this machine fit to measure on? What can be read is judged at once; the rest is tried, by an A/A."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import psutil

from attnbench import environment
from attnbench.devices import machine
from attnbench.errors import AttnbenchError
from attnbench.registry import Request, find
from attnbench.stats.intervals import Interval
from attnbench.sweep.plan import cells_of
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Settings
from attnbench.workers.ask import ask
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

_BUSY_SHARE = 0.1  # of one core, used by others; beside it a burst is disturbed now and then
_STOLEN_SHARE = 0.02
_SPARE_BYTES = 2 << 30
_FINEST_TICK = 1e-6  # seconds; a burst lasts 3 ms
_AA_LENGTH = 1024


class Check(NamedTuple):
    """One thing that was looked at. advice is empty where nothing is amiss."""

    name: str
    found: str
    advice: str = ""


def look(facts: Mapping[str, Any], threads: int, seconds: float = 1.0, isa: str = "auto") -> list[Check]:
    """Judges what can be read without measuring a kernel.

    facts: `device.describe`. threads: what variants would use. seconds: how long to watch the others' load.
    isa: what kernels are meant to be held to.
    """
    found = [
        *_load(seconds),
        _frequency(facts),
        _threads(facts, threads),
        _kernels(facts, isa),
        _memory(),
        _compiler(),
        _timer(),
    ]
    return [*found, _gpu(facts)] if facts.get("gpu") else found


def _load(seconds: float) -> list[Check]:
    shares = psutil.cpu_times_percent(seconds)
    stolen = getattr(shares, "steal", 0.0) / 100
    idle = (shares.idle + getattr(shares, "iowait", 0.0)) / 100
    busy = max(0.0, 1 - idle - stolen) * (os.cpu_count() or 1)
    quiet = busy <= _BUSY_SHARE
    checks = [
        Check(
            "load",
            f"{busy:.2f} cores busy for the last {seconds:g} s, load average {machine.load():.2f}",
            "" if quiet else "close other programs, or wait; ratios hold better than latencies meanwhile",
        )
    ]
    if stolen > _STOLEN_SHARE:
        advice = "the host gives this virtual machine's time to others; measure at another hour, or elsewhere"
        checks.append(Check("stolen time", f"{stolen:.0%}", advice))
    return checks


def _frequency(facts: Mapping[str, Any]) -> Check:
    governor = facts.get("governor")
    if governor is None:
        return Check("frequency", "not told by this machine (usual for a virtual one)")
    fixed = governor == "performance"
    advice = "" if fixed else "set it to performance (cpupower frequency-set -g performance), and turbo off if you can"
    return Check("frequency", f"governor {governor}", advice)


def _threads(facts: Mapping[str, Any], threads: int) -> Check:
    usable, cores, quota = int(facts["usable_threads"]), int(facts["cores"]), facts.get("cgroup_cpus")
    found = f"{threads} of {usable} usable hardware threads, {cores} cores"
    if quota is not None:
        found += f", cgroup gives {quota:g}"
    if threads > usable:
        return Check("threads", found, f"they will fight each other; use --threads {usable} or fewer")
    if quota is not None and threads > quota:
        return Check("threads", found, f"the cgroup will halt them in turns; use --threads {max(1, int(quota))}")
    if (running := facts.get("threads_at_once")) is not None and running < threads:
        names = " and ".join(environment.of_threads(facts)) or "what holds them to fewer cores"
        return Check("threads", f"{found}, {running} at a time", f"unset {names}, or use --threads {running}")
    if threads > cores:
        return Check("threads", found, f"some share a core; --threads {cores} is steadier")
    return Check("threads", found)


def _kernels(facts: Mapping[str, Any], isa: str) -> Check:
    changed, meant = environment.words(facts), environment.words({"environment": environment.ISAS[isa]})
    found = "; ".join(filter(None, [f"CPU capability {facts.get('cpu_capability') or 'unknown'}", changed]))
    advice = "unset what you do not mean to measure with; a run records it" if changed != meant else ""
    return Check("kernels", found, advice)


def _memory() -> Check:
    free, swapped = machine.available_memory(), psutil.swap_memory().used
    found = f"{free / 2**30:.1f} GiB available" + (f", {swapped / 2**30:.1f} GiB swapped out" if swapped else "")
    enough = free >= _SPARE_BYTES
    return Check("memory", found, "" if enough else "close other programs; long sequences will be skipped")


def _compiler() -> Check:
    name = os.environ.get("CXX", "g++")
    if path := shutil.which(name):
        return Check("compiler", path)
    return Check(
        "compiler", f"no {name}", "install a C++ compiler, or name one by CXX: some variants are slower without"
    )


def _timer() -> Check:
    ticks = []
    for _ in range(100):
        before = now = time.perf_counter()
        while now == before:
            now = time.perf_counter()
        ticks.append(now - before)
    tick = median(ticks)
    return Check(
        "timer", f"steps of {tick * 1e9:.0f} ns", "" if tick <= _FINEST_TICK else "short calls can't be timed here"
    )


def _gpu(facts: Mapping[str, Any]) -> Check:
    name, state = str(facts["gpu"]), facts.get("gpu_state")
    if not state:
        return Check("GPU", f"{name}; NVML tells nothing of it", "clocks, power and others at work will go unseen")
    others, held_down = state["other_processes"], state["throttled"]
    told = {
        "{:.0f} MHz": (state["clock_hz"] or 0) / 1e6,
        "{:.0f} °C": state["temperature_c"],
        "{:.0f} W": state["power_w"],
        "cap {:.0f} W": state["power_cap_w"],
    }
    words = [name, *(text.format(value) for text, value in told.items() if value)]
    words.append("others unknown" if others is None else f"{others} other process{'es' * (others != 1)}")
    advice = "stop the other processes on it: they take turns with what is timed" if others else ""
    return Check("GPU", ", ".join(words), f"its clocks are held down: {held_down}" if held_down else advice)


def smallest_difference(server: Forkserver, threads: int, seconds: float, precision: float) -> Check:
    """Measures sdpa against itself for so many seconds: what differs by less than the interval is not told apart.

    Raises:
        AttnbenchError: sdpa could not be measured.
    """
    workload = Workload(seq=_AA_LENGTH, kv_seq=_AA_LENGTH, threads=threads)
    request = Request(find()["sdpa"])
    (cell,) = cells_of(request, ask(server, request, [workload]), [workload])
    cells = [cell, replace(cell, plugin=f"{cell.plugin} again")]
    settings = Settings(cell.plugin, precision=0.0, budget=seconds, timeout=60 + seconds, memory=8 << 30)
    row = measure(server, settings, cells)[1]
    half = (
        None if row["status"] != "ok" else Interval(row["speedup"], row["speedup_low"], row["speedup_high"]).half_width
    )
    if half is None and row["status"] == "ok":
        found = f"none in {seconds:g} s at {_AA_LENGTH}: one process and the next differ by more than their rounds tell"
        return Check("smallest difference", found, "stop what runs beside it, or give it longer with --seconds")
    if half is None:
        raise AttnbenchError(f"the A/A of sdpa gave no interval: {row['status']} {row['reason']}".strip())
    found = (
        f"{half:.1%} at {_AA_LENGTH} in {seconds:g} s: sdpa against itself is {row['speedup']:.4f} "
        f"[{row['speedup_low']:.4f}, {row['speedup_high']:.4f}], {row['rounds']} rounds in {row['processes']} processes"
    )
    if half <= precision:
        return Check("smallest difference", found)
    needed = seconds * (half / precision) ** 2
    advice = f"more than the {precision:.0%} of --precision: about {needed:.0f} s a pair would do, or a quieter machine"
    return Check("smallest difference", found, advice)
