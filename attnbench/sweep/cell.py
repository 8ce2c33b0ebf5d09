"""One plugin on one workload, and what is known of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from attnbench.stats.intervals import CONFIDENCE
from attnbench.sweep.stopping import Schedule, schedule
from attnbench.theory import costs
from attnbench.workers.messages import Columns
from attnbench.workload import Workload


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

    def end(self, status: str, reason: str, traceback: str = "") -> None:
        self.status, self.reason, self.traceback = status, reason, traceback

    @property
    def tensor_bytes(self) -> int:
        """Inputs twice (the values, and what calls see of them) and two outputs."""
        return 2 * costs.input_bytes(self.workload) + 2 * costs.output_bytes(self.workload)

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
    planned: int = 0
    """Rounds, in all processes together."""
    launches: int = 1
    """Processes, one after the other."""
    schedule: Schedule = field(default_factory=lambda: Schedule(1, ()))
    confidence: float = CONFIDENCE
    """Of its intervals: the end's, or that of the early look at which it left."""
    converged: bool = False
    """Whether it left at an early look."""
    samples: list[list[float]] = field(default_factory=list)  # as records.SAMPLE

    def plan(self, rounds: int, launches: int) -> None:
        """Fixes, before its first round, in how many rounds and launches it is measured, and when it is looked at."""
        self.launches, self.schedule = launches, schedule(rounds, launches)
        self.confidence = self.schedule.confidence(early=False)

    @property
    def seconds(self) -> dict[tuple[float, float], float]:
        """Seconds a call by (process, round)."""
        return {(s[0], s[1]): s[4] / s[3] for s in self.samples}
