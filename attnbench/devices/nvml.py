"""What a GPU says of itself while it works: clocks, temperature, power, what holds it back, and who else is on it.

From NVML, the library behind nvidia-smi. What this GPU, its driver or a container does not tell is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import psutil
import pynvml
import torch

from attnbench.records.schema import GPU_STATE

STATE = GPU_STATE
"""What `Gpu.state` tells."""
# What lowers the clocks against the program's interest. An idle GPU and clocks that somebody has set are no throttling.
_REASONS = {
    "power cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "slowed down by the hardware": pynvml.nvmlClocksEventReasonHwSlowdown,
    "too hot": pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "power brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "in step with other GPUs": pynvml.nvmlClocksEventReasonSyncBoost,
}


class Gpu:
    """One GPU, by its handle."""

    def __init__(self, handle: Any, library: Any = pynvml) -> None:
        self._handle, self._nvml = handle, library

    def state(self) -> dict[str, Any]:
        """`STATE` as it is now. Clocks and power mean most while the GPU is at work."""
        n, handle = self._nvml, self._handle
        return {
            "clock_hz": self._asked(lambda: n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM) * 1e6),
            "memory_clock_hz": self._asked(lambda: n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_MEM) * 1e6),
            "temperature_c": self._asked(lambda: float(n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU))),
            "power_w": self._asked(lambda: n.nvmlDeviceGetPowerUsage(handle) / 1e3),
            "power_cap_w": self._asked(lambda: n.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
            "throttled": self._asked(lambda: _named(n.nvmlDeviceGetCurrentClocksEventReasons(handle))),
            "other_processes": self._others(),
        }

    def energy_j(self) -> float | None:
        """What the GPU has used since its driver was loaded."""
        millijoules = self._asked(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if millijoules is None else float(millijoules) / 1e3

    def process_bytes(self) -> int | None:
        """GPU memory of this process: its tensors, what torch keeps for later, and its context."""
        return next((p.usedGpuMemory for p in self._processes() if p.pid == os.getpid()), None)

    def _others(self) -> int | None:
        """How many processes beside this sweep's are on the GPU."""
        seen = {p.pid for p in self._processes()}
        if os.getpid() not in seen:  # it hides processes from this container, or numbers them otherwise
            return None
        ours = {child.pid for child in psutil.Process(os.getppid()).children()}  # of the server: the workers
        return len(seen - ours - {os.getpid()})

    def _processes(self) -> list[Any]:
        n, handle = self._nvml, self._handle
        computing = self._asked(lambda: n.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        return [*computing, *(self._asked(lambda: n.nvmlDeviceGetGraphicsRunningProcesses(handle)) or [])]

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._nvml.NVMLError:
            return None


def _named(reasons: int) -> str:
    return ", ".join(name for name, bits in _REASONS.items() if reasons & bits)


@cache
def current() -> Gpu | None:
    """The GPU that torch uses in this process; None where NVML is not to be had."""
    try:
        pynvml.nvmlInit()
        # By its name: CUDA_VISIBLE_DEVICES renumbers what torch sees, and not what NVML does.
        return Gpu(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}"))
    except pynvml.NVMLError:
        return None


def driver() -> str | None:
    """The driver's version; None where NVML is not to be had."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
