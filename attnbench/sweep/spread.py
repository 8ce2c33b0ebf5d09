"""A sweep over the nodes of a cluster: each workload is a task that has a device to itself, and this process journals.

All variants of a workload are measured in one task, by turns as on one machine, so that speedups stay paired. What is
measured is decided there (`remote`); here it is decided what goes where, and what becomes of a task that is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from attnbench.errors import AttnbenchError
from attnbench.records.machines import name_of
from attnbench.records.run import Run
from attnbench.records.schema import Row, key
from attnbench.sweep import engine, on_ray, remote, rows
from attnbench.sweep.cell import Cell
from attnbench.sweep.engine import Planned
from attnbench.sweep.members import POLL_SECONDS, Device, Members
from attnbench.sweep.on_ray import Cluster, Lost
from attnbench.sweep.precision import within
from attnbench.sweep.remote import Done, Job, Refused, Seen
from attnbench.sweep.rounds import Progress
from attnbench.sweep.settings import Asked
from attnbench.theory.costs import flops
from attnbench.workload import Workload

ALL = 0  # threads of a sweep that computes with all that a node gives
_TRIES = 3  # times that a workload is sent before its cells have crashed
_EMPTY_SECONDS = 60.0  # without any node, until the run ends
_EVEN = 0.5  # of what time is left, what workloads share evenly; the rest goes by their operations


@dataclass(eq=False)
class Work:
    """A workload to measure. tries: how often it was sent."""

    workload: Workload
    cells: Sequence[Cell]
    operations: int
    tries: int = 0


@dataclass
class Sent:
    """A workload that is measured on a device. until: when it should have ended, in monotonic seconds."""

    work: Work
    device: Device
    seen: Seen
    until: float


@dataclass(frozen=True)
class Spread(Planned):
    """A plan by the first node, while this process is connected to the cluster; threads and memory are that node's.

    seen: that node. members: all that take part. tell: says a line at once.
    """

    seen: Seen
    cluster: Cluster
    members: Members
    tell: Callable[[str], object]

    @property
    def where(self) -> str:
        """Where it will be measured, in words."""
        ready = self.members.ready
        nodes, device = {each.node.id for each in ready}, self.asked.sweep.device
        return f"{device}, {len(ready)} at a time on {len(nodes)} node{'s' * (len(nodes) > 1)} of a Ray cluster"


def at_large(asked: Asked, threads: int | None) -> Asked:
    """What was asked for, without what this process's machine would say. threads: that were asked for."""
    return replace(asked, sweep=replace(asked.sweep, threads=threads or ALL))


@contextmanager
def planned(
    asked: Asked, on: str, tell: Callable[[str], object] = lambda line: None, ready: bool = True
) -> Iterator[Spread]:
    """Asks the nodes, and on the first of them every plugin; nothing is measured.

    asked: its threads may be `ALL`. on: see `on_ray.parse`. tell, ready: see `engine.planned`.

    Raises:
        AttnbenchError: there is no cluster, or something is not to be had on it.
    """
    address = on_ray.parse(on)
    engine.early(asked.sweep)
    with on_ray.connected(address) as cluster:
        members = Members(cluster, asked, tell)
        first, *_ = members.first()
        given = (members.asked, first.share, ready)
        task = cluster.send(remote.plan, given, first.node, first.share.cpus, first.gpus)
        try:
            found = cluster.result(task)
        except Lost as error:
            raise AttnbenchError(f"node {first.node.name} could not plan the run: {error}") from None
        if isinstance(found, Refused):
            raise AttnbenchError(found.why)
        precision = asked.precision
        if precision is None:
            precision = within(asked.budget * len(members.ready), found.cells)
        members.asked = replace(members.asked, precision=precision)
        settled = replace(found.asked, precision=precision)
        assert first.seen is not None
        yield Spread(settled, found.cells, found.baseline, found.facts, first.seen, cluster, members, tell)


