"""The worker processes of a sweep: who is alive, and what becomes of a cell whose process fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from attnbench.devices import cgroup, peek
from attnbench.devices.bursts import burst_size
from attnbench.devices.device import of
from attnbench.sweep.cell import Cell
from attnbench.sweep.settings import Settings
from attnbench.workers.about_witness import Given, Placed, Witness, Witnessed
from attnbench.workers.ask import describe_exit
from attnbench.workers.channel import Closed, Expired
from attnbench.workers.kinds import Answer, Request
from attnbench.workers.messages import Failure, Prepare, Prepared, Release, Released
from attnbench.workers.server import Forkserver, Worker

_RELEASE_SECONDS = 10.0  # to free what a workload left

A = TypeVar("A", bound=Answer)


@dataclass
class Live:
    """A cell with a worker that is ready to be timed.

    start_s: seconds that starting it took, without its checks. took_s: with them.
    """

    cell: Cell
    worker: Worker
    ready: Prepared
    took_s: float
    thorough: bool
    values: tuple[int, ...]
    """The numbers that its values are drawn from now, and altered by; `places` where calls were given theirs last."""
    places: int
    judged: bool
    """Whether what it puts out was judged in whole, in this process or one before."""
    there: bytes | None = None
    """What lay where it says its output does, as soon as the burst that is checked had ended; None: nobody looked."""
    wall_s: list[float] = field(default_factory=list)
    used_s: float = 0.0
    """CPU seconds of its process when it was last left, and (below) when that was."""
    left_at: float = 0.0

    @property
    def start_s(self) -> float:
        return self.took_s - self.ready.checks_s

    @property
    def burst(self) -> tuple[int, int]:
        """Calls of a burst, and untimed ones before it."""
        return burst_size(self.ready.call_s, of(self.cell.workload.device).burst_s)


class Crew:
    """Starts, asks and ends the workers, each within its cell's time limit."""

    def __init__(self, server: Forkserver, settings: Settings) -> None:
        self._server, self._settings = server, settings
        self._idle: dict[str, Worker] = {}
        self._witness: Worker | None = None
        self._peeks: bool | None = None
        self.spent: dict[Cell, float] = {}
        """Seconds of each cell's time limit."""

    def start(self, cell: Cell, thorough: bool, number: int, show: bool = False, probe: bool = False) -> Live | None:
        """A worker that is ready for a cell; None where the cell has ended instead. The others: see `Prepare`."""
        began = time.monotonic()
        limit = self._settings.memory if of(cell.workload.device).limits_process else None
        worker = self._idle.pop(cell.plugin, None) or self._server.start(limit, cell.path)
        if self._peeks is None:  # before a plugin is there, which may forbid it
            self._peeks = peek.can_peek(worker.pid)
        settings = self._settings
        asked = Prepare(
            cell.workload, cell.target, cell.options, thorough, number, show, probe, settings.l2, settings.memory
        )
        ready = self.ask(cell, worker, asked)
        if ready is None:
            worker.end()
            return None
        if ready.compiles:
            self._server.preload()
        if ready.flaw:
            cell.end("wrong", ready.flaw)
        values = (number, number + 1) if thorough else (number,)
        return Live(cell, worker, ready, time.monotonic() - began, thorough, values, number, not thorough)

    def ask(self, cell: Cell, worker: Worker, request: Request[A]) -> A | None:
        """The answer, within what is left of the cell's time limit; what goes wrong instead is the cell's status."""
        spent, limit = self.spent.get(cell, 0.0), self._settings.timeout
        kills, began = cgroup.oom_kills(), time.monotonic()
        answer: A | Failure | None = None
        try:
            answer = worker.request(request, max(0.001, limit - spent))
        except Expired:
            worker.end()
            cell.end("timeout", f"no answer within {limit:.0f} s (--timeout)")
        except Closed:
            code = worker.end()
            if code == -9 and cgroup.oom_kills() > kills:
                cell.end("out-of-memory", "killed by the kernel: the cgroup's memory ran out")
            else:
                last = (worker.output().splitlines() or [""])[-1]
                cell.end("crashed", describe_exit(code) + (f"; last output: {last[:200]}" if last else ""))
        self.spent[cell] = spent + time.monotonic() - began
        if isinstance(answer, Failure):
            cell.end(answer.status, answer.reason, answer.traceback)
            return None
        return answer

    def there(self, worker: Worker, placed: Sequence[Placed]) -> bytes | None:
        """Outputs, read from a worker's memory; nothing where they can't be, None where the system lets nobody look."""
        if not self._peeks:
            return None
        found = (peek.tensor(worker.pid, x.address, x.shape, x.strides, x.itemsize) for x in placed)
        return b"".join(x or b"" for x in found)

    def witness(self, cell: Cell, given: Given, rows: int, output: bytes) -> Witnessed | None:
        """What a process without plugins finds; None where it comes to nothing, as for want of memory."""
        if self._witness is None:
            self._witness = self._server.start(self._settings.memory)
        try:
            asked = Witness(cell.workload, given, rows, output)
            answer = self._witness.request(asked, self._settings.timeout)
        except (Closed, Expired):
            self._witness.end()
            self._witness = None
            return None
        return answer if isinstance(answer, Witnessed) else None

    def leave(self, live: Iterable[Live]) -> None:
        """Ends cells' workers, or lets them wait for their variants' next workload where nothing went wrong in them."""
        ended = [one.worker for one in live if not self._waits(one)]
        for worker in ended:  # so that all give their memory back at the same time
            worker.channel.close()
        for worker in ended:
            worker.end()

    def _waits(self, one: Live) -> bool:
        if self._settings.reuse and one.cell.status is None:
            with suppress(Closed, Expired):
                if isinstance(one.worker.request(Release(), _RELEASE_SECONDS), Released):
                    self._idle[one.cell.plugin] = one.worker
                    return True
        return False

    def dismiss(self, but: Set[str] = frozenset()) -> None:
        """Ends the waiting workers, but for those of these variants."""
        for plugin in self._idle.keys() - but:
            self._idle.pop(plugin).end()
        if not but and self._witness:
            self._witness.end()
            self._witness = None
