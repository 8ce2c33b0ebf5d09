"""Is one of many cells slower for certain? By two looks: a short one at each, and a long one at those that look it.

The second look is measured anew, so that what made a cell look slow in the first has no part in it. Only the cells of
the second share the error that all decisions together may make (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

import numpy as np
from scipy.stats import norm, wilcoxon

from attnbench.stats.held_up import Round
from attnbench.stats.intervals import CONFIDENCE, interval

ERROR = 0.01  # how often at most a cell is called slower where none is
_MIN_SIGNED = 10  # processes: all on one side have a probability of 0.5^10, a tenth of a per cent
_ONE_PROCESS = 0.03  # what a process may differ by from the next, where too few were measured to know
_UNKNOWN = 0.1  # half-width of what has too few rounds for an interval


def suspicion(ratios: Mapping[Round, float], margin: float) -> float | None:
    """How much a first look gives cause for a second one; None where it gives none.

    ratios: the base's time over the new one's by (process, round). margin: the share that it may be slower by.

    Cause is a median that is slower by over half the margin, unless it is certain not to be slower by all of it.
    """
    found = interval(list(ratios.values()), [process for process, _ in ratios])
    excess, half = -log(found.median) - margin, found.half_width or _UNKNOWN
    certain = found.low is not None and found.low > 1 - margin
    return None if certain or excess < -margin / 2 else excess / half


def chance(ratios: Mapping[Round, float], margin: float) -> float:
    """The probability of such ratios, were it slower by no more than the margin: one-sided, the process as the unit.

    Of identical code a process's median ratio is as often above 1 as below, by as much, whatever the noise: the
    signed-rank test (Wilcoxon 1945) is exact then, and one process that was held up weighs little in it. Where there
    are too few processes for it, it is that of the rounds and of what a process may differ by from the next; 1 where
    there are too few rounds for an interval.
    """
    processes = np.array([process for process, _ in ratios])
    slower = -np.log(np.array(list(ratios.values()))) + log(1 - margin)
    each = [float(np.median(slower[processes == process])) for process in np.unique(processes)]
    if len(each) >= _MIN_SIGNED:
        return float(wilcoxon(each, alternative="greater").pvalue)
    found = interval(list(ratios.values()), list(processes))
    if found.half_width is None:
        return 1.0
    within = norm.ppf((1 + CONFIDENCE) / 2)
    return float(norm.sf(np.median(slower) / (np.hypot(found.half_width, _ONE_PROCESS) / within)))


def certain(chances: Sequence[float], error: float = ERROR) -> list[bool]:
    """Which of these are certain, where all together may err with this probability (Holm 1979)."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    found = [False] * len(chances)
    for rank, i in enumerate(order):
        if chances[i] > error / (len(chances) - rank):
            break
        found[i] = True
    return found
