"""One plugin made ready for one workload in this process, and timed on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from random import Random
from typing import Any

import torch
from torch import Tensor

from attnbench.devices import bursts, device, others
from attnbench.devices.bursts import BURST_SECONDS
from attnbench.devices.threads import Team
from attnbench.errors import Failed
from attnbench.judge import deviation, form, probes, values
from attnbench.registry import load
from attnbench.task import inputs
from attnbench.task.call import Task, build, outputs
from attnbench.workers.about_witness import Placed
from attnbench.workers.messages import (
    COMPILER,
    Aim,
    Aimed,
    Columns,
    Finish,
    Finished,
    Looked,
    Prepare,
    Prepared,
    Timed,
    printable,
)
from attnbench.workers.witness import as_bytes
from attnbench.workload import DEVICES

_PROBE_SECONDS = 2.0  # after which no further small problem is begun
_LITTLE_BYTES = 256 << 10  # what the sizes of blocks are rounded by
_LIBRARIES_BYTES = 8 << 20  # what libraries keep from their first call on, for anybody
_LOOKS = 0.05  # of the calls' time, what looks at bursts that are not checked may take
_FIRST_LOOKS = 0.02  # seconds that they may take in any case in a variant's first process, which may be its only one
_ALWAYS = 3  # where that is too little for a look at each burst, one of so many gets it nonetheless, drawn


@dataclass(frozen=True)
class _MemoryCall:
    """What the call that measured memory took, when it began, its figures, and whether a glance found it wrong."""

    call_s: float = 0.0
    call_start: float = 0.0
    columns: Columns = field(default_factory=dict)
    suspect: bool = False


@dataclass(frozen=True)
class _Unjudged:
    """What that call was given and returned, until a burst's call is judged in its place; `seen` of it at once."""

    given: list[Tensor]
    raw: Any
    number: int
    seen: form.Glimpse


