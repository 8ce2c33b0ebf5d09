"""Peak memory of one call, measured by itself and never while it is timed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

_libc = ctypes.CDLL(None)


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def resident_bytes() -> int:
    """Resident bytes of this process once freed pages went back to the system."""
    _libc.malloc_trim(0)
    return _status("VmRSS")


def measure(call: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, int]:
    """Runs one call. Returns its output and the bytes held at its peak beside what was held before, output included.

    On a CPU the kernel's high-water mark of resident pages (proc(5), clear_refs) is reset before and read after.
    malloc keeps freed pages: without giving them back first, memory that a call takes from them would go unseen.
    """
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call(*tensors)
        torch.cuda.synchronize()
        return out, int(torch.cuda.max_memory_allocated()) - before
    before = resident_bytes()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    out = call(*tensors)
    return out, max(0, _status("VmHWM") - before)


def poison(like: Tensor) -> None:
    """Leaves NaN where an output-sized allocation may land next, so that an unwritten output shows."""
    torch.full_like(like, float("nan"))
