"""Decides when: runs the workers of one workload in rounds, one block of each in turn, and makes rows of it.

Drift of a shared machine hits the blocks of one round alike, so speedups are paired by round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from attnbench.devices import machine
from attnbench.devices.bursts import burst_size
from attnbench.records.schema import Row
from attnbench.stats import doubts
from attnbench.stats.intervals import MIN_PROCESSES, MIN_ROUNDS, Interval, interval
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.costs import Costs
from attnbench.sweep.plan import MOST_ROUNDS, allot, groups, skip_too_dear, skip_too_large
from attnbench.sweep.settings import Settings
from attnbench.sweep.stopping import processes
from attnbench.theory.costs import flops
from attnbench.theory.roofline import impossible
from attnbench.workers.ask import describe_exit
from attnbench.workers.channel import Closed, Expired, Message
from attnbench.workers.server import Forkserver, Worker

_LEAK_BYTES = 1 << 20  # a call that keeps more than this is worth a warning
_NOT_COLUMNS = ("call_s", "call_start", "calls_s", "start_s", "checks_s", "leak_bytes", "failed", "reason")
_RELEASE_SECONDS = 10.0  # to free what a workload left
_ENERGY_SECONDS, _ENERGY_SHARE = 0.5, 0.1  # a GPU's energy counter moves in steps of up to a tenth of a second
_OVERRUN, _LEAST_ROUNDS = 1.5, 3  # a workload whose rounds take this many times what was allotted stops after so many


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


@dataclass
class _Live:
    """A cell with a worker that is ready to be timed."""

    cell: Cell
    worker: Worker
    facts: Message
    calls: int
    head: int
    wall_s: list[float] = field(default_factory=list)


class Session:
    """Measures cells, workload by workload."""

    def __init__(self, server: Forkserver, settings: Settings) -> None:
        self._server, self._settings = server, settings
        self._costs = Costs()
        self._random = random.Random(settings.seed)
        self._spent: dict[Cell, float] = {}
        self._baseline: Cell | None = None
        self._measured: dict[Cell, Measured] = {}
        self._process = 0
        self._idle: dict[str, Worker] = {}
        self.seconds = Seconds()

    def run(self, cells: Sequence[Cell], sink: Sink, progress: Progress) -> None:
        """Measures all cells and hands the rows of each workload to `sink` as soon as it is done."""
        try:
            self._run(cells, sink, progress)
        finally:
            self._dismiss()

    def _run(self, cells: Sequence[Cell], sink: Sink, progress: Progress) -> None:
        deadline = time.monotonic() + self._settings.budget
        skip_too_large(cells, self._settings.memory)
        workloads = [list(group) for _, group in groupby(cells, key=lambda c: c.workload)]
        for i, together in enumerate(workloads):
            left = max(0.0, deadline - time.monotonic())
            pending = [cell for later in workloads[i:] for cell in later]
            skip_too_dear(together, pending, self._costs, self._settings.budget, left)
            self._dismiss(but={cell.plugin for cell in pending})
            rows = self._measure(together, pending, deadline, progress)
            sink.append(rows)
            progress.rows(rows, max(0.0, deadline - time.monotonic()))

    def _measure(
        self, cells: Sequence[Cell], pending: Sequence[Cell], deadline: float, progress: Progress
    ) -> list[Row]:
        """One workload: its groups one after the other, then a row for each cell."""
        open_cells = [c for c in cells if c.status is None]
        self._baseline = next((c for c in open_cells if c.plugin == self._settings.baseline), None)
        self._measured = {}
        self._process = 0
        for group in groups(open_cells, self._baseline, self._settings.memory):
            left = max(0.0, deadline - time.monotonic())
            self._measure_together(group, pending, left, progress)
        return [self._row(cell) for cell in cells]

    def _measure_together(
        self, group: Sequence[Cell], pending: Sequence[Cell], left: float, progress: Progress
    ) -> None:
        """Cells that are alive together, in one process each or in several one after the other."""
        if self._baseline in self._measured:  # it starts afresh beside each group
            self._measured[self._baseline].converged = False
            self._spent[self._baseline] = 0.0
        launch, launches = 0, 1
        while launch < launches:
            live = self._start([c for c in group if self._is_open(c) and self._takes_part(c, launch)], progress)
            try:
                if launch == 0:
                    launches = self._schedule(live, pending, left)
                    checked = {0, self._random.randrange(launches)}
                self._rounds(live, launch, launch in checked, progress)
                self._finish(live, left / len(pending))
            finally:
                for one in live:
                    self._leave(one)
            self._process += 1
            launch += 1
            self._look(live, launch, by_process=True)

    def _is_open(self, cell: Cell) -> bool:
        return cell.status is None and not (cell in self._measured and self._measured[cell].converged)

    def _takes_part(self, cell: Cell, launch: int) -> bool:
        return launch == 0 or (cell in self._measured and launch < self._measured[cell].launches)

    def _start(self, group: Sequence[Cell], progress: Progress) -> list[_Live]:
        live = []
        for cell in group:
            progress.cell(cell, "getting ready")
            began = time.monotonic()
            worker = self._idle.pop(cell.plugin, None) or self._server.start(self._memory_limit(cell))
            message = {
                "op": "prepare",
                "workload": cell.workload.as_dict(),
                "target": cell.target,
                "options": cell.options,
                "thorough": cell not in self._measured,
                "l2": self._settings.l2,
                "memory_limit": self._settings.memory,
            }
            facts = self._ask(cell, worker, message)
            if "call_s" not in facts:
                worker.end()
                continue
            took = time.monotonic() - began
            facts["start_s"] = took - facts["checks_s"]
            compiling = max(0.0, facts["first_call_s"] - facts["call_s"])
            self.seconds.compilation += facts["setup_s"] + compiling
            self.seconds.calls += facts["calls_s"] - compiling
            self._costs.learn(cell, facts["call_s"], took - facts["calls_s"] + compiling)
            self._measured.setdefault(cell, Measured(facts))
            live.append(_Live(cell, worker, facts, *burst_size(facts["call_s"])))
        return live

    def _leave(self, one: _Live) -> None:
        """Ends a cell's worker, or lets it wait for its variant's next workload where nothing went wrong in it."""
        if self._settings.reuse and one.cell.status is None:
            with suppress(Closed, Expired):
                if not one.worker.request({"op": "release"}, _RELEASE_SECONDS):
                    self._idle[one.cell.plugin] = one.worker
                    return
        one.worker.end()

    def _dismiss(self, but: Set[str] = frozenset()) -> None:
        """Ends the waiting workers, but for those of these variants."""
        for plugin in self._idle.keys() - but:
            self._idle.pop(plugin).end()

    def _memory_limit(self, cell: Cell) -> int | None:
        # CUDA maps far more than it uses; there torch's own limit does the work.
        return self._settings.memory if cell.workload.device == "cpu" else None

    def _ask(self, cell: Cell, worker: Worker, message: Message) -> Message:
        """A request within what is left of the cell's time limit; whatever goes wrong becomes the cell's status."""
        spent = self._spent.get(cell, 0.0)
        limit = self._settings.timeout
        kills = machine.oom_kills()
        began = time.monotonic()
        answer: Message = {}
        try:
            answer = worker.request(message, max(0.001, limit - spent))
            if "failed" in answer:
                cell.end(answer["failed"], answer["reason"], answer.get("traceback", ""))
        except Expired:
            worker.end()
            cell.end("timeout", f"no answer within {limit:.0f} s (--timeout)")
        except Closed:
            code = worker.end()
            if code == -9 and machine.oom_kills() > kills:
                cell.end("out-of-memory", "killed by the kernel: the cgroup's memory ran out")
            else:
                last = (worker.output().splitlines() or [""])[-1]
                cell.end("crashed", describe_exit(code) + (f"; last output: {last[:200]}" if last else ""))
        self._spent[cell] = spent + time.monotonic() - began
        return answer

    def _schedule(self, live: Sequence[_Live], pending: Sequence[Cell], left: float) -> int:
        """Now that calls of this workload have been timed: rounds for each of its cells, and processes for all."""
        done = [c for c in self._measured if c not in {one.cell for one in live}]
        rounds = allot([c for c in pending if c not in done], self._costs, left, ready=[one.cell for one in live])
        for one in live:
            time_left = self._settings.timeout - self._spent[one.cell]
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

    def _shares(self, one: _Live, base: _Live | None, others: int) -> tuple[float, float]:
        """Seconds that all rounds of a cell take, and one start of it, with its share of the baseline's."""
        rounds_s, start_s = self._costs.round(one.cell), float(one.facts["start_s"])
        if base and base is not one:
            rounds_s += self._costs.round(base.cell) / others
            start_s += base.facts["start_s"] / others
        return self._measured[one.cell].planned * rounds_s, start_s

    def _rounds(self, live: Sequence[_Live], launch: int, check: bool, progress: Progress) -> None:
        costs = {one.cell: self._costs.round(one.cell) for one in live}
        planned = {one.cell: self._measured[one.cell].schedule.rounds for one in live}
        if others := [rounds for cell, rounds in planned.items() if cell is not self._baseline]:
            planned |= {one.cell: max(others) for one in live if one.cell is self._baseline}
        longest = max(planned.values(), default=0)
        allotted = sum(planned[one.cell] * costs[one.cell] for one in live)
        began = time.monotonic()
        # The checked round is drawn, so that no plugin can tell which of its answers will be looked at.
        checked = {cell: self._random.randrange(max(1, min(n, MIN_ROUNDS))) for cell, n in planned.items()}
        for turn in range(MOST_ROUNDS):
            # Cells planned for the most rounds go on where the time allotted to the workload is not used up.
            taking_part = [
                one
                for one in live
                if self._is_open(one.cell)
                and (turn < (n := planned[one.cell]) or n == longest)
                and self._spent[one.cell] + 2 * costs[one.cell] < self._settings.timeout
            ]
            spent, next_round = time.monotonic() - began, sum(costs[one.cell] for one in taking_part)
            if not taking_part or (turn >= longest and spent + next_round > allotted):
                break
            if turn >= _LEAST_ROUNDS and spent > max(1.0, _OVERRUN * allotted):
                break
            self._random.shuffle(taking_part)
            for one in taking_part:
                progress.cell(one.cell, f"round {turn + 1} of {planned[one.cell]}")
                self._burst(one, turn, check=check and checked[one.cell] == turn)
            if launch == 0:
                self._look(live, turn + 1, by_process=False)
        if launch == 0:
            for one in live:
                self._keep_a_sample(one)

    def _keep_a_sample(self, one: _Live) -> None:
        """The last call before the rounds counts where a cell, or a baseline beside it, is too dear for a round."""
        measured = self._measured[one.cell]
        if one.cell.status is None and all(sample[0] != self._process for sample in measured.samples):
            measured.samples.append([self._process, 0, one.facts["call_start"], 1, one.facts["call_s"]])

    def _burst(self, one: _Live, turn: int, check: bool) -> None:
        message = {"op": "burst", "calls": one.calls, "head": one.head, "turn": turn, "check": check}
        answer = self._ask(one.cell, one.worker, message)
        if "seconds" in answer:
            self.seconds.calls += answer["calls_s"]
            sample = [self._process, turn, answer["start"], one.calls, answer["seconds"]]
            self._measured[one.cell].samples.append(sample)
            if "wall_s" in answer:
                one.wall_s.append(answer["wall_s"])

    def _look(self, live: Sequence[_Live], done: int, by_process: bool) -> None:
        """At a look fixed beforehand, cells that are precise enough leave; the baseline stays with the last of them."""
        others = [one.cell for one in live if one.cell is not self._baseline and one.cell.status is None]
        for cell in others or [one.cell for one in live if one.cell.status is None]:
            measured = self._measured[cell]
            if by_process == (measured.launches > 1) and done in measured.schedule.looks:
                confidence = measured.schedule.confidence(early=True)
                if self._is_precise(*self._intervals(cell, confidence)):
                    measured.converged, measured.confidence = True, confidence
        if others and self._baseline in self._measured:
            base, beside = self._measured[self._baseline], [self._measured[cell] for cell in others]
            base.converged = all(measured.converged for measured in beside)
            if base.converged:
                base.confidence = max(measured.confidence for measured in beside)

    def _is_precise(self, latency: Interval, speedup: Interval | None) -> bool:
        widths = [found.half_width for found in (latency, speedup) if found]
        return all(w is not None and w <= self._settings.precision for w in widths)

    def _intervals(self, cell: Cell, confidence: float) -> tuple[Interval, Interval | None]:
        """Of a call's seconds, and of the speedup where there is one.

        The speedup is paired: the baseline's seconds over this cell's, for each round in which both took part.
        """
        ours = self._measured[cell].seconds
        latency = _interval(ours, confidence)
        base = self._baseline
        if cell is base:
            return latency, Interval(1.0, 1.0, 1.0)
        if base is None or base.status is not None or base not in self._measured:
            return latency, None
        theirs = self._measured[base].seconds
        ratios = {key: theirs[key] / ours[key] for key in ours if key in theirs}
        return latency, _interval(ratios, confidence) if ratios else None

    def _finish(self, live: Sequence[_Live], each_s: float) -> None:
        """each_s: what is left of the budget for each cell, of which what a call's energy takes is a small part."""
        energy_s = _ENERGY_SECONDS if _ENERGY_SHARE * each_s > _ENERGY_SECONDS else 0.0
        for one in live:
            if one.cell.status is None:
                answer = self._ask(one.cell, one.worker, {"op": "finish", "energy_s": energy_s})
                facts = self._measured[one.cell].facts
                # A leak shows in every process; what the allocator happens to keep, in some.
                leak = min(answer.get("leak_bytes", 0.0), facts.get("leak_bytes", float("inf")))
                facts |= answer | {"leak_bytes": leak}
                if one.wall_s:
                    facts["wall_s"] = statistics.median(one.wall_s)

    def _row(self, cell: Cell) -> Row:
        w, measured = cell.workload, self._measured.get(cell)
        row: Row = {
            "plugin": cell.plugin,
            "variant": cell.variant,
            "family": cell.family,
            "distribution": cell.distribution,
            "baseline": self._settings.baseline,
            **w.as_dict(),
            "l2": self._settings.l2 if w.device == "cuda" else "",
            "flops": flops(w),
            "variant_flops": cell.flops or None,
            "predicted_workspace_bytes": cell.workspace,
            "warnings": [],
            "samples": [],
        }
        if measured:
            row |= {name: value for name, value in measured.facts.items() if name not in _NOT_COLUMNS}
        if cell.status is None and not (measured and measured.samples):
            cell.end("error", "no block of it was timed")
        figures = self._figures(cell) if cell.status is None else {}
        if reason := impossible(row | figures, self._settings.ceilings):
            cell.end("wrong", reason)
            figures = {"samples": figures["samples"]}
        return row | figures | {"status": cell.status or "ok", "reason": cell.reason, "traceback": cell.traceback}

    def _figures(self, cell: Cell) -> Row:
        measured = self._measured[cell]
        latency, speedup = self._intervals(cell, measured.confidence)
        rounds, precise = len(measured.samples), self._is_precise(latency, speedup)
        speedup = speedup or Interval(float("nan"), None, None)
        kinds = doubts.of_samples(measured.samples, self._settings.precision, precise)
        number = len({sample[0] for sample in measured.samples})
        if number < MIN_PROCESSES and rounds >= MIN_ROUNDS:
            kinds.append("one-process")
        if measured.facts.get("leak_bytes", 0.0) > _LEAK_BYTES:
            kinds.append("memory-leak")
        kinds += doubts.of_gpu(measured.facts, latency.median)
        return {
            "latency_s": latency.median,
            "latency_low_s": latency.low,
            "latency_high_s": latency.high,
            "rounds": rounds,
            "processes": number,
            "confidence": measured.confidence,
            "converged": precise,
            "speedup": speedup.median,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
            "flops_per_s": flops(cell.workload) / latency.median,
            "warnings": kinds,
            "samples": measured.samples,
        }


def _interval(values: Mapping[tuple[float, float], float], confidence: float) -> Interval:
    """Of values by (process, round)."""
    return interval(list(values.values()), [process for process, _ in values], confidence)


class _Rows(list[Row]):
    def append(self, rows: Sequence[Row]) -> None:  # type: ignore[override]
        self.extend(rows)


class Unwatched:
    """Nobody watches."""

    def cell(self, cell: Cell, doing: str) -> None: ...

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None: ...


def measure(server: Forkserver, settings: Settings, cells: Sequence[Cell]) -> list[Row]:
    """The rows of all cells, kept in memory, with nobody watching."""
    rows = _Rows()
    Session(server, settings).run(cells, rows, Unwatched())
    return list(rows)
