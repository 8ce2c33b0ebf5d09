"""How many of a worker's threads can run at the same time, whatever they are told to do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_GRAIN = 1 << 15  # elements that torch gives a thread at least (ATen, Parallel.h)


def at_once(threads: int, tasks: Path = Path("/proc/self/task")) -> int | None:
    """Threads of torch's OpenMP pool that can run at a time where so many are asked for; None where Linux is not.

    Variables and affinities are seen by what they do: a call that is split among all threads is made, and those that
    it started, and this one, are asked where they may run. For a process that has not made such a call before.
    """
    import torch

    if not hasattr(os, "sched_getaffinity") or not tasks.is_dir():
        return None
    torch.set_num_threads(threads)  # starts threads of another pool
    before = _ids(tasks)
    torch.empty(threads * _GRAIN, dtype=torch.uint8).add_(1)
    team = {threading.get_native_id(), *(_ids(tasks) - before)}
    cpus: set[int] = set()
    for thread in team:
        cpus |= os.sched_getaffinity(thread)
    return min(len(team), len(cpus))


def _ids(tasks: Path) -> set[int]:
    return {int(entry.name) for entry in tasks.iterdir()}
