"""What will be measured, what it is predicted to cost, and how many rounds each cell gets of the budget.

Nothing here runs a variant: plugins answer in worker processes, and costs are predicted from cells already measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, sqrt
from typing import Any

from attnbench import theory
from attnbench.bench.blocks import BLOCK_SECONDS, HEAD_SECONDS
from attnbench.bench.channel import Closed, Expired, Message
from attnbench.bench.forkserver import Forkserver
from attnbench.bench.interval import CONFIDENCE, MIN_PROCESSES, MIN_ROUNDS
from attnbench.errors import AttnbenchError
from attnbench.registry import Request
from attnbench.workload import Workload

# What cells too dear for MIN_ROUNDS get: a median without an interval, or else the one call that measured their memory.
FEW_ROUNDS = (3, 0)
MOST_ROUNDS = 200
MOST_PROCESSES = 20
LOOKS = (12, 25, 50, 100)  # rounds after which a cell may stop early
PROCESS_LOOKS = (5, 10)

_BUDGET_SHARE = 1 / 4  # no single cell may take more of the budget
_PROCESS_SHARE = 1 / 3  # of the time for rounds, what starting further processes may take
_PROCESS_ROUNDS = 2  # the fewest in each of several processes
_EARLY_ERROR = 0.2  # of what intervals may miss, the share of all early looks together
_CHEAP = 1e-3  # of the time left: a round that costs less is not worth saving
# Of a worker beside its tensors, on the device: resident on a CPU, context and kernels on a GPU.
_WORKER_BYTES = {"cpu": 200 << 20, "cuda": 600 << 20}
_START_SECONDS = 0.4  # to start a worker, load its plugin and compute the reference
_WARM_UP_SECONDS = 0.1  # of short calls
_DESCRIBE_SECONDS = 60.0
_GUESSED_FLOPS_PER_S = {"cpu": 5e10, "cuda": 5e13}  # only until a first cell has been measured


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
        """Inputs thrice (two sets to rotate and the buffers that calls see) and two outputs."""
        return 3 * theory.input_bytes(self.workload) + 2 * theory.output_bytes(self.workload)

    @property
    def predicted_bytes(self) -> int | None:
        return None if self.workspace is None else self.tensor_bytes + self.workspace


def ask(server: Forkserver, request: Request, workloads: Sequence[Workload], memory: int | None = None) -> Message:
    """What a plugin says of itself and of each workload; a `failed` message if it can't even be asked."""
    found = request.found
    if found.problem:
        return {"failed": "error", "reason": found.problem}
    worker = server.start(memory)
    try:
        message = {"op": "describe", **request.as_dict(), "workloads": [w.as_dict() for w in workloads]}
        return worker.request(message, _DESCRIBE_SECONDS)
    except Expired:
        return {"failed": "timeout", "reason": f"at import: no answer within {_DESCRIBE_SECONDS:.0f} s"}
    except Closed:
        return {"failed": "crashed", "reason": f"at import: {describe_exit(worker.end())}"}
    finally:
        worker.end()


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    import signal

    if code is None:
        return "the process is gone"
    if code >= 0:
        return f"exit code {code} without a result"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def cells_of(request: Request, answer: Message, workloads: Sequence[Workload]) -> Iterator[Cell]:
    """The cells that a request stands for, by what its plugin answered.

    Raises:
        AttnbenchError: the request has an option or value that the plugin doesn't know.
    """
    found = request.found
    if answer.get("failed") == "usage":
        raise AttnbenchError(f"--plugins {found.name}: {answer['reason']}")
    if "failed" in answer:
        name = ":".join([found.name, *(f"{k}={v}" for k, v in request.options), *(["*"] if request.every else [])])
        for workload in workloads:
            cell = Cell(name, found.name, found.origin, found.target, workload)
            cell.end(answer["failed"], answer["reason"], answer.get("traceback", ""))
            yield cell
        return
    for instance in answer["instances"]:
        for workload, says in zip(workloads, instance["answers"], strict=True):
            cell = Cell(
                plugin=instance["plugin"],
                variant=found.name,
                distribution=found.origin,
                target=found.target,
                workload=workload,
                family=answer["family"],
                options=instance["options"],
                workspace=says.get("workspace"),
                flops=says.get("flops", 0),
            )
            if "unsupported" in says:
                cell.end("unsupported", says["unsupported"])
            yield cell


