"""One plugin made ready for one workload in this process, and timed on request."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

from attnbench.devices import bursts, device, memory, nvml
from attnbench.devices.bursts import BURST_SECONDS
from attnbench.errors import Failed
from attnbench.judge import form, reference
from attnbench.judge.values import judge
from attnbench.registry import load
from attnbench.task import inputs
from attnbench.task.call import Task, build, outputs
from attnbench.workers.channel import Message
from attnbench.workload import Workload


class Subject:
    """One plugin made ready for one workload."""

    def __init__(
        self,
        workload: Workload,
        target: str,
        options: dict[str, Any],
        thorough: bool,
        l2: str = "kept",
        memory_limit: int | None = None,
    ) -> None:
        self.workload, self.thorough, self.l2 = workload, thorough, l2
        self.stage, self.calls, self.resident, self.call_s = "import", 0, 0, 0.0
        memory.return_freed_pages()
        self.gpu = None
        if workload.device == "cuda":
            if memory_limit is not None:
                memory.limit_gpu(memory_limit)
            self.gpu = nvml.current()
        torch.set_num_threads(workload.threads)
        torch.manual_seed(workload.seed)
        torch.set_grad_enabled(False)  # for good: what a plugin does to it shows
        self.global_state = form.global_state()
        self.plugin = load(target)(**options)
        self.rows = reference.sample_rows(workload.seq, workload.seed)

    def prepare(self) -> Message:
        """Builds, makes the first calls, checks the output and measures memory."""
        self.stage = "build"
        start = bursts.clock()
        made = build(self.plugin, self.workload)
        setup_s = bursts.clock() - start
        task = self.task = Task(self.plugin, self.workload, made)
        call, gates = task.call, task.gates["self"] if self.workload.scope == "attention" else ()
        # Two sets of values to rotate between, and the buffers that the calls see.
        self.sets = [inputs.empty(self.workload, gates) for _ in range(2)]
        self.buffers = inputs.empty(self.workload, gates)
        self.draws = len(self.sets)
        for draw, tensors in enumerate(self.sets):
            inputs.fill(tensors, self.workload, draw)
        self.stage = "first call"
        self._show(0)
        form.poison(self.buffers[0])
        first_s, raw = device.once(call, self.buffers)
        self._check_form(raw)
        _wrong_if(form.disturbed(self.global_state))
        facts: Message = {"setup_s": setup_s, "first_call_s": first_s, "calls_s": first_s}
        began = bursts.clock()
        if self.thorough:
            self.stage = "memory and error"
            checked = self._measure_memory_and_error(raw)
            facts["calls_s"] += checked.pop("calls_s")
            facts |= checked
        facts["checks_s"] = bursts.clock() - began  # what a further process of the same cell is spared
        del raw
        memory.keep_freed_pages()
        self.stage = "warm-up"
        self.timer = device.timer(call, self.buffers, self.l2)
        facts.setdefault("call_start", bursts.clock())
        self.call_s, spent = self.timer.warm_up(facts.get("call_s", 0.0))
        facts["calls_s"] += spent
        facts["call_s"] = self.call_s
        facts["timing"] = self.timer.how
        if self.workload.device == "cuda":
            facts |= self._watched("start", 0.0)
        facts["implementation"] = str(task.implementation)
        facts["density"] = None if task.density is None else float(task.density)
        _wrong_if(form.disturbed(self.global_state))
        memory.give_back(self.buffers[0])
        self.resident, self.calls = memory.kept_bytes(self.buffers[0]), 0
        return facts

    def _show(self, index: int) -> None:
        for buffer, tensor in zip(self.buffers, self.sets[index], strict=True):
            buffer.copy_(tensor)

    def _check_form(self, raw: Any) -> None:
        _wrong_if(form.misshapen(outputs(raw), self.task.shapes(), self.buffers))

    def _measure_memory_and_error(self, earlier: Any) -> Message:
        """The second call, on other values in the same buffers, while the first one's output is still held."""
        self._show(1)
        form.poison(self.buffers[0])
        saved = self._saved_bytes() if self.workload.phase == "train" else None
        start = bursts.clock()
        (seconds, raw), held = memory.measure(lambda *given: device.once(self.task.call, given), self.buffers)
        reserved = memory.reserved_bytes(self.buffers[0])
        self._check_form(raw)
        _wrong_if(form.overwritten(outputs(raw), outputs(earlier)))
        _wrong_if(form.changed(self.buffers, self.sets[1]))
        input_bytes = sum(b.nbytes for b in self.buffers) + self.task.parameter_bytes + self.task.cache_bytes
        output_bytes = sum(x.nbytes for x in outputs(raw))
        workspace = max(0, held - output_bytes - (saved or 0))
        checks = self._judge(raw)
        return checks | {
            "call_start": start,
            "call_s": seconds,
            "calls_s": seconds + checks["calls_s"],
            "input_bytes": input_bytes,
            "output_bytes": output_bytes,
            "saved_bytes": saved,
            "cache_bytes": self.task.cache_bytes if self.workload.phase == "decode" else None,
            "workspace_bytes": workspace,
            # Gradients take the place of what was saved for them, so the peak may lie below the sum of all.
            "peak_bytes": input_bytes + max(output_bytes, held),
            "reserved_bytes": reserved,
            "process_bytes": self.gpu.process_bytes() if self.gpu else None,
        }

    def _saved_bytes(self) -> int:
        """What the forward pass keeps for the backward one, beside its output, inputs and parameters."""
        (_, out), held = memory.held(lambda: self.task.forward(self.buffers[:-1]), like=self.buffers[0])
        return max(0, held - int(out.nbytes))

    def _judge(self, raw: Any) -> Message:
        """Both errors of an output for what the buffers hold now. A wrong one keeps its errors on record."""
        start = bursts.clock()
        taps = self.task.taps(self.buffers, raw)
        calls_s = 0.0 if self.workload.scope == "attention" else bursts.clock() - start
        draw = self.workload.seed + self.draws
        found = judge(self.task, self.plugin.family, self.buffers, raw, taps, self.rows, draw)
        wrong = {"failed": "wrong", "reason": found.problem} if found.problem else {}
        return {**found.columns, "calls_s": calls_s, **wrong}

    def burst(self, calls: int, head: int, turn: int, check: bool) -> Message:
        """Times one burst on the next set of values. With `check`, on fresh values, and its output is checked."""
        self.stage = "timed call"
        shown = turn % len(self.sets)
        if check:
            inputs.fill(self.sets[shown], self.workload, self.draws)
            self.rows = reference.sample_rows(self.workload.seq, self.workload.seed + self.draws)
            self.draws += 1
        self._show(shown)
        if check:
            form.poison(self.buffers[0])
        timed, raw = self.timer.burst(calls, head)
        self.calls += calls + head
        answer: Message = {"start": timed.start, "seconds": timed.seconds, "calls_s": timed.total_seconds}
        if timed.wall_s is not None:
            answer["wall_s"] = timed.wall_s
        if check:
            self._check_form(raw)
            _wrong_if(form.changed(self.buffers, self.sets[shown]))
            # A block repeats a short call on the same values: one that remembers its last answer would win.
            if calls + head > 1 and form.overwritten(outputs(self.task.call(*self.buffers))[:1], outputs(raw)[:1]):
                raise Failed("wrong", "a call returns the output of the call before once more")
            checks = self._judge(raw)
            answer |= checks | {"calls_s": answer["calls_s"] + checks["calls_s"]}
        _wrong_if(form.disturbed(self.global_state))
        del raw
        memory.give_back(self.buffers[0])
        return answer

    def finish(self, energy_s: float) -> Message:
        """Bytes gained a call since `prepare`; on a GPU its state, and over `energy_s` seconds what a call uses."""
        self.stage = "last calls"
        kept = memory.kept_bytes(self.buffers[0]) - self.resident
        answer: Message = {"leak_bytes": kept / max(1, self.calls)}
        return answer | self._watched("end", energy_s)

    def _watched(self, when: str, energy_s: float) -> Message:
        """The GPU's state while calls run, as columns; with energy_s also joules of a call, over that many seconds.

        Joules are of calls as a program makes them: where the GPU waits for the host, what it uses meanwhile counts.
        """
        if self.gpu is None:
            return {}
        torch.cuda.synchronize()
        before, calls = self.gpu.energy_j(), max(1, ceil(max(energy_s, BURST_SECONDS) / self.call_s))
        for _ in range(calls):
            self.task.call(*self.buffers)
        state = self.gpu.state()
        torch.cuda.synchronize()
        after = self.gpu.energy_j()
        self.calls += calls
        facts: Message = {f"{when}_{name}": value for name, value in state.items()}
        if energy_s and before is not None and after is not None:
            facts["energy_j"] = (after - before) / calls
        return facts


def _wrong_if(problem: str | None) -> None:
    if problem:
        raise Failed("wrong", problem)
