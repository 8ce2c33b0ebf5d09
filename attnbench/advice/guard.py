"""Did a pull request make a plugin slower, or break it? Two revisions are measured in turns, in one session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, TypeAlias

from attnbench.advice.revisions import Revision
from attnbench.analysis import between
from attnbench.analysis.between import BROKEN, SLOWER, UNSURE, Change, Comparison
from attnbench.errors import AttnbenchError
from attnbench.records.run import as_frame
from attnbench.records.schema import FAILED, Row
from attnbench.registry import Request, select
from attnbench.stats import held_up
from attnbench.stats.held_up import Round, paired
from attnbench.stats.intervals import interval
from attnbench.stats.slower import certain, chance, suspicion
from attnbench.sweep.cell import Cell
from attnbench.sweep.engine import Plan, planned, settings_here
from attnbench.sweep.rounds import Progress
from attnbench.sweep.session import measure
from attnbench.sweep.settings import Asked, Settings

SCREEN_SHARE = 0.5  # of the time, for a first look at all cells
SHORT_SECONDS = 8.5  # of a second look, where the first leaves too many to be measured long
TURN_SECONDS, TURNS, MOST_TURNS = 17.0, 2, 3  # of the last look; a turn is as long as the most processes of a cell take
IN_TIME = 0.95  # of the budget; the last cell may take longer than its share
_SCREEN_PRECISION, _LAST_PRECISION = 0.01, 1e-4  # at which a first look may end early, and others do not
_BASE, _NEW = "@BASE", "@NEW"
Ratios: TypeAlias = Mapping[Round, float]
"""BASE's time over NEW's by (process, round)."""


@dataclass(frozen=True)
class Pair:
    """A cell of NEW, and BASE's of the same plugin, options and workload; None where BASE has none."""

    base: Cell | None
    new: Cell


@dataclass(frozen=True)
class Look:
    """What measuring a pair gave: both rows, under the plugin's own name, NEW's speedup being that over BASE."""

    base: Row | None
    new: Row

    @property
    def ratios(self) -> Ratios:
        """Empty where either has no number."""
        if not (self.base and self.base["status"] == self.new["status"] == "ok"):
            return {}
        return paired(self.base["samples"], self.new["samples"])


@dataclass(frozen=True)
class Guarded:
    """What became of a pull request.

    slower: cells that are slower by more than the margin for certain. broken: those that failed or are wrong in NEW,
    and did not in BASE or are not there. without: NEW's others that have no number. unconfirmed: those that looked
    slower, for which no time was left. told: whether any cell of NEW has a number. disturbed: how many cells had most
    of their rounds held up.
    """

    comparison: Comparison
    slower: list[Change]
    broken: list[Row]
    without: list[Row]
    unconfirmed: list[Change]
    told: bool
    disturbed: int

    @property
    def failed(self) -> bool:
        """Where nothing is told, too: that would be no pass."""
        return bool(self.slower or self.broken) or not self.told


def guard(
    asked: Asked,
    base: Revision,
    new: Revision,
    margin: float,
    same: float,
    until: float,
    progress: Progress,
    say: Callable[[str], object],
) -> Guarded:
    """Measures all cells that NEW has beside those of BASE: briefly, then again and longer what looks slower.

    asked: its plugins name those of the package. margin: by how much a cell may be slower. same: see `compare`.
    until: monotonic seconds at which it should be done. say: hears in a line what is done next.

    Raises:
        AttnbenchError: a plugin, an option or a size is not to be had, or there is nothing to measure.
    """
    with planned(asked, (_requests(asked.plugins, base, new), None)) as plan:
        settings = settings_here(plan)
        pairs, left = _pairs(plan.cells)

        def looked(pair: Pair, seconds: float, precision: float, turned: bool) -> Look:
            own = replace(settings, budget=max(seconds, 0.1), precision=precision)
            return _look(plan, own, pair, turned, progress)

        found = _decided(pairs, looked, margin, same, until, say)
    return replace(found, comparison=replace(found.comparison, only_base=[(_bare(c), c.workload) for c in left]))


