"""Linear attention with elu features in C++ on a CPU: linear.cpp, in float32, causal by chunks."""

from __future__ import annotations

from attnbench.plugin import Call
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler

CHUNK = kernels.KEYS


def unsupported(workload: Workload) -> str | None:
    if workload.device != "cpu":
        return "the C++ kernel is for a CPU"
    if workload.phase == "decode":
        return "the C++ kernel goes through all keys"
    if workload.phase == "train":
        return "the C++ kernel has no backward pass"
    return compiler.unsupported(workload.dtype, "linear.cpp")


def described() -> str:
    return kernels.described("float32")


def linear(workload: Workload) -> Call:
    kernel = compiler.load("linear.cpp", workload.dtype).linear
    return kernels.caller(kernel, workload, kernels.dense(workload, workload.seq), CHUNK)


def workspace_bytes(workload: Workload) -> int:
    """The sums and chunk of each thread."""
    dims, columns = (kernels.columns(n) for n in (workload.head_dim, workload.value_dim))
    chunk = CHUNK * (3 * dims + 2 * columns + CHUNK)
    return 4 * workload.threads * ((dims + 1) * columns + chunk)
