"""What more time would buy: which cells are worth further rounds, how many those are, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from attnbench.stats.held_up import paired, without
from attnbench.stats.intervals import MIN_ROUNDS, Interval
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.contest import Contest
from attnbench.sweep.costs import Costs
from attnbench.sweep.plan import MOST_ROUNDS
from attnbench.sweep.precision import intervals, is_precise
from attnbench.sweep.settings import Settings
from attnbench.sweep.stopping import LOOKS, MOST_PROCESSES, further

Worth = Callable[[Contest, float], Mapping[Cell, float]]
"""How much it matters that each cell of a contest gets the precision asked for; those left out get no more time."""

_OPEN = 3.0  # what a cell counts whose verdict more rounds may change, beside one that they only make more precise
_UNKNOWN_ROUNDS = 40  # what a cell needs of which too little is known
_MEDIAN = 1.96 * 1.2533  # half-width of a normal sample's median, in deviations over the root of their number
_SPARE = 1.6  # times the rounds that a spread calls for, as that is known from few rounds itself
_FREE = 0.2  # the least share of rounds that is counted on not to be held up


@dataclass(frozen=True)
class Bout:
    """Further rounds for cells of a contest.

    rounds: of each in all launches, the baseline's among them. seconds: predicted, of all together.
    count: cells that it may make precise enough. cut: whether it has fewer rounds than that calls for.
    """

    contest: Contest
    rounds: Mapping[Cell, int]
    launches: int
    seconds: float
    worth: float
    count: int
    cut: bool = False

    @property
    def comes_last(self) -> bool:
        return any(cell.comes_last for cell in self.rounds)


def verdicts(contest: Contest, precision: float) -> Mapping[Cell, float]:
    """Cells that are not precise enough count 1, those not told apart from the baseline or from the fastest 3."""
    found = {c: intervals(contest.measured[c], contest.base, contest.measured[c].confidence) for c in contest.rivals}
    rates = {c: speedup or _inverse(latency) for c, (latency, speedup) in found.items()}
    best = max(rates.values(), key=lambda rate: rate.median, default=None)
    worth = {}
    for cell, rate in rates.items():
        few = len(contest.measured[cell].samples) < LOOKS[0]  # which may agree by chance
        if is_precise(*found[cell], precision / 2 if few else precision):
            continue
        near = best is None or best.low is None or rate.high is None or rate.high >= best.low
        same = contest.base is not None and (rate.low is None or rate.high is None or rate.low <= 1 <= rate.high)
        worth[cell] = _OPEN if near or same else 1.0
    return worth


def _inverse(seconds: Interval) -> Interval:
    """Calls a second."""
    low, high = (1 / bound if bound else None for bound in (seconds.high, seconds.low))
    return Interval(1 / seconds.median, low, high)


def rounds_needed(cell: Measured, base: Measured | None, precision: float) -> int:
    """How many further rounds the precision may take, by how the rounds so far differ."""
    values = without(cell.seconds, cell.held_up)
    if base is not None and base is not cell:
        values = paired(base.samples, cell.samples)
    found = np.log(list(values.values()))
    if len(found) < MIN_ROUNDS:
        return _UNKNOWN_ROUNDS
    if precision <= 0:
        return MOST_ROUNDS
    latency, speedup = intervals(cell, base, cell.confidence)
    half = (speedup or latency).half_width if len(found) >= LOOKS[0] else None
    if half is None:
        low, high = np.quantile(found, [0.25, 0.75])
        half = _MEDIAN * (high - low) / 1.349 / len(found) ** 0.5
    free = max(_FREE, 1 - len(cell.held_up) / len(cell.samples))
    needed = _SPARE * len(found) * (half / precision) ** 2 - len(found)
    return min(MOST_ROUNDS, max(MIN_ROUNDS, ceil(needed / free)))


class Returns:
    """Weighs what cells are worth against what they cost.

    spent: seconds of each cell's time limit that are gone.
    """

    def __init__(self, costs: Costs, spent: Mapping[Cell, float], settings: Settings, worth: Worth) -> None:
        self._costs, self._spent, self._settings, self._worth = costs, spent, settings, worth
        self._offers: dict[Contest, list[Bout]] = {}

    def best(self, contests: Iterable[Contest], left: float) -> Bout | None:
        """The further rounds that make most of `left` seconds: the cheapest for what they are worth, if they fit.

        Where nothing fits, the cheapest with as many rounds as do; None where that is too few to say anything. Cells
        that come last take what time is of no use to the others.
        """
        found = []
        for contest in contests:
            if contest not in self._offers:
                self._offers[contest] = list(self._bouts(contest))
            found += self._offers[contest]
        first = [bout for bout in found if not bout.comes_last]
        return self._cheapest(first, left) or self._cheapest([bout for bout in found if bout.comes_last], left)

    def _cheapest(self, found: Sequence[Bout], left: float) -> Bout | None:
        fits = [bout for bout in found if bout.seconds <= left]
        cheapest = min(fits or found, key=lambda bout: bout.seconds / bout.worth, default=None)
        return cheapest if fits or cheapest is None else self._within(cheapest, left)

    def measured(self, contest: Contest) -> None:
        """What was weighed of it no longer holds."""
        self._offers.pop(contest, None)

    def outlook(self, contests: Iterable[Contest], seconds: float) -> list[tuple[str, int]]:
        """What so many seconds more would buy: workloads, and how many more of their cells would be precise enough."""
        rest, gained = list(contests), []
        while (bout := self.best(rest, seconds)) and not bout.cut:
            rest.remove(bout.contest)
            seconds -= bout.seconds
            gained.append((bout.contest.label, bout.count))
        return gained

    def _bouts(self, contest: Contest) -> Iterator[Bout]:
        """Of the cell that is cheapest for its worth, of it and the next, and so on: they share the baseline.

        Of those that come last, each by itself.
        """
        worth = self._worth(contest, self._settings.precision)
        value = {cell: weight for cell, weight in worth.items() if self._most(cell) >= MIN_ROUNDS}
        needs = {c: rounds_needed(contest.measured[c], contest.base, self._settings.precision) for c in value}
        typical = float(np.median([*needs.values()])) if needs else 0.0
        for cell in needs:
            if len(contest.measured[cell].samples) < LOOKS[0]:  # a spread of few rounds is mostly chance
                needs[cell] = round((needs[cell] * typical) ** 0.5)
        price = {cell: needs[cell] * self._costs.round(cell) + self._costs.start(cell) for cell in value}
        chosen: dict[Cell, int] = {}
        for cell in sorted(value, key=lambda c: price[c] / value[c]):
            rounds = min(needs[cell], self._most(cell))
            if cell.comes_last:
                yield self._bout(contest, {cell: rounds}, value[cell])
                continue
            chosen[cell] = rounds
            yield self._bout(contest, chosen, sum(value[c] for c in chosen))

    def _most(self, cell: Cell) -> int:
        """Rounds that fit into its time limit and its share of the budget."""
        share = cell.share - self._costs.start(cell)
        return self._costs.fitting(cell, min(self._settings.timeout, share) - self._spent.get(cell, 0.0))

    def _bout(self, contest: Contest, needs: Mapping[Cell, int], worth: float) -> Bout:
        base = contest.baseline if contest.base and contest.baseline not in needs else None
        shared = [self._costs.round(base) / len(needs), self._costs.start(base) / len(needs)] if base else [0.0, 0.0]
        rounds, wanted = {}, []
        for cell, need in needs.items():
            round_s, start_s = self._costs.round(cell) + shared[0], self._costs.start(cell) + shared[1]
            most = 1 if self._settings.reuse or cell.comes_last else MOST_PROCESSES
            rounds[cell], launches = further(need, round_s, start_s, contest.measured[cell].processes, most)
            wanted.append(launches)
        launches = min((n for n in wanted if n > 1), default=1)
        if base:
            rounds[base] = max(rounds.values())
        seconds = sum(n * self._costs.round(c) + launches * self._costs.start(c) for c, n in rounds.items())
        return Bout(contest, rounds, launches, seconds, worth, len(needs))

    def _within(self, bout: Bout, seconds: float) -> Bout | None:
        """The same with fewer rounds, in as many processes as may be; None where too few for an interval are left."""
        start_s = sum(self._costs.start(c) for c in bout.rounds)
        for launches in sorted({bout.launches, 1}, reverse=True):
            share = (seconds - launches * start_s) / max(1e-9, bout.seconds - bout.launches * start_s)
            rounds = {cell: int(n * min(1.0, share)) for cell, n in bout.rounds.items()}
            if min(rounds.values()) >= max(MIN_ROUNDS, 2 * launches):
                return replace(bout, rounds=rounds, launches=launches, seconds=seconds, cut=True)
        return None
