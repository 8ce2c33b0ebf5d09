"""How precisely cells are known: paired intervals, and the looks at which those that are precise enough leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attnbench.stats.held_up import paired, without
from attnbench.stats.intervals import Interval, interval
from attnbench.sweep.cell import Cell, Measured

# Half of a default run's cells came so near with so many seconds of budget each, on two virtual cores of machines that
# others used, too (docs/measuring.md, Intervals); of half-widths, a quarter needs sixteen times as long.
_BOUGHT, _SECONDS = 0.1, 2.5
FINEST = 0.02
STEPS = (FINEST, 0.03, 0.05, 0.1, 0.2, 0.5)


def within(budget: float, cells: Iterable[Cell]) -> float:
    """The half-width that half of the cells can be expected to reach, of `STEPS`, before any of them is measured.

    budget: seconds for all of them. cells: those that have ended already need none.
    """
    seconds = budget / max(1, sum(cell.status is None for cell in cells))
    expected = _BOUGHT * (_SECONDS / seconds) ** 0.5
    return next((step for step in STEPS if step >= expected), STEPS[-1])


def intervals(cell: Measured, base: Measured | None, confidence: float) -> tuple[Interval, Interval | None]:
    """Of a call's seconds, and of the speedup where there is one.

    The speedup is paired: the baseline's seconds over this cell's, for each round in which both took part.

    base: the baseline's; the cell's own where it is the baseline; None where there is none.
    """
    latency = _interval(without(cell.seconds, cell.held_up), confidence)
    if base is None or base is cell:
        return latency, Interval(1.0, 1.0, 1.0) if base else None
    ratios = paired(base.samples, cell.samples)
    return latency, _interval(ratios, confidence) if ratios else None


def is_precise(latency: Interval, speedup: Interval | None, precision: float) -> bool:
    """Whether the half-width of its speedup is within the precision asked for; of a call, where that is all there is.

    A speedup is paired, so that it is known more closely than either of its calls on a machine that drifts.
    """
    is_baseline = speedup is not None and speedup.low == speedup.high == 1
    width = latency.half_width if speedup is None or is_baseline else speedup.half_width
    return width is not None and width <= precision


def look(
    alive: Sequence[Cell],
    baseline: Cell | None,
    known: Mapping[Cell, Measured],
    by_process: bool,
    precision: float,
) -> None:
    """At a look fixed beforehand, cells that are precise enough leave; the baseline stays with the last of them.

    by_process: whether a process has ended, and no round.
    """
    others = [cell for cell in alive if cell is not baseline and cell.status is None]
    base = known.get(baseline) if baseline and baseline.status is None else None
    for cell in others or [cell for cell in alive if cell.status is None]:
        measured = known[cell]
        done = measured.processes if by_process else len(measured.samples)
        if by_process == (measured.launches > 1) and done in measured.schedule.looks:
            confidence = measured.schedule.confidence(early=True)
            if is_precise(*intervals(measured, base, confidence), precision):
                measured.converged, measured.confidence = True, confidence
    if others and baseline is not None and baseline in known:
        first, beside = known[baseline], [known[cell] for cell in others]
        first.converged = all(measured.converged for measured in beside)
        if first.converged:
            first.confidence = max(measured.confidence for measured in beside)


def _interval(values: Mapping[tuple[float, float], float], confidence: float) -> Interval:
    """Of values by (process, round)."""
    return interval(list(values.values()), [process for process, _ in values], confidence)