class Subject:
    """One plugin made ready for one workload."""

    def __init__(self, asked: Prepare) -> None:
        self.workload = workload = asked.workload
        self.thorough, self.l2, self.show, self.output = asked.thorough, asked.l2, asked.show, b""
        self.stage, self.calls, self.call_s = "import", 0, 0.0
        self.called_s = self.looked_s = 0.0
        self.given: list[list[Tensor]] = []
        self.raw: Any = None
        self.unjudged: _Unjudged | None = None
        self.first = self.settled = False
        self.device = device.of(workload.device)
        self.device.begin(asked.memory_limit)
        self.team = Team(workload.threads if workload.on_host else 1)
        torch.manual_seed(workload.seed)
        torch.set_grad_enabled(False)  # for good: what a plugin does to it shows
        self.before_bytes = self.device.large_bytes()
        self.global_state = form.global_state()
        self.functions = functions()
        self.plugin = load(asked.target)(**asked.options)

    def prepare(self, asked: Prepare) -> Prepared:
        """Builds, makes the first calls and measures memory."""
        self.stage = "build"
        start = bursts.clock()
        made = build(self.plugin, self.workload)
        setup_s = bursts.clock() - start
        task = self.task = Task(self.plugin, self.workload, made)
        self.built_bytes = self._beyond(self.before_bytes, task.bytes)
        call, gates = task.call, task.gates["self"] if self.workload.scope == "attention" else ()
        self.pools = inputs.pools(self.workload, gates)
        self.pools.draw(asked.number)
        self.places = asked.number
        self.stage = "first call"
        (given,) = self.pools.views(1, asked.number)
        form.poison(given[0])
        before = self.device.large_bytes()
        first_s, raw = self.device.once(call, given)
        self._check_form(raw, given)
        self.first_call_bytes = self._beyond(before, sum(x.nbytes for x in outputs(raw)))
        self._untouched()
        began, memory = bursts.clock(), _MemoryCall()
        if self.thorough:
            self.stage = "memory"
            memory = self._measure_memory(given, raw, asked.number)
        probed = bursts.clock()
        flaw = self._flaw() if asked.probe else None
        checks_s, probes_s = bursts.clock() - began, bursts.clock() - probed
        del raw
        torch.zeros_like(given[0])  # where NaN was left: see `form.poison`
        self.device.before_timing()
        self.stage = "warm-up"
        self.timer = self.device.timer(call, given, self.l2)
        call_start = memory.call_start or bursts.clock()
        self.call_s, spent = self.timer.warm_up(memory.call_s)
        columns = memory.columns | {
            "timing": self.timer.how,
            "implementation": printable(str(task.implementation)),
            "emulated": task.emulated,
            "density": None if task.density is None else float(task.density),
        }
        columns |= self._watched("start", 0.0)
        _wrong_if(form.disturbed(self.global_state))
        self.device.give_back()
        self.kept, self.calls = self.device.kept_bytes(), 0
        return Prepared(
            call_s=self.call_s,
            call_start=call_start,
            calls_s=first_s + memory.call_s + spent,
            setup_s=setup_s,
            first_call_s=first_s,
            checks_s=checks_s,
            probes_s=probes_s,
            columns=columns,
            flaw=flaw,
            suspect=memory.suspect,
            compiles=COMPILER[0] in sys.modules,
        )

    def _check_form(self, raw: Any, given: Sequence[Tensor]) -> None:
        _wrong_if(form.misshapen(outputs(raw), self.task.shapes(), given))

    def _measure_memory(self, given: list[Tensor], earlier: Any, number: int) -> _MemoryCall:
        """The second call, on some other values, while the first one's output is still held. Its own is kept."""
        self.pools.alter(number + 1)
        form.poison(given[0])
        saved = self._saved_bytes(given) if self.workload.trains else None
        start = bursts.clock()
        (seconds, raw), held = self.device.peak(lambda: self.device.once(self.task.call, given))
        reserved = self.device.reserved_bytes()
        self._check_form(raw, given)
        _wrong_if(form.overwritten(outputs(raw), outputs(earlier)))
        output_bytes = sum(x.nbytes for x in outputs(raw))
        built, first, cache_bytes = self.built_bytes or 0, self.first_call_bytes or 0, self.task.cache_bytes
        if self.workload.decodes:  # what was built is the past, in whatever form
            built, cache_bytes = 0, cache_bytes + built
        kept = built + (first if first > _LIBRARIES_BYTES else 0)
        input_bytes = sum(x.nbytes for x in given) + self.task.parameter_bytes + cache_bytes
        workspace = None if held is None else kept + max(0, held - output_bytes - (saved or 0))
        self._untouched()
        suspect = values.glance(self.task, self.plugin.family, given, raw, number) is not None
        self.unjudged = _Unjudged(given, raw, number, form.glimpse(outputs(raw), number))
        process_bytes = self.device.process_bytes()
        self.device.before_timing()  # small problems make many tensors, each of which would be mapped afresh
        columns: Columns = {
            "input_bytes": input_bytes,
            "output_bytes": output_bytes,
            "saved_bytes": saved,
            "cache_bytes": cache_bytes if self.workload.decodes else None,
            "workspace_bytes": workspace,
            "built_bytes": self.built_bytes,
            "first_call_bytes": self.first_call_bytes,
            # Gradients take the place of what was saved for them, so the peak may lie below the sum of all.
            "peak_bytes": None if held is None else input_bytes + kept + max(output_bytes, held),
            "reserved_bytes": reserved,
            "process_bytes": process_bytes,
        }
        return _MemoryCall(seconds, start, columns, suspect)

    def _beyond(self, before: int | None, known: int) -> int | None:
        """Bytes of large blocks that are there now and were not before, beside known ones."""
        now = self.device.large_bytes()
        if now is None or before is None:
            return None
        return more if (more := now - before - known) > _LITTLE_BYTES else 0

    def _flaw(self) -> str | None:
        self.stage = "small problems"
        end = bursts.clock() + _PROBE_SECONDS
        return probes.problem(self.plugin, self.workload, go_on=lambda: bursts.clock() < end)

    def _saved_bytes(self, given: Sequence[Tensor]) -> int | None:
        """What the forward pass keeps for the backward one, beside its output, inputs and parameters."""
        (_, out), held = self.device.held(lambda: self.task.forward(given[:-1]))
        return None if held is None else max(0, held - int(out.nbytes))

    def _judge(
        self, raw: Any, given: Sequence[Tensor], number: int, apart: bool = False, here: bool = False
    ) -> tuple[Columns, float, str | None]:
        """Errors of what a call returned that was given these, seconds of calls, and what is wrong.

        Values that a process without the plugin can judge alone are only shown to it: see `workers.witness`.

        number: which elements and rows are looked at. apart: for the first time, so how far it is from attention, too:
        see `values.judge`. here: judge those, too.
        """
        self._untouched()
        seen, family, again = form.glimpse(outputs(raw), number), self.plugin.family, not (apart or here)
        in_block, elsewhere = self.workload.scope == "block", not here and self.show and family == "exact"
        inside = apart or values.needs_taps(self.task)
        if self.show and (apart or elsewhere):
            judged_there = slice(None) if elsewhere and not in_block else slice(1)
            self.output, apart = as_bytes(*outputs(raw)[judged_there]), False
        found, calls_s = values.Judgement({"tolerance": deviation.tolerance(self.workload, family)}, None), 0.0
        if not elsewhere or (in_block and inside):
            start = bursts.clock()
            taps = self.task.taps(given, raw) if inside else []
            calls_s = bursts.clock() - start if in_block else 0.0
            found = values.judge(self.task, family, given, raw, taps, number, apart, not elsewhere, again)
        _wrong_if(form.unfinished(outputs(raw), seen))
        if self.pools.are_changed():
            raise Failed("wrong", "a call changes its inputs")
        return {**found.columns}, calls_s, found.problem

    def aim(self, asked: Aim) -> Aimed:
        """Gives each call of the next burst values of its own, and makes those calls that nobody times."""
        self.stage, self.aimed = "timed call", asked
        if asked.check is not None:
            self.first, self.unjudged = self.unjudged is not None, None
            self.pools.alter(asked.number, few=True)
        else:
            self.places = asked.number
        # Where calls of the burst before were given theirs: what is kept of them would be taken for the answer. The
        # call that is checked gets the first, whichever it is, so that who judges several variants draws it once; so
        # did the last one of that burst, which is remembered best.
        views = self.pools.views(asked.calls + asked.head, self.places)
        first = -(asked.calls - 1 if asked.check is None else asked.check) % len(views)
        self.given = [*views[first:], *views[:first]]
        head = self.given[len(views) - asked.head :]
        if asked.check is not None:
            form.poison(self.given[0][0])
        if not head:
            self.pools.touch()
            self.task.touch()
        calls_s = sum(self.device.once(self.task.call, given)[0] for given in head)
        self.calls += len(head)
        self.called_s += calls_s
        return Aimed(calls_s)

    def burst(self) -> Timed:
        """Times it."""
        asked, pid = self.aimed, os.getpid()
        self.team.settle()
        before = others.waited_s(pid)
        timed, self.raw = self.timer.burst(asked.calls, 0, self.given, _looked_at(asked))
        after = others.waited_s(pid)
        self.calls += asked.calls
        self.called_s += timed.total_seconds
        waited_s = None if before is None or after is None else after - before
        placed = _placed(self.raw) if self.show and asked.check is not None else ()
        return Timed(timed.start, timed.seconds, timed.total_seconds, timed.wall_s, waited_s, placed)

    def look(self) -> Looked:
        """Looks at what came out of it: judges it if it is to be checked, else looks in passing at a few rows.

        So no work is left out where nobody would see.
        """
        asked, raw, self.raw = self.aimed, self.raw, None
        self.given = []
        if asked.check is None:
            found = self._glance(raw, asked.number)
        else:
            self._check_form(raw, self.timer.kept)
            found = self._judged(raw, self.timer.kept, asked.number, apart=self.first)
        _wrong_if(form.disturbed(self.global_state))
        del raw
        self.device.give_back()
        if not self.settled or asked.check is not None:  # what looking took for the first time is no leak
            self.settled, self.kept, self.calls = True, self.device.kept_bytes(), 0
        return found

    def judge(self) -> Looked:
        """Judges what the call that measured memory returned: of a variant too dear for a burst that is checked."""
        self.stage, kept, self.unjudged = "error", self.unjudged, None
        assert kept is not None
        found = self._judged(kept.raw, kept.given, kept.number, apart=True)
        _wrong_if(form.unfinished(outputs(kept.raw), kept.seen))
        return found

    def _judged(self, raw: Any, given: Sequence[Tensor], number: int, apart: bool) -> Looked:
        columns, calls_s, wrong = self._judge(raw, given, number, apart)
        output, self.output = self.output, b""
        return Looked(calls_s, wrong, columns, output)

    def _glance(self, raw: Any, number: int) -> Looked:
        """A look at a few rows of a call's output, for a small part of the calls' time, and at all that is wrong."""
        if self.looked_s > max(_LOOKS * self.called_s, _FIRST_LOOKS * self.thorough) and number % _ALWAYS:
            return Looked(0.0, None)
        start = bursts.clock()
        self._check_form(raw, self.timer.kept)
        wrong = values.glance(self.task, self.plugin.family, self.timer.kept, raw, number)
        if self.pools.are_changed(number):
            wrong = "a call changes its inputs"
        self.looked_s += bursts.clock() - start
        if not wrong:
            return Looked(0.0, None)
        columns, calls_s, worse = self._judge(raw, self.timer.kept, number, here=True)
        return Looked(calls_s, worse or wrong, columns)

    def _untouched(self) -> None:
        """Before anything is judged: what judges is what it was."""
        _wrong_if(form.disturbed(self.global_state) or self.functions.replaced())

    def finish(self, asked: Finish) -> Finished:
        """Bytes gained a call since `prepare`; on a GPU its state, and over `energy_s` seconds what a call uses."""
        self.stage = "last calls"
        kept = self.device.kept_bytes()
        gained = 0 if kept is None or self.kept is None else kept - self.kept
        return Finished(gained / max(1, self.calls), self._watched("end", asked.energy_s))

    def _watched(self, when: str, energy_s: float) -> Columns:
        """The device's state while calls run, as columns; with energy_s also joules of a call, over that many seconds.

        Joules are of calls as a program makes them: where the GPU waits for the host, what it uses meanwhile counts.
        """
        if not self.device.state():
            return {}
        self.device.synchronise()
        before, calls = self.device.energy_j(), max(1, ceil(max(energy_s, BURST_SECONDS) / self.call_s))
        for _ in range(calls):
            self.task.call(*self.timer.tensors)
        state = self.device.state()
        self.device.synchronise()
        after = self.device.energy_j()
        self.calls += calls
        facts: Columns = {f"{when}_{name}": value for name, value in state.items()}
        if energy_s and before is not None and after is not None:
            facts["energy_j"] = (after - before) / calls
        return facts


@cache
def functions() -> form.Functions:
    """What calls and checks are made of, before any plugin is there: the fork server looks, once for all workers."""
    return form.Functions(clock for name in DEVICES for clock in device.of(name).clocks())


def _looked_at(asked: Aim) -> int:
    """Of which call of a burst to keep the output: the last one every other time, which no later call can make good."""
    if asked.check is not None:
        return asked.check
    return -1 if asked.number % 2 else Random(asked.number).randrange(asked.calls)


def _placed(raw: Any) -> tuple[Placed, ...]:
    """Where what a call returned lies: whoever looks there at once sees what was done in time."""
    return tuple(
        Placed(x.data_ptr(), list(x.shape), [n * x.itemsize for n in x.stride()], x.itemsize)
        for x in outputs(raw)
        if type(x) is Tensor
    )


def _wrong_if(problem: str | None) -> None:
    if problem:
        raise Failed("wrong", problem)
