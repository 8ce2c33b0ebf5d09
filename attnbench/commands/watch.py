"""Shows how a sweep goes on: a bar in a terminal, plain lines elsewhere."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attnbench.records.schema import Row
from attnbench.report.units import known
from attnbench.sweep.cell import Cell
from attnbench.workload import Workload


class Watch:
    """Progress for a person; a context manager."""

    def __init__(self, console: Console, cells: int) -> None:
        self._console, self._cells, self._done = console, cells, 0
        self._first: dict[Workload, str] = {}
        """The fastest variant of each workload."""
        what, left = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
        columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("planning", total=cells, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def cell(self, cell: Cell, doing: str) -> None:
        self._bar.update(self._task, description=f"{cell.workload.label()} {cell.variant}: {doing}")

    def rows(self, rows: Sequence[Row], seconds_left: float) -> None:
        self._done += len(rows)
        of = f"[{self._done}/{self._cells}] " if self._cells else ""  # nobody counted them
        self._tell(of, rows, seconds_left)

    def again(self, rows: Sequence[Row], seconds_left: float) -> None:
        self._tell("further rounds, ", rows, seconds_left)

    def _tell(self, begin: str, rows: Sequence[Row], seconds_left: float) -> None:
        # The planner spends the budget: what is left of it is the best estimate of when it ends.
        statuses = Counter(row["status"] for row in rows)
        ok = [row for row in rows if row["status"] == "ok" and known(row.get("latency_s"))]
        best = min(ok, key=lambda row: float(row["latency_s"]), default=None)
        workload = Workload.from_dict(rows[0])
        if best:
            self._first[workload] = best["variant"]
        left = "; ".join([f"at most {seconds_left:.0f} s left", *self._leader()])
        self._bar.update(self._task, completed=self._done, left=left)
        text = ", ".join(f"{count} {status}" for status, count in statuses.items())
        fastest = f"; fastest {best['variant']} {best['latency_s'] * 1e3:.3g} ms" if best else ""
        on = f" on {rows[0]['node']}" if rows[0].get("node") else ""
        line = f"{begin}{workload.label()}{on}: {text}{fastest} ({left})"
        with suppress(OSError):  # a full disk behind stderr is no reason to stop measuring
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _leader(self) -> list[str]:
        """Who was the fastest most often so far, where there has been more than one workload."""
        if len(self._first) < 2:
            return []
        (variant, wins), *_ = Counter(self._first.values()).most_common(1)
        return [f"leading: {variant}, fastest in {wins} of {len(self._first)}"]
