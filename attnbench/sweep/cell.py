"""One plugin on one workload, and what is known of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from attnbench.activations import SETS
from attnbench.stats.held_up import by_round, held_up
from attnbench.stats.intervals import CONFIDENCE, MIN_ROUNDS
from attnbench.sweep.meanwhile import Seen
from attnbench.sweep.stopping import Schedule, schedule
from attnbench.theory import costs
from attnbench.workers.messages import Columns
from attnbench.workload import Workload

# What of a burst's time by the session's clock its own must tell of, in most bursts and in one of four: a machine that
# is busy is slow to wake who waits for an answer, but not every time.
_MOST_CLAIMED, _BEST_CLAIMED = 0.5, 0.85
# Seconds that telling it may take: at most, and beside a baseline at least, of which it may take this many times.
_TELLING, _LEAST_TELLING, _LIKE_BASELINE = 2e-3, 6e-4, 2.0
_TELLING_ONCE = 2e-2  # of bursts so few that a machine may have been slow to tell of each
_LEFT_SECONDS, _LEFT_CORES = 0.1, 0.25  # what a process that waits may use: a pool of threads falls asleep


@dataclass
class Spent:
    """Seconds that went by, and those that a process used of all cores meanwhile."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, wall_s: float, cpu_s: float) -> None:
        self.wall_s, self.cpu_s = self.wall_s + wall_s, self.cpu_s + cpu_s

    @property
    def cores(self) -> float:
        return self.cpu_s / self.wall_s if self.wall_s else 0.0


@dataclass(eq=False)
class Cell:
    """One plugin on one workload; ends as exactly one row."""

    plugin: str
    variant: str
    distribution: str
    target: str
    workload: Workload
    family: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    workspace: int | None = None
    """Bytes that the plugin says it will need beside inputs and output."""
    flops: int = 0
    """The variant's own count of operations."""
    status: str | None = None
    """Set once the cell has ended."""
    reason: str = ""
    traceback: str = ""
    path: str = ""
    """Where its plugin is imported from: see `registry.Found`."""
    emulated: bool = False
    """What computes it stands in for something else, as its plugin says: its time tells little."""
    share: float = inf
    """Seconds of the budget that it may take, but for a number in any case: see `plan.bound_emulated`."""

    @property
    def comes_last(self) -> bool:
        """It takes what others leave of the budget, and no more than its share."""
        return self.share < inf

    def end(self, status: str, reason: str, traceback: str = "") -> None:
        self.status, self.reason, self.traceback = status, reason, traceback

    @property
    def tensor_bytes(self) -> int:
        """Inputs twice (the values, and what calls see of them), sets of those of a model, and two outputs."""
        sets = SETS if self.workload.activations else 1
        return 2 * sets * costs.input_bytes(self.workload) + 2 * costs.output_bytes(self.workload)

    @property
    def predicted_bytes(self) -> int | None:
        return None if self.workspace is None else self.tensor_bytes + self.workspace


@dataclass
class Measured:
    """What is known of a cell so far, over all its processes."""

    columns: Columns
    """Figures from the first process, and from the last calls of each."""
    leak_bytes: float = inf
    """The least that a call kept in any process: a leak shows in all, what the allocator happens to keep in some."""
    bursts: list[tuple[float, Seen]] = field(default_factory=list)
    """Seconds of each by the worker's clock, and what the session saw of it."""
    idle: Spent = field(default_factory=Spent)
    """Between bursts."""
    launches: int = 1
    """Processes of the rounds planned last, one after the other."""
    schedule: Schedule = field(default_factory=lambda: Schedule(1, ()))
    confidence: float = CONFIDENCE
    """Of its intervals: the end's, or that of the early look at which it left."""
    converged: bool = False
    """Whether it left the rounds planned last at an early look."""
    samples: list[list[Any]] = field(default_factory=list)  # as records.SAMPLE

    def plan(self, rounds: int, launches: int) -> None:
        """Fixes, before the first of them, in how many launches it is measured for further rounds, and its looks."""
        self.converged = False
        self.launches, self.schedule = launches, schedule(rounds, launches, len(self.samples), self.processes)
        self.confidence = self.schedule.confidence(early=False)

    def contradiction(self, base: Measured | None) -> str | None:
        """What is wrong where the session saw other than the worker says: of time, or of work between its calls.

        base: the baseline's, by which it is known how long it takes to be told; the cell's own, or None without one.
        """
        if self.idle.cpu_s > _LEFT_SECONDS and self.idle.cores > _LEFT_CORES:
            return f"it keeps {self.idle.cores:.1f} cores busy between its calls"
        telling = _TELLING_ONCE
        if len(self.bursts) >= MIN_ROUNDS:
            beside = _LIKE_BASELINE * base.telling_s if base is not None and base is not self else _TELLING
            telling = min(_TELLING, max(_LEAST_TELLING, beside))
        if self.bursts and self._understates(telling):
            claimed = sum(own for own, _ in self.bursts)
            return f"its clock says that bursts took {claimed:.2g} s, the session's {self.used.wall_s:.2g} s"
        return None

    def _understates(self, telling_s: float) -> bool:
        shares = sorted(own / max(own, seen.took_s - telling_s, 1e-9) for own, seen in self.bursts)
        most, best = shares[len(shares) // 2], shares[-1 - len(shares) // 4]
        return most < _MOST_CLAIMED or (len(shares) >= MIN_ROUNDS and best < _BEST_CLAIMED)

    @property
    def processes(self) -> int:
        return len({sample[0] for sample in self.samples})

    @property
    def telling_s(self) -> float:
        """What the session's clock has beyond the worker's in all but a quarter of the bursts."""
        beyond = sorted(seen.took_s - own for own, seen in self.bursts)
        return beyond[len(beyond) // 4] if beyond else _TELLING

    @property
    def used(self) -> Spent:
        """In all bursts."""
        return Spent(sum(seen.took_s for _, seen in self.bursts), sum(seen.cpu_s for _, seen in self.bursts))

    @property
    def seconds(self) -> dict[tuple[float, float], float]:
        """Seconds a call by (process, round)."""
        return by_round(self.samples)

    @property
    def held_up(self) -> set[tuple[float, float]]:
        """The (process, round) of bursts that had to wait for a core."""
        return held_up(self.samples)
