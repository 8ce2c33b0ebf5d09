"""What the fork server asks of the system so that no process outlives a run or takes more memory than it may.

Linux does all of it. Another system does what it can: a worker is still ended with its process group, and asked to end
when the sweep does.
"""

from __future__ import annotations

import ctypes
import resource
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# A worker that prints without end is stopped by this, not by a full disk.
_LARGEST_FILE = 1 << 30


def adopt_orphans() -> None:
    """What dead children leave behind becomes this process's, which ends it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """This process is killed as soon as its parent is gone, whatever it does then."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit(memory: int | None) -> None:
    """Limits this process for good. memory: bytes that it may allocate beyond what it has now."""
    _lower(resource.RLIMIT_FSIZE, _LARGEST_FILE)
    _lower(resource.RLIMIT_CORE, 0)
    if memory is not None and (held := _data_bytes()) is not None:
        _lower(resource.RLIMIT_DATA, held + memory)


def unlimited() -> dict[str, str]:
    """What of a run's limits is not kept here, and why."""
    return {} if _data_bytes() is not None else {"--memory": "this system does not tell what a process has allocated"}


def _prctl(option: int, value: int) -> None:
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _data_bytes() -> int | None:
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return None


def _lower(kind: int, value: int) -> None:
    """A limit that is lower already stays."""
    least = min(v for v in (value, *resource.getrlimit(kind)) if v != resource.RLIM_INFINITY)
    resource.setrlimit(kind, (least, least))
