"""Decides when: runs the workers of one workload in rounds, one block of each in turn, and makes rows of it.

Drift of a shared machine hits the blocks of one round alike, so speedups are paired by round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from attnbench import theory
from attnbench.bench import machine
from attnbench.bench.blocks import block_size
from attnbench.bench.channel import Closed, Expired, Message
from attnbench.bench.forkserver import Forkserver, Worker
from attnbench.bench.interval import MIN_ROUNDS, Interval, median_interval
from attnbench.bench.plan import (
    FEW_ROUNDS,
    MOST_ROUNDS,
    Cell,
    Costs,
    allot,
    describe_exit,
    groups,
    looks,
    skip_too_dear,
    skip_too_large,
)
from attnbench.records import Row

_LEAK_BYTES = 1 << 20  # a call that keeps more than this is worth a warning
_OVERRUN = 1.5  # a workload whose rounds take this many times what was allotted stops


@dataclass(frozen=True)
class Settings:
    """How to measure; what is measured stands in the cells.

    baseline: canonical name of the plugin that speedups refer to; "" for none.
    precision: relative half-width at which an interval counts as converged.
    budget, timeout: seconds for the whole sweep, and for one cell.
    memory: bytes that may be in use at a time.
    """

    baseline: str
    precision: float
    budget: float
    timeout: float
    memory: int
    seed: int = 0


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
    planned: int = 0
    ended: bool = False
    samples: list[list[float]] = field(default_factory=list)  # as records.SAMPLE


class Session:
    """Measures cells, workload by workload."""

    def __init__(self, server: Forkserver, settings: Settings) -> None:
        self._server, self._settings = server, settings
        self._costs = Costs()
        self._random = random.Random(settings.seed)
        self._spent: dict[Cell, float] = {}
        self.seconds = Seconds()

    def run(self, cells: Sequence[Cell], sink: Sink, progress: Progress) -> None:
        """Measures all cells and hands the rows of each workload to `sink` as soon as it is done."""
        deadline = time.monotonic() + self._settings.budget
        skip_too_large(cells, self._settings.memory)
        workloads = [list(group) for _, group in groupby(cells, key=lambda c: c.workload)]
        for i, together in enumerate(workloads):
            left = max(0.0, deadline - time.monotonic())
            pending = [cell for later in workloads[i:] for cell in later]
            skip_too_dear(pending, self._costs, self._settings.budget, left)
            rows = self._measure(together, pending, deadline, progress)
            sink.append(rows)
            progress.rows(rows, max(0.0, deadline - time.monotonic()))

    def _measure(
        self, cells: Sequence[Cell], pending: Sequence[Cell], deadline: float, progress: Progress
    ) -> list[Row]:
        """One workload: its groups one after the other, then a row for each cell."""
        open_cells = [c for c in cells if c.status is None]
        baseline = next((c for c in open_cells if c.plugin == self._settings.baseline), None)
        measured: dict[str, _Live] = {}
        base_samples: dict[tuple[float, float], float] = {}
        for process, group in enumerate(groups(open_cells, baseline, self._settings.memory)):
            if process and baseline and baseline.status is not None:
                group = [c for c in group if c is not baseline]
            live = self._start(group, process, progress)
            try:
                self._plan_rounds(live, pending, deadline)
                self._rounds(live, process, baseline, progress)
                self._finish(live)
            finally:
                for one in live:
                    one.worker.end()
            for one in live:
                if one.cell is baseline and process:
                    measured[one.cell.plugin].samples += one.samples
                else:
                    measured[one.cell.plugin] = one
                if one.cell is baseline:
                    base_samples |= {(s[0], s[1]): s[4] / s[3] for s in one.samples}
        if baseline and baseline.status is not None:
            base_samples = {}
        return [self._row(cell, measured.get(cell.plugin), base_samples) for cell in cells]

    def _start(self, group: Sequence[Cell], process: int, progress: Progress) -> list[_Live]:
        live = []
        for cell in group:
            progress.cell(cell, "getting ready")
            began = time.monotonic()
            worker = self._server.start(self._memory_limit(cell))
            facts = self._ask(
                cell,
                worker,
                {
                    "op": "prepare",
                    "workload": cell.workload.as_dict(),
                    "target": cell.target,
                    "options": cell.options,
                    "thorough": process == 0 or cell.plugin != self._settings.baseline,
                },
            )
            if "call_s" not in facts:
                worker.end()
                continue
            compiling = facts["setup_s"] + max(0.0, facts["first_call_s"] - facts["call_s"])
            calls = facts["calls_s"] - max(0.0, facts["first_call_s"] - facts["call_s"])
            self.seconds.compilation += compiling
            self.seconds.calls += calls
            self._costs.learn(cell, facts["call_s"], time.monotonic() - began - calls)
            live.append(_Live(cell, worker, facts, *block_size(facts["call_s"])))
        return live

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

    def _plan_rounds(self, live: Sequence[_Live], pending: Sequence[Cell], deadline: float) -> None:
        """Now that calls of this workload have been timed: how many rounds each of them gets of the time left."""
        left = max(0.0, deadline - time.monotonic())
        rounds = allot(pending, self._costs, left, ready=[one.cell for one in live])
        for one in live:
            time_left = self._settings.timeout - self._spent[one.cell]
            within = int(0.8 * time_left / self._costs.round(one.cell))
            one.planned = max(1, min(within, rounds.get(one.cell, 1)))
        # The baseline takes part in every round, or the others would have nothing to be paired with.
        for one in live:
            if one.cell.plugin == self._settings.baseline:
                one.planned = max(o.planned for o in live)

    def _rounds(self, live: Sequence[_Live], process: int, baseline: Cell | None, progress: Progress) -> None:
        costs = {id(one): self._costs.round(one.cell) for one in live}
        began = time.monotonic()
        allotted = sum(one.planned * costs[id(one)] for one in live)
        longest = max((one.planned for one in live), default=0)
        # The checked round is drawn, so that no plugin can tell which of its answers will be looked at.
        checked = {id(one): self._random.randrange(min(one.planned, MIN_ROUNDS)) for one in live}
        for turn in range(MOST_ROUNDS):
            # Cells planned for the most rounds go on where the time allotted to the workload is not used up.
            taking_part = [
                o for o in live if o.cell.status is None and not o.ended and (turn < o.planned or o.planned == longest)
            ]
            spent, next_round = time.monotonic() - began, sum(costs[id(o)] for o in taking_part)
            if not taking_part or (turn >= longest and spent + next_round > allotted):
                break
            if len(live) > 1 and turn >= MIN_ROUNDS and all(o.cell is baseline for o in taking_part):
                break
            if turn >= FEW_ROUNDS and spent > max(1.0, _OVERRUN * allotted):
                break
            self._random.shuffle(taking_part)
            for one in taking_part:
                progress.cell(one.cell, f"round {turn + 1} of {one.planned}")
                self._block(one, process, turn, check=checked[id(one)] == turn)
            self._stop_converged(live, baseline, turn + 1)

    def _block(self, one: _Live, process: int, turn: int, check: bool) -> None:
        message = {"op": "block", "calls": one.calls, "head": one.head, "turn": turn, "check": check}
        answer = self._ask(one.cell, one.worker, message)
        if "seconds" in answer:
            self.seconds.calls += answer["calls_s"]
            one.samples.append([process, turn, answer["start"], one.calls, answer["seconds"]])

    def _stop_converged(self, live: Sequence[_Live], baseline: Cell | None, done: int) -> None:
        """At a look fixed beforehand, cells that are precise enough leave; the baseline stays with the last of them."""
        base = next((o for o in live if o.cell is baseline), None)
        for one in live:
            at, confidence = looks(one.planned)
            if one is base or one.ended or done not in at[:-1]:
                continue
            pairs = _ratios(one.samples, _per_call(base.samples)) if base else None
            one.ended = self._converged(one.samples, pairs, confidence)
        if base and all(o.ended or o.cell.status for o in live if o is not base):
            base.ended = len(live) > 1

    def _converged(self, samples: list[list[float]], ratios: list[float] | None, confidence: float) -> bool:
        widths = [median_interval([s[4] / s[3] for s in samples], confidence).half_width]
        if ratios is not None:
            widths.append(median_interval(ratios, confidence).half_width)
        return all(w is not None and w <= self._settings.precision for w in widths)

    def _finish(self, live: Sequence[_Live]) -> None:
        for one in live:
            if one.cell.status is None:
                answer = self._ask(one.cell, one.worker, {"op": "leak"})
                one.facts["leak_bytes"] = answer.get("leak_bytes", 0.0)

    def _row(self, cell: Cell, one: _Live | None, base: dict[tuple[float, float], float]) -> Row:
        w = cell.workload
        row: Row = {
            "plugin": cell.plugin,
            "variant": cell.variant,
            "family": cell.family,
            "distribution": cell.distribution,
            "baseline": self._settings.baseline,
            **w.as_dict(),
            "flops": theory.flops(w),
            "variant_flops": cell.flops or None,
            "predicted_workspace_bytes": cell.workspace,
            "warnings": [],
            "samples": [],
        }
        facts = one.facts if one else {}
        row |= {name: value for name, value in facts.items() if name not in ("call_s", "calls_s", "leak_bytes")}
        if cell.status is None and (one is None or not one.samples):
            cell.end("error", "no block of it was timed")
        row["status"] = cell.status or "ok"
        row["reason"], row["traceback"] = cell.reason, cell.traceback
        if cell.status is None and one is not None:
            row |= self._figures(cell, one, base)
        return row

    def _figures(self, cell: Cell, one: _Live, base: dict[tuple[float, float], float]) -> Row:
        times = [s[4] / s[3] for s in one.samples]
        _, confidence = looks(one.planned)
        latency = median_interval(times, confidence)
        is_baseline = cell.plugin == self._settings.baseline
        ratios = None if is_baseline or not base else _ratios(one.samples, base)
        speedup = median_interval(ratios, confidence) if ratios else Interval(float("nan"), None, None)
        if is_baseline:
            speedup = Interval(1.0, 1.0, 1.0)
        warnings = []
        if one.facts.get("leak_bytes", 0.0) > _LEAK_BYTES:
            warnings.append("memory-leak")
        if len(times) < MIN_ROUNDS:
            warnings.append("few-rounds")
        converged = self._converged(one.samples, ratios, confidence)
        if len(times) >= MIN_ROUNDS and not converged:
            warnings.append("imprecise")
        return {
            "latency_s": latency.median,
            "latency_low_s": latency.low,
            "latency_high_s": latency.high,
            "rounds": len(times),
            "processes": len({s[0] for s in one.samples}),
            "confidence": confidence,
            "converged": converged,
            "speedup": speedup.median,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
            "flops_per_s": theory.flops(cell.workload) / latency.median,
            "warnings": warnings,
            "samples": one.samples,
        }


def _per_call(samples: list[list[float]]) -> dict[tuple[float, float], float]:
    return {(s[0], s[1]): s[4] / s[3] for s in samples}


def _ratios(samples: list[list[float]], base: dict[tuple[float, float], float]) -> list[float]:
    """Baseline's seconds over this variant's, for each round in which both took part."""
    return [base[s[0], s[1]] / (s[4] / s[3]) for s in samples if (s[0], s[1]) in base]
