"""Confidence intervals of latencies and of their ratios.

Within one process they assume no distribution: the interval between two order statistics covers the median with a
probability that the binomial distribution gives exactly (Conover, Practical Nonparametric Statistics, section 3.2).
Rounds that resemble their neighbours carry less information than their number says; the interval then uses the
effective number (Bayley and Hammersley 1946). Over several processes, see `interval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, floor, hypot, log, sqrt
from typing import NamedTuple

import numpy as np
from scipy.stats import binom, rankdata, t

MIN_PROCESSES = 5  # with fewer, Student's t asks for intervals too wide to be of use
MIN_ROUNDS = 6  # the first number of rounds whose extremes hold the median with 95%: 1 - 2 * 0.5^6 = 0.969
CONFIDENCE = 0.95
_ALIKE = 8  # calls whose operations differ by at most this factor are expected to differ alike between processes
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution, from the median absolute deviation
_MEDIAN_VARIANCE = 1.5708  # pi / 2: of a median, over that of a mean


class Interval(NamedTuple):
    """The median and its confidence interval; low and high are None where there were too few values."""

    median: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half the interval's width, relative to the median."""
        if self.low is None or self.high is None or not self.median:
            return None
        return (self.high - self.low) / 2 / self.median


class Spread(NamedTuple):
    """How much something differs from process to process."""

    variance: float
    """Of the process medians' logarithms."""
    freedom: int
    """Degrees of freedom behind it."""

    def half_width(self, confidence: float) -> float:
        """Of the interval of one process's value, as a difference of logarithms."""
        return float(t.ppf((1 + confidence) / 2, self.freedom)) * sqrt(self.variance)


def spread(values: Sequence[float], processes: Sequence[float]) -> Spread | None:
    """What values from several processes show of their differences; None for fewer than `MIN_PROCESSES`.

    The variance of the process medians holds noise of the rounds too, which a cell in one process counts by itself.
    Half of it is taken off: taking off all leaves intervals that hold the truth in 85% of cases only, since both
    variances are known from few values (see benchmarks/trust/coverage.py).
    """
    groups = _by_process(np.log(np.asarray(values, dtype=float)), processes)
    if len(groups) < MIN_PROCESSES:
        return None
    medians = np.array([np.median(g) for g in groups])
    residuals = np.concatenate([g - m for g, m in zip(groups, medians, strict=True)])
    spare = max(1, len(residuals) - len(groups)) / len(residuals)  # each process lent its median
    deviation = _MAD_TO_DEVIATION * float(np.median(np.abs(residuals)))
    of_rounds = _MEDIAN_VARIANCE * deviation**2 / spare * float(np.mean([1 / len(g) for g in groups]))
    return Spread(max(0.0, float(np.var(medians, ddof=1)) - of_rounds / 2), len(groups) - 1)


class Spreads:
    """The spreads that a run has met of one plugin, by how much work a call was: longer calls differ less."""

    def __init__(self) -> None:
        self._known: list[tuple[int, Spread]] = []

    def learn(self, flops: int, found: Spread | None) -> None:
        if found:
            self._known.append((flops, found))

    def near(self, flops: int) -> Spread | None:
        """All those of about as much work, pooled."""
        return self._pooled([s for f, s in self._known if max(f, flops) <= _ALIKE * min(f, flops)])

    def nearest(self, flops: int) -> Spread | None:
        """`near`, or else the one of the most similar work."""
        if near := self.near(flops):
            return near
        one = min(self._known, key=lambda k: abs(log(max(1, k[0]) / max(1, flops))), default=None)
        return one and one[1]

    @staticmethod
    def _pooled(spreads: Sequence[Spread]) -> Spread | None:
        freedom = sum(s.freedom for s in spreads)
        return Spread(sum(s.variance * s.freedom for s in spreads) / freedom, freedom) if freedom else None


def interval(
    values: Sequence[float], processes: Sequence[float], confidence: float = CONFIDENCE, known: Spread | None = None
) -> Interval:
    """The interval for positive values that were measured in the processes numbered beside them.

    The same code runs faster or slower in another process, for as long as that lives (Mytkowicz 2009); rounds can't
    tell. With `MIN_PROCESSES` or more, the process is the unit (Kalibera and Jones 2013): its median is one value, and
    the values' logarithms get a Student t interval. With fewer it is `median_interval` of all rounds, to which `known`
    adds what other cells showed of the differences between processes.
    """
    medians = [float(np.median(group)) for group in _by_process(np.asarray(values, dtype=float), processes)]
    if len(medians) < MIN_PROCESSES:
        return _widened(median_interval(values, confidence), known.half_width(confidence) if known else 0.0)
    logs = [log(m) for m in medians]
    centre = float(np.mean(logs))
    half = float(t.ppf((1 + confidence) / 2, len(logs) - 1) * np.std(logs, ddof=1) / np.sqrt(len(logs)))
    return Interval(exp(centre), exp(centre - half), exp(centre + half))


def _by_process(values: np.ndarray, processes: Sequence[float]) -> list[np.ndarray]:
    numbers = np.asarray(processes)
    return [values[numbers == process] for process in dict.fromkeys(processes)]


def _widened(found: Interval, more: float) -> Interval:
    """Independent errors add in squares, here of logarithms."""
    if found.low is None or found.high is None or not more:
        return found
    below, above = log(found.median / found.low), log(found.high / found.median)
    return Interval(found.median, found.median * exp(-hypot(below, more)), found.median * exp(hypot(above, more)))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of `values`, in the order they were measured, and an interval that covers it."""
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if not n:
        return Interval(float("nan"), None, None)
    median = float(np.median(ordered))
    effective = effective_size(values)
    # The largest k with P(fewer than k of n values lie below the median) <= half of what may be missed.
    below = int(binom.ppf((1 - confidence) / 2, effective, 0.5))
    while below > 0 and binom.cdf(below - 1, effective, 0.5) > (1 - confidence) / 2:
        below -= 1
    if below < 1 or n < MIN_ROUNDS:
        return Interval(median, None, None)
    rank = max(1, floor(below * n / effective))  # 1 is the smallest value
    return Interval(median, float(ordered[rank - 1]), float(ordered[n - rank]))


def effective_size(values: Sequence[float]) -> int:
    """How many independent values `values` are worth, from the lag-1 autocorrelation of their ranks.

    Ranks, so that one spike does not hide the resemblance of the rest. Never more than there are; few values say
    too little about their correlation to be discounted, but for what would be plain at any length.
    """
    n = len(values)
    if n < MIN_ROUNDS or np.ptp(values) == 0:
        return n
    ranks = rankdata(values) - (n + 1) / 2
    rho = float(ranks[:-1] @ ranks[1:] / (ranks @ ranks))
    # Under independence the estimate has mean -1/n and deviation about 1/sqrt(n); only what exceeds chance counts.
    rho = rho + 1 / n
    if rho < 1.5 / np.sqrt(n):
        return n
    return max(1, min(n, round(n * (1 - rho) / (1 + rho))))
