"""Intervals of a mean over tokens whose documents, not they themselves, are independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from attnbench.stats.intervals import CONFIDENCE


class Mean(NamedTuple):
    """A mean and its interval; low and high are None where there were too few clusters."""

    mean: float
    low: float | None
    high: float | None

    def exp(self) -> Mean:
        """Of a mean of logarithms: a geometric mean, such as a perplexity or a ratio of two."""
        return Mean(_exp(self.mean), *(None if end is None else _exp(end) for end in (self.low, self.high)))


def _exp(value: float) -> float:
    return exp(min(value, 700.0))  # more is no float


def clustered_mean(
    sums: Sequence[float], counts: Sequence[int], clusters: Sequence[int], confidence: float = CONFIDENCE
) -> Mean:
    """sum(sums) / sum(counts), and an interval that counts how the clusters differ.

    sums, counts: of each part, of which clusters[i] is the cluster. The ratio estimator of cluster sampling with its
    linearized variance (Cochran, Sampling Techniques, section 6.4), and Student's t with a degree of freedom less than
    there are clusters. Of one cluster its parts stand for clusters.
    """
    number = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if number.max() == 0:
        number = np.arange(len(number))
    total, size = np.bincount(number, weights=sums), np.bincount(number, weights=counts)
    mean, k = float(total.sum() / size.sum()), len(total)
    if k < 2:
        return Mean(mean, None, None)
    variance = k / (k - 1) * float(((total - mean * size) ** 2).sum()) / float(size.sum()) ** 2
    half = float(stdtrit(k - 1, (1 + confidence) / 2)) * sqrt(variance)
    return Mean(mean, mean - half, mean + half)
