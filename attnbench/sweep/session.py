"""Decides what is measured next: every cell gets a number first, then time goes where it tells most."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from attnbench.records.schema import Row
from attnbench.sweep import rows
from attnbench.sweep.cell import Cell
from attnbench.sweep.contest import Contest
from attnbench.sweep.plan import bound_emulated, skip_too_dear, skip_too_large
from attnbench.sweep.returns import Returns, Worth, verdicts
from attnbench.sweep.rounds import Known, Progress, Rounds, Seconds
from attnbench.sweep.settings import Settings
from attnbench.theory.roofline import impossible
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload


class Sink(Protocol):
    """Where finished rows go; those of a workload may come again, measured more closely."""

    def append(self, rows: Sequence[Row]) -> None: ...


class Session:
    """Measures cells, workload by workload.

    worth: see `returns.Worth`. known: what sessions before it have learnt, and learns more.
    """

    def __init__(
        self, server: Forkserver, settings: Settings, worth: Worth = verdicts, known: Known | None = None
    ) -> None:
        self._settings, self._rounds = settings, Rounds(server, settings, known or Known())
        self._returns = Returns(self._rounds.costs, self._rounds.spent, settings, worth)
        self._contests: list[Contest] = []

    @property
    def seconds(self) -> Seconds:
        return self._rounds.seconds

    def run(self, cells: Sequence[Cell], sink: Sink, progress: Progress) -> None:
        """Measures all cells and hands the rows of each workload to `sink` as soon as they are there."""
        deadline = time.monotonic() + self._settings.budget
        try:
            self._cover(cells, deadline, sink, progress)
            self._sharpen(deadline, sink, progress)
        finally:
            self._rounds.close()

    def outlook(self, seconds: float) -> list[tuple[str, int]]:
        """What so many seconds more would buy: see `Returns.outlook`."""
        return self._returns.outlook(self._contests, seconds)

    def _cover(self, cells: Sequence[Cell], deadline: float, sink: Sink, progress: Progress) -> None:
        """A number for every cell that fits."""
        skip_too_large(cells, self._settings.memory)
        bound_emulated(cells, self._settings)
        self._contests = [Contest(list(group)) for _, group in groupby(cells, key=lambda c: c.workload)]
        for i, contest in enumerate(self._contests):
            left = max(0.0, deadline - time.monotonic())
            pending = [cell for later in self._contests[i:] for cell in later.cells]
            settings = self._settings
            skip_too_dear(contest.cells, pending, self._rounds.costs, settings.budget, left, settings.part)
            self._rounds.cover(contest, pending, deadline, progress)
            sink.append(done := self._ended(contest))
            progress.rows(done, max(0.0, deadline - time.monotonic()))

    def _sharpen(self, deadline: float, sink: Sink, progress: Progress) -> None:
        """What is left of the time, bout by bout, where it tells most."""
        while bout := self._returns.best(self._contests, deadline - time.monotonic()):
            self._rounds.sharpen(bout, deadline, progress)
            sink.append(done := self._ended(bout.contest))
            self._returns.measured(bout.contest)
            progress.again(done, max(0.0, deadline - time.monotonic()))

    def _ended(self, contest: Contest) -> list[Row]:
        return [self._row(contest, cell) for cell in contest.cells]

    def _row(self, contest: Contest, cell: Cell) -> Row:
        """A cell's row. What is faster than this machine can be ends as wrong."""
        measured, settings = contest.measured.get(cell), self._settings
        found = rows.row(cell, measured, settings)
        if cell.status is None and not (measured and measured.samples):
            cell.end("error", "no burst of it was timed")
        figures: Row = {}
        if cell.status is None and measured:
            figures = rows.figures(cell, measured, contest.base, settings)
            if reason := measured.contradiction(contest.base) or impossible(found | figures, settings.ceilings):
                cell.end("wrong", reason)
                figures = {"samples": figures["samples"]}
        return found | figures | {"status": cell.status or "ok", "reason": cell.reason, "traceback": cell.traceback}


class _Rows:
    """Keeps the newest rows of each workload."""

    def __init__(self) -> None:
        self.kept: dict[Workload, list[Row]] = {}

    def append(self, rows: Sequence[Row]) -> None:
        self.kept[Workload.from_dict(rows[0])] = list(rows)


class Unwatched:
    """Nobody watches."""

    def cell(self, cell: Cell, doing: str) -> None: ...

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None: ...

    def again(self, rows: Sequence[Row], seconds_left: float) -> None: ...


def measure(
    server: Forkserver,
    settings: Settings,
    cells: Sequence[Cell],
    progress: Progress | None = None,
    worth: Worth = verdicts,
) -> list[Row]:
    """The rows of all cells, kept in memory."""
    found = _Rows()
    Session(server, settings, worth).run(cells, found, progress or Unwatched())
    return [row for rows in found.kept.values() for row in rows]
