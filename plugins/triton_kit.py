"""What the variants' Triton kernels share: where they can run, and how their tiles are padded. Needs no triton."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from attnbench.workload import Workload

MAX_DIM = 256  # what the kernels' tiles hold


def unsupported(workload: Workload) -> str | None:
    """None, or why a variant's Triton kernels can't take this workload here."""
    if workload.device != "cuda":
        return "the Triton kernels are for CUDA"
    if max(workload.head_dim, workload.value_dim) > MAX_DIM:
        return f"the Triton kernels hold head and value dims up to {MAX_DIM}"
    return None if find_spec("triton") else "the Triton kernels need triton"


def kernels(variant: str) -> ModuleType:
    """A variant's `triton_kernels`, loaded where they are asked for: triton need not be there."""
    return import_module(f"{variant}.triton_kernels")


def padded(dim: int, least: int = 16) -> int:
    """A power of 2, as tiles want it, and at least what tensor cores multiply over: 16, and 32 of int8."""
    return max(least, 1 << (dim - 1).bit_length())
