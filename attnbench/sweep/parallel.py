"""`attnbench parallel`: what it takes and what it saves that several processes share one attention."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attnbench.devices import others
from attnbench.devices.bursts import burst_size
from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.records.schema import Row
from attnbench.registry import SCHEMES, find, select
from attnbench.registry import Request as Named
from attnbench.sizes import Sweep
from attnbench.stats.intervals import MIN_ROUNDS
from attnbench.sweep import engine
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.group import Group
from attnbench.sweep.precision import look
from attnbench.sweep.rows import figures
from attnbench.sweep.settings import Settings
from attnbench.theory import costs
from attnbench.workers.about_parallel import CallTogether, DescribeScheme, Joined, SchemeDescribed, SchemeInstance
from attnbench.workers.ask import ask_machine, ask_once
from attnbench.workers.kinds import Columns
from attnbench.workers.messages import Facts, Failure
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

BASELINE = "sdpa"
ROUNDS = 60
SENT_BY = ("sent_bytes", "peak_bytes", "workspace_bytes", "input_bytes", "output_bytes")
"""Columns of which each rank has its own: a row has the most, and of the first two each rank's behind `_by_rank`."""
_BURST_SECONDS = 0.02  # of a group: a barrier's end reaches its ranks some tenths of a millisecond apart
_DESCRIBE_SECONDS = 120.0
_DISTURBED = 0.1  # of all cores' time, what others may use before times are off
_BITS = 40  # of a number that values are drawn from
_OVERRUN = 0.5  # of a share of the budget, beyond which fewer rounds than an interval needs will do


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `attnbench parallel` is asked for. worlds: numbers of processes. sweep: its threads are those of a process.

    precision: half-width of a speedup at which a group may stop. budget: seconds for all. timeout: for an answer.
    """

    plugins: str
    worlds: tuple[int, ...]
    sweep: Sweep
    precision: float = 0.05
    budget: float = 120.0
    timeout: float = 60.0
    isa: str = "auto"


@dataclass
class Found:
    """What came of it so far. rows: as docs/parallel.md lists them."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


@dataclass(eq=False)
class Member:
    """A scheme among so many processes on one workload: the cell of a row, and the group that works on it."""

    cell: Cell
    scheme: SchemeInstance
    group: Group
    predicted: int | None
    """Bytes that each process sends in a call, by formula."""
    joined: list[Joined] = field(default_factory=list)
    bursts_s: float = 0.0
    """Seconds of its bursts by the session's clock, and (below) CPU seconds that others used of all cores meanwhile."""
    others_s: float = 0.0

    @property
    def world(self) -> int:
        return self.group.world

    @property
    def bytes(self) -> int:
        """What its processes take together, at most: each may have all keys, and rank 0 judges the whole."""
        w = self.cell.workload
        whole = costs.input_bytes(w) + costs.output_bytes(w)
        return self.world * (of(w.device).worker_bytes + 2 * whole) + 4 * whole


def measure(asked: Asked, say: Callable[[str], None], keep: Callable[[Found], None]) -> Found:
    """Measures each scheme among each number of processes, those of a workload by turns and beside one process.

    say: told a line where one ends. keep: given what there is after each workload.

    Raises:
        AttnbenchError: a scheme, an option or the device is not to be had, or the sizes make no workload.
    """
    _checked(asked.sweep)  # what is wrong whatever the machine is said before anything is started
    began, known = time.monotonic(), find(kind=SCHEMES)
    requests = [*select(BASELINE, known, SCHEMES), *select(asked.plugins, known, SCHEMES)]
    with Forkserver(asked.sweep.threads, asked.isa) as server, TemporaryDirectory(prefix="attnbench-") as folder:
        facts = ask_machine(server)
        device = engine.device_of(asked.sweep.device, facts.devices)
        sweep = engine.on(asked.sweep, device, facts.devices[device].dtype)
        workloads, found = _checked(sweep), Found(facts.machine)
        instances = _described(server, requests, workloads, asked.worlds)
        weights = [w.batch * w.heads * w.seq * w.kv_seq for w in workloads]
        for number, w in enumerate(workloads):
            left = asked.budget - (time.monotonic() - began)
            share = max(0.0, left) * weights[number] / sum(weights[number:])
            contest = _Contest(server, Path(folder), asked, facts, w)
            contest.run(list(_members(instances, number, w, asked)), share)
            for row in contest.rows():
                found.rows.append(row)
                say(line(row))
            keep(found)
    return found


