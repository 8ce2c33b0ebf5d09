"""What lies in another process's memory, read from outside, without its help (Linux, proc_pid_mem(5))."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

_LARGEST_SPAN = 1 << 30  # bytes over which a tensor may be spread


def can_peek(pid: int) -> bool:
    """Whether the system lets us, tried at a place that is mapped in this process."""
    try:
        with Path(f"/proc/{pid}/maps").open(encoding="utf-8", errors="replace") as maps:
            start = next((int(line.split("-")[0], 16) for line in maps if line.split()[1].startswith("r")), None)
    except (OSError, ValueError, IndexError):
        return False
    return start is not None and _read(pid, start, 1) is not None


def tensor(pid: int, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bytes | None:
    """The values of a tensor in that process, as they lie in memory when they are contiguous; None where none are.

    address: of its first value. strides: in bytes, as `itemsize` is.
    """
    count = prod(shape)
    span = itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not count or min(strides, default=0) < 0 or span > _LARGEST_SPAN:
        return None
    found = _read(pid, address, span)
    if found is None:
        return None
    kind = np.dtype(f"V{itemsize}")
    return np.ndarray(tuple(shape), kind, buffer=found, strides=tuple(strides)).tobytes()


def _read(pid: int, address: int, size: int) -> bytearray | None:
    found = bytearray()
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            while len(found) < size:
                if not (more := memory.read(size - len(found))):
                    return None
                found += more
    except (OSError, ValueError, OverflowError):  # not there, not ours to read, no address
        return None
    return found
