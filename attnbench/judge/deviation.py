"""Errors of an output against a float64 reference, and how large an implementation error may be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnbench.plugin import Definition, Softmax
from attnbench.workload import DEVICES, Workload

# Relative L2 by dtype and family. Exact and sparse variants differ from the reference by rounding alone: torch's own
# kernels show 3e-7 (float32), 3e-3 (bfloat16) and 4e-4 (float16), and naive attention a few times that. A quantized
# variant's reference shares its int8 operands, but a value on the edge between two integers may fall either way.
# A feature map divides two long sums, and a recurrence carries its rounding on. On CUDA, float32 products may run in
# TF32.
_TOLERANCE = {
    "float32": {"exact": 2e-5, "sparse": 2e-5, "quantized": 1e-3, "kernel": 1e-4, "recurrent": 1e-4},
    "bfloat16": {"exact": 1.5e-2, "sparse": 1.5e-2, "quantized": 2e-2, "kernel": 2e-2, "recurrent": 2e-2},
    "float16": {"exact": 2e-3, "sparse": 2e-3, "quantized": 5e-3, "kernel": 1e-2, "recurrent": 1e-2},
}
_TF32_TOLERANCE = 2e-3
_GRADIENT_FACTOR = 2
_NO_GRADIENT = 1e-3
_WORST_ROW = 10  # a single row may be off by this many times the tolerance
# What rounds softmax's weights to few bits: some lie so near an edge between two numbers that float32 and float64 see
# them on different sides. One of them in a small problem is more than rounding, and a row of few keys moves by a step.
_EDGE, _STEP = 4e-3, 0.5


@dataclass(frozen=True)
class Error:
    """Relative L2 norm of the difference, its largest element, cosine similarity, and the worst row's relative L2."""

    rel_l2: float
    max_abs: float
    cosine: float
    worst_row: float

    def columns(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{name}": getattr(self, name) for name in ("rel_l2", "max_abs", "cosine")}


def compare(actual: Tensor, expected: Tensor) -> Error:
    """The error of `actual` (any dtype) against `expected` (float64), both (..., rows, dim)."""
    a, e = actual.double(), expected
    difference = a - e
    row = difference.norm(dim=-1) / e.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    norm = max(float(e.norm()), torch.finfo(torch.float64).tiny)
    cosine = float((a * e).sum()) / max(float(a.norm()) * norm, torch.finfo(torch.float64).tiny)
    return Error(float(difference.norm()) / norm, float(difference.abs().max()), cosine, float(row.max()))


def badness(error: Error | None) -> float:
    """By which the worse of two is known: NaN is the worst, and none at all the best."""
    return -1.0 if error is None else error.rel_l2 if error.rel_l2 == error.rel_l2 else float("inf")


def tolerance(workload: Workload, family: str, *definitions: Definition) -> float:
    """The largest relative L2 at which an implementation still counts as right. The harness's, not the plugin's.

    definitions: of the attentions that are judged by it. What rounds weights is given room for that if it says of
        itself that it is quantized.
    """
    allowed = _TOLERANCE[workload.dtype][family]
    if DEVICES[workload.device].tf32 and workload.dtype == "float32":
        allowed = max(allowed, _TF32_TOLERANCE)
    return max(allowed, _EDGE) if family == "quantized" and any(map(rounds_weights, definitions)) else allowed


def gradient_tolerance(workload: Workload, family: str) -> float:
    """The same of a gradient, which goes through twice as many products, and rounds P and its gradient too."""
    return _GRADIENT_FACTOR * tolerance(workload, family)


def gradient_error(actual: Tensor, expected: Tensor, up: Tensor) -> float:
    """Relative L2 of a gradient (any dtype) against float64.

    One that is next to nothing beside the gradient that came in, `up`, as where a query sees a single key and softmax
    is constant, is taken relative to that.
    """
    norm, reach = float(expected.norm()), float(up.double().norm())
    if norm <= _NO_GRADIENT * reach:
        norm = max(reach, torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected).norm()) / norm


def past_edges(error: Error, definition: Definition) -> Error:
    """The error, silent about its worst row where rounding of softmax's weights explains that."""
    return replace(error, worst_row=0.0) if rounds_weights(definition) and error.worst_row <= _STEP else error


def rounds_weights(definition: Definition) -> bool:
    return isinstance(definition, Softmax) and definition.weights is not None


def verdict(error: Error, allowed: float) -> str | None:
    """None if the implementation error is tolerable, or what is wrong in a few words."""
    if not error.rel_l2 <= allowed:  # NaN is never right
        return f"implementation error {error.rel_l2:.1e} (relative L2) is over the tolerance {allowed:.2g}"
    return verdict_of_rows(error, allowed)


def verdict_of_rows(error: Error, allowed: float) -> str | None:
    """What holds of any row, also where few are looked at."""
    if error.worst_row <= _WORST_ROW * allowed:
        return None
    return f"a row is off by {error.worst_row:.1e} (relative L2), over {_WORST_ROW} times the tolerance {allowed:.2g}"
