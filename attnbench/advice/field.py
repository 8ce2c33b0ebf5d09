"""What is known of every variant on shapes that differ in sizes alone: measured at some, predicted at all others.

Modelled is the logarithm of a variant's speedup over the baseline, as it was paired by round, beyond the ratio of
their operations: what is left, the ratio of two rates, changes slowly from size to size (`stats.surface`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import erfc, exp, log, log2, pi, sqrt

import numpy as np

from attnbench.advice.best import Limits
from attnbench.analysis.frames import as_rows
from attnbench.records.run import as_frame
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.stats.surface import Array, Surface
from attnbench.sweep.cell import Cell
from attnbench.theory import costs

Place = tuple[int, ...]
"""The sizes of a shape, along the axes of a map."""

WITHIN = 0.02  # of the fastest's time: a choice that is off by no more is as good
_ALIKE = ("batch", "heads", "kv_heads", "layers")  # sizes on which a variant's error hardly depends
_NOISE = 0.015  # of a ratio that was measured in one process, what another would say: standard deviation, relative
_FEW = 0.15  # of one round's ratio, where there are too few for an interval
_Z = 1.96  # standard deviations to either side of a 95% interval


@dataclass(frozen=True)
class Guess:
    """What is thought of one variant at one place.

    gain: the logarithm of its speedup over the baseline, and its standard deviation `doubt`.
    holds: how likely it is that it holds the limits: 1 where all that was measured around says so, 0 where none does.
    """

    plugin: str
    gain: float
    doubt: float
    holds: float


@dataclass
class Field:
    """names: of the sizes of a place. baseline: its canonical name. rows: what was measured, by place and plugin."""

    names: tuple[str, ...]
    limits: Limits
    baseline: str
    rows: dict[Place, dict[str, Row]] = field(default_factory=dict)
    _flops: dict[Place, dict[str, int]] = field(default_factory=dict)
    _surfaces: dict[str, Surface] = field(default_factory=dict)
    _seconds: Surface | None = None

    def learn(self, place: Place, cells: Sequence[Cell], rows: Sequence[Row]) -> None:
        """Takes in the rows of one place; those that were left out for want of time tell nothing."""
        told = {row["plugin"]: row for row in as_rows(as_frame(rows)) if row["status"] != "skipped"}
        self.rows.setdefault(place, {}).update(told)
        self._take_flops(place, cells)
        self._fit()

    def _fit(self) -> None:
        base = {p: row for p, rows in self.rows.items() if (row := rows.get(self.baseline)) and _timed(row)}
        self._seconds = _surface([(p, log(row["latency_s"]) - self._work(p), _NOISE) for p, row in base.items()])
        plugins = {plugin for rows in self.rows.values() for plugin in rows} - {self.baseline}
        self._surfaces = {}
        for plugin in plugins:
            known = [(p, rows[plugin]) for p, rows in self.rows.items() if plugin in rows and _timed(rows[plugin])]
            surface = _surface([(p, log(r["speedup"]) - self._less(p, plugin), _doubt(r)) for p, r in known])
            if surface:
                self._surfaces[plugin] = surface

    def _work(self, place: Place) -> float:
        return log(max(1, self._flops[place].get(self.baseline, 1)))

    def _less(self, place: Place, plugin: str) -> float:
        """The speedup that its operations alone would make, as a logarithm."""
        own = self._flops[place].get(plugin, 0)
        return self._work(place) - log(own) if own else 0.0

    def _take_flops(self, place: Place, cells: Sequence[Cell]) -> None:
        self._flops[place] = {cell.plugin: cell.flops for cell in cells}

    def guesses(self, place: Place, cells: Sequence[Cell]) -> list[Guess]:
        """Of every variant that was measured anywhere; the likely fastest first."""
        return self.outlook({place: cells})[place]

    def outlook(self, cells: Mapping[Place, Sequence[Cell]]) -> dict[Place, list[Guess]]:
        """`guesses` at several places."""
        places = list(cells)
        for place in places:
            self._take_flops(place, cells[place])
        found: dict[Place, list[Guess]] = {place: [] for place in places}
        for plugin in [self.baseline, *self._surfaces]:
            means, doubts = np.zeros(len(places)), np.zeros(len(places))
            if plugin != self.baseline:
                means, doubts = self._surfaces[plugin].at(_coordinates(places))
                means = means + np.array([self._less(place, plugin) for place in places])
            for place, mean, doubt in zip(places, means, doubts, strict=True):
                cell = next((c for c in cells[place] if c.plugin == plugin), None)
                if cell is not None and cell.status is None:
                    found[place].append(Guess(plugin, float(mean), float(doubt), self._holds(place, cell)))
        for guesses in found.values():
            guesses.sort(key=lambda g: (g.holds < 1, -g.gain))
        return found

    def seconds(self, place: Place, cells: Sequence[Cell]) -> float | None:
        """Of a call of the baseline, as predicted."""
        if self._seconds is None:
            return None
        self._take_flops(place, cells)
        (mean,), _ = self._seconds.at(_coordinates([place]))
        return exp(float(mean) + self._work(place))

    def without_error(self) -> set[str]:
        """The variants that approximate no softmax attention: no limit of error is held by them anywhere."""
        rows = [row for rows in self.rows.values() for row in rows.values() if row["status"] == "ok"]
        return {row["plugin"] for row in rows if not units.known(row["approximation_rel_l2"])}

    def _holds(self, place: Place, cell: Cell) -> float:
        """Errors by the nearest places to each side, memory by what the plugin says, or by those places too."""
        plugin, most = cell.plugin, self.limits.memory
        known = {p: rows[plugin] for p, rows in self.rows.items() if plugin in rows}
        if place in known:
            return float(not self.limits.broken_by(known[place]))
        close: dict[Place, bool] = {}
        for p, row in known.items():
            short = self._of_error(p)
            close[short] = close.get(short, True) and not Limits(self.limits.error).broken_by(row)
        holds = _around(close, self._of_error(place))
        if most is None:
            return holds
        if cell.workspace is not None:
            return holds if costs.peak(cell.workload, cell.workspace) <= most else 0.0
        small = {p: not Limits(None, most).broken_by(row) for p, row in known.items()}
        return min(holds, _around(small, place))

    def _of_error(self, place: Place) -> Place:
        """Of its sizes those on which errors depend."""
        return tuple(size for name, size in zip(self.names, place, strict=True) if name not in _ALIKE)


def _around(known: Mapping[Place, bool], place: Place) -> float:
    """1 where the nearest places to each side of it all say yes, 0 where all say no, a half where they differ."""
    signs = product((1, -1), repeat=len(place))
    said = {known[near] for each in signs if (near := _nearest(known, place, each)) is not None}
    return 0.5 if len(said) > 1 else float(True in said)


def _timed(row: Row) -> bool:
    return row["status"] == "ok" and units.known(row["latency_s"], row["speedup"]) and row["speedup"] > 0


def _doubt(row: Row) -> float:
    """Standard deviation of a measured speedup, relative."""
    low, high = row["speedup_low"], row["speedup_high"]
    few = _FEW / sqrt(row["rounds"]) if units.known(row["rounds"]) and row["rounds"] else _FEW
    return sqrt((((high - low) / (2 * _Z * row["speedup"])) if units.known(low, high) else few) ** 2 + _NOISE**2)


def _coordinates(places: Sequence[Place]) -> Array:
    return np.array([[log2(size) for size in place] for place in places], dtype=float).reshape(len(places), -1)


def _surface(known: Sequence[tuple[Place, float, float]]) -> Surface | None:
    if not known:
        return None
    places, values, noise = zip(*known, strict=True)
    return Surface.fit(_coordinates(places), np.array(values), np.array(noise))


def _nearest(known: Mapping[Place, bool], place: Place, signs: tuple[int, ...]) -> Place | None:
    """The nearest of the places that lie to these sides of it, or level with it."""
    apart = {p: [s * log2(a / b) for a, b, s in zip(p, place, signs, strict=True)] for p in known}
    return min((p for p in apart if min(apart[p], default=0.0) >= 0), key=lambda p: sum(apart[p]), default=None)


def regret(guesses: Sequence[Guess]) -> float:
    """What choosing the first may cost: the relative time that another might save beyond `WITHIN`, as expected.

    Of normal quantities, the expectation of by how much each other is larger, where it is (Mockus 1975).
    """
    if not guesses or guesses[0].holds < 1:
        return max((g.holds for g in guesses), default=0.0)
    first, *others = guesses
    found = 0.0
    for other in others:
        if other.holds:
            behind, doubt = WITHIN + first.gain - other.gain, max(1e-9, sqrt(first.doubt**2 + other.doubt**2))
            z = behind / doubt
            found += other.holds * (doubt * exp(-z * z / 2) / sqrt(2 * pi) - behind * erfc(z / sqrt(2)) / 2)
    return found


def contenders(guesses: Sequence[Guess], any_error: bool = False) -> list[str]:
    """Those that may be the fastest within the limits; the others need no more time.

    any_error: those that break the limits where they were measured count, too, as they may hold them elsewhere.
    """
    able = [g for g in guesses if g.holds or any_error]
    bar = max((g.gain - 2 * g.doubt for g in guesses if g.holds == 1), default=float("-inf"))
    return [g.plugin for g in able if g.gain + 2 * g.doubt >= bar]


def tied(guesses: Sequence[Guess]) -> tuple[str, ...]:
    """Those that are not told apart from the first."""
    first, *others = guesses
    return tuple(
        g.plugin
        for g in others
        if g.holds and g.gain + _Z * sqrt(first.doubt**2 + g.doubt**2) >= first.gain and g.plugin != first.plugin
    )
