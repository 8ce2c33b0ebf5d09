"""Confidence intervals of latencies and of their ratios.

Within one process they assume no distribution: the interval between two order statistics covers the median with a
probability that the binomial distribution gives exactly (Conover, Practical Nonparametric Statistics, section 3.2).
Rounds that resemble their neighbours carry less information than their number says; the interval then uses the
effective number (Bayley and Hammersley 1946). Over several processes the process is the unit: see `clustered_interval`.
"""

from collections.abc import Sequence
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, bdtrik, stdtrit  # scipy.stats takes a second to import, and every command imports this

MIN_PROCESSES = 5  # with fewer, Student's t asks for intervals too wide to be of use
MIN_ROUNDS = 6  # the first number of rounds whose extremes hold the median with 95%: 1 - 2 * 0.5^6 = 0.969
CONFIDENCE = 0.95
_ROUNDING = 1e-9


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


def interval(values: Sequence[float], processes: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval for positive values that were measured in the processes numbered beside them.

    The same code runs faster or slower in another process, for as long as that lives (Mytkowicz 2009); rounds can't
    tell. With `MIN_PROCESSES` or more, the process is the unit (Kalibera and Jones 2013). With fewer it is
    `median_interval` of all rounds, which is silent about other processes: borrowing what shorter calls show of them
    was tried, and made intervals that were many times too wide.
    """
    if len(set(processes)) < MIN_PROCESSES:
        return median_interval(values, confidence)
    return clustered_interval(values, processes, confidence)


def clustered_interval(values: Sequence[float], processes: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of all values, and an interval that counts how the processes differ.

    Were m the median, then of each process as many values would lie below m as above, but for chance: the surpluses of
    the processes have mean 0, which Student's t tests (a sign test for clusters, Datta and Satten 2005; one t statistic
    over few clusters, Ibragimov and Mueller 2010). The interval is all m that it lets stand. One outlier among a
    process's few rounds weighs no more there than any other round; in a mean of the processes' medians it would.
    """
    ordered = np.argsort(values, kind="stable")
    found = np.asarray(values, dtype=float)[ordered]
    _, which = np.unique(np.asarray(processes), return_inverse=True)
    sizes, n = np.bincount(which), len(found)
    below = np.zeros((n + 1, len(sizes)))  # of each process, where `row` values lie below m
    below[np.arange(1, n + 1), which[ordered]] = 1
    surplus = below.cumsum(axis=0) - sizes / 2
    least = stdtrit(len(sizes) - 1, (1 + confidence) / 2) * surplus.std(axis=1, ddof=1) / np.sqrt(len(sizes))
    rejected = np.flatnonzero(np.abs(surplus.mean(axis=1)) > least + _ROUNDING)
    low, high = rejected[rejected < n / 2].max(initial=-1), rejected[rejected > n / 2].min(initial=n + 1)
    median = float(np.median(found))
    if low < 0 or high > n:  # even none below is what chance may do
        return Interval(median, None, None)
    return Interval(median, float(found[low]), float(found[high - 1]))


def by_process(values: np.ndarray, processes: Sequence[float]) -> list[np.ndarray]:
    """The values of each process apart, in the order they were measured."""
    numbers = np.asarray(processes)
    return [values[numbers == process] for process in dict.fromkeys(processes)]


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of `values`, in the order they were measured, and an interval that covers it."""
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if not n:
        return Interval(float("nan"), None, None)
    median = float(np.median(ordered))
    effective = effective_size(values)
    # The largest k with P(fewer than k of n values lie below the median) <= half of what may be missed.
    below = ceil(bdtrik((1 - confidence) / 2, effective, 0.5))
    while below > 0 and bdtr(below - 1, effective, 0.5) > (1 - confidence) / 2:
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
    _, which, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[which] - (n + 1) / 2  # ties share the mean of theirs
    rho = float(ranks[:-1] @ ranks[1:] / (ranks @ ranks))
    # Under independence the estimate has mean -1/n and deviation about 1/sqrt(n); only what exceeds chance counts.
    rho = rho + 1 / n
    if rho < 1.5 / np.sqrt(n):
        return n
    return max(1, min(n, round(n * (1 - rho) / (1 + rho))))