def meta(plan: Spread, command: Sequence[str]) -> dict[str, Any]:
    """What run.json will say of a run that begins now."""
    name = name_of(plan.facts)
    told = engine.meta_of(plan, command, plan.seen.ceilings)
    # Memory is each node's own, and so are threads, where nothing was asked for.
    return told | {
        "args": plan.members.asked.as_dict(),
        "on": "ray",
        "machines": {name: plan.facts},
        "ceilings_of": {name: told["ceilings"]},
    }


def measure(
    plan: Spread,
    run: Run,
    progress: Progress,
    began: float,
    call: Callable[[Job], Done | Refused] = remote.measure,
) -> list[Row]:
    """Measures what the run, which is open, does not hold yet, and returns all its rows.

    began: monotonic seconds at which the command started; wall time counts from there. call: what a task does.
    """
    driver = Driver(plan, run, progress, call)
    before = dict(run.meta.get("seconds") or {})
    try:
        driver.run()
        run.meta["finished"] = engine.now()
    finally:
        driver.stop()
        spent = driver.spent | {"wall": time.monotonic() - began}
        spent["elsewhere"] = spent["tasks"] - spent["calls"] - spent["compilation"]
        run.meta["seconds"] = {k: round((before.get(k) or 0.0) + v, 3) for k, v in spent.items()}
        with suppress(AttnbenchError):  # what ended the run matters more than that this can't be written either
            run.save()
    return driver.rows


def check_same(plan: Spread, run: Run) -> None:
    """Raises: AttnbenchError: the run was begun on one machine, or with other plugins than the nodes have."""
    if run.meta.get("on") != "ray":
        raise AttnbenchError(f"{run.path} was begun without a cluster: go on without --on, or start a new run")
    engine.check_same_plugins(run, {cell.variant: cell.distribution for cell in plan.cells})


