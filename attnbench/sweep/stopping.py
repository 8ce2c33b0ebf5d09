"""In how many processes a cell is measured, and when it may stop early."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attnbench.stats.intervals import CONFIDENCE, MIN_PROCESSES

MOST_PROCESSES = 20
LOOKS = (12, 25, 50, 100, 200)  # rounds after which a cell may stop early
PROCESS_LOOKS = (5, 10)
_PROCESS_SHARE = 1 / 3  # of the time for rounds, what starting further processes may take
# Likewise, and seconds at most, for as few processes as an interval by process needs.
_STARTS_SHARE, _STARTS_SECONDS = 1 / 2, 3.0
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


def schedule(rounds: int, launches: int, rounds_before: int = 0, processes_before: int = 0) -> Schedule:
    """The schedule for `rounds` rounds in all, in so many launches.

    rounds_before, processes_before: what there is of the cell already. Looks count these too.
    """
    if launches == 1:
        return Schedule(rounds, tuple(n for n in LOOKS if rounds_before < n < rounds_before + rounds))
    # A look shortly before the end is worth nothing.
    looks = (n for n in PROCESS_LOOKS if processes_before < n and 2 * n <= processes_before + launches)
    return Schedule(max(_PROCESS_ROUNDS, ceil(rounds / launches)), tuple(looks))


def further(rounds: int, round_s: float, start_s: float, before: int, most: int = MOST_PROCESSES) -> tuple[int, int]:
    """How many rounds, at least those asked for, and in how many further processes, one after the other.

    round_s: seconds of one, with the baseline's. start_s: to start it and the baseline once more. before: processes
    that it was measured in already.

    Several, where starting them takes a third of the time at most and each gets a few rounds. Where that makes fewer
    than an interval by process needs, as many as it needs, with rounds for twice the time that starting them takes:
    those are what makes it precise. One where that takes long.
    """
    affordable = min(int(rounds * round_s * _PROCESS_SHARE / start_s), rounds // _PROCESS_ROUNDS, most)
    least = MIN_PROCESSES - before
    if affordable >= least:
        return rounds, max(1, affordable)
    if least > most or least * start_s > _STARTS_SECONDS:
        return rounds, 1
    return max(rounds, _PROCESS_ROUNDS * least, ceil(least * start_s / _STARTS_SHARE / round_s)), least
