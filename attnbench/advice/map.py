"""Which variant is the fastest over a whole range of sizes: a part of the grid is measured, the rest is predicted.

Where to measure next: where a wrong choice would cost most, there and at the places near it, for each second that it
takes; and of the variants only those that may be the fastest there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import exp, log2
from typing import Any

from attnbench.advice.best import Limits, choose
from attnbench.advice.field import Field, Guess, Place, contenders, regret, tied
from attnbench.errors import AttnbenchError
from attnbench.records.run import as_frame
from attnbench.records.schema import Row
from attnbench.report import units
from attnbench.sizes import Sweep
from attnbench.sweep.cell import Cell
from attnbench.sweep.costs import Costs
from attnbench.sweep.engine import Plan, planned, settings_here
from attnbench.sweep.rounds import Progress
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Asked, Settings
from attnbench.workload import Workload, flag

_SIZES = ("seq", "kv_seq", "batch", "heads", "kv_heads", "head_dim", "value_dim", "layers")
_NAMES = ("phase", "mask", "dtype")
_START_S, _CALLS, _ROUNDS = 0.4, 4.0, 16  # a cell's start, calls until it is ready, and rounds that are enough for it
_BURST_S, _ROUND_S = 4e-3, 5e-3  # a round of short calls, and what goes around any round
_GUESSED_RATE = 5e10  # operations a second, before anything is known
_PRECISION = 0.03  # at which a cell leaves early: processes differ by as much
_RESERVE = 1.3  # times what a place should take: what has to be left for it to be begun
_REACH = 1.5  # doublings over which a measurement tells of its neighbours


@dataclass(frozen=True)
class Axis:
    """A word of the command line that was given several values."""

    name: str
    values: tuple[Any, ...]

    @property
    def is_size(self) -> bool:
        return self.name in _SIZES


@dataclass(frozen=True)
class Spot:
    """One workload of the grid, and what is fastest there; plugin is None where nothing holds the limits.

    speedup: over the baseline, with its 95% interval, measured here or predicted. latency_s: of a call.
    tied: those that are not told apart from it. at: its values on the axes.
    """

    at: tuple[Any, ...]
    workload: Workload
    plugin: str | None
    variant: str | None
    speedup: float | None
    low: float | None
    high: float | None
    latency_s: float | None
    measured: bool
    tied: tuple[str, ...]

    def as_dict(self, axes: Sequence[Axis]) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("plugin", "speedup", "low", "high", "latency_s", "measured")}
        where = {axis.name: value for axis, value in zip(axes, self.at, strict=True)}
        return where | told | {"tied": list(self.tied), "workload": self.workload.as_dict()}


@dataclass(frozen=True)
class Chart:
    """A map: its axes, a spot for each point of the grid, and the fields behind them, by what is named on no size axis.

    variants, families: of each plugin. seconds: that it took. machine: what is known of it.
    """

    axes: tuple[Axis, ...]
    spots: tuple[Spot, ...]
    baseline: str
    limits: Limits
    variants: Mapping[str, str]
    families: Mapping[str, str]
    fields: Mapping[tuple[Any, ...], Field]
    seconds: float
    machine: Mapping[str, Any]

    def choice(self, cells: Sequence[Cell]) -> list[Guess]:
        """What it says of any workload within its ranges, by the cells of all variants: the choice first."""
        at = _at(self.axes, cells[0].workload)
        return self.fields[_names(self.axes, at)].guesses(_sizes(self.axes, at), cells)

    @property
    def measured(self) -> int:
        return sum(spot.measured for spot in self.spots)

    def as_dict(self) -> dict[str, Any]:
        return {
            "axes": {axis.name: list(axis.values) for axis in self.axes},
            "baseline": self.baseline,
            "max_error": self.limits.error,
            "max_memory": self.limits.memory,
            "seconds": round(self.seconds, 2),
            "cells": [spot.as_dict(self.axes) for spot in self.spots],
        }


def axes_of(sweep: Sweep) -> tuple[Axis, ...]:
    """The words that have several values, the one with the most first: it goes along the picture.

    Raises:
        AttnbenchError: none has, or more than two have.
    """
    given: dict[str, tuple[Any, ...]] = {name: tuple(getattr(sweep, name) or ()) for name in (*_SIZES, *_NAMES)}
    found = [Axis(name, values) for name, values in given.items() if len(values) > 1]
    if not 1 <= len(found) <= 2:
        several = f"{units.listed([flag(a.name) for a in found])} have" if found else "none has"
        raise AttnbenchError(
            f"a map has one or two axes, and {several} several values: give two words several, such as "
            "--seq 256..4096 --batch 1..8"
        )
    found = [Axis(a.name, tuple(sorted(a.values)) if a.is_size else a.values) for a in found]
    return tuple(sorted(found, key=lambda axis: (not axis.is_size, -len(axis.values))))


def _value(name: str, w: Workload) -> Any:
    return w.kv_seq if name == "seq" and w.decodes else getattr(w, name)


def _at(axes: Sequence[Axis], w: Workload) -> tuple[Any, ...]:
    return tuple(_value(axis.name, w) for axis in axes)


def _sizes(axes: Sequence[Axis], at: Sequence[Any]) -> Place:
    return tuple(value for axis, value in zip(axes, at, strict=True) if axis.is_size)


def _names(axes: Sequence[Axis], at: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(value for axis, value in zip(axes, at, strict=True) if not axis.is_size)


def chart(asked: Asked, limits: Limits, progress: Progress | None = None) -> Chart:
    """Draws a map of what is asked for within its budget, in seconds, the planning with it.

    Raises:
        AttnbenchError: it has no axis or more than two, or something asked for is not to be had.
    """
    began = time.monotonic()
    axes = axes_of(asked.sweep)
    with planned(asked) as plan:
        if not plan.baseline:
            raise AttnbenchError("a map shows gains over a baseline: --baseline none leaves it none")
        survey = _Survey(plan, axes, limits, began + asked.budget, progress)
        survey.explore()
        facts = plan.facts
    variants = {cell.plugin: cell.variant for cell in plan.cells}
    families = {cell.plugin: cell.family for cell in plan.cells}
    spots = tuple(survey.spots(variants))
    seconds = time.monotonic() - began
    return Chart(axes, spots, plan.baseline, limits, variants, families, survey.fields, seconds, facts)


class _Survey:
    """Measures where it tells most, as long as there is time."""

    def __init__(
        self, plan: Plan, axes: tuple[Axis, ...], limits: Limits, deadline: float, progress: Progress | None
    ) -> None:
        self._plan, self._axes, self._deadline, self._progress = plan, axes, deadline, progress
        self._settings: Settings = settings_here(plan)
        self._start_s = _START_S
        self.cells = {_at(axes, w): list(group) for w, group in groupby(plan.cells, key=lambda c: c.workload)}
        self.fields: dict[tuple[Any, ...], Field] = {}
        sizes = tuple(axis.name for axis in axes if axis.is_size)
        for at in self.cells:
            self.fields.setdefault(_names(axes, at), Field(sizes, limits, plan.baseline))

    def explore(self) -> None:
        for at in self._anchors():
            cells = self._wanted(at, anchor=True)
            if self._cost(at, cells) > self._left and any(field.rows for field in self.fields.values()):
                continue
            self._measure(at, cells)
        while (found := self._next()) is not None:
            self._measure(found, self._wanted(found))

    @property
    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _anchors(self) -> list[tuple[Any, ...]]:
        """Of each field the least sizes, those in the middle, and each axis at its largest with the others least."""
        ends = []
        for name in self.fields:
            sizes = [axis.values for axis in self._axes if axis.is_size]
            least, middle = (tuple(v[i(len(v))] for v in sizes) for i in (lambda n: 0, lambda n: n // 2))
            most = [(*least[:i], v[-1], *least[i + 1 :]) for i, v in enumerate(sizes)]
            ends += [(number, self._full(name, place)) for number, place in enumerate([least, middle, *most])]
        ordered = sorted(ends, key=lambda end: end[0])
        return [at for at in dict.fromkeys(at for _, at in ordered) if at in self.cells]

    def _full(self, name: tuple[Any, ...], place: Place) -> tuple[Any, ...]:
        names, sizes = iter(name), iter(place)
        return tuple(next(sizes if axis.is_size else names) for axis in self._axes)

    def _field(self, at: tuple[Any, ...]) -> tuple[Field, Place]:
        return self.fields[_names(self._axes, at)], _sizes(self._axes, at)

    def _wanted(self, at: tuple[Any, ...], anchor: bool = False) -> list[Cell]:
        """The cells of those that may be the fastest there, and of the baseline."""
        field, place = self._field(at)
        able = [cell for cell in self.cells[at] if cell.status is None]
        if not field.rows:
            return able
        hopeless = set() if field.limits.error is None else field.without_error()
        names = {field.baseline, *contenders(field.guesses(place, able), any_error=anchor)} - hopeless
        return [cell for cell in able if cell.plugin in names or cell.plugin == field.baseline]

    def _call_s(self, at: tuple[Any, ...], cells: Sequence[Cell]) -> list[float]:
        """Seconds of a call of each, as predicted."""
        field, place = self._field(at)
        gains = {g.plugin: g.gain for g in field.guesses(place, cells)}
        base = field.seconds(place, cells)
        if base is None:
            return [cell.flops / _GUESSED_RATE for cell in cells]
        return [base / exp(gains.get(cell.plugin, 0.0)) for cell in cells]

    def _cost(self, at: tuple[Any, ...], cells: Sequence[Cell]) -> float:
        """Seconds to measure them, as predicted."""
        calls = self._call_s(at, cells)
        rounds = sum(_ROUNDS * (max(call, _BURST_S) + _ROUND_S) for call in calls)
        return self._start_s * len(cells) + _CALLS * sum(calls) + min(rounds, self._plan.asked.budget / 10)

    def _measure(self, at: tuple[Any, ...], cells: Sequence[Cell]) -> None:
        field, place = self._field(at)
        cost, began = self._cost(at, cells), time.monotonic()
        settings = replace(
            self._settings, budget=max(cost, _least(cells)), precision=_PRECISION, look=_ROUNDS, later=0.0
        )
        rows = measure(self._plan.server, settings, [replace(cell) for cell in cells], self, lambda *_: {})
        field.learn(place, self.cells[at], rows)
        more = (time.monotonic() - began - settings.budget) / len(cells)
        self._start_s = min(1.0, max(_START_S, self._start_s + more / 3))

    def cell(self, cell: Cell, doing: str) -> None:
        if self._progress:
            self._progress.cell(cell, doing)

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None:
        """What is left is what the map has left, not the place."""
        if self._progress:
            self._progress.rows(rows, max(0.0, self._left))

    again = rows

    def _next(self) -> tuple[Any, ...] | None:
        """Where to measure next, for what is to be gained in its seconds; None where time or places are used up."""
        found: dict[tuple[Any, ...], float] = {}
        for name, field in self.fields.items():
            cells = {
                _sizes(self._axes, at): cells for at, cells in self.cells.items() if _names(self._axes, at) == name
            }
            risks = {place: regret(guesses) for place, guesses in field.outlook(cells).items()}
            for place in cells.keys() - field.rows.keys():
                at = self._full(name, place)
                cost = self._cost(at, self._wanted(at))
                if _RESERVE * cost <= self._left:
                    found[at] = sum(risk * _near(place, other) for other, risk in risks.items()) / cost
        return max(found, key=found.__getitem__, default=None)

    def spots(self, variants: Mapping[str, str]) -> list[Spot]:
        return [self._spot(at, variants) for at in self.cells]

    def _spot(self, at: tuple[Any, ...], variants: Mapping[str, str]) -> Spot:
        field, place = self._field(at)
        cells = self.cells[at]
        workload, here, guesses = cells[0].workload, field.rows.get(place, {}), field.guesses(place, cells)
        answer = choose(as_frame(list(here.values())), field.limits) if here else None
        if answer and answer.row and units.known(answer.row["speedup_low"], answer.row["speedup_high"]):
            row: Row = answer.row
            name, gain, low, high = (row[n] for n in ("plugin", "speedup", "speedup_low", "speedup_high"))
            return Spot(at, workload, name, variants[name], gain, low, high, row["latency_s"], True, answer.tied)
        if not guesses or guesses[0].holds < 1:
            return Spot(at, workload, None, None, None, None, None, None, bool(here), ())
        first, base = guesses[0], field.seconds(place, cells)
        low, gain, high = (exp(first.gain + z * first.doubt) for z in (-1.96, 0.0, 1.96))
        name, latency = first.plugin, base / gain if base else None
        return Spot(at, workload, name, variants[name], gain, low, high, latency, bool(here), tied(guesses))


def _least(cells: Sequence[Cell]) -> float:
    """The budget from which on a session leaves out none of them, for all that it can guess of them."""
    need = [Costs().ready(cell) for cell in cells]
    return 1.02 * max(sum(need), min(4, len(need)) * max(need))


def _near(one: Place, other: Place) -> float:
    """How much of what is not known of one place a measurement at the other tells."""
    apart = sum(log2(a / b) ** 2 for a, b in zip(one, other, strict=True))
    return exp(-apart / _REACH**2)
