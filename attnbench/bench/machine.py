"""What machine a run was measured on, and how busy it was."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("torch", "xformers", "triton", "numpy", "pandas", "scipy")


def describe() -> dict[str, Any]:
    """CPU, features, GPU, memory, limits and versions, all JSON. Loads torch and asks for the GPU: for a worker."""
    import cpuinfo
    import torch

    cpu = cpuinfo.get_cpu_info()
    return {
        "cpu": cpu.get("brand_raw", platform.processor() or "unknown"),
        "features": sorted(f for f in cpu.get("flags", []) if f.startswith(("avx", "amx", "fma", "sve", "neon"))),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "hardware_threads": os.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)),
        "cache_bytes": {k: cpu[k] for k in ("l1_data_cache_size", "l2_cache_size", "l3_cache_size") if k in cpu},
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cgroup_cpu": _read("/sys/fs/cgroup/cpu.max"),
        "cgroup_memory": _read("/sys/fs/cgroup/memory.max"),
        "memory_bytes": psutil.virtual_memory().total,
        **_gpu(),
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "git": _git(),
        "load_start": load(),
    }


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_memory_bytes": None, "gpu_free_bytes": None}
    from attnbench.bench import nvml

    found = torch.cuda.get_device_properties()
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": found.name,
        "gpu_memory_bytes": total,
        "gpu_free_bytes": free,
        "gpu_multiprocessors": found.multi_processor_count,
        "gpu_l2_bytes": found.L2_cache_size,
        "gpu_capability": f"{found.major}.{found.minor}",
        "gpu_driver": nvml.driver(),
        "gpu_state": idle.state() if (idle := nvml.current()) else None,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def identity(machine: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for a run to be resumed: its numbers would not compare otherwise."""
    torch_version = machine.get("libraries", {}).get("torch")
    return (*(machine.get(k) for k in ("cpu", "hardware_threads", "memory_bytes", "gpu")), torch_version)


def load() -> float:
    """Processes running or waiting to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def available_memory() -> int:
    """Bytes that can be allocated before this machine, or the cgroup that holds us, runs out."""
    free = psutil.virtual_memory().available
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit and limit.isdigit() and used and used.isdigit():
        free = min(free, int(limit) - int(used))
    return int(free)


def oom_kills() -> int:
    """How often the kernel has killed in our cgroup for want of memory."""
    for line in (_read("/sys/fs/cgroup/memory.events") or "").splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    """The state of the checkout that attnbench runs from, or None for an installed copy."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
