"""Which bursts something else held up: other processes, other virtual machines, a quota.

A burst that had to wait for a core tells of that wait more than of its calls. What tells such a burst apart is the
scheduler, and not how long it took: that would choose the fast ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from attnbench.stats.intervals import MIN_ROUNDS

_LOST, _WAKE_UP_S = 0.02, 1e-4  # of a burst's time; and what a thread takes to wake up
_SECONDS, _LOSSES = 4, slice(7, 10)  # where a sample has its seconds, and what was lost: steal, throttled, waited

Sample: TypeAlias = Sequence[Any]
"""As `records.SAMPLE` names it; those of old runs end with their seconds."""
Round: TypeAlias = tuple[float, float]
Value = TypeVar("Value")


def by_round(samples: Sequence[Sample]) -> dict[Round, float]:
    """Seconds of a call by (process, round)."""
    return {(s[0], s[1]): s[_SECONDS] / s[3] for s in samples}


def held_up(samples: Sequence[Sample]) -> set[Round]:
    """The (process, round) of bursts whose threads lacked a core for over a fiftieth of the time, and 0.1 ms."""
    return {
        (s[0], s[1]) for s in samples if sum(lost or 0.0 for lost in s[_LOSSES]) > max(_LOST * s[_SECONDS], _WAKE_UP_S)
    }


def without(values: Mapping[Round, Value], held: set[Round]) -> dict[Round, Value]:
    """Values by round without those that were held up; all where too few for an interval would be left."""
    kept = {at: value for at, value in values.items() if at not in held}
    return kept if len(kept) >= MIN_ROUNDS else dict(values)


def paired(base: Sequence[Sample], other: Sequence[Sample]) -> dict[Round, float]:
    """The base's seconds over the other's of each round that both were measured in, without those held up."""
    theirs, ours = by_round(base), by_round(other)
    ratios = {at: theirs[at] / ours[at] for at in ours if at in theirs}
    return without(ratios, held_up(base) | held_up(other))


def matters(samples: Sequence[Sample]) -> bool:
    """Whether a cell is disturbed: fewer than half of its bursts were free, so that not even a median is."""
    return 2 * len(held_up(samples)) > len(samples)
