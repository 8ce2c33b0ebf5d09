"""What is written down of a cell once it has ended."""

from __future__ import annotations

from attnbench.records.schema import Row
from attnbench.stats import doubts
from attnbench.stats.intervals import MIN_PROCESSES, MIN_ROUNDS, Interval
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.precision import intervals, is_precise
from attnbench.sweep.settings import Settings
from attnbench.theory.costs import flops

_SEEN_SECONDS, _OVER = 0.3, 0.3  # CPU seconds are told in hundredths; cores beyond --threads, a warning
_LEAK_BYTES = 1 << 20  # a call that keeps more than this is worth a warning


def row(cell: Cell, measured: Measured | None, settings: Settings) -> Row:
    """All but its figures: see `figures`."""
    w = cell.workload
    found: Row = {
        "plugin": cell.plugin,
        "variant": cell.variant,
        "family": cell.family,
        "distribution": cell.distribution,
        "baseline": settings.baseline,
        **w.as_dict(),
        "machine": settings.machine,
        "l2": settings.l2,
        "isa": settings.isa,
        "flops": flops(w),
        "variant_flops": cell.flops or None,
        "predicted_workspace_bytes": cell.workspace,
        "warnings": [],
        "samples": [],
    }
    return found | (dict(measured.columns) if measured else {})


def figures(cell: Cell, measured: Measured, base: Measured | None, settings: Settings) -> Row:
    """What its samples say. base: the baseline's; the cell's own where it is the baseline."""
    latency, speedup = intervals(measured, base, measured.confidence)
    rounds, precise = len(measured.samples), is_precise(latency, speedup, settings.precision)
    speedup = speedup or Interval(float("nan"), None, None)
    kinds = doubts.of_samples(measured.samples, settings.precision, precise, base.samples if base else ())
    number = measured.processes
    if number < MIN_PROCESSES and rounds >= MIN_ROUNDS:
        kinds.append("one-process")
    if measured.used.wall_s > _SEEN_SECONDS and measured.used.cores > cell.workload.threads + _OVER:
        kinds.append("more-threads")
    if cell.workload.on_host and settings.at_once is not None and settings.at_once < cell.workload.threads:
        kinds.append("fewer-threads")
    if measured.columns.get("emulated"):
        kinds.append("emulated")
    if cell.workload.is_tiled:
        kinds.append("tiled")
    if _LEAK_BYTES < measured.leak_bytes < float("inf"):
        kinds.append("memory-leak")
    kinds += doubts.of_gpu(measured.columns, latency.median)
    return {
        "latency_s": latency.median,
        "latency_low_s": latency.low,
        "latency_high_s": latency.high,
        "rounds": rounds,
        "held_up": len(measured.held_up),
        "processes": number,
        "confidence": measured.confidence,
        "converged": precise,
        "speedup": speedup.median,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "flops_per_s": flops(cell.workload) / latency.median,
        "warnings": kinds,
        "samples": measured.samples,
    }
