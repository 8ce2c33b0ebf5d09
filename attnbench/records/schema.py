"""What a row holds: its columns, statuses and samples."""

from __future__ import annotations

from typing import Any

from attnbench.workload import Workload

SCHEMA = 1
STATUSES = ("ok", "unsupported", "skipped", "out-of-memory", "timeout", "crashed", "error", "wrong")
WELL = ("ok", "unsupported", "skipped")
FAILED = ("out-of-memory", "timeout", "crashed", "error")
Row = dict[str, Any]
WORKLOAD = (
    "scope", "block", "norm", "layers", "phase", "device", "dtype", "batch", "heads", "kv_heads", "seq", "kv_seq",
    "head_dim", "value_dim", "lengths", "mask", "inputs", "seed", "threads",
)  # fmt: skip
TEXTS = (
    "plugin", "variant", "family", "implementation", "distribution", "baseline", "status", "reason", "timing", "l2",
    "start_throttled", "end_throttled",
)  # fmt: skip
GPU_STATE = (
    "clock_hz", "memory_clock_hz", "temperature_c", "power_w", "power_cap_w", "throttled", "other_processes"
)  # fmt: skip
"""Of the GPU, from NVML: SI units but for degrees Celsius; `throttled` in words, "" for nothing."""
GPU_COLUMNS = tuple(f"{when}_{what}" for what in GPU_STATE if what != "throttled" for when in ("start", "end"))
"""Numbers of that while the cell's first and last calls ran."""
NUMBERS = (
    "latency_s", "latency_low_s", "latency_high_s", "speedup", "speedup_low", "speedup_high", "rounds", "processes",
    "confidence", "peak_bytes", "workspace_bytes", "predicted_workspace_bytes", "input_bytes", "output_bytes",
    "saved_bytes", "cache_bytes", "flops", "flops_per_s", "variant_flops", "density", "setup_s", "first_call_s",
    "implementation_rel_l2", "implementation_max_abs", "implementation_cosine",
    "approximation_rel_l2", "approximation_max_abs", "approximation_cosine", "tolerance",
    "query_gradient_rel_l2", "key_gradient_rel_l2", "value_gradient_rel_l2", "gate_gradient_rel_l2",
    "wall_s", "energy_j", "reserved_bytes", "process_bytes", *GPU_COLUMNS,
)  # fmt: skip
COLUMNS = (*TEXTS[:6], *WORKLOAD, *TEXTS[6:], *NUMBERS[:8], "converged", *NUMBERS[8:], "warnings", "traceback")
SAMPLE = ("process", "round", "start", "calls", "seconds")


def key(row: Row) -> tuple[str, Workload]:
    return row["plugin"], Workload.from_dict(row)