def line(row: Row) -> str:
    """A row in a line."""
    name = f"{row['scheme']} x {row['world']}, {row['seq']} tokens"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['reason']}"
    speedup = "" if row["speedup"] is None else f", {row['speedup']:.3g}x {BASELINE}'s"
    return f"{name}: {1e3 * row['latency_s']:.3g} ms{speedup}"


def _checked(sweep: Sweep) -> list[Workload]:
    """Its workloads. Raises: AttnbenchError: they are none, or not what processes share."""
    workloads = engine.early(sweep)
    for w in workloads:
        if w.mask not in ("full", "causal"):
            raise AttnbenchError(f"--mask {w.mask}: processes share attention with mask full or causal")
        if w.decodes:
            raise AttnbenchError("--phase decode: processes share attention in the phases forward and train")
    return workloads


def _described(
    server: Forkserver, requests: Sequence[Named], workloads: list[Workload], worlds: Sequence[int]
) -> list[SchemeInstance | tuple[str, Failure]]:
    """The schemes that requests stand for, each once; or of one that can't be asked its name, and why."""
    found: dict[str, SchemeInstance | tuple[str, Failure]] = {}
    for request in requests:
        offer = request.found
        question = DescribeScheme(
            offer.name, offer.target, dict(request.options), request.every, workloads, [1, *worlds]
        )
        answer: SchemeDescribed | Failure
        answer = Failure("error", offer.problem) if offer.problem else ask_once(server, question, _DESCRIBE_SECONDS)
        if isinstance(answer, Failure):
            if answer.status == "usage":
                raise AttnbenchError(f"{SCHEMES.flag} {offer.name}: {answer.reason}")
            found.setdefault(offer.name, (offer.name, answer))
            continue
        server.preload(answer.preloads)
        for each in answer.instances:
            found.setdefault(each.scheme, each)
    return list(found.values())


def offered(isa: str = "auto") -> list[tuple[Any, SchemeDescribed | Failure]]:
    """All schemes that are installed, and what each says of itself."""
    with Forkserver(1, isa) as server:
        return [
            (each, ask_once(server, DescribeScheme(each.name, each.target, {}, False, [], []), _DESCRIBE_SECONDS))
            for each in find(kind=SCHEMES).values()
        ]


def _members(
    instances: Sequence[SchemeInstance | tuple[str, Failure]], number: int, workload: Workload, asked: Asked
) -> Iterator[Member]:
    """Of the workload of this number; the baseline, in one process, comes first."""
    for each in instances:
        if isinstance(each, tuple):
            name, failure = each
            nameless = SchemeInstance(name, "", {}, [], [])
            cell = Cell(name, name, "", "", workload)
            cell.end(failure.status, failure.reason, failure.traceback)
            yield Member(cell, nameless, Group(1, asked.timeout), None)
            continue
        for i, world in enumerate((1, *asked.worlds)):
            is_baseline = each.scheme == BASELINE
            if is_baseline != (i == 0):
                continue
            name = each.scheme.partition(":")[0]
            cell = Cell(each.scheme, name, "", each.target, workload, "exact")
            if reason := each.refusals[number][i]:
                cell.end("unsupported", reason)
            yield Member(cell, each, Group(world, asked.timeout), each.sent_bytes[number][i])


