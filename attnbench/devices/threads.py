"""The threads among which torch splits a call: how many can run at a time, and on which cores they do."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from attnbench.devices.cpu import libc

_GRAIN = 1 << 15  # elements that torch gives a thread at least (ATen, Parallel.h)
_TASKS = Path("/proc/self/task")


class Team:
    """Torch's OpenMP pool for so many threads, in a process that has made no such call before."""

    def __init__(self, threads: int, tasks: Path = _TASKS) -> None:
        """Makes it, where Linux is: those that a call which is split among all threads has started."""
        import torch

        torch.set_num_threads(threads)  # starts threads of another pool
        self._tasks, self.others = tasks, list[int]()
        if hasattr(os, "sched_getaffinity") and tasks.is_dir():
            before = _ids(tasks)
            torch.empty(threads * _GRAIN, dtype=torch.uint8).add_(1)
            self.others = sorted(_ids(tasks) - before)

    def settle(self) -> None:
        """Gives the others a core each that this thread is not on, where the team takes all cores.

        Who slept may be woken on a core that is taken while another one idles, and waits there for the scheduler's next
        tick in the middle of a call: where cores are virtual, a halted one does not count as idle. Of calls in a row
        only the first suffers so; after it the threads are where they are put here at once.
        """
        with suppress(OSError, AttributeError):  # another system, or one that lets nobody choose
            if not self.others:
                return
            here = libc().sched_getcpu()
            cores = [core for core in sorted(os.sched_getaffinity(0)) if core != here]
            if len(cores) == len(self.others) and set(self.others) <= _ids(self._tasks):
                for thread, core in zip(self.others, cores, strict=True):
                    os.sched_setaffinity(thread, {core})


def at_once(threads: int, tasks: Path = _TASKS) -> int | None:
    """Threads of torch's OpenMP pool that can run at a time where so many are asked for; None where Linux is not.

    Variables and affinities are seen by what they do: a team's threads, and this one, are asked where they may run.
    For a process that has not made such a call before.
    """
    if not hasattr(os, "sched_getaffinity") or not tasks.is_dir():
        return None
    team = {threading.get_native_id(), *Team(threads, tasks).others}
    cpus: set[int] = set()
    for thread in team:
        cpus |= os.sched_getaffinity(thread)
    return min(len(team), len(cpus))


def _ids(tasks: Path) -> set[int]:
    return {int(entry) for entry in os.listdir(tasks)}