class Costs:
    """Predicts seconds from what was measured before, by the ratio of the variant's own operations."""

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
        self._fixed: dict[tuple[Any, ...], float] = {}

    def learn(self, cell: Cell, call_s: float, fixed_s: float) -> None:
        """fixed_s: seconds to make the cell ready beside the calls that this took."""
        self._calls.setdefault(self._like(cell), []).append((cell.flops, call_s))
        self._fixed[self._like(cell)] = fixed_s

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._calls)

    def call(self, cell: Cell) -> float:
        """Seconds of one call. Where none like it was measured, at the rate of the plugin's others, or of anyone's."""
        known = (
            self._calls.get(self._like(cell))
            or [k for like, calls in self._calls.items() if like[0] == cell.plugin for k in calls]
            or [k for calls in self._calls.values() for k in calls]
            or [(1, 1 / _GUESSED_FLOPS_PER_S[cell.workload.device])]
        )
        flops, seconds = min(known, key=lambda k: abs(k[0] - cell.flops))
        return seconds * cell.flops / max(1, flops)

    def round(self, cell: Cell) -> float:
        """Seconds of one round: a block of calls and, where calls are short, an untimed one."""
        call = self.call(cell)
        return max(call, BLOCK_SECONDS) + (call if call < HEAD_SECONDS else 0)

    def ready(self, cell: Cell) -> float:
        """Seconds until the first round, by when the cell has a number: a first call, and one that measures memory.

        What a block is judged by, or what training saves, takes a further call each.
        """
        calls = 2 + (cell.workload.scope == "block") + (cell.workload.phase == "train")
        return self._fixed.get(self._like(cell), _START_SECONDS) + calls * self.call(cell) + _WARM_UP_SECONDS

    @staticmethod
    def _like(cell: Cell) -> tuple[Any, ...]:
        w = cell.workload
        return cell.plugin, w.scope, w.block, w.dtype, w.mask, w.device, w.phase


def skip_too_large(cells: Iterable[Cell], memory: int) -> None:
    """Ends cells whose predicted memory is over the limit."""
    for cell in cells:
        need = cell.predicted_bytes
        if cell.status is None and need is not None and need > memory:
            cell.end(
                "skipped",
                f"predicted memory {need / 2**30:.1f} GiB is over the limit of {memory / 2**30:.1f} GiB (--memory)",
            )


def skip_too_dear(cells: Iterable[Cell], pending: Sequence[Cell], costs: Costs, budget: float, left: float) -> None:
    """Ends those of `cells` of which even one number costs too much: over a quarter of the budget, or over their share.

    pending: all cells still to come, these among them. Where fewer than four share the budget, each may take its part.
    """
    share = max(_BUDGET_SHARE, 1 / max(1, sum(c.status is None for c in pending)))
    within = set(affordable(pending, costs, left))
    total = budget - left + sum(costs.ready(c) for c in pending if c.status is None)
    for cell in cells:
        if cell.status is not None:
            continue
        need = costs.ready(cell)
        each = f"{need:.2g} s predicted at {costs.call(cell):.2g} s a call"
        if need > budget * share:
            why = f"over {share:.0%} of the budget of {budget:.0f} s; --budget {_tens(need / share)} would do"
            cell.end("skipped", f"{each} is {why}")
        elif cell not in within:
            why = f"more than the cheaper cells leave of the budget of {budget:.0f} s; --budget {_tens(total)} would do"
            cell.end("skipped", f"{each} is {why}")


def _tens(seconds: float) -> int:
    return ceil(seconds / 10) * 10


def affordable(cells: Sequence[Cell], costs: Costs, seconds: float, ready: Sequence[Cell] = ()) -> list[Cell]:
    """The open cells, without the dearest where the least that each needs is too much for `seconds` together.

    So what is left out is left out for its own cost, wherever in the sweep it stands. Cells that are `ready` have paid.
    """
    need = {c: 0.0 if c in ready else costs.ready(c) for c in cells if c.status is None}
    totals = accumulate(sorted(need.values()))
    most = sum(total <= seconds for total in totals)  # cells
    kept = set(sorted(need, key=need.__getitem__)[:most])
    return [c for c in need if c in kept or c in ready]