class _Contest:
    """The members of one workload, measured by turns, as many of them alive together as memory holds."""

    def __init__(self, server: Forkserver, folder: Path, asked: Asked, facts: Facts, workload: Workload) -> None:
        self._server, self._folder, self._asked, self._workload = server, folder, asked, workload
        self._machine, here = facts.machine, facts.devices[workload.device]
        memory = int(engine.MEMORY_SHARE * min(here.free_bytes, facts.devices["cpu"].free_bytes))
        self._settings = Settings(
            baseline=BASELINE, precision=asked.precision, budget=asked.budget, timeout=asked.timeout, memory=memory,
            isa=asked.isa, at_once=facts.machine["threads_at_once"],
        )  # fmt: skip
        self._measured: dict[Cell, Measured] = {}
        self._members: list[Member] = []
        self._secret, self._random, self._process = random.SystemRandom(), random.Random(workload.seed), 0

    def run(self, members: list[Member], seconds: float) -> None:
        """Measures them, within so many seconds if an interval takes no longer."""
        self._members, end = members, time.monotonic() + seconds
        base, *rest = members
        for member in members:
            if member.cell.status is None and member.bytes > self._settings.memory:
                needs = f"{member.bytes / 2**30:.3g} GiB for its processes"
                member.cell.end("skipped", f"{needs} are over {self._settings.memory / 2**30:.3g} GiB")
        batches = self._batches(base, [m for m in rest if m.cell.status is None])
        for number, batch in enumerate(batches):
            share = max(0.0, end - time.monotonic()) / (len(batches) - number)
            began = time.monotonic()
            deadline = began + share
            with self._joined([m for m in [base, *batch] if m.cell.status is None]) as live:
                joined = time.monotonic()
                # However small its share, rounds may take half of what it took to be ready for them.
                self._rounds(live, base, deadline, max(deadline, joined) + _OVERRUN * max(share, joined - began))
            self._process += 1

    def _batches(self, base: Member, members: Sequence[Member]) -> list[list[Member]]:
        """Of members that fit into memory beside the baseline; one that doesn't stands alone beside it."""
        found: list[list[Member]] = [[]]
        for member in members:
            if found[-1] and base.bytes + sum(m.bytes for m in (*found[-1], member)) > self._settings.memory:
                found.append([])
            found[-1].append(member)
        return found

    @contextmanager
    def _joined(self, members: Sequence[Member]) -> Iterator[list[Member]]:
        live: list[Member] = []
        try:
            for member in members:
                live.append(member)  # before anything goes wrong, so that it is ended whatever does
                self._join(member)
            yield [m for m in live if m.cell.status is None]
        finally:
            for member in live:
                member.group.end()

    def _join(self, member: Member) -> None:
        limit = self._settings.memory if of(self._workload.device).limits_process else None
        member.group.start(self._server, self._folder, limit)
        joined = member.group.join(member.scheme, self._workload, self._secret.getrandbits(_BITS))
        if not self._goes_on(member, joined):
            return
        assert joined is not None
        if wrong := joined[0].wrong:
            self._stop(member, "wrong", wrong)
        if member.cell not in self._measured:
            member.joined, self._measured[member.cell] = joined, Measured(_columns(joined))
        self._measured[member.cell].plan(ROUNDS, 1)

    def _rounds(self, live: Sequence[Member], base: Member, deadline: float, latest: float) -> None:
        """Bursts of all in turns, until each is precise enough or the time is over.

        Late, there are as many as an interval needs; after `latest` none but the first is begun.
        """
        sizes = {m: burst_size(max(each.call_s for each in m.joined), _BURST_SECONDS) for m in live}
        checked = {m: self._secret.randrange(MIN_ROUNDS) for m in live}
        for turn in range(ROUNDS):
            taking_part = [m for m in live if m.cell.status is None and not self._measured[m.cell].converged]
            now = time.monotonic()
            if not taking_part or (now > deadline and turn >= MIN_ROUNDS) or (now > latest and turn):
                break
            self._random.shuffle(taking_part)
            for member in taking_part:
                calls, head = sizes[member]
                number = self._secret.getrandbits(_BITS)
                self._burst(member, turn, CallTogether(calls, head, number, turn == checked[member]))
            alive = [m.cell for m in live if m.cell.status is None]
            look(alive, base.cell, self._measured, by_process=False, precision=self._asked.precision)

    def _burst(self, member: Member, turn: int, asked: CallTogether) -> None:
        began, busy, own = time.monotonic(), others.host().busy_s, member.group.cpu_seconds()
        called = member.group.call(asked)
        member.bursts_s += time.monotonic() - began
        if busy is not None and called is not None:
            used = (others.host().busy_s or busy) - busy
            member.others_s += max(0.0, used - (member.group.cpu_seconds() - own))
        if not self._goes_on(member, called):
            return
        assert called is not None
        # From a barrier to the last rank's end, by each rank's own clock: that holds across machines, too.
        slowest = max(each.seconds for each in called)
        start = min(each.start for each in called)
        self._measured[member.cell].samples.append([self._process, turn, start, asked.calls, slowest])
        if called[0].wrong:
            self._measured[member.cell].columns |= called[0].columns
            self._stop(member, "wrong", called[0].wrong)

    def _goes_on(self, member: Member, answers: object) -> bool:
        if answers is None:
            member.cell.end(member.group.status or "error", member.group.reason, member.group.traceback)
        return answers is not None

    def _stop(self, member: Member, status: str, reason: str) -> None:
        member.cell.end(status, reason)
        member.group.end(status, reason)

    def rows(self) -> Iterator[Row]:
        """A row a member, in their order."""
        base = self._measured.get(self._members[0].cell)
        for member in self._members:
            yield self._row(member, base)

    def _row(self, member: Member, base: Measured | None) -> Row:
        cell, w, measured = member.cell, member.cell.workload, self._measured.get(member.cell)
        found: Row = {
            "scheme": cell.plugin, "variant": cell.variant, "world": member.world, **w.as_dict(),
            "status": cell.status or "ok", "reason": cell.reason, "traceback": cell.traceback, "isa": self._asked.isa,
            "baseline": BASELINE, "predicted_sent_bytes": member.predicted, "warnings": [], "samples": [],
        }  # fmt: skip
        found |= dict.fromkeys((*SENT_BY, *_MEASURED))
        if measured is None:
            return found
        found |= measured.columns | {f"{name}_by_rank": _by_rank(member.joined, name) for name in SENT_BY[:2]}
        if found["sent_bytes"] is not None and member.predicted is not None:
            found["framing_bytes"] = found["sent_bytes"] - member.predicted
        if measured.samples and cell.status is None:
            found |= figures(cell, measured, base, self._settings)
            for name in ("speedup", "flops_per_s"):
                found[name] = found[name] if math.isfinite(found[name]) else None
            cores = self._machine["usable_threads"]
            if w.on_host and member.others_s > _DISTURBED * cores * member.bursts_s:
                found["warnings"] = [*found["warnings"], "disturbed"]
            if w.on_host and member.world * w.threads > cores:
                found["warnings"] = [*found["warnings"], "crowded"]
        elif cell.status is None:
            found |= {"status": "error", "reason": "no burst of it was timed"}
        return found


_MEASURED = (
    "latency_s", "latency_low_s", "latency_high_s", "speedup", "speedup_low", "speedup_high", "rounds",
    "implementation", "link_bytes_per_s", "sent_bytes_by_rank", "framing_bytes", "peak_bytes_by_rank", "tolerance",
    *(f"{kind}_{what}" for kind in ("implementation", "approximation") for what in ("rel_l2", "max_abs", "cosine")),
    *(f"{name}_gradient_rel_l2" for name in ("query", "key", "value")),
)  # fmt: skip


def _columns(joined: Sequence[Joined]) -> Columns:
    """Of a group: those of rank 0, which judges, and of what each rank has its own the most, or the slowest."""
    found: Columns = dict(joined[0].columns)
    for name in SENT_BY:
        each = [x for x in _by_rank(joined, name) if x is not None]
        found[name] = max(each) if len(each) == len(joined) else None
    links = [x for x in _by_rank(joined, "link_bytes_per_s") if x is not None]
    return found | {"link_bytes_per_s": min(links) if links else None}


def _by_rank(joined: Sequence[Joined], name: str) -> list[Any]:
    return [each.columns.get(name) for each in joined]
