"""What `attnbench parallel` measured on one machine, beside what `theory.parallel` says of its processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.theory import parallel
from attnbench.theory.parallel import Device
from attnbench.theory.roofline import Ceilings
from attnbench.theory.schemes import SCHEMES
from attnbench.workload import DEVICES, Workload

_FORMULAS = {"sdpa": "whole"}


@dataclass(frozen=True)
class Against:
    """A scheme on so many processes: measured, and predicted.

    sent_bytes, peak_bytes: of a process in a call, None where they could not be measured. least_s: at the machine's
    ceilings, None where those are not known. expected_s: where processes compute as fast as sdpa in one of them, None
    where that was not measured.
    """

    scheme: str
    world: int
    workload: Workload
    sent_bytes: float | None
    predicted_sent_bytes: int
    peak_bytes: float | None
    predicted_peak_bytes: int
    latency_s: float
    least_s: float | None
    expected_s: float | None


def against(rows: Iterable[Mapping[str, Any]], ceilings: Ceilings | None, cores: int) -> list[Against]:
    """Of each finished row that a formula is known for, in the rows' order.

    The processes share this machine: of `cores` each has its threads' worth, or its share where they are fewer; of the
    memory's rate each has 1 / world. The link is what was measured between them, all sending at once. Where they leave
    no core free, messages are copied by the cores that compute, so that nothing overlaps.

    rows: of a run of `attnbench parallel`.
    """
    done = [row for row in rows if row.get("status") == "ok" and row.get("latency_s")]
    alone = {_key(row): row["latency_s"] for row in done if row["world"] == 1 and formula(row["scheme"]) == "whole"}
    found = []
    for row in done:
        workload, world, name = Workload.from_dict(dict(row)), row["world"], formula(row["scheme"])
        if name is None or parallel.unsupported(name, workload, world):
            continue
        reached = alone.get(_key(row))
        least = _at_ceilings(row, workload, ceilings, cores)
        expected = _process(parallel.flops("whole", workload, 1) / reached, math.inf, row, cores) if reached else None
        times = [parallel.time_s(name, workload, world, each) if each else None for each in (least, expected)]
        sent = row.get("sent_bytes"), parallel.sent_bytes(name, workload, world)
        held = row.get("peak_bytes"), parallel.peak_bytes(name, workload, world)
        found.append(Against(row["scheme"], world, workload, *sent, *held, row["latency_s"], *times))
    return found


def formula(scheme: str) -> str | None:
    """Which of `theory.schemes.SCHEMES` a scheme's spec, such as "ring:order=contiguous", is; None for none."""
    name, *options = scheme.split(":")
    name = _FORMULAS.get(name, name) + ("-contiguous" if "order=contiguous" in options else "")
    return name if name in SCHEMES else None


def _at_ceilings(row: Mapping[str, Any], workload: Workload, ceilings: Ceilings | None, cores: int) -> Device | None:
    """One of the processes as fast as its share of the machine can be; None where its ceilings are not known."""
    if ceilings is None or ceilings.device != workload.device:
        return None
    found = ceilings.of(workload.replace(threads=ceilings.threads), quantized=False)
    share = min(1.0, workload.threads / ceilings.threads) if workload.on_host else 1.0
    return _process(found[1] * share, ceilings.bytes_per_s, row, cores) if found else None


def _process(rate: float, bytes_per_s: float, row: Mapping[str, Any], cores: int) -> Device:
    """One of the processes. rate: of operations, where it has a core for each of its threads."""
    link = row.get("link_bytes_per_s") or math.inf
    if not DEVICES[row["device"]].host:
        return Device(rate, bytes_per_s, link)  # a GPU each
    world, threads = row["world"], row["threads"]
    return Device(rate * min(1.0, cores / (world * threads)), bytes_per_s / world, link, world * threads < cores)


def _key(row: Mapping[str, Any]) -> Sequence[Any]:
    """What makes rows one problem: the workload."""
    return tuple(sorted(Workload.from_dict(dict(row)).as_dict().items()))
