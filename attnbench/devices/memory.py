"""Peak memory of one call, measured by itself and never while it is timed."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_libc = ctypes.CDLL(None)
# mallopt(3). Left alone, malloc maps large allocations afresh at first and from the heap once one was freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LEAST_MMAP, _MOST_MMAP = 128 << 10, 32 << 20


def return_freed_pages() -> None:
    """Makes every allocation from 128 KiB up a mapping of its own: memory is exact, and allocating is slower."""
    _libc.mallopt(_M_MMAP_THRESHOLD, _LEAST_MMAP)


def keep_freed_pages() -> None:
    """Back to what malloc settles at in a long-lived process: what is freed is used again, as it is when timed."""
    _libc.mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP)
    _libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_MMAP)


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def resident_bytes() -> int:
    """Resident bytes of this process once freed pages went back to the system."""
    _libc.malloc_trim(0)
    return _status("VmRSS")


def kept_bytes(like: Tensor) -> int:
    """Bytes that this process holds on the tensor's device: resident ones, or those of torch's tensors on a GPU."""
    return int(torch.cuda.memory_allocated()) if like.is_cuda else resident_bytes()


def reserved_bytes(like: Tensor) -> int | None:
    """The most GPU memory that torch had taken, cached blocks included, since `measure` began; None on a CPU."""
    return int(torch.cuda.max_memory_reserved()) if like.is_cuda else None


def limit_gpu(limit: int) -> None:
    """Lets this process take so much of the GPU's memory: what asks for more gets torch's OutOfMemoryError."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def give_back(like: Tensor) -> None:
    """Gives a GPU's memory that torch keeps for later back, as this process will be idle while others run."""
    if like.is_cuda:
        torch.cuda.empty_cache()


def release() -> None:
    """Frees all that nothing refers to any more, here and on a GPU."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def measure(call: Callable[..., Any], tensors: list[Tensor]) -> tuple[Any, int]:
    """Runs one call. Returns its output and the bytes held at its peak beside what was held before, output included.

    On a CPU the kernel's high-water mark of resident pages (proc(5), clear_refs) is reset before and read after. Code
    that the call pages in is not counted. malloc keeps freed pages: without giving them back first, and keeping none
    (`return_freed_pages`, before the first call), memory that a call takes from them would go unseen.
    """
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call(*tensors)
        torch.cuda.synchronize()
        return out, int(torch.cuda.max_memory_allocated()) - before
    before, code = resident_bytes(), _status("RssFile")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    out = call(*tensors)
    return out, max(0, _status("VmHWM") - before - max(0, _status("RssFile") - code))


def held(call: Callable[[], Any], like: Tensor) -> tuple[Any, int]:
    """Runs one call. Returns what it gives and the bytes that are held more than before, as long as that lives.

    like: a tensor on the device in question.
    """
    if like.is_cuda:
        torch.cuda.synchronize()
        before = int(torch.cuda.memory_allocated())
        kept = call()
        torch.cuda.synchronize()
        return kept, int(torch.cuda.memory_allocated()) - before
    before = resident_bytes()
    kept = call()
    return kept, resident_bytes() - before
