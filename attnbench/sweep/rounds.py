"""Runs the workers of one workload in rounds, one burst of each in turn.

Drift of a shared machine hits the bursts of one round alike, so speedups are paired by round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from attnbench.devices import machine
from attnbench.records.schema import Row
from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.contest import Contest
from attnbench.sweep.costs import Costs
from attnbench.sweep.crew import Crew, Live
from attnbench.sweep.meanwhile import Meanwhile
from attnbench.sweep.plan import allot, groups
from attnbench.sweep.precision import look
from attnbench.sweep.returns import Bout
from attnbench.sweep.settings import Settings
from attnbench.sweep.testimony import HIDDEN, LATE, has_witness, hear
from attnbench.workers.about_witness import Given
from attnbench.workers.messages import Aim, Burst, Finish, Judge, Look, Looked
from attnbench.workers.server import Forkserver

_ENERGY_SECONDS, _ENERGY_SHARE = 0.5, 0.1  # a GPU's energy counter moves in steps of up to a tenth of a second
_OVERRUN, _LEAST_ROUNDS = 1.5, 3  # a workload whose rounds take this many times what was allotted stops after so many

_GAP_SECONDS, _SPUN_SECONDS = 5e-3, 1e-3  # between bursts that tell of work left over; a thread's spinning before sleep
_WATCHED_SECONDS = 1.0  # what a look at processes beside a worker counts for
_BITS = 40  # of a number that values are drawn from


class Progress(Protocol):
    """What whoever watches is told. again: of rows that were told of before, and are known more closely now."""

    def cell(self, cell: Cell, doing: str) -> None: ...
    def rows(self, rows: Sequence[Row], seconds_left: float) -> None: ...
    def again(self, rows: Sequence[Row], seconds_left: float) -> None: ...


@dataclass
class Seconds:
    """Where the wall time went."""

    calls: float = 0.0
    compilation: float = 0.0


@dataclass
class Known:
    """What a session learns of variants, which holds for the next on the same machine.

    flaws: what small problems showed, for each kind that was tried.
    """

    costs: Costs = field(default_factory=Costs)
    flaws: dict[tuple[Any, ...], str | None] = field(default_factory=dict)


class Rounds:
    """A first look at each cell of a contest, and bouts of further rounds."""

    def __init__(self, server: Forkserver, settings: Settings, known: Known) -> None:
        self._settings, self._crew = settings, Crew(server, settings)
        self.costs, self._flaws, self.spent = known.costs, known.flaws, self._crew.spent
        self._random = random.Random(settings.seed)
        self._secret = random.SystemRandom()  # for what no plugin may know beforehand
        self.seconds = Seconds()

    def close(self) -> None:
        """Ends all processes."""
        self._crew.dismiss()

    def cover(self, contest: Contest, pending: Sequence[Cell], deadline: float, progress: Progress) -> None:
        """A number for each open cell, from one process: as many rounds as an interval needs, or fewer of dear ones.

        pending: all cells that have no number yet, these among them. deadline: in monotonic seconds.
        """
        open_cells = [c for c in contest.cells if c.status is None]
        contest.baseline = next((c for c in open_cells if c.plugin == self._settings.baseline), None)
        for group in groups(open_cells, contest.baseline, self._settings.memory):
            self._begin_afresh(contest)
            with self._started(contest, group, progress) as live:
                left = max(0.0, deadline - time.monotonic())
                ready = [one.cell for one in live]
                rest = [c for c in pending if c in ready or c not in contest.measured]
                self._plan(contest, live, allot(rest, self.costs, left, self._settings, ready))
                self._rounds(contest, live, True, deadline, progress)
                self._finish(contest, live, left / len(pending))
                rows = self._secret.getrandbits(_BITS)
                for one in live:
                    if one.cell.status is None:  # what judging takes is no leak, so that was asked before
                        self._judge_now(contest, one, rows)
                    self._keep_a_sample(contest, one)
            contest.leave(self._settings.reuse)

    def sharpen(self, bout: Bout, deadline: float, progress: Progress) -> None:
        """The rounds of a bout, in its launches one after the other, until all its cells are precise enough."""
        contest = bout.contest
        for group in groups(list(bout.rounds), contest.baseline, self._settings.memory):
            self._begin_afresh(contest)
            for cell in group:
                contest.measured[cell].plan(bout.rounds[cell], bout.launches)
            checked = self._secret.randrange(bout.launches)
            for launch in range(bout.launches):
                taking_part = [c for c in group if contest.is_open(c)]
                if not taking_part or time.monotonic() > deadline:
                    break
                with self._started(contest, taking_part, progress) as live:
                    self._rounds(contest, live, launch == checked, deadline, progress)
                    self._finish(contest, live, 0.0)
                contest.leave(self._settings.reuse)
                self._look(contest, live, by_process=True)

    def _begin_afresh(self, contest: Contest) -> None:
        """The baseline is measured as often as the others need: no time limit adds that up."""
        if contest.baseline in contest.measured:
            self.spent[contest.baseline] = 0.0

    @contextmanager
    def _started(self, contest: Contest, cells: Sequence[Cell], progress: Progress) -> Iterator[list[Live]]:
        live: list[Live] = []
        try:
            live.extend(self._start(contest, cells, progress))
            yield live
        finally:
            self._crew.leave(live)

    def _start(self, contest: Contest, group: Sequence[Cell], progress: Progress) -> Iterator[Live]:
        number, rows = (self._secret.getrandbits(_BITS) for _ in range(2))
        # Whose turn it is to wait while the others get ready has cold caches in its first round: who that is, is drawn.
        for cell in self._random.sample(group, len(group)):
            progress.cell(cell, "getting ready")
            thorough, kind = cell not in contest.measured, _kind(cell)
            if thorough and self._flaws.get(kind):
                cell.end("wrong", self._flaws[kind] or "")
                continue
            probe = thorough and kind not in self._flaws and cell.workload.is_plain
            one = self._crew.start(cell, thorough, number, has_witness(cell), probe)
            if one is None:
                continue
            yield one  # before anything goes wrong, so that it is left whatever does
            if probe:
                self._flaws[kind] = one.ready.flaw
            self._account(contest, one)
            if one.ready.suspect or one.ready.flaw:
                self._judge_now(contest, one, rows)

    def _account(self, contest: Contest, one: Live) -> None:
        """What getting a cell ready took."""
        ready = one.ready
        compiling = max(0.0, ready.first_call_s - ready.call_s)
        self.seconds.compilation += ready.setup_s + compiling
        self.seconds.calls += ready.calls_s - compiling
        if one.thorough:
            fixed_s = one.took_s - ready.calls_s + compiling - ready.probes_s
            # A second process finds what was compiled.
            self.costs.learn(one.cell, ready.call_s, fixed_s, max(0.0, one.start_s - ready.setup_s - compiling))
        columns = {**ready.columns, "setup_s": ready.setup_s, "first_call_s": ready.first_call_s}
        contest.measured.setdefault(one.cell, Measured(columns))

    def _plan(self, contest: Contest, live: Sequence[Live], rounds: Mapping[Cell, int]) -> None:
        """As many rounds as fit into each cell's time limit."""
        planned = {}
        for cell in (one.cell for one in live):
            fitting = self.costs.fitting(cell, self._settings.timeout - self.spent[cell])
            planned[cell] = min(fitting, rounds.get(cell, 0))
        base = next((c for c in planned if c is contest.baseline and c.status is None), None)
        others = [c for c in planned if c is not base and c.status is None]
        if base and others:  # a round without the baseline pairs with nothing, but for the first: see `_keep_a_sample`
            planned |= {c: min(planned[c], max(1, planned[base])) for c in others}
            planned[base] = max(planned[c] for c in others)
        for cell, number in planned.items():
            contest.measured[cell].plan(number, 1)

    def _rounds(self, contest: Contest, live: Sequence[Live], check: bool, deadline: float, progress: Progress) -> None:
        """As many as the cells' schedules have, in one process each. check: whether one burst of each is checked."""
        costs = {one.cell: self.costs.round(one.cell) for one in live}
        planned = {one.cell: contest.measured[one.cell].schedule.rounds for one in live}
        allotted = sum(planned[cell] * costs[cell] for cell in planned)
        began = time.monotonic()
        # The checked round is drawn, so that no plugin can tell which of its answers will be looked at. Where there are
        # several it is not the first: what a call before may have kept is tried too, see `Subject.aim`; nor the last of
        # three: calls behind it tell of a leak. All cells have theirs in the same round, as far as they can: then one
        # reference is theirs together.
        drawn = self._secret.random()
        checked = {cell: min(1 + int(drawn * (min(n, MIN_ROUNDS) - 1)), _latest(n)) for cell, n in planned.items()}
        last: Live | None = None
        for turn in range(max(planned.values(), default=0)):
            taking_part = [
                one
                for one in live
                if contest.is_open(one.cell)
                and turn < planned[one.cell]
                and self.spent[one.cell] + 2 * costs[one.cell] < self._settings.timeout
            ]
            now = time.monotonic()
            late = now > deadline or now - began > max(1.0, _OVERRUN * allotted)
            if not taking_part or (turn >= _LEAST_ROUNDS and late):
                break
            last = self._in_turn(taking_part, last)
            number, rows = (self._secret.getrandbits(_BITS) for _ in range(2))
            for one in taking_part:
                progress.cell(one.cell, f"round {turn + 1} of {planned[one.cell]}")
                self._burst(contest, one, turn, number, rows, check=check and checked[one.cell] == turn)
            self._look(contest, live, by_process=False)

    def _in_turn(self, taking_part: list[Live], last: Live | None) -> Live:
        """Puts them in the order of a round, and says who ends it. last: who ended the one before.

        Nobody follows itself: it would find its own caches warm.
        """
        self._random.shuffle(taking_part)
        if taking_part[0] is last and len(taking_part) > 1:
            taking_part.insert(self._random.randrange(1, len(taking_part)), taking_part.pop(0))
        return taking_part[-1]

    def _keep_a_sample(self, contest: Contest, one: Live) -> None:
        """The last call before the rounds counts where a cell, or a baseline beside it, is too dear for a round."""
        measured = contest.measured[one.cell]
        if one.cell.status is None and all(sample[0] != contest.process for sample in measured.samples):
            measured.samples.append([contest.process, contest.turn, one.ready.call_start, 1, one.ready.call_s])

    def _burst(self, contest: Contest, one: Live, turn: int, number: int, rows: int, check: bool) -> None:
        """One burst: its calls get their inputs, are made while two clocks run, and what came out is looked at."""
        calls, head = one.burst
        which = self._secret.randrange(calls) if check else None
        measured, pid = contest.measured[one.cell], one.worker.pid
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
        if check and _is_shown(one):
            one.there = self._crew.there(one.worker, timed.placed)
        # A GPU's own clock leaves out what the host does around its work.
        measured.bursts.append((timed.seconds if one.cell.workload.on_host else timed.calls_s, seen))
        self.seconds.calls += aimed.calls_s + timed.calls_s
        measured.samples.append([contest.process, contest.turn + turn, timed.start, calls, timed.seconds, *seen.sample])
        if timed.wall_s is not None:
            one.wall_s.append(timed.wall_s)
        self._look_at(contest, one, number, rows, which)
        one.left_at, one.used_s = time.monotonic(), machine.cpu_seconds(pid)

    def _look_at(self, contest: Contest, one: Live, number: int, rows: int, which: int | None) -> None:
        """What came out of a burst. which: the call that is checked; rows: of the witness."""
        began = time.monotonic()
        looked = self._crew.ask(one.cell, one.worker, Look())
        if looked is None:
            return
        if which is None:
            one.places = number
        else:
            one.values = (*one.values, number)
        self._weigh(contest, one, looked, rows, began, checked=which is not None)

    def _judge_now(self, contest: Contest, one: Live, rows: int) -> None:
        """Judges the call that measured memory: something looks wrong, or no round came in which one is checked."""
        if one.judged:
            return
        began = time.monotonic()
        if looked := self._crew.ask(one.cell, one.worker, Judge()):
            one.places = one.values[0]
            self._weigh(contest, one, looked, rows, began, checked=True)

    def _weigh(self, contest: Contest, one: Live, looked: Looked, rows: int, began: float, checked: bool) -> None:
        """What a call returned has been looked at in its process. checked: and judged; so the witness is heard."""
        cell, columns = one.cell, dict(looked.columns)
        first, shown = checked and not one.judged, checked and _is_shown(one)
        self.seconds.calls += looked.calls_s
        one.judged = one.judged or checked
        if looked.wrong:
            cell.end("wrong", looked.wrong)
        if shown:
            if looked.output:
                given = Given(one.values, one.thorough, one.places)
                hear(self._crew, one, given, rows, looked.output, columns)
            elif cell.status is None:
                cell.end("wrong", HIDDEN)
            if cell.status is None and one.there is not None and not one.there.startswith(looked.output):
                cell.end("wrong", LATE)
            one.there = None
        if first:
            self.costs.learn_more(cell, time.monotonic() - began - looked.calls_s)
        if first or cell.status is not None:
            contest.measured[cell].columns |= columns

    def _look(self, contest: Contest, live: Sequence[Live], by_process: bool) -> None:
        alive = [one.cell for one in live]
        look(alive, contest.baseline, contest.measured, by_process, self._settings.precision)

    def _finish(self, contest: Contest, live: Sequence[Live], each_s: float) -> None:
        """each_s: what is left of the budget for each cell, of which what a call's energy takes is a small part."""
        energy_s = _ENERGY_SECONDS if _ENERGY_SHARE * each_s > _ENERGY_SECONDS else 0.0
        for one in live:
            if one.cell.status is not None:
                continue
            measured = contest.measured[one.cell]
            if busy := machine.busy_children(one.worker.pid):
                measured.idle.add(_WATCHED_SECONDS, busy * _WATCHED_SECONDS)
            if finished := self._crew.ask(one.cell, one.worker, Finish(energy_s)):
                measured.leak_bytes = min(measured.leak_bytes, finished.leak_bytes)
                measured.columns |= finished.columns
            if one.wall_s:
                measured.columns["wall_s"] = statistics.median(one.wall_s)


def _latest(rounds: int) -> int:
    """The last round that may be checked."""
    return rounds - 2 if rounds > 2 else rounds - 1


def _is_shown(one: Live) -> bool:
    """Whether a call that is judged now is shown to the witness: the first of a cell, and each of an exact one."""
    return has_witness(one.cell) and (not one.judged or one.cell.family == "exact")


def _kind(cell: Cell) -> tuple[Any, ...]:
    """What small problems take over of a workload."""
    w = cell.workload
    return cell.plugin, w.dtype, w.device, w.mask, w.heads, w.kv_heads, w.head_dim, w.value_dim
