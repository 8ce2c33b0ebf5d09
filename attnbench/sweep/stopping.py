"""In how many processes a cell is measured, and when it may stop early."""

from __future__ import annotations

from dataclasses import dataclass

from attnbench.stats.intervals import CONFIDENCE, MIN_PROCESSES

MOST_PROCESSES = 20
LOOKS = (12, 25, 50, 100, 200)  # rounds after which a cell may stop early
PROCESS_LOOKS = (5, 10)
_PROCESS_SHARE = 1 / 3  # of the time for rounds, what starting further processes may take
_PROCESS_ROUNDS = 2  # the fewest in each of several processes
_EARLY_ERROR = 0.2  # of what intervals may miss, the share of all early looks together


@dataclass(frozen=True)
class Schedule:
    """How one cell's rounds are spread and when it may stop early; fixed before its first round.

    Stopping when an interval looks good makes it lie, unless the looks are few, fixed, and share the error among
    them (Bonferroni). The early ones share little of it, so that a cell that stops at none loses little.
    """

    rounds: int
    """In each process."""
    looks: tuple[int, ...]
    """After so many rounds, or processes where there are several, a cell that is precise enough stops."""

    def confidence(self, early: bool) -> float:
        """Of the interval that is reported: taken at an early look, or at the end."""
        missed = 1 - CONFIDENCE
        if early:
            return 1 - _EARLY_ERROR * missed / len(self.looks)
        return 1 - (1 - _EARLY_ERROR) * missed if self.looks else CONFIDENCE


def schedule(rounds: int, processes: int) -> Schedule:
    """The schedule for `rounds` rounds in all, in so many processes."""
    if processes == 1:
        return Schedule(rounds, tuple(n for n in LOOKS if n < rounds))
    looks = tuple(n for n in PROCESS_LOOKS if 2 * n <= processes)  # a look shortly before the end is worth nothing
    return Schedule(max(_PROCESS_ROUNDS, rounds // processes), looks)


def processes(rounds: int, rounds_s: float, start_s: float) -> int:
    """In how many processes, one after the other, a variant is measured.

    rounds: how many it gets. rounds_s: seconds for all of them, with the baseline's. start_s: seconds to start it and
    the baseline once more.

    Several, where starting them takes a third of the time at most and each gets a few rounds; fewer than make an
    interval by process would only cost time, so it is one then.
    """
    affordable = min(int(rounds_s * _PROCESS_SHARE / start_s), rounds // _PROCESS_ROUNDS, MOST_PROCESSES)
    return affordable if affordable >= MIN_PROCESSES else 1
