"""What the cgroup that holds this process lets it use of CPU and memory: a container's limits, or a job scheduler's.

cgroup v2, and v1 where a host still has it. A limit holds for all below it, so every folder from our own up to the
root counts; inside a container the root is the container's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# What the kernel gives back as soon as someone asks for memory; v1 spells it with "total_".
_RECLAIMABLE = ("inactive_file", "active_file")
_V1 = {"memory.max": "memory.limit_in_bytes", "memory.current": "memory.usage_in_bytes"}
_UNLIMITED = 1 << 62  # v1 says a number so large where v2 says "max"


def cpus(root: Path = ROOT, own: Path = OWN) -> float | None:
    """How many CPUs' time we may use, such as 1.5; None where nothing limits it."""
    limits = [limit for folder in _folders("cpu", root, own) if (limit := _quota(folder))]
    return min(limits, default=None)


def free_bytes(root: Path = ROOT, own: Path = OWN) -> int | None:
    """What we may still allocate, file cache that the kernel would give up included; None where nothing limits it."""
    free = []
    for folder in _folders("memory", root, own):
        limit, used = _number(folder, "memory.max"), _number(folder, "memory.current")
        if limit is not None and used is not None:
            free.append(max(0, limit - max(0, used - _reclaimable(folder))))
    return min(free, default=None)


def memory_bytes(root: Path = ROOT, own: Path = OWN) -> int | None:
    """What we may hold in all; None where nothing limits it."""
    limits = [limit for f in _folders("memory", root, own) if (limit := _number(f, "memory.max")) is not None]
    return min(limits, default=None)


def oom_kills(root: Path = ROOT, own: Path = OWN) -> int:
    """How often the kernel has killed in our cgroup for want of memory."""
    for folder in _folders("memory", root, own):
        for name in ("memory.events", "memory.oom_control"):  # v2, v1
            if (count := _fields(folder / name).get("oom_kill")) is not None:
                return count
    return 0


def halts(root: Path = ROOT, own: Path = OWN) -> tuple[Path, ...]:
    """The files that count how long we, and what shares a quota with us, were halted; for `halted`."""
    files = dict.fromkeys(folder / "cpu.stat" for folder in _folders("cpu", root, own))
    return tuple(file for file in files if _halted(file) is not None)


class Halted(NamedTuple):
    """CPU seconds for which quotas halted us so far, and periods of a quota in which that happened."""

    seconds: float
    periods: int


def halted(files: Sequence[Path]) -> Halted | None:
    """All levels together; None where no cgroup counts them."""
    found = [each for file in files if (each := _halted(file)) is not None]
    return Halted(sum(each.seconds for each in found), sum(each.periods for each in found)) if found else None


def _halted(file: Path) -> Halted | None:
    fields = _fields(file)
    for name, per_second in (("throttled_usec", 1e6), ("throttled_time", 1e9)):  # v2, v1
        if (count := fields.get(name)) is not None:
            return Halted(count / per_second, fields.get("nr_throttled", 0))
    return None


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Where the limits that hold for us may stand, the innermost first."""
    for line in (read(own) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", controller) or controller in controllers.split(","):
            top = root / controllers if controllers else root
            folder = top / path.lstrip("/")
            yield from (f for f in (folder, *folder.parents) if f != top and f.is_relative_to(top))
    yield from (root, root / controller)


def _quota(folder: Path) -> float | None:
    allowed, _, period = (read(folder / "cpu.max") or "").partition(" ")
    if not allowed:
        allowed = read(folder / "cpu.cfs_quota_us") or ""
        period = read(folder / "cpu.cfs_period_us") or ""
    return int(allowed) / int(period) if allowed.isdigit() and period.isdigit() and int(period) else None


def _number(folder: Path, name: str) -> int | None:
    text = read(folder / name) or read(folder / _V1[name]) or ""
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _reclaimable(folder: Path) -> int:
    fields = _fields(folder / "memory.stat")
    # v1's plain names leave out the cgroups below, which its usage counts.
    return sum(fields.get(f"total_{name}", fields.get(name, 0)) for name in _RECLAIMABLE)


def _fields(path: Path) -> dict[str, int]:
    """A file of lines "name number"."""
    pairs = (line.partition(" ") for line in (read(path) or "").splitlines())
    return {name: int(count) for name, _, count in pairs if count.isdigit()}


def read(path: Path) -> str | None:
    """The text of a small file of the kernel's, None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
