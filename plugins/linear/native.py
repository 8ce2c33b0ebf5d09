"""Linear attention with elu features in C++ on a CPU with AVX-512: linear.cpp, in float32, causal by chunks."""

from __future__ import annotations

from attnbench.plugin import Call
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler

CHUNK = kernels.KEYS


def unsupported(workload: Workload) -> str | None:
    if workload.device != "cpu":
        return "the AVX-512 kernel is for a CPU"
    if workload.phase == "decode":
        return "the AVX-512 kernel goes through all keys"
    if workload.phase == "train":
        return "the AVX-512 kernel has no backward pass"
    if workload.dtype == "float16":
        return "the AVX-512 kernel is for float32 and bfloat16"
    return compiler.unsupported("linear.cpp")


def linear(workload: Workload) -> Call:
    kernel = getattr(compiler.load("linear.cpp"), f"linear_{workload.dtype}")
    return kernels.caller(kernel, workload, kernels.dense(workload, workload.seq), CHUNK)


def workspace_bytes(workload: Workload) -> int:
    """The sums and chunk of each thread."""
    dims, columns = (kernels.round_up(n, kernels.LANES) for n in (workload.head_dim, workload.value_dim))
    chunk = CHUNK * (3 * dims + 2 * columns + CHUNK)
    return 4 * workload.threads * ((dims + 1) * columns + chunk)
