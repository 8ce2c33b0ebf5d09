"""What a cell will cost, predicted from those already measured."""

from __future__ import annotations

from typing import Any

from attnbench.devices.bursts import burst_size
from attnbench.devices.device import of
from attnbench.sweep.cell import Cell

_START_SECONDS = 0.4  # to start a worker, load its plugin and compute the reference
_WARM_UP_SECONDS = 0.1  # of short calls
_ROUND_SECONDS = 4e-3  # to give a burst's calls their values, to look at what came out, and at the machine
_LIMIT_SHARE = 0.8  # of what is left of a time limit, what may be planned for: calls may take longer than predicted
_LOOKS = 1.05  # times a burst's calls, with the looks in passing


class Costs:
    """Predicts seconds from what was measured before, by the ratio of the variant's own operations."""

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
        self._fixed: dict[tuple[Any, ...], float] = {}
        self._starts: dict[Cell, float] = {}

    def learn(self, cell: Cell, call_s: float, fixed_s: float, start_s: float) -> None:
        """fixed_s: seconds to make the cell ready beside the calls that this took; start_s: to start it once more."""
        self._calls.setdefault(self._like(cell), []).append((cell.flops, call_s))
        self._fixed[self._like(cell)] = fixed_s
        self._starts[cell] = start_s

    def learn_more(self, cell: Cell, fixed_s: float) -> None:
        """Seconds more that its like take to get a number, as they are judged."""
        self._fixed[self._like(cell)] += fixed_s

    def start(self, cell: Cell) -> float:
        """Seconds to start a cell's process once more."""
        return self._starts.get(cell, _START_SECONDS)

    def call(self, cell: Cell) -> float:
        """Seconds of one call. Where none like it was measured, at the rate of the plugin's others, or of anyone's."""
        known = (
            self._calls.get(self._like(cell))
            or [k for like, calls in self._calls.items() if like[0] == cell.plugin for k in calls]
            or [k for calls in self._calls.values() for k in calls]
            or [(1, 1 / of(cell.workload.device).guessed_flops_per_s)]
        )
        flops, seconds = min(known, key=lambda k: abs(k[0] - cell.flops))
        return seconds * cell.flops / max(1, flops)

    def round(self, cell: Cell) -> float:
        """Seconds of one round: a burst of calls and, where calls are short, an untimed one."""
        call = self.call(cell)
        calls, head = burst_size(call, of(cell.workload.device).burst_s)
        return _LOOKS * (calls + head) * call + _ROUND_SECONDS

    def fitting(self, cell: Cell, seconds: float) -> int:
        """Rounds that may be planned for where so much of the cell's time limit is left."""
        return max(0, int(_LIMIT_SHARE * seconds / self.round(cell)))

    def ready(self, cell: Cell) -> float:
        """Seconds until the first round, by when the cell has a number: a first call, and one that measures memory.

        What a block is judged by, or what training saves, takes a further call each.
        """
        calls = 2 + (cell.workload.scope == "block") + cell.workload.trains
        return self._fixed.get(self._like(cell), _START_SECONDS) + calls * self.call(cell) + _WARM_UP_SECONDS

    @staticmethod
    def _like(cell: Cell) -> tuple[Any, ...]:
        w = cell.workload
        return cell.plugin, w.scope, w.block, w.dtype, w.mask, w.device, w.phase
