"""Powers of the length: the exponent of a growth, and the length at which one quantity overtakes another."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

FIT_WINDOW = 8
"""An exponent is fitted over the lengths from an eighth of the longest up: shorter ones pay a call's fixed costs."""


@dataclass(frozen=True)
class Exponent:
    """p in "grows as l^p", with its 95% interval and the lengths that it was fitted over."""

    value: float
    low: float
    high: float
    lengths: tuple[int, ...]


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> Exponent | None:
    """The exponent p of values ~ c * lengths^p: the slope of an ordinary least-squares line in log-log.

    Fitted over the lengths from 1 / `FIT_WINDOW` of the longest up, or over the three longest where fewer than
    three are that long. The interval is the slope's, from Student's t with n - 2 degrees of freedom; it tells how
    straight the line is, not how noisy one measurement was. Values that are not finite and above 0 are left out.

    lengths, values: (n,) each; a value's unit does not matter.
    Returns None where fewer than three different lengths are left.
    """
    x, y = np.asarray(lengths, dtype=float), np.asarray(values, dtype=float)
    usable = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    x, y = x[usable], y[usable]
    distinct = sorted(set(x.tolist()), reverse=True)
    if len(distinct) < 3:
        return None
    long = x >= min(distinct[0] / FIT_WINDOW, distinct[2])
    dx, dy = np.log(x[long]) - np.log(x[long]).mean(), np.log(y[long]) - np.log(y[long]).mean()
    slope = float(dx @ dy / (dx @ dx))
    left = dy - slope * dx
    freedom = len(dx) - 2
    # scipy.stats.linregress has no error for a flat line, which memory that does not grow is.
    margin = float(stdtrit(freedom, 0.975) * np.sqrt(left @ left / freedom / (dx @ dx)))
    return Exponent(slope, slope - margin, slope + margin, tuple(sorted({int(length) for length in x[long]})))


BEFORE, BEYOND, UNKNOWN = 0.0, math.inf, math.nan
"""A crossing before the shortest length measured, one beyond the longest, and one that measurements leave open."""
_LONGEST = 2**40  # tokens


def first_length(test: Callable[[int], bool], start: int = 1) -> float:
    """The least length from `start` up that passes a test which all longer ones pass too; BEYOND where none does."""
    low, high = start - 1, start
    while not test(high):
        low, high = high, 2 * high
        if high > _LONGEST:
            return BEYOND
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle, high)
    return float(high)


def crossing(lengths: Sequence[float], ratios: Sequence[float]) -> float:
    """The length from which on a ratio is at least 1, interpolated between measured lengths in log-log.

    lengths: ascending. BEFORE where it is nowhere less, BEYOND where it still is at the longest, UNKNOWN where a ratio
    that decides is missing.
    """
    x, r = np.asarray(lengths, dtype=float), np.asarray(ratios, dtype=float)
    below = np.flatnonzero(r < 1)
    last = int(below[-1]) if len(below) else -1
    if not np.isfinite(r[last + 1 :]).all():
        return UNKNOWN
    if last == len(x) - 1:
        return BEYOND
    if last < 0:
        return BEFORE
    (x0, x1), (r0, r1) = np.log(x[last : last + 2]), np.log(np.maximum(r[last : last + 2], 1e-9))
    return float(np.exp(x0 - r0 * (x1 - x0) / (r1 - r0)))


def curve(values: Mapping[float, float]) -> Callable[[float], float] | None:
    """A value at any length: between the lengths known straight in log-log, beyond them as between the two nearest.

    None where fewer than two are known.
    """
    known = sorted((length, value) for length, value in values.items() if math.isfinite(value))
    if len(known) < 2:
        return None

    def at_length(length: float) -> float:
        i = min(max(1, sum(other < length for other, _ in known)), len(known) - 1)
        (short, few), (long, many) = known[i - 1 : i + 1]
        power = math.log(many / few) / math.log(long / short) if few > 0 and many > 0 else 0.0
        return float(many * (length / long) ** power)

    return at_length
