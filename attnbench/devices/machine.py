"""What machine a run was measured on, and how busy it was."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from attnbench.devices import cgroup


def usable_cores() -> int:
    """Cores that this process may run on (its affinity, not what the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """As many as there are usable cores and, under a cgroup's quota, as run without being halted in turns."""
    quota = cgroup.cpus()
    return usable_cores() if quota is None else min(usable_cores(), max(1, int(quota)))


LIBRARIES = ("torch", "xformers", "triton", "numpy", "pandas", "scipy")


def describe() -> dict[str, Any]:
    """CPU, features, memory, limits and versions, all JSON. What is known of a GPU is `device.describe`'s to add."""
    import cpuinfo

    cpu = cpuinfo.get_cpu_info()
    return {
        "cpu": cpu.get("brand_raw", platform.processor() or "unknown"),
        "features": sorted(f for f in cpu.get("flags", []) if f.startswith(("avx", "amx", "fma", "sve", "neon"))),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "hardware_threads": os.cpu_count(),
        "usable_threads": usable_cores(),
        "cache_bytes": {k: cpu[k] for k in ("l1_data_cache_size", "l2_cache_size", "l3_cache_size") if k in cpu},
        "governor": cgroup.read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "cgroup_cpus": cgroup.cpus(),
        "cgroup_memory_bytes": cgroup.memory_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "git": _git(),
        "load_start": load(),
    }


def load() -> float:
    """Processes running or waiting to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def available_memory() -> int:
    """Bytes that can be allocated before this machine, or the cgroup that holds us, runs out."""
    free, held = int(psutil.virtual_memory().available), cgroup.free_bytes()
    return free if held is None else min(free, held)


def cpu_seconds(pid: int) -> float:
    """What a process and those that it started have used of all cores so far; 0 for one that is gone.

    In steps of a hundredth of a second.
    """
    return _own_seconds(pid) + sum(map(cpu_seconds, _children(pid)))


def _own_seconds(pid: int) -> float:
    try:  # proc(5): the name, which may hold anything, ends with the last bracket; asked around each burst
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        pass
    try:
        spent = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(spent.user + spent.system + spent.children_user + spent.children_system)


def _children(pid: int) -> list[int]:
    """Processes that live and that a process has started, where Linux tells (proc(5), task/children)."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    return found


def busy_children(pid: int, seconds: float = 0.05) -> float:
    """Cores that the processes which a process has started keep busy, watched for so long where there are any."""
    children = _children(pid)
    if not children:
        return 0.0
    before = sum(map(cpu_seconds, children))
    time.sleep(seconds)
    return (sum(map(cpu_seconds, children)) - before) / seconds


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:  # it is not installed, or its metadata is broken
        return None


def _git() -> str | None:
    """The state of the checkout that attnbench runs from, or None for an installed copy."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16: AVX512-BF16, AMX or SVE's."""
    import cpuinfo

    return not {"avx512_bf16", "amx_bf16", "svebf16"}.isdisjoint(cpuinfo.get_cpu_info().get("flags", []))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of all last-level caches together, as Linux tells; None where it does not.

    More of a machine than the threads may use: then fewer cells count as bound by memory, not more.
    """
    sizes: dict[int, dict[str, int]] = {}
    for index in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = (
                (index / name).read_text(encoding="utf-8").strip() for name in ("level", "shared_cpu_list", "size")
            )
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
            sizes.setdefault(int(level), {})[shared] = int(size[:-1]) * unit
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return sum(sizes[max(sizes)].values()) if sizes else None