def allot(cells: Sequence[Cell], costs: Costs, seconds: float, ready: Sequence[Cell] = ()) -> dict[Cell, int]:
    """Rounds for each cell, so that all together take about `seconds`; none for those that are not `affordable`.

    Every cell first gets the rounds that an interval needs; where that is too much, the dearest get fewer. What is
    left is spread so that rounds go with 1 / sqrt(cost), which makes the summed variance least (Neyman 1934).
    Cells that are `ready` have paid for that already.
    """
    open_cells = affordable(cells, costs, seconds, ready)
    each = [costs.round(c) for c in open_cells]
    rounds = [MIN_ROUNDS] * len(each)
    left = seconds - sum(costs.ready(c) for c in open_cells if c not in ready) - sum(MIN_ROUNDS * c for c in each)
    for fewer in FEW_ROUNDS:
        for i in sorted(range(len(each)), key=lambda i: -each[i]):
            if left >= 0 or each[i] < _CHEAP * seconds:
                break
            left += (rounds[i] - fewer) * each[i]
            rounds[i] = fewer
    if left > 0 and each:
        rounds = _spread(each, rounds, left + sum(n * c for n, c in zip(rounds, each, strict=True)))
    return dict(zip(open_cells, rounds, strict=True))


def _spread(each: Sequence[float], least: Sequence[int], seconds: float) -> list[int]:
    def at(share: float) -> list[int]:
        return [min(MOST_ROUNDS, max(n, int(share / sqrt(c)))) for n, c in zip(least, each, strict=True)]

    low, high = 0.0, MOST_ROUNDS * sqrt(max(each))
    for _ in range(50):
        middle = (low + high) / 2
        fits = sum(n * c for n, c in zip(at(middle), each, strict=True)) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


@dataclass(frozen=True)
class Schedule:
    """How one cell's rounds are spread and when it may stop early; fixed before its first round.

    Stopping when an interval looks good makes it lie, unless the looks are few, fixed, and share the error among
    them (Bonferroni). The early ones share little of it, so that a cell that stops at none loses little.
    """

    rounds: int
    """In each process."""
    looks: tuple[int, ...]
    """After so many rounds, or processes where there are several, a cell that is precise enough stops."""

    def confidence(self, early: bool) -> float:
        """Of the interval that is reported: taken at an early look, or at the end."""
        missed = 1 - CONFIDENCE
        if early:
            return 1 - _EARLY_ERROR * missed / len(self.looks)
        return 1 - (1 - _EARLY_ERROR) * missed if self.looks else CONFIDENCE


def schedule(rounds: int, processes: int) -> Schedule:
    """The schedule for `rounds` rounds in all, in so many processes."""
    if processes == 1:
        return Schedule(rounds, tuple(n for n in LOOKS if n < rounds))
    looks = tuple(n for n in PROCESS_LOOKS if 2 * n <= processes)  # a look shortly before the end is worth nothing
    return Schedule(max(_PROCESS_ROUNDS, rounds // processes), looks)


def processes(rounds: int, rounds_s: float, start_s: float) -> int:
    """In how many processes, one after the other, a variant is measured.

    rounds: how many it gets. rounds_s: seconds for all of them, with the baseline's. start_s: seconds to start it and
    the baseline once more.

    Several, where starting them takes a third of the time at most and each gets a few rounds; fewer than make an
    interval by process would only cost time, so it is one then.
    """
    affordable = min(int(rounds_s * _PROCESS_SHARE / start_s), rounds // _PROCESS_ROUNDS, MOST_PROCESSES)
    return affordable if affordable >= MIN_PROCESSES else 1


def groups(cells: Sequence[Cell], baseline: Cell | None, memory: int) -> list[list[Cell]]:
    """Cells that are alive together: resident bytes of all and the largest workspace fit; each with the baseline.

    A cell joins the first group that has room for it: the baseline is measured once more in each.
    """
    result: list[list[Cell]] = []
    for cell in cells:
        if cell is baseline:
            continue
        room = next((group for group in result if _bytes_together([*group, cell]) <= memory), None)
        if room is not None:
            room.append(cell)
        else:
            result.append([baseline, cell] if baseline else [cell])
    return result or ([[baseline]] if baseline else [])


def _bytes_together(cells: Sequence[Cell]) -> int:
    return sum(_WORKER_BYTES[c.workload.device] + c.tensor_bytes for c in cells) + max(c.workspace or 0 for c in cells)
