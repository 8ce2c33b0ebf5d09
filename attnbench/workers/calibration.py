"""The highest rates of this machine: of matrix products in each format, and of reading memory.

Measured when asked for, by `attnbench calibrate`, and kept in the user's cache folder: a run takes them from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from math import ceil
from typing import TYPE_CHECKING, TypeAlias

import psutil

from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.theory.roofline import Ceilings
from attnbench.workload import DEVICES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape: TypeAlias = tuple[int, int, int, int]
"""(batch, m, k, n) of products (m x k) (k x n)."""
SQUARES: tuple[Shape, ...] = tuple((1, n, n, n) for n in (512, 1024, 2048, 4096, 8192))  # a GPU wants the last
ATTENTION: tuple[Shape, ...] = ((8, 2048, 64, 2048), (8, 2048, 2048, 64))  # Q K^T and P V of 8 heads
_FLOATS = ("float32", "bfloat16", "float16")
_TINY: Shape = (1, 256, 256, 256)
_LONGEST_CALL = 0.3  # seconds; a longer product tells no more, and those of float16 would take minutes on most CPUs
_BURST_SECONDS = 1e-3  # short, so that some fall between the turns of other programs
_READ_BYTES = 512 << 20
_CACHES = 4  # at least so many times the caches are read
_Way: TypeAlias = "Callable[[Shape], tuple[Callable[..., Tensor], list[Tensor]]]"
"""For a shape, a call and the tensors that it takes."""


def measure(
    device: str, threads: int, shapes: Sequence[Shape] = (), read_bytes: int = 0, seconds: float = 0.5
) -> Ceilings:
    """Measures the ceilings with so many threads of this process; takes well under a minute.

    A ceiling is a maximum: whatever disturbs a call makes it slower, so the fastest of all calls in all shapes is
    taken. It is still a rate that something reached, not the one in a data sheet.

    shapes: of the products; those whose call would take over 0.3 s are left out. read_bytes: how much is read
        from memory. Both have defaults for the device. seconds: for each shape, and each way to do it.

    Raises:
        AttnbenchError: there is no such device, too little memory, or no product that works.
    """
    import torch

    on = of(device)
    if missing := on.missing():
        raise AttnbenchError(f"--device {device}: {missing}")
    cache = on.cache_bytes()
    read_bytes = read_bytes or max(_READ_BYTES, _CACHES * (cache or 0))
    free = on.free_bytes()
    if free < 2 * read_bytes:
        needed, there = 2 * read_bytes / 2**30, free / 2**30
        raise AttnbenchError(f"calibrating needs {needed:.1f} GiB of free memory, there are {there:.1f}")
    shapes = shapes or SQUARES + ATTENTION
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    began, others = time.monotonic(), _others()
    try:
        with torch.inference_mode():
            rates, at = {}, {}
            for name in (*_FLOATS, "int8"):
                if best := max(_products(name, device, shapes, seconds), default=None):
                    rates[name], at[name] = best
            if "float32" not in rates:
                raise AttnbenchError("no float32 product of this torch works here, or none is done in time")
            memory, at["memory"] = max(_reads(device, read_bytes, seconds))
    finally:
        torch.set_num_threads(before)
    # What others used of the cores that the threads left free took nothing from them.
    used = (_others() - others) / (time.monotonic() - began) - max(0, (os.cpu_count() or 1) - threads)
    return Ceilings(
        device=device,
        threads=threads,
        operations_per_s=rates,
        bytes_per_s=memory,
        cache_bytes=cache,
        disturbed=max(0.0, used) / threads if DEVICES[device].host else 0.0,
        at=at,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _products(name: str, device: str, shapes: Sequence[Shape], seconds: float) -> Iterator[tuple[float, str]]:
    """(operations a second, at what) of each way and shape that works."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    for way, make in _ways(dtype, device).items():
        rate = 0.0
        for shape in (_TINY, *sorted(shapes, key=_operations)):
            if rate and _operations(shape) / rate > _LONGEST_CALL:
                continue
            try:
                call, tensors = make(shape)
                best = _operations(shape) / _fastest(device, call, tensors, 0.0 if shape is _TINY else seconds)
            except RuntimeError:  # no such product of this dtype, in this torch or on this device
                break
            rate = max(rate, best)
            if shape is not _TINY:  # that was to see how long the others would take
                batch, m, k, n = shape
                yield best, f"{f'{batch} x ' if batch > 1 else ''}({m} x {k}) ({k} x {n}), {way}"


def _ways(dtype: torch.dtype, device: str) -> dict[str, _Way]:
    """Whose products are tried, by name."""
    import torch

    def draw(*size: int) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, size, dtype=dtype, device=device)
        return torch.randn(*size, device=device).to(dtype)

    def integers(shape: Shape) -> tuple[Callable[..., Tensor], list[Tensor]]:
        batch, m, k, n = shape
        return torch._int_mm, [draw(batch * m, k), draw(n, k).t()]

    def floats(shape: Shape) -> tuple[Callable[..., Tensor], list[Tensor]]:
        batch, m, k, n = shape
        many = (batch,) if batch > 1 else ()  # a batch of one goes the slower way of batches
        out = torch.empty(*many, m, n, dtype=dtype, device=device)
        return lambda a, b: torch.matmul(a, b, out=out), [draw(*many, m, k), draw(*many, k, n)]

    def convolution(shape: Shape) -> tuple[Callable[..., Tensor], list[Tensor]]:
        batch, m, k, n = shape
        x, weight = draw(1, k, batch * m, 1), draw(n, k, 1, 1)
        return torch.nn.functional.conv2d, [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]

    if dtype == torch.int8:
        return {"torch._int_mm": integers}
    # A convolution of 1 x 1 is the same product; on a CPU by oneDNN, where MKL may use half of one that is not Intel's.
    return {"torch.matmul": floats, "1 x 1 convolution": convolution}


def _reads(device: str, size: int, seconds: float) -> Iterator[tuple[float, str]]:
    """(bytes a second, at what) of several ways to read `size` bytes once."""
    import torch

    x = torch.ones(size // 4, device=device)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.sum": torch.sum,
        "torch.amax": torch.amax,
        "torch.sum of int64": lambda x: x.view(torch.int64).sum(),
    }
    for way, call in ways.items():
        yield x.nbytes / _fastest(device, call, [x], seconds), f"{x.nbytes / 2**20:.0f} MiB, {way}"


def _others() -> float:
    """Seconds that all cores together spent on anything but this process, a virtual machine's stolen time included."""
    spent, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = spent.idle + getattr(spent, "iowait", 0.0)
    # A guest's time is in the user's already.
    total = sum(spent) - getattr(spent, "guest", 0.0) - getattr(spent, "guest_nice", 0.0)
    return float(total - idle - own.user - own.system)


def _operations(shape: Shape) -> int:
    batch, m, k, n = shape
    return 2 * batch * m * k * n


def _fastest(device: str, call: Callable[..., Tensor], tensors: list[Tensor], seconds: float) -> float:
    """Seconds of a call in the fastest block of those that fit into `seconds`; at least one, after a first call."""
    timer = of(device).timer(call, tensors)
    timer.burst(1)
    block, _ = timer.burst(1)
    best, spent = block.seconds, block.seconds
    while spent < seconds:
        block, _ = timer.burst(ceil(_BURST_SECONDS / max(best, 1e-7)))
        best, spent = min(best, block.seconds / block.calls), spent + block.total_seconds
    return best
