"""One rank of a group of processes that share attention: it holds a part, calls with the others and is timed.

Values of a part are drawn from a number that all ranks are told, so that rank 0 can draw the whole and judge what the
others send it, once the clock has stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attnbench.devices import bursts, device, sockets
from attnbench.devices.threads import Team
from attnbench.errors import Failed
from attnbench.judge import form, values
from attnbench.parallel import Scheme, refusal
from attnbench.plugin import Attention, Plugin
from attnbench.registry import canonical, instances, load_scheme
from attnbench.task import inputs
from attnbench.task.call import Task, outputs
from attnbench.theory import parallel as theory
from attnbench.workers.about_parallel import (
    Called,
    CallTogether,
    DescribeScheme,
    Join,
    Joined,
    SchemeDescribed,
    SchemeInstance,
)
from attnbench.workers.kinds import Choice, Columns
from attnbench.workers.messages import printable
from attnbench.workload import Workload

_SETTLE_SECONDS = 0.01  # in which the last small messages of a barrier are out
_LINK_BYTES, _LINK_TIMES = 16 << 20, 4


def describe(request: DescribeScheme) -> SchemeDescribed:
    """The schemes that a spec stands for. Runs the scheme's code.

    Raises:
        AttnbenchError: an option is unknown, or its value is not allowed.
    """
    kind, found = load_scheme(request.target), []
    for given in instances(kind, request.options, request.every):
        scheme = kind(**given)
        changed = {name: value for name, value in given.items() if value != kind.options[name].default}
        refusals: list[list[str | None]] = []
        sent: list[list[int | None]] = []
        for w in request.workloads:
            why = [refusal(scheme, w, world) for world in request.worlds]
            refusals.append([None if reason is None else printable(reason) for reason in why])
            pairs = zip(why, request.worlds, strict=True)
            sent.append([None if reason else _predicted(scheme, w, world) for reason, world in pairs])
        found.append(SchemeInstance(canonical(request.name, changed), request.target, given, refusals, sent))
    options = {name: Choice(o.default, o.help, o.choices) for name, o in kind.options.items()}
    what = (kind.__doc__ or "").strip().partition("\n\n")[0]
    return SchemeDescribed(printable(" ".join(what.split())), options, found, tuple(kind.preloads))


def _predicted(scheme: Scheme, workload: Workload, world: int) -> int | None:
    """What each process sends in a call, by the scheme's own word or by theory's."""
    own = scheme.sent_bytes(workload, world)
    if own is not None or not scheme.formula or theory.unsupported(scheme.formula, workload, world):
        return own
    return theory.sent_bytes(scheme.formula, workload, world)


class Rank:
    """This process in its group, ready for one workload."""

    def __init__(self, asked: Join) -> None:
        """Meets the others. Raises: Failed: there are not enough GPUs; "wrong", what it holds makes no whole."""
        self.stage, self._asked = "import", asked
        w, self._rank, self._world = asked.workload, asked.rank, asked.world
        self._whole, each = w, w.seq // asked.world
        self._device = device.of(w.device)
        if too_few := self._device.one_of(self._rank, self._world):
            raise Failed("unsupported", too_few)
        self._device.begin(None)
        self._team = Team(w.threads if w.on_host else 1)
        torch.set_grad_enabled(False)
        scheme = self._scheme = load_scheme(asked.scheme.target)(**asked.scheme.options)
        self._check_order()
        self.stage = "meeting the others"
        self._group = _meet(asked)
        self.stage = "build"
        made = scheme.build(w, self._group)
        made = made if isinstance(made, Attention) else Attention(made, type(scheme).__name__)
        part = w.replace(seq=each, kv_seq=each)
        self._part, self._task = part, Task(Plugin(), part, {"self": made})

    def ready(self) -> Joined:
        """The first calls: what they hold, what they send, and what comes out of them."""
        number = self._asked.number
        columns: Columns = {"implementation": printable(str(self._task.implementation)), **self._linked()}
        self.stage = "first call"
        given = self._drawn(number, self._rank)
        first = self._task.call(*given)
        self._check_form(first, given)
        del first, given
        self.stage = "memory, bytes and error"
        given = self._drawn(number + 1, self._rank)
        quiet, before = self._sent(), self._sent()
        raw, held = self._device.peak(lambda: self._task.call(*given))
        after = self._sent()
        if after is not None and before is not None and quiet is not None:
            columns["sent_bytes"] = after - before - (before - quiet)
        output_bytes, input_bytes = (sum(x.nbytes for x in tensors) for tensors in (outputs(raw), given))
        columns |= {
            "input_bytes": input_bytes,
            "output_bytes": output_bytes,
            "workspace_bytes": None if held is None else max(0, held - output_bytes),
            "peak_bytes": None if held is None else input_bytes + max(output_bytes, held),
        }
        self._device.before_timing()
        wrong = self._judge(outputs(raw), number + 1, columns)
        del raw
        self.stage = "warm-up"
        dist.barrier(self._group)
        self._device.once(self._task.call, given)
        seconds, _ = self._device.once(self._task.call, given)
        self._device.give_back()
        return Joined(seconds, columns, wrong)

    def call(self, asked: CallTogether) -> Called:
        """A burst of calls on values that none before had."""
        self.stage = "timed call"
        given = self._drawn(asked.number, self._rank)
        for _ in range(asked.head):
            self._task.call(*given)
        self._team.settle()
        self._device.synchronise()
        dist.barrier(self._group)
        raw, start = None, bursts.clock()
        for _ in range(asked.calls):
            raw = self._task.call(*given)
        self._device.synchronise()
        seconds = bursts.clock() - start
        columns: Columns = {}
        # Gradients take long to judge, and were right: the output tells whether a call still does its work.
        wrong = self._judge(outputs(raw)[:1], asked.number, columns) if asked.check else None
        return Called(start, seconds, columns, wrong)

    def _check_order(self) -> None:
        """That all ranks' tokens are each token once."""
        w = self._whole
        whole = torch.arange(w.seq, dtype=torch.float64).view(1, 1, -1, 1)
        parts = [self._scheme.shard(whole, w, rank, self._world) for rank in range(self._world)]
        if any(part.shape[2] != w.seq // self._world for part in parts):
            raise Failed("wrong", "its ranks do not hold as many tokens each")
        if not torch.equal(self._scheme.unshard(parts, w), whole):
            raise Failed("wrong", "its parts put together are not the whole that they were of")

    def _drawn(self, number: int, rank: int) -> list[Tensor]:
        """A rank's part of query, key and value, and in phase train of the output's gradient."""
        tensors = inputs.empty(self._part)
        inputs.fill(tensors, self._part, number * self._world + rank)
        return tensors

    def _check_form(self, raw: Any, given: Sequence[Tensor]) -> None:
        if problem := form.misshapen(outputs(raw), self._task.shapes(), given):
            raise Failed("wrong", problem)

    def _sent(self) -> int | None:
        """Bytes that this rank has sent, once all have come here; with each look goes a barrier's."""
        dist.barrier(self._group)
        time.sleep(_SETTLE_SECONDS)
        return sockets.sent_bytes() if self._whole.on_host else None

    def _linked(self) -> Columns:
        if self._world == 1:
            return {}
        self.stage = "measuring the link"
        return {"link_bytes_per_s": _link(self._group, self._whole.device)}

    def _judge(self, raw: Sequence[Tensor], number: int, columns: Columns) -> str | None:
        """On rank 0, to which all send what came out: what is wrong with it; its errors join the columns.

        raw: its part of the output, and of gradients where they are to be judged, too.
        """
        wholes = [self._gathered(part) for part in raw]
        if self._rank:
            return None
        w = self._whole if len(raw) > 1 else self._whole.replace(phase="forward")
        drawn = [self._drawn(number, rank) for rank in range(self._world)]
        given = [self._scheme.unshard(parts, w) for parts in zip(*drawn, strict=True)]
        made = [self._scheme.unshard(parts, w) for parts in wholes]
        task = Task(Plugin(), w, {"self": Attention(self._task.plain, "")})
        given, answer = (given, tuple(made)) if w.trains else (given[:3], made[0])
        found = values.judge(task, "exact", given, answer, task.taps(given, answer), number)
        columns |= found.columns
        return found.problem

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """The parts of all ranks on rank 0; elsewhere none."""
        part = part.detach().contiguous()
        every = [torch.empty_like(part) for _ in range(self._world)] if self._rank == 0 else None
        dist.gather(part, every, group=self._group, group_dst=0)
        return every or []


@cache
def _link(group: ProcessGroup, on: str) -> float:
    """Bytes a second from each rank to the next, all at once, that this rank got through; the best of some times."""
    rank, world, waits = group.rank(), group.size(), device.of(on)
    sent = torch.zeros(_LINK_BYTES // 4, device=on)
    came, best = torch.empty_like(sent), float("inf")
    for _ in range(_LINK_TIMES):
        dist.barrier(group)
        start = bursts.clock()
        both = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % world),
            dist.P2POp(dist.irecv, came, group=group, group_peer=(rank - 1) % world),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        waits.synchronise()
        best = min(best, bursts.clock() - start)
    return _LINK_BYTES / best


def _meet(asked: Join) -> ProcessGroup:
    """The group, once all its ranks are there; where they have met before, the same."""
    w = asked.workload
    if dist.is_initialized() and dist.group.WORLD is not None:
        return dist.group.WORLD
    if w.on_host and os.path.isdir("/sys/class/net/lo"):  # by its host's name a machine may be known to nobody
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        device.of(w.device).group_backend,
        init_method=f"file://{asked.meeting}",
        rank=asked.rank,
        world_size=asked.world,
        timeout=timedelta(seconds=asked.timeout),
        device_id=None if w.on_host else torch.device(w.device, asked.rank),
    )
    found = dist.group.WORLD
    assert found is not None  # as of now
    return found
