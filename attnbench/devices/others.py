"""What else this machine's cores did meanwhile: time that went to anybody, to other virtual machines, and to halts."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from attnbench.devices import cgroup

_STAT = Path("/proc/stat")
_FIRST_LINE = 256  # bytes that hold it


class Host(NamedTuple):
    """CPU seconds since some moment that stays the same, all cores together; None where the system does not tell.

    busy_s: what all processes used, ours too, interrupts with them, in steps of a hundredth of a second.
    steal_s: in which cores of this virtual machine had work and the host ran something else.
    throttled_s: in which our cgroup, or one above it, had used up its quota and its threads were halted; in so many
    periods of it (throttled_periods).
    """

    busy_s: float | None
    steal_s: float | None
    throttled_s: float | None
    throttled_periods: int | None

    def since(self, before: Host) -> Host:
        """What has come to it since then."""
        return Host(*(None if a is None or b is None else a - b for a, b in zip(self, before, strict=True)))  # type: ignore[arg-type]


def host(stat: Path = _STAT, root: Path = cgroup.ROOT, own: Path = cgroup.OWN) -> Host:
    """All cores up to now, by proc_stat(5) and the cgroups that hold us; cheap enough to ask around each burst."""
    return Host(*_cores(stat), *(cgroup.halted(_halts(root, own)) or (None, None)))


@cache
def _halts(root: Path, own: Path) -> tuple[Path, ...]:
    """Looked for once: a process stays in its cgroup."""
    return cgroup.halts(root, own)


def _cores(stat: Path) -> tuple[float | None, float | None]:
    """Busy and stolen seconds, by the first line of /proc/stat; the others, a line a core, are not taken over."""
    try:
        with stat.open("rb", buffering=0) as file:
            name, *fields = file.read(_FIRST_LINE).partition(b"\n")[0].split()
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, fields[:8])
    except (OSError, ValueError):
        return None, None
    if name != b"cpu":
        return None, None
    return (user + nice + system + interrupts + soft) / ticks, stolen / ticks


def waited_s(pid: int, root: Path = Path("/proc"), thread: int | None = None) -> float | None:
    """Seconds that the threads of a process were ready to run and had no core, up to now; None where nobody tells.

    By the scheduler's own statistics (Linux, sched-stats: the second field of schedstat, in nanoseconds).

    thread: one of them alone.
    """
    total, told = 0, False
    threads = root / str(pid) / "task"
    with suppress(OSError):
        for one in [str(thread)] if thread else os.listdir(threads):
            with suppress(OSError, ValueError, IndexError):
                total, told = total + int((threads / one / "schedstat").read_bytes().split()[1]), True
    return total / 1e9 if told else None