def _decided(
    pairs: Sequence[Pair],
    looked: Callable[[Pair, float, float, bool], Look],
    margin: float,
    same: float,
    until: float,
    say: Callable[[str], object],
) -> Guarded:
    """The plan of all looks.

    looked: measures a pair for so many seconds, or until it is so precise; with NEW in BASE's place every other time.
    """
    screened = monotonic() + SCREEN_SHARE * (until - monotonic())
    say(f"{len(pairs)} cells, a first look of at most {(screened - monotonic()) / len(pairs):.1f} s at each")
    looks = [
        looked(pair, (screened - monotonic()) / (len(pairs) - i), _SCREEN_PRECISION, bool(i % 2))
        for i, pair in enumerate(pairs)
    ]

    def again(i: int, seconds: float) -> Ratios:
        look = looked(pairs[i], min(seconds, until - monotonic()), _LAST_PRECISION, False)
        looks[i] = looks[i] if look.ratios else look
        return look.ratios

    chosen, left = narrowed({i: look.ratios for i, look in enumerate(looks)}, until - monotonic(), again, margin)
    chosen = [i for i in chosen if looks[i].ratios]
    if chosen:
        say(f"{len(chosen)} may be slower, and get a long look")
    turns = min(MOST_TURNS, max(1, round((until - monotonic()) / TURN_SECONDS / max(1, len(chosen)))))
    last: dict[int, list[Look]] = {i: [] for i in chosen}
    # One after the other, so that no cell has all of its time while the machine is at its worst.
    for turn, i in enumerate(list(chosen) * turns):
        seconds = (until - monotonic()) / (turns * len(chosen) - turn)
        odd = bool(turn // len(chosen) % 2)
        last[i].append(looked(pairs[i], min(TURN_SECONDS, seconds), _LAST_PRECISION, odd))
    looks = [joined(last.get(i, [look])) for i, look in enumerate(looks)]
    return _told(pairs, looks, confirmed({i: looks[i].ratios for i in chosen}, margin), left, same)


def affordable(seconds: float) -> int:
    """How many cells get a long look in so many seconds; one in any case."""
    return max(1, round(seconds / (TURNS * TURN_SECONDS)))


def narrowed(
    first: Mapping[int, Ratios], seconds: float, again: Callable[[int, float], Ratios], margin: float
) -> tuple[list[int], list[int]]:
    """The cells for the last look, and those that looked slower and get none for want of time.

    first: of the first looks, by cell. seconds: what is left. again: measures a cell for so many.

    Where more are suspected than get a long look, half of the time goes to short ones at the most suspicious; both
    looks together then say which they are.
    """
    suspects = suspected(first, margin)
    if len(suspects) <= affordable(seconds) or affordable(seconds / 2) < 2:
        number = affordable(seconds)
        return suspects[:number], suspects[number:]
    few = suspects[: int(seconds / 2 / SHORT_SECONDS)]
    both = {
        i: {**first[i], **{(-1 - process, at): x for (process, at), x in again(i, SHORT_SECONDS).items()}} for i in few
    }
    still, number = suspected(both, margin), affordable(seconds / 2)
    return still[:number], still[number:] + suspects[len(few) :]


def joined(looks: Sequence[Look]) -> Look:
    """Several looks at one cell as one, which has the processes of all; one that came to no number, if there is one."""
    if unfinished := [look for look in looks if not look.ratios]:
        return unfinished[0]
    base: list[list[Any]] = []
    new: list[list[Any]] = []
    for look in looks:
        assert look.base
        before = 1 + max((sample[0] for sample in new), default=-1)
        for samples, row in ((base, look.base), (new, look.new)):
            samples += [[sample[0] + before, *sample[1:]] for sample in row["samples"]]
    ratios = paired(base, new)
    found = interval(list(ratios.values()), [process for process, _ in ratios])
    number = {"processes": len({process for process, _ in ratios})}
    names = ("speedup", "speedup_low", "speedup_high")
    first = looks[0]
    assert first.base
    return Look(
        first.base | number | dict.fromkeys(names, 1.0) | {"samples": base},
        first.new | number | dict(zip(names, found, strict=True)) | {"samples": new},
    )


def suspected(ratios: Mapping[int, Ratios], margin: float) -> list[int]:
    """The cells that look slower, the most suspicious first. ratios: of the first looks, by cell."""
    grounds = {i: suspicion(found, margin) for i, found in ratios.items() if found}
    return sorted((i for i, ground in grounds.items() if ground is not None), key=lambda i: -(grounds[i] or 0.0))


def confirmed(ratios: Mapping[int, Ratios], margin: float) -> set[int]:
    """The cells that are slower by more than the margin for certain. ratios: of the last looks, by cell."""
    able = {i: found for i, found in ratios.items() if found}
    slower = certain([chance(found, margin) for found in able.values()])
    return {i for i, is_slower in zip(able, slower, strict=True) if is_slower}


def _requests(plugins: str, base: Revision, new: Revision) -> list[Request]:
    """Those asked for of both revisions, under names that say which is which."""
    if not (every := base.plugins | new.plugins):
        raise AttnbenchError(f"neither {base} nor {new} has a plugin: no entry point in the group attnbench.plugins")
    requests = []
    for request in select(plugins, every):
        for side, suffix in ((base, _BASE), (new, _NEW)):
            if found := side.plugins.get(request.found.name):
                requests.append(replace(request, found=replace(found, name=found.name + suffix)))
    return requests


def _pairs(cells: Sequence[Cell]) -> tuple[list[Pair], list[Cell]]:
    """NEW's cells beside BASE's of the same workload and values of the options that both know; and BASE's others."""
    before = [cell for cell in cells if cell.variant.endswith(_BASE)]
    pairs = [
        Pair(next((other for other in before if _alike(other, cell)), None), cell)
        for cell in cells
        if cell not in before
    ]
    met = {pair.base for pair in pairs}
    return pairs, [cell for cell in before if cell not in met]


def _alike(base: Cell, new: Cell) -> bool:
    both = base.options.keys() & new.options.keys()
    named = base.variant.removesuffix(_BASE) == new.variant.removesuffix(_NEW)
    return named and base.workload == new.workload and all(base.options[k] == new.options[k] for k in both)


def _bare(cell: Cell) -> str:
    return cell.plugin.replace(_NEW, "", 1).replace(_BASE, "", 1)


def _look(plan: Plan, settings: Settings, pair: Pair, turned: bool, progress: Progress) -> Look:
    """turned: NEW has BASE's place in the session, so that what favours either place favours neither side."""
    cells = [replace(cell) for cell in (pair.base, pair.new) if cell][:: -1 if turned else 1]
    rows = measure(plan.server, replace(settings, baseline=cells[0].plugin), cells, progress)[:: -1 if turned else 1]
    for row in rows:
        row |= {"plugin": _bare(pair.new), "variant": pair.new.variant.removesuffix(_NEW), "baseline": _BASE}
        if row["status"] == "skipped":
            row["reason"] += f" (the cell's share of --budget is {settings.budget:.2g} s)"
    return Look(rows[0] if pair.base else None, rows[-1])


def _told(
    pairs: Sequence[Pair], looks: Sequence[Look], slower: Set[int], unconfirmed: Sequence[int], same: float
) -> Guarded:
    changes: dict[int, Change] = {}
    broken, without = list[Row](), list[Row]()
    for i, look in enumerate(looks):
        if look.base:
            (found,) = between.compare(as_frame([look.base]), as_frame([look.new]), ({}, {}), same).changes
            # Of many cells some are slower by their own interval alone: the last look decides.
            verdict = SLOWER if i in slower else UNSURE if found.verdict == SLOWER else found.verdict
            changes[i] = replace(found, verdict=verdict)
        if look.new["status"] != "ok":
            fails = changes[i].verdict == BROKEN if look.base else look.new["status"] in (*FAILED, "wrong")
            (broken if fails else without).append(look.new)
    only_new = [(_bare(pair.new), pair.new.workload) for pair in pairs if not pair.base]
    told = any(look.new["status"] == "ok" for look in looks)
    return Guarded(
        Comparison(list(changes.values()), [], only_new),
        [changes[i] for i in sorted(slower)],
        broken,
        without,
        [changes[i] for i in unconfirmed],
        told,
        sum(held_up.matters(look.new["samples"]) for look in looks),
    )


def as_dict(found: Guarded, base: Revision, new: Revision) -> dict[str, Any]:
    """For `--json`."""
    rows = {
        name: [{key: row[key] for key in ("plugin", "seq", "status", "reason")} for row in getattr(found, name)]
        for name in ("broken", "without")
    }
    return {
        "base": base.commit,
        "new": new.commit,
        "failed": found.failed,
        "cells": [change.as_dict() for change in found.comparison.changes],
        **rows,
        "disturbed": found.disturbed,
        "unconfirmed": [[change.plugin, change.workload.label()] for change in found.unconfirmed],
        "only_base": [[name, w.label()] for name, w in found.comparison.only_base],
        "only_new": [[name, w.label()] for name, w in found.comparison.only_new],
    }
