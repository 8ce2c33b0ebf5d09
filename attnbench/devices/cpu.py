"""The CPU: the host's clock, and memory as Linux counts it. On other systems variants are timed, without memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from attnbench import environment
from attnbench.devices import machine
from attnbench.devices.device import MEMORY, Device

# mallopt(3). Left alone, malloc maps large allocations afresh at first and from the heap once one was freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LEAST_MMAP, _MOST_MMAP = 128 << 10, 32 << 20


class Cpu(Device):
    """All cores that the threads run on."""

    reuses = False
    limits_process = True
    worker_bytes = 200 << 20
    burst_s = 3e-3  # noise comes and goes in tenths of a second: what the members of a round share, so it is short
    guessed_flops_per_s = 5e10

    def missing(self) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        """Which of its kernels torch picks in this process, such as "AVX2"."""
        import torch

        return {"cpu_capability": torch.backends.cpu.get_cpu_capability()}

    def usual_dtype(self) -> str:
        """bfloat16 where the CPU multiplies it by itself and nothing holds torch back from that, else float32."""
        held = str(self.facts()["cpu_capability"]) in ("DEFAULT", "AVX2") or environment.holds_cpu(os.environ)
        return "bfloat16" if machine.multiplies_bfloat16() and not held else "float32"

    def unmeasured(self) -> dict[str, str]:
        return dict.fromkeys(MEMORY, why) if (why := _blind()) else {}

    def cache_bytes(self) -> int | None:
        return machine.cache_bytes()

    def begin(self, limit: int | None) -> None:
        """Makes every allocation from 128 KiB up a mapping of its own: memory is exact, and allocating is slower.

        limit: kept by the process's own limit.
        """
        if not _blind():
            libc().mallopt(_M_MMAP_THRESHOLD, _LEAST_MMAP)

    def before_timing(self) -> None:
        """Back to what malloc settles at in a long-lived process: what is freed is used again."""
        if not _blind():
            libc().mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP)
            libc().mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_MMAP)

    def peak(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """As `Device.peak`, by the kernel's high-water mark of resident pages (proc(5), clear_refs), reset before.

        Code that the call pages in is not counted. malloc keeps freed pages: without giving them back first, and
        keeping none (`begin`), memory that a call takes from them would go unseen.
        """
        before = self.kept_bytes()
        if before is None:
            return call(), None
        code = status_bytes("RssFile")
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        out = call()
        return out, max(0, status_bytes("VmHWM") - before - max(0, status_bytes("RssFile") - code))

    def large_bytes(self) -> int | None:
        """What malloc has mapped by itself (mallinfo2(3), hblkhd): after `begin` that is each block from 128 KiB up."""
        if _blind():
            return None
        _use_up()
        return int(_mallinfo().hblkhd)

    def kept_bytes(self) -> int | None:
        """Resident bytes of this process once freed pages went back to the system."""
        if _blind():
            return None
        libc().malloc_trim(0)
        return status_bytes("VmRSS")


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _use_up() -> None:
    """Takes the large pieces that the heap has free, for good: malloc would serve large blocks from there, unseen."""
    here = libc()
    here.malloc.restype, here.malloc.argtypes, here.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size = _MOST_MMAP
    while size >= _LEAST_MMAP:
        mapped = _mallinfo().hblkhd
        piece = here.malloc(size)
        if piece is None or _mallinfo().hblkhd != mapped:  # of the heap's there is none so large
            here.free(piece)
            size //= 4


class _Mallinfo(ctypes.Structure):
    """As mallinfo2(3) has it."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def _mallinfo() -> _Mallinfo:
    told = libc().mallinfo2
    told.restype = _Mallinfo
    found: _Mallinfo = told()
    return found


@cache
def _blind() -> str | None:
    """None where memory can be measured, or what this system lacks for it."""
    try:
        here = libc()
        here.mallopt, here.malloc_trim, here.mallinfo2  # noqa: B018 - the lookup itself tells
        status_bytes("VmHWM")
        with open("/proc/self/clear_refs", "w"):
            return None
    except AttributeError:
        return "this system's C library has no mallopt, malloc_trim and mallinfo2"
    except (OSError, StopIteration):
        return "this system has no /proc that counts resident pages"


def status_bytes(field: str) -> int:
    """One of the sizes that proc(5) lists of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


DEVICE = Cpu()
