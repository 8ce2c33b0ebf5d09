"""Calls timed together, a burst, and how many of them one holds. The clock is the host's. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BURST_SECONDS = 0.02  # a burst is at least this long where its device says nothing else


def burst_size(call_seconds: float, seconds: float = BURST_SECONDS) -> tuple[int, int]:
    """(calls, untimed head calls) of a burst of at least so many seconds, for a call of this length.

    Shorter calls get an untimed one first, since a turn begins with cold caches.
    """
    return max(1, ceil(seconds / max(call_seconds, 1e-7))), 1 if call_seconds < seconds else 0


# Taken before any plugin is imported: one that replaces time.perf_counter changes nothing here.
clock = time.perf_counter
_STEADY_SECONDS, _STEADY_GAIN = 0.3, 0.97


@dataclass(frozen=True)
class Burst:
    """One timed burst: `calls` calls in `seconds`, begun at `start` on this machine's monotonic clock."""

    start: float
    calls: int
    seconds: float
    total_seconds: float
    """All that the variant itself ran for, the untimed head call included."""
    wall_s: float | None = None
    """On a GPU, seconds of a call by the host's clock, the start of its kernels included."""


class Timer:
    """Times bursts of one call with the host's clock, for work that is done when the call returns."""

    how = "clock"
    """What it reads: a record's `timing`."""

    kept: Sequence[Tensor]
    """What the call whose output `burst` returned was given."""

    def __init__(
        self,
        call: Callable[..., Any],
        tensors: Sequence[Tensor],
        wait: Callable[[], None] = lambda: None,
        burst_s: float = BURST_SECONDS,
    ) -> None:
        """wait: what a burst ends with, such as waiting for a device. burst_s: how long the warm-up's bursts are."""
        self.call, self.tensors, self._wait, self._burst_s = call, tensors, wait, burst_s

    def burst(
        self, calls: int, head: int = 0, given: Sequence[Sequence[Tensor]] = (), keep: int = -1
    ) -> tuple[Burst, Any]:
        """Times `calls` calls after `head` untimed ones. Also returns what one of the timed ones did.

        given: tensors for one call after the other, taken in turn; the timer's own where there are none.
        keep: which call's output to return.
        """
        turns = cycle(given or (self.tensors,))
        began = clock()
        for tensors in islice(turns, head):
            self.call(*tensors)
        start = clock()
        out = self._calls(turns, calls, keep)
        self._wait()
        end = clock()
        return Burst(start, calls, end - start, end - began), out

    def _calls(self, turns: Iterator[Sequence[Tensor]], calls: int, keep: int) -> Any:
        """Makes so many calls and gives what number `keep` returned."""
        before = keep % calls
        for tensors in islice(turns, before):
            self.call(*tensors)
        self.kept = next(turns)
        out = self.call(*self.kept)
        for tensors in islice(turns, calls - 1 - before):
            self.call(*tensors)
        return out

    def warm_up(self, last_s: float = 0.0) -> tuple[float, float]:
        """Calls until a call gets no faster, for at most a third of a second; long calls are steady at once.

        last_s: seconds of the last call, if it was not the first.

        Returns:
            seconds of a call now, and seconds spent.
        """
        if last_s >= _STEADY_SECONDS:
            return last_s, 0.0
        burst, _ = self.burst(1)
        best, spent = burst.seconds, burst.total_seconds
        while spent < _STEADY_SECONDS and best < _STEADY_SECONDS:
            burst, _ = self.burst(*burst_size(best, self._burst_s))
            spent += burst.total_seconds
            now = burst.seconds / burst.calls
            if now > best * _STEADY_GAIN:
                return min(now, best), spent
            best = now
        return best, spent
