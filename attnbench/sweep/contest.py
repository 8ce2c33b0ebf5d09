"""The cells of one workload, measured side by side, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnbench.sweep.cell import Cell, Measured


@dataclass(eq=False)
class Contest:
    """One workload: cells end one by one; those that have a number may be measured more closely later."""

    cells: Sequence[Cell]
    baseline: Cell | None = None
    """What its speedups refer to; None where there is none that could be started."""
    measured: dict[Cell, Measured] = field(default_factory=dict)
    process: int = 0
    """The number of those that run now in its samples, and (below) of the first round that they have."""
    turn: int = 0

    @property
    def label(self) -> str:
        return self.cells[0].workload.label()

    @property
    def base(self) -> Measured | None:
        """What is known of the baseline, where it did not fail."""
        return self.measured.get(self.baseline) if self.baseline and self.baseline.status is None else None

    @property
    def rivals(self) -> list[Cell]:
        """The measured cells whose precision counts: without the baseline, where there are others."""
        alive = [cell for cell in self.measured if cell.status is None]
        return [cell for cell in alive if cell is not self.baseline] or alive

    def leave(self, same: bool) -> None:
        """Its processes have had their rounds. same: whether these will have the next too."""
        turns = [sample[1] for known in self.measured.values() for sample in known.samples if sample[0] == self.process]
        self.process, self.turn = (self.process, 1 + max(turns, default=-1)) if same else (self.process + 1, 0)

    def is_open(self, cell: Cell) -> bool:
        """Whether it has neither failed nor become precise enough."""
        return cell.status is None and not (cell in self.measured and self.measured[cell].converged)
