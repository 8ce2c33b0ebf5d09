"""Decides when: runs the workers of one workload in rounds, one burst of each in turn.

Drift of a shared machine hits the bursts of one round alike, so speedups are paired by round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from msgspec import structs

from attnbench.devices import machine
from attnbench.records.schema import Row
from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep import rows
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.costs import Costs
from attnbench.sweep.crew import Crew, Live
from attnbench.sweep.meanwhile import Meanwhile
from attnbench.sweep.plan import MOST_ROUNDS, allot, groups, skip_too_dear, skip_too_large
from attnbench.sweep.precision import look
from attnbench.sweep.settings import Settings
from attnbench.sweep.stopping import processes
from attnbench.theory.roofline import impossible
from attnbench.workers.messages import Aim, Burst, Columns, Finish, Given, Look
from attnbench.workers.server import Forkserver

_ENERGY_SECONDS, _ENERGY_SHARE = 0.5, 0.1  # a GPU's energy counter moves in steps of up to a tenth of a second
_OVERRUN, _LEAST_ROUNDS = 1.5, 3  # a workload whose rounds take this many times what was allotted stops after so many

_GAP_SECONDS, _SPUN_SECONDS = 5e-3, 1e-3  # between bursts that tell of work left over; a thread's spinning before sleep
_WATCHED_SECONDS = 1.0  # what a look at processes beside a worker counts for
_LIKE, _TINY = 2.0, 1e-5  # errors on two samples of rows are alike up to this factor; rounding is what it is
_LARGEST_OUTPUT = 48 << 20
_ERRORS = ("rel_l2", "max_abs", "cosine")
_HIDDEN = "its process does not show what came out of its calls"
_BITS = 40  # of a number that values are drawn from


class Progress(Protocol):
    """What the session tells whoever watches."""

    def cell(self, cell: Cell, doing: str) -> None: ...
    def rows(self, rows: Sequence[Row], seconds_left: float) -> None: ...


class Sink(Protocol):
    """Where finished rows go."""

    def append(self, rows: Sequence[Row]) -> None: ...


@dataclass
class Seconds:
    """Where the wall time went."""

    calls: float = 0.0
    compilation: float = 0.0


class Session:
    """Measures cells, workload by workload."""

    def __init__(self, server: Forkserver, settings: Settings) -> None:
        self._settings, self._crew = settings, Crew(server, settings)
        self._costs = Costs()
        self._random = random.Random(settings.seed)
        self._secret = random.SystemRandom()  # for what no plugin may know beforehand
        self._baseline: Cell | None = None
        self._measured: dict[Cell, Measured] = {}
        self._process = 0
        self._flaws: dict[tuple[Any, ...], str | None] = {}
        """What small problems showed, for each kind that was tried."""
        self.seconds = Seconds()

    def run(self, cells: Sequence[Cell], sink: Sink, progress: Progress) -> None:
        """Measures all cells and hands the rows of each workload to `sink` as soon as it is done."""
        try:
            self._run(cells, sink, progress)
        finally:
            self._crew.dismiss()

    def _run(self, cells: Sequence[Cell], sink: Sink, progress: Progress) -> None:
        deadline = time.monotonic() + self._settings.budget
        skip_too_large(cells, self._settings.memory)
        workloads = [list(group) for _, group in groupby(cells, key=lambda c: c.workload)]
        for i, together in enumerate(workloads):
            left = max(0.0, deadline - time.monotonic())
            pending = [cell for later in workloads[i:] for cell in later]
            skip_too_dear(together, pending, self._costs, self._settings.budget, left)
            self._crew.dismiss(but={cell.plugin for cell in pending})
            done = self._measure(together, pending, deadline, progress)
            sink.append(done)
            progress.rows(done, max(0.0, deadline - time.monotonic()))

    def _measure(
        self, cells: Sequence[Cell], pending: Sequence[Cell], deadline: float, progress: Progress
    ) -> list[Row]:
        """One workload: its groups one after the other, then a row for each cell."""
        open_cells = [c for c in cells if c.status is None]
        self._baseline = next((c for c in open_cells if c.plugin == self._settings.baseline), None)
        self._measured = {}
        self._process = 0
        for group in groups(open_cells, self._baseline, self._settings.memory):
            self._measure_together(group, pending, deadline, progress)
        return [self._ended(cell) for cell in cells]

    def _measure_together(
        self, group: Sequence[Cell], pending: Sequence[Cell], deadline: float, progress: Progress
    ) -> None:
        """Cells that are alive together, in one process each or in several one after the other."""
        if self._baseline in self._measured:  # it starts afresh beside each group
            self._measured[self._baseline].converged = False
            self._crew.spent[self._baseline] = 0.0
        launch, launches = 0, 1
        while launch < launches:
            live = self._start([c for c in group if self._is_open(c) and self._takes_part(c, launch)], progress)
            try:
                if launch == 0:
                    left = max(0.0, deadline - time.monotonic())
                    launches = self._schedule(live, pending, left)
                    checked = {0, self._secret.randrange(launches)}
                self._rounds(live, launch, launch in checked, progress)
                self._finish(live, left / len(pending))
            finally:
                for one in live:
                    self._crew.leave(one)
            self._process += 1
            launch += 1
            self._look(live, launch, by_process=True)

    def _is_open(self, cell: Cell) -> bool:
        return cell.status is None and not (cell in self._measured and self._measured[cell].converged)

    def _takes_part(self, cell: Cell, launch: int) -> bool:
        return launch == 0 or (cell in self._measured and launch < self._measured[cell].launches)

    def _start(self, group: Sequence[Cell], progress: Progress) -> list[Live]:
        live, number, rows = [], *(self._secret.getrandbits(_BITS) for _ in range(2))
        for cell in group:
            progress.cell(cell, "getting ready")
            thorough, kind = cell not in self._measured, _kind(cell)
            if thorough and self._flaws.get(kind):
                cell.end("wrong", self._flaws[kind] or "")
                continue
            probe = thorough and kind not in self._flaws and cell.workload.is_plain
            one = self._crew.start(cell, thorough, number, _has_witness(cell), probe)
            if one is None:
                continue
            if probe:
                self._flaws[kind] = one.ready.flaw
            if one.ready.output:
                given = Given(one.values, one.thorough, one.places)
                self._hear_witness(one, given, rows, one.ready.output, one.ready.columns)
                one.ready = structs.replace(one.ready, output=b"")
            elif thorough and _has_witness(cell) and cell.status is None:
                cell.end("wrong", _HIDDEN)
            ready = one.ready
            compiling = max(0.0, ready.first_call_s - ready.call_s)
            self.seconds.compilation += ready.setup_s + compiling
            self.seconds.calls += ready.calls_s - compiling
            self._costs.learn(cell, ready.call_s, one.took_s - ready.calls_s + compiling)
            columns = {**ready.columns, "setup_s": ready.setup_s, "first_call_s": ready.first_call_s}
            self._measured.setdefault(cell, Measured(columns))
            live.append(one)
        return live

    def _hear_witness(self, one: Live, given: Given, rows: int, output: bytes, columns: Columns) -> None:
        """Sets an approximation error that was found apart from the plugin, and ends a cell that told of another.

        columns: what the plugin's own process told, if it did.
        """
        cell = one.cell
        found, alone = self._crew.witness(cell, given, rows, output), "implementation_rel_l2" not in columns
        if found is None:
            if alone and cell.status is None:
                cell.end("error", "what should have judged its output, apart from it, came to no end")
            return
        told = columns.get("approximation_rel_l2")
        told = told if isinstance(told, float) else found.rel_l2
        if alone:
            columns |= {f"implementation_{name}": getattr(found, name) for name in _ERRORS}
        columns |= {f"approximation_{name}": getattr(found, name) for name in _ERRORS}
        if cell.status is not None:  # it was found to be wrong in another way
            return
        if cell.family == "exact" and found.problem:
            cell.end("wrong", found.problem)
        elif not found.rel_l2 <= _LIKE * told + _TINY or not told <= _LIKE * found.rel_l2 + _TINY:
            said = f"its process finds it {told:.1e} off attention (relative L2), one without it {found.rel_l2:.1e}"
            cell.end("wrong", said)

    def _schedule(self, live: Sequence[Live], pending: Sequence[Cell], left: float) -> int:
        """Now that calls of this workload have been timed: rounds for each of its cells, and processes for all."""
        done = [c for c in self._measured if c not in {one.cell for one in live}]
        rounds = allot([c for c in pending if c not in done], self._costs, left, ready=[one.cell for one in live])
        for one in live:
            time_left = self._settings.timeout - self._crew.spent[one.cell]
            within = int(0.8 * time_left / self._costs.round(one.cell))
            self._measured[one.cell].planned = max(0, min(within, rounds.get(one.cell, 0)))
        base = next((one for one in live if one.cell is self._baseline and one.cell.status is None), None)
        others = [one for one in live if one is not base and one.cell.status is None]
        if base and others:  # a round without the baseline pairs with nothing, but for the first: see `_keep_a_sample`
            for one in others:
                measured = self._measured[one.cell]
                measured.planned = min(measured.planned, max(1, self._measured[base.cell].planned))
        apart = others or ([base] if base else [])
        share = {one.cell: self._shares(one, base, len(others)) for one in apart}
        wanted = {cell: processes(self._measured[cell].planned, *seconds) for cell, seconds in share.items()}
        if self._settings.reuse:
            wanted = dict.fromkeys(wanted, 1)
        launches = min((n for n in wanted.values() if n > 1), default=1)
        for cell, (rounds_s, start_s) in share.items():
            measured = self._measured[cell]
            if wanted[cell] > 1:
                measured.plan(int(measured.planned * (1 - launches * start_s / rounds_s)), launches)
            else:
                measured.plan(measured.planned, 1)
        if base and others:
            most = max(m.launches * m.schedule.rounds for m in (self._measured[one.cell] for one in others))
            self._measured[base.cell].plan(most, launches)
        return launches

    def _shares(self, one: Live, base: Live | None, others: int) -> tuple[float, float]:
        """Seconds that all rounds of a cell take, and one start of it, with its share of the baseline's."""
        rounds_s, start_s = self._costs.round(one.cell), one.start_s
        if base and base is not one:
            rounds_s += self._costs.round(base.cell) / others
            start_s += base.start_s / others
        return self._measured[one.cell].planned * rounds_s, start_s

    def _rounds(self, live: Sequence[Live], launch: int, check: bool, progress: Progress) -> None:
        costs = {one.cell: self._costs.round(one.cell) for one in live}
        planned = {one.cell: self._measured[one.cell].schedule.rounds for one in live}
        if others := [rounds for cell, rounds in planned.items() if cell is not self._baseline]:
            planned |= {one.cell: max(others) for one in live if one.cell is self._baseline}
        longest = max(planned.values(), default=0)
        allotted = sum(planned[one.cell] * costs[one.cell] for one in live)
        began = time.monotonic()
        # The checked round is drawn, so that no plugin can tell which of its answers will be looked at. Where there are
        # several it is not the first: what a call before may have kept is tried too, see `Subject.aim`. All cells have
        # theirs in the same round, as far as they can: then one reference is theirs together.
        drawn = self._secret.random()
        checked = {cell: min(1 + int(drawn * (min(n, MIN_ROUNDS) - 1)), n - 1) for cell, n in planned.items()}
        for turn in range(MOST_ROUNDS):
            # Cells planned for the most rounds go on where the time allotted to the workload is not used up.
            taking_part = [
                one
                for one in live
                if self._is_open(one.cell)
                and (turn < (n := planned[one.cell]) or n == longest)
                and self._crew.spent[one.cell] + 2 * costs[one.cell] < self._settings.timeout
            ]
            spent, next_round = time.monotonic() - began, sum(costs[one.cell] for one in taking_part)
            if not taking_part or (turn >= longest and spent + next_round > allotted):
                break
            if turn >= _LEAST_ROUNDS and spent > max(1.0, _OVERRUN * allotted):
                break
            self._random.shuffle(taking_part)
            number, rows = (self._secret.getrandbits(_BITS) for _ in range(2))
            for one in taking_part:
                progress.cell(one.cell, f"round {turn + 1} of {planned[one.cell]}")
                self._burst(one, turn, number, rows, check=check and checked[one.cell] == turn)
            if launch == 0:
                self._look(live, turn + 1, by_process=False)
        if launch == 0:
            for one in live:
                self._keep_a_sample(one)

    def _keep_a_sample(self, one: Live) -> None:
        """The last call before the rounds counts where a cell, or a baseline beside it, is too dear for a round."""
        measured = self._measured[one.cell]
        if one.cell.status is None and all(sample[0] != self._process for sample in measured.samples):
            measured.samples.append([self._process, 0, one.ready.call_start, 1, one.ready.call_s])

    def _burst(self, one: Live, turn: int, number: int, rows: int, check: bool) -> None:
        """One burst: its calls get their inputs, are made while two clocks run, and what came out is looked at."""
        calls, head = one.burst
        which = self._secret.randrange(calls) if check else None
        measured, pid = self._measured[one.cell], one.worker.pid
        began, used = time.monotonic(), machine.cpu_seconds(pid)
        if one.left_at and began - one.left_at > _GAP_SECONDS:
            spun = one.cell.workload.threads * _SPUN_SECONDS
            measured.idle.add(began - one.left_at, used - one.used_s - spun)
        aimed = self._crew.ask(one.cell, one.worker, Aim(calls, head, number, which))
        if aimed is None:
            return
        meanwhile = Meanwhile(pid)
        timed = self._crew.ask(one.cell, one.worker, Burst())
        if timed is None:
            return
        seen = meanwhile.seen(timed.waited_s)
        # A GPU's own clock leaves out what the host does around its work.
        measured.bursts.append((timed.seconds if one.cell.workload.on_host else timed.calls_s, seen))
        self.seconds.calls += aimed.calls_s + timed.calls_s
        measured.samples.append([self._process, turn, timed.start, calls, timed.seconds, *seen.sample])
        if timed.wall_s is not None:
            one.wall_s.append(timed.wall_s)
        self._look_at(one, number, rows, which)
        one.left_at, one.used_s = time.monotonic(), machine.cpu_seconds(pid)

    def _look_at(self, one: Live, number: int, rows: int, which: int | None) -> None:
        """What came out of a burst. which: the call that is checked; rows: see `_hear_witness`."""
        looked = self._crew.ask(one.cell, one.worker, Look())
        if looked is None:
            return
        self.seconds.calls += looked.calls_s
        columns = dict(looked.columns)
        if which is None:
            one.places = number
        else:
            one.values = (*one.values, number)
        if looked.wrong:
            one.cell.end("wrong", looked.wrong)
        elif which is not None and _has_witness(one.cell) and one.cell.family == "exact":
            if not looked.output:
                one.cell.end("wrong", _HIDDEN)
                return
            calls, head = one.burst
            given = Given(one.values, one.thorough, one.places, calls + head, head + which)
            self._hear_witness(one, given, rows, looked.output, columns)
        if one.cell.status is not None:
            self._measured[one.cell].columns |= columns

    def _look(self, live: Sequence[Live], done: int, by_process: bool) -> None:
        alive = [one.cell for one in live]
        look(alive, self._baseline, self._measured, done, by_process, self._settings.precision)

    def _finish(self, live: Sequence[Live], each_s: float) -> None:
        """each_s: what is left of the budget for each cell, of which what a call's energy takes is a small part."""
        energy_s = _ENERGY_SECONDS if _ENERGY_SHARE * each_s > _ENERGY_SECONDS else 0.0
        for one in live:
            if one.cell.status is not None:
                continue
            measured = self._measured[one.cell]
            if busy := machine.busy_children(one.worker.pid):
                measured.idle.add(_WATCHED_SECONDS, busy * _WATCHED_SECONDS)
            if finished := self._crew.ask(one.cell, one.worker, Finish(energy_s)):
                measured.leak_bytes = min(measured.leak_bytes, finished.leak_bytes)
                measured.columns |= finished.columns
            if one.wall_s:
                measured.columns["wall_s"] = statistics.median(one.wall_s)

    def _ended(self, cell: Cell) -> Row:
        """A cell's row. What is faster than this machine can be ends as wrong."""
        measured, settings = self._measured.get(cell), self._settings
        found = rows.row(cell, measured, settings)
        if cell.status is None and not (measured and measured.samples):
            cell.end("error", "no burst of it was timed")
        figures: Row = {}
        if cell.status is None and measured:
            base = (self._baseline and self._baseline.status is None and self._measured.get(self._baseline)) or None
            figures = rows.figures(cell, measured, base, settings)
            if reason := measured.contradiction(base) or impossible(found | figures, settings.ceilings):
                cell.end("wrong", reason)
                figures = {"samples": figures["samples"]}
        return found | figures | {"status": cell.status or "ok", "reason": cell.reason, "traceback": cell.traceback}


def _kind(cell: Cell) -> tuple[Any, ...]:
    """What small problems take over of a workload."""
    w = cell.workload
    return cell.plugin, w.dtype, w.device, w.mask, w.heads, w.kv_heads, w.head_dim, w.value_dim


def _has_witness(cell: Cell) -> bool:
    """Whether a process without plugins can say how far an output is from attention, and it fits into a message."""
    w = cell.workload
    size = w.batch * w.seq * (w.width if w.scope == "block" else w.heads * w.value_dim) * w.itemsize
    forward = not (w.decodes or w.trains or w.lengths) and w.layers == 1
    return forward and w.on_host and cell.family != "recurrent" and size <= _LARGEST_OUTPUT


class _Rows(list[Row]):
    def append(self, rows: Sequence[Row]) -> None:  # type: ignore[override]
        self.extend(rows)


class Unwatched:
    """Nobody watches."""

    def cell(self, cell: Cell, doing: str) -> None: ...

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None: ...


def measure(
    server: Forkserver, settings: Settings, cells: Sequence[Cell], progress: Progress | None = None
) -> list[Row]:
    """The rows of all cells, kept in memory."""
    kept = _Rows()
    Session(server, settings).run(cells, kept, progress or Unwatched())
    return list(kept)