class Driver:
    """Keeps one task in flight on each device, the longest first, and journals what comes back."""

    def __init__(
        self, plan: Spread, run: Run, progress: Progress, call: Callable[[Job], Done | Refused] = remote.measure
    ) -> None:
        self._plan, self._run, self._progress, self._call = plan, run, progress, call
        self._cluster, self._members, self._tell = plan.cluster, plan.members, plan.tell
        self.rows = run.repair()
        """All that the run holds."""
        done = {self._like(key(row)[1]) for row in self.rows}
        cells: dict[Workload, list[Cell]] = {}
        for cell in plan.cells:
            cells.setdefault(cell.workload, []).append(cell)
        self._todo = [Work(w, of, flops(w)) for w, of in cells.items() if self._like(w) not in done]
        self._operations = max(1, sum(work.operations for work in self._todo))
        self._pending = sorted(self._todo, key=lambda work: -work.operations)
        self._sent: dict[Any, Sent] = {}
        self.spent = {"calls": 0.0, "compilation": 0.0, "tasks": 0.0}
        self._deadline = 0.0

    def _like(self, workload: Workload) -> Workload:
        """What is the same problem on any node."""
        return workload.replace(threads=1) if self._members.asked.sweep.threads == ALL else workload

    def run(self) -> None:
        """Until every cell has its row."""
        self._deadline = time.monotonic() + self._plan.asked.budget
        empty, met = time.monotonic(), 0.0
        while self._pending or self._sent:
            if time.monotonic() - met > POLL_SECONDS:
                self._members.meet()
                met = time.monotonic()
            if not self._sent:
                self._send()
            if tasks := [*self._sent, *self._members.looks]:
                empty = time.monotonic()
            elif time.monotonic() - empty > _EMPTY_SECONDS:
                raise AttnbenchError(f"no node is left; go on with --resume {self._run.path} --on ray")
            else:
                time.sleep(POLL_SECONDS)
            done = []
            for task in self._cluster.ended(tasks, POLL_SECONDS) if tasks else ():
                if task in self._sent:
                    done.append(self._ended(task, self._sent.pop(task)))
                else:
                    self._members.seen(task)
            self._send()  # before the disk is waited for
            for found in filter(None, done):
                self._append(*found)

    def stop(self) -> None:
        """Ends what is under way; what was journaled stays."""
        for task in self._sent:
            self._cluster.cancel(task)
        self._sent.clear()

    def _send(self) -> None:
        if self._pending and time.monotonic() > self._deadline:
            self._give_up()
        busy = {id(sent.device) for sent in self._sent.values()}
        for device in self._members.ready:
            if id(device) in busy or not self._pending or not (seen := device.seen):
                continue
            work = self._pending.pop(0)
            work.tries += 1
            seconds = self._seconds(work)
            job = Job(self._members.asked, work.workload, seconds, self._plan.asked.budget, device.share)
            task = self._cluster.send(self._call, (job,), device.node, device.share.cpus, device.gpus)
            self._sent[task] = Sent(work, device, seen, time.monotonic() + seconds)
            self._progress.cell(work.cells[0], f"on {device.node.name}")

    def _give_up(self) -> None:
        """No time is left for what waits: its cells are skipped."""
        budget = self._plan.asked.budget
        would_do = ceil(budget / max(0.1, 1 - sum(map(self._weight, self._pending))) / 10) * 10
        why = f"the budget of {budget:.0f} s was over before its turn; --budget {would_do} would do"
        for work in self._pending:
            self._append(self._without_number(work, "skipped", why), self._plan.seen, "")
        self._pending.clear()

    def _weight(self, work: Work) -> float:
        """Which share of all time a workload has, of those that this command measures."""
        return _EVEN / len(self._todo) + (1 - _EVEN) * work.operations / self._operations

    def _seconds(self, work: Work) -> float:
        """A workload's part of what time all devices have left."""
        now, devices = time.monotonic(), len(self._members.ready)
        left = max(0.0, self._deadline - now)
        if len(self._pending) < devices - len(self._sent):
            return left  # nobody else needs it
        taken = sum(min(left, max(0.0, sent.until - now)) for sent in self._sent.values())
        share = self._weight(work) / sum(map(self._weight, [work, *self._pending]))
        return min(left, max(0.0, left * devices - taken) * share)

    def _ended(self, task: Any, sent: Sent) -> tuple[list[Row], Seen, str] | None:
        """Rows, where they were measured and the node's name, where a task gave any or is given up."""
        work, device = sent.work, sent.device
        try:
            found = self._cluster.result(task)
        except Lost as error:
            found = Refused(str(error))
            if not error.ran:
                self._members.look(device)
        if isinstance(found, Done):
            for name, seconds in (("calls", found.calls), ("compilation", found.compilation), ("tasks", found.took)):
                self.spent[name] += seconds
            return found.rows, sent.seen, device.node.name
        again = work.tries < _TRIES
        what = "it is sent again" if again else f"after {_TRIES} times it is given up"
        self._tell(f"{work.workload.label()} came to nothing on node {device.node.name}: {found.why}; {what}")
        if again:
            self._pending = sorted([*self._pending, work], key=lambda each: -each.operations)
            return None
        why = f"its task came to nothing {work.tries} times, at last: {found.why}"
        return self._without_number(work, "crashed", why), sent.seen, device.node.name

    def _without_number(self, work: Work, status: str, why: str) -> list[Row]:
        settings, found = engine.settings_of(self._plan, None), []
        for cell in work.cells:
            if cell.status is None:
                cell.end(status, why)
            told = {"status": cell.status, "reason": cell.reason, "traceback": cell.traceback}
            found.append(rows.row(cell, None, settings) | told)
        return found

    def _append(self, found: list[Row], seen: Seen, node: str) -> None:
        """Journals a workload's rows, with where they were measured."""
        known = self._run.meta["machines"]
        if (name := name_of(seen.facts, known)) not in known:
            known[name] = dict(seen.facts)
            self._run.meta["ceilings_of"][name] = seen.ceilings.as_dict() if seen.ceilings else None
            self._run.save()
        found = [row | {"machine": name, "node": node} for row in found]
        self._run.append(found)
        self.rows += found
        self._progress.rows(found, max(0.0, self._deadline - time.monotonic()))
