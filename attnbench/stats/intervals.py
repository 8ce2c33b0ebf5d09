"""Confidence intervals of latencies and of their ratios.

Within one process they assume no distribution: the interval between two order statistics covers the median with a
probability that the binomial distribution gives exactly (Conover, Practical Nonparametric Statistics, section 3.2).
Rounds that resemble their neighbours carry less information than their number says; the interval then uses the
effective number (Bayley and Hammersley 1946). Over several processes, see `interval`.
"""

from collections.abc import Sequence
from math import exp, floor, log
from typing import NamedTuple

import numpy as np
from scipy.stats import binom, rankdata, t

MIN_PROCESSES = 5  # with fewer, Student's t asks for intervals too wide to be of use
MIN_ROUNDS = 6  # the first number of rounds whose extremes hold the median with 95%: 1 - 2 * 0.5^6 = 0.969
CONFIDENCE = 0.95


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
    tell. With `MIN_PROCESSES` or more, the process is the unit (Kalibera and Jones 2013): its median is one value, and
    the values' logarithms get a Student t interval. With fewer it is `median_interval` of all rounds, which
    is silent about other processes: borrowing what shorter calls show of them was tried, and made intervals that were
    many times too wide.
    """
    medians = [float(np.median(group)) for group in by_process(np.asarray(values, dtype=float), processes)]
    if len(medians) < MIN_PROCESSES:
        return median_interval(values, confidence)
    logs = [log(m) for m in medians]
    centre = float(np.mean(logs))
    half = float(t.ppf((1 + confidence) / 2, len(logs) - 1) * np.std(logs, ddof=1) / np.sqrt(len(logs)))
    return Interval(exp(centre), exp(centre - half), exp(centre + half))


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
