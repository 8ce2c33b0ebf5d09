"""What to be wary of in a cell that was measured: each warning is a kind with a name, a meaning and advice.

Decided from what is stored alone, so that a run on disk can be judged again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # which loads scipy.stats, a second of it, where that is called

from attnbench.stats.held_up import Round, Sample, by_round, held_up, matters, without
from attnbench.stats.intervals import MIN_ROUNDS, by_process


class Kind(NamedTuple):
    """One kind of warning."""

    means: str
    advice: str


KINDS = {
    "few-rounds": Kind(
        "fewer than 6 rounds were timed, so there is no interval",
        "a longer --budget, or fewer cells: the longest lengths and the slowest plugins cost most",
    ),
    "imprecise": Kind(
        "the budget ended before the asked precision was reached",
        "a longer --budget, or fewer cells; differences smaller than the intervals mean nothing",
    ),
    "noisy": Kind(
        "rounds differ so much that the asked precision would take more than 80 of them",
        "close other programs, fix the clock frequency, see `attnbench doctor`; or ask for less by --precision",
    ),
    "bimodal": Kind(
        "rounds fall into two groups, so the median may lie in one or the other",
        "look for what alternates: two clock frequencies, another program, cores that share a cache",
    ),
    "drifting": Kind(
        "rounds grew slower or faster as the cell went on",
        "let the machine warm up or cool down first; speedups are paired by round and hold, latencies may not repeat",
    ),
    "processes-differ": Kind(
        "the variant runs faster in some processes than in others, beyond the noise of rounds",
        "the interval counts it; only more processes narrow it, which a longer --budget buys",
    ),
    "one-process": Kind(
        "all rounds came from one process, so the interval leaves out what differs from one process to the next",
        "a longer --budget or fewer cells buy five processes; until then distrust differences of a few per cent",
    ),
    "uneven": Kind(
        "some of its calls take much longer than most, and the baseline's beside them do not; a median leaves them out",
        "look for work that is done only now and then; the mean over its samples counts it",
    ),
    "coarse-timer": Kind(
        "rounds took no time or all exactly the same, as a timer too coarse for them reads",
        "distrust the row; see `attnbench doctor` for the timer's resolution",
    ),
    "disturbed": Kind(
        "most rounds had to wait for a core that something else was using, so its time and its ratio are off",
        "stop what runs beside it, or give it fewer --threads; `waited_s` of its samples says how long",
    ),
    "more-threads": Kind(
        "its calls kept more cores busy than --threads gives the others",
        "compare it with --threads at least as high, or make it keep to torch.get_num_threads()",
    ),
    "crowded": Kind(
        "its processes have more threads together than there are cores, so that they wait for each other",
        "bytes, memory and errors hold; for times fewer processes, or --threads 1",
    ),
    "fewer-threads": Kind(
        "fewer of its threads can run at the same time than --threads says: variables or affinity hold them together",
        "unset OMP_THREAD_LIMIT, OMP_PLACES, GOMP_CPU_AFFINITY and the like, or ask for the --threads that do run",
    ),
    "emulated": Kind(
        "what ran only stands in for what the variant is about, as int8 by float32: its time says nothing of that",
        "judge it by its errors alone, or run it where the CPU or library has the real thing; see `implementation`",
    ),
    "tiled": Kind(
        "its inputs are a model's activations over and over, as the model was not made for so many tokens",
        "judge the error by shorter lengths: no text repeats itself like that",
    ),
    "memory-leak": Kind(
        "a call keeps more than 1 MiB of memory that the one before did not hold",
        "look for what the plugin stores between calls",
    ),
    "launch-bound": Kind(
        "the host starts the work more slowly than the GPU does it: latency is the GPU's time alone, wall time both",
        "in a model that is not compiled or captured in CUDA graphs, the wall time is what a call takes",
    ),
    "throttled": Kind(
        "the GPU held its clocks down while the cell ran, for the reason in start_throttled or end_throttled",
        "speedups are paired and hold; latencies are those of this GPU with this power cap and cooling",
    ),
    "shared-gpu": Kind(
        "processes that are not this run's were on the GPU at the cell's start or end",
        "stop them, or distrust the row: they take turns with the kernels that are timed",
    ),
}
_UNKNOWN = Kind("this attnbench does not know it", "see the release of attnbench that measured it")
_NOISY = 5.0  # quartile range in units of the precision; the median then needs (1.82 * 5)^2 = 83 rounds
_SHAPE_ROUNDS = 16  # fewer do not show a shape
_SEPARATION = 5.0  # Ashman's D; splitting one normal distribution in two gives 2.7
_SMALLER_MODE = 0.2  # share of rounds; less are outliers, which the median withstands
_TREND = 0.5  # Spearman's correlation of time with order
_WALL = 1.25  # times its latency, what a call's wall time may be before the host counts as what it waits for
_FAR = 3.0  # times the median distance from the median; of a normal distribution 4% lie further
_CHANCE = 1e-3  # probability of a false warning of drift, of differing processes or of uneven calls, each


def explain(kind: str) -> Kind:
    """What a kind means and what to do, for a run that another release may have written too."""
    return KINDS.get(kind, _UNKNOWN)


def of_gpu(facts: Mapping[str, Any], latency_s: float) -> list[str]:
    """The kinds that what a GPU said of a cell deserves; see `records.COLUMNS` for the names."""
    wall = facts.get("wall_s")
    applies = {
        "launch-bound": wall is not None and wall > _WALL * latency_s,
        "throttled": bool(facts.get("start_throttled") or facts.get("end_throttled")),
        "shared-gpu": bool(facts.get("start_other_processes") or facts.get("end_other_processes")),
    }
    return [kind for kind in KINDS if applies.get(kind)]


def of_samples(
    samples: Sequence[Sample], precision: float, precise: bool, baseline: Sequence[Sample] = ()
) -> list[str]:
    """The kinds that a cell's samples deserve, in the order of `KINDS`.

    samples: as `records.SAMPLE` names them. baseline: the baseline's, where there is one.
    precision: relative half-width that was asked for. precise: whether the cell's intervals reached it.
    """
    disturbed = ["disturbed"] if matters(samples) else []
    found = without(by_round(samples), held_up(samples))
    seconds = np.array(list(found.values()))
    if len(seconds) < MIN_ROUNDS:
        return ["few-rounds", *disturbed]
    if seconds.min() <= 0 or np.ptp(seconds) == 0:
        return ["coarse-timer"]
    processes = by_process(np.log(seconds), [process for process, _ in found])
    within = np.concatenate([logs - np.median(logs) for logs in processes])
    bimodal, drifting = _is_bimodal(within, precision), len(processes) == 1 and _is_drifting(within, precision)
    low, high = np.quantile(within, [0.25, 0.75])
    applies = {
        "imprecise": not precise,
        "noisy": not (precise or bimodal or drifting) and high - low > _NOISY * precision,
        "bimodal": bimodal,
        "drifting": drifting,
        "uneven": _is_uneven(found, without(by_round(baseline), held_up(baseline)), precision),
        "processes-differ": _processes_differ(processes, precision),
        "disturbed": bool(disturbed),
    }
    return [kind for kind in KINDS if applies.get(kind)]


def _is_uneven(seconds: Mapping[Round, float], baseline: Mapping[Round, float], precision: float) -> bool:
    """Whether ratios that lie far from their median lie above it more often than chance has it.

    What disturbs a machine hits either member of a pair as often as the other.
    """
    logs = np.log([seconds[at] / baseline[at] for at in seconds.keys() & baseline.keys() if baseline[at] > 0])
    if len(logs) < _SHAPE_ROUNDS:
        return False
    off = logs - np.median(logs)
    far = off[np.abs(off) > _FAR * np.median(np.abs(off))]
    if not len(far) or off.mean() <= precision:
        return False
    return bool(scipy.stats.binomtest(int((far > 0).sum()), len(far), alternative="greater").pvalue < _CHANCE)


def _is_bimodal(values: np.ndarray, precision: float) -> bool:
    """Whether the best split in two leaves groups that lie far apart for their spread (Ashman, Bird and Zepf 1994)."""
    ordered = np.sort(values)
    n, least = len(ordered), max(3, round(_SMALLER_MODE * len(ordered)))
    if n < _SHAPE_ROUNDS:
        return False
    cuts = range(least, n - least + 1)
    cut = min(cuts, key=lambda i: i * ordered[:i].var() + (n - i) * ordered[i:].var())
    low, high = ordered[:cut], ordered[cut:]
    spread = np.sqrt((low.var(ddof=1) + high.var(ddof=1)) / 2)
    return bool(high.mean() - low.mean() > max(precision, _SEPARATION * spread))


def _is_drifting(logs: np.ndarray, precision: float) -> bool:
    """Whether time goes with order, in one process: several start afresh, each at its own speed."""
    if len(logs) < _SHAPE_ROUNDS:
        return False
    found = scipy.stats.spearmanr(np.arange(len(logs)), logs)
    third = max(1, len(logs) // 3)
    moved = abs(np.median(logs[-third:]) - np.median(logs[:third]))
    return bool(abs(found.statistic) > _TREND and found.pvalue < _CHANCE and moved > precision)


def _processes_differ(processes: Sequence[np.ndarray], precision: float) -> bool:
    """Whether the process explains the spread (Kruskal and Wallis 1952)."""
    groups = [logs for logs in processes if len(logs) > 1]
    if len(groups) < 2:
        return False
    medians = [float(np.median(g)) for g in groups]
    return bool(scipy.stats.kruskal(*groups).pvalue < _CHANCE and max(medians) - min(medians) > precision)
