"""Runs inside a worker process: makes one plugin ready for one workload, then times blocks of it on request.

Whatever a plugin does here (raise, hang, crash, print, exit) ends this process at worst, never the sweep.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from attnbench import reference, theory
from attnbench.bench import inputs, latency, machine, memory, nvml
from attnbench.bench.blocks import BLOCK_SECONDS
from attnbench.bench.channel import Channel, Closed, Message, printable
from attnbench.bench.generation import generate
from attnbench.bench.judge import judge
from attnbench.bench.task import NoGradient, Task, outputs
from attnbench.errors import AttnbenchError
from attnbench.plugin import Plugin
from attnbench.registry import canonical, instances, load
from attnbench.workload import Workload

_LONGEST_TEXT = 4000
_NO_PHASE = {"train": "it has no backward pass", "decode": "it cannot add tokens to a past"}


class Failed(Exception):
    """The cell ends here, with this status."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def serve(channel: Channel) -> None:
    """Answers requests until the session hangs up."""
    subject: Subject | None = None
    process = os.getpid()
    try:
        while True:
            message = channel.receive()
            try:
                match message.pop("op"):
                    case "machine":
                        answer = machine.describe()
                    case "describe":
                        answer = describe(load(message.pop("target")), **message)
                    case "generate":
                        answer = _generate(Workload.from_dict(message.pop("workload")), **message)
                    case "prepare":
                        subject = Subject(Workload.from_dict(message.pop("workload")), **message)
                        answer = subject.prepare()
                    case "block":
                        assert subject is not None
                        answer = subject.block(**message)
                    case "release":  # the process goes on to another workload
                        subject, answer = None, {}
                        memory.release()
                    case _:
                        assert subject is not None
                        answer = subject.finish(**message)
            except BaseException as problem:  # SystemExit and KeyboardInterrupt too: it is the plugin's doing
                answer = _failure(problem, subject.stage if subject else "import")
            if os.getpid() != process:  # a fork that a plugin made came back from its call: it has nothing to say
                os._exit(0)
            try:
                channel.send(answer)
            except (TypeError, ValueError) as problem:  # the plugin said something that JSON can't hold
                channel.send(_failure(problem, subject.stage if subject else "import"))
    except Closed:
        pass


def _failure(problem: BaseException, stage: str) -> Message:
    if isinstance(problem, NoGradient):
        return {"failed": "unsupported", "reason": "its output carries no gradient: it has no backward pass"}
    if isinstance(problem, Failed):
        return {"failed": problem.status, "reason": problem.reason}
    try:
        text = str(problem)
    except BaseException:  # an exception of the plugin's own that can't even be printed
        text = ""
    first_line = (text.strip().splitlines() or [""])[0]
    memory_ran_out = (
        isinstance(problem, MemoryError | torch.OutOfMemoryError)
        or (isinstance(problem, RuntimeError) and "can't allocate memory" in text)
        or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM)
    )
    return {
        "failed": "out-of-memory" if memory_ran_out else "error",
        "reason": printable(f"at {stage}: {type(problem).__name__}: {first_line}".removesuffix(": "))[:500],
        "traceback": printable("".join(traceback.format_exception(problem)))[-_LONGEST_TEXT:],
    }


def describe(
    kind: type[Plugin], name: str, options: Mapping[str, str], every: bool, workloads: list[Message]
) -> Message:
    """What a plugin is, and for each set of its options what it says of each workload."""
    try:
        chosen = instances(kind, options, every)
    except AttnbenchError as problem:
        raise Failed("usage", str(problem)) from None
    known = [Workload.from_dict(w) for w in workloads]
    return {
        "family": kind.family,
        "devices": list(kind.devices),
        "doc": (kind.__doc__ or "").strip().partition("\n")[0],
        "options": {
            n: {"default": o.default, "help": o.help, "choices": list(o.choices)} for n, o in kind.options.items()
        },
        "instances": [
            {
                "plugin": canonical(name, values),
                "options": values,
                "answers": [_answer(kind(**values), w) for w in known],
            }
            for values in chosen
        ],
    }


def _answer(plugin: Plugin, workload: Workload) -> Message:
    parts = [entry for part in theory.attentions(workload).values() for entry in part.entries()]
    for part in dict.fromkeys(parts):
        if reason := _refusal(plugin, part):
            return {"unsupported": reason}
    workspaces = [plugin.workspace_bytes(part) for part in parts]
    # What a plugin counts is its forward pass; training is three times that, for it as for exact attention.
    passes = 3 if workload.phase == "train" else 1
    own = [theory.flops(part) if (f := plugin.flops(part)) is None else passes * f for part in parts]
    others = theory.flops(workload) - workload.layers * sum(map(theory.flops, parts))
    return {
        "workspace": None if None in workspaces else max(int(w) for w in workspaces if w is not None),
        "flops": int(others + workload.layers * sum(own)),
    }


def _generate(workload: Workload, target: str, options: dict[str, Any], **sizes: int) -> Message:
    plugin = load(target)(**options)
    for part in theory.attentions(workload).values():
        if reason := _refusal(plugin, part):
            raise Failed("unsupported", reason)
    return generate(plugin, workload, **sizes)


def _refusal(plugin: Plugin, part: Workload) -> str | None:
    """Why a plugin does not do one attention problem."""
    if part.device not in plugin.devices:
        return f"runs on {' and '.join(plugin.devices) or 'no device'} only"
    if part.phase not in plugin.phases:
        return _NO_PHASE.get(part.phase, f"has no {part.phase} phase")
    reason = plugin.supports(part)
    return printable(str(reason)) if reason else None


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
        self.global_state = _global_state()
        self.plugin = load(target)(**options)
        self.rows = reference.sample_rows(workload.seq, workload.seed)

    def prepare(self) -> Message:
        """Builds, makes the first calls, checks the output and measures memory."""
        self.stage = "build"
        task = self.task = Task(self.plugin, self.workload)
        call, gates = task.call, task.gates["self"] if self.workload.scope == "attention" else ()
        # Two sets of values to rotate between, and the buffers that the calls see.
        self.sets = [inputs.empty(self.workload, gates) for _ in range(2)]
        self.buffers = inputs.empty(self.workload, gates)
        self.draws = len(self.sets)
        for draw, tensors in enumerate(self.sets):
            inputs.fill(tensors, self.workload, draw)
        self.stage = "first call"
        self._show(0)
        memory.poison(self.buffers[0])
        first_s, raw = latency.once(call, self.buffers)
        self._check_form(raw)
        self._check_global_state()
        facts: Message = {"setup_s": task.setup_s, "first_call_s": first_s, "calls_s": first_s}
        began = latency.clock()
        if self.thorough:
            self.stage = "memory and error"
            checked = self._measure_memory_and_error(raw)
            facts["calls_s"] += checked.pop("calls_s")
            facts |= checked
        facts["checks_s"] = latency.clock() - began  # what a further process of the same cell is spared
        del raw
        memory.keep_freed_pages()
        self.stage = "warm-up"
        self.timer = latency.timer(call, self.buffers, self.l2)
        self.call_s, spent = self.timer.warm_up(facts.get("call_s", 0.0))
        facts["calls_s"] += spent
        facts["call_s"] = self.call_s
        facts["timing"] = self.timer.how
        if self.workload.device == "cuda":
            facts |= self._watched("start", 0.0)
        facts["implementation"] = printable(str(task.implementation))
        facts["density"] = None if task.density is None else float(task.density)
        self._check_global_state()
        memory.give_back(self.buffers[0])
        self.resident, self.calls = memory.kept_bytes(self.buffers[0]), 0
        return facts

    def _show(self, index: int) -> None:
        for buffer, tensor in zip(self.buffers, self.sets[index], strict=True):
            buffer.copy_(tensor)

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the output, and in phase train of the gradients of inputs and parameters."""
        w = self.workload
        out = (w.batch, w.seq, w.width) if w.scope == "block" else (w.batch, w.heads, w.seq, w.value_dim)
        if w.phase != "train":
            return [out]
        parameters = list(self.task.stack.parameters()) if self.task.stack else []
        return [out, *(tuple(x.shape) for x in (*self.buffers[:-1], *parameters))]

    def _check_form(self, raw: Any) -> None:
        shapes, outs = self._shapes(), outputs(raw)
        if not isinstance(outs[0], Tensor) or len(outs) != len(shapes):
            raise Failed("wrong", f"returned a {type(raw).__name__}, not a tensor")
        for i, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
            what = "output" if i == 0 else "a gradient"
            if tuple(out.shape) != shape:
                raise Failed("wrong", f"{what} has shape {tuple(out.shape)}, not {shape}")
            if out.dtype != self.buffers[0].dtype:
                raise Failed("wrong", f"{what} is {out.dtype}, not {self.buffers[0].dtype}")
            if out.device.type != self.workload.device:
                raise Failed("wrong", f"{what} is on {out.device}, not on {self.workload.device}")
            if _storage(out) in {_storage(b) for b in self.buffers}:
                raise Failed("wrong", f"{what} shares its memory with an input")

    def _measure_memory_and_error(self, earlier: Any) -> Message:
        """The second call, on other values in the same buffers, while the first one's output is still held."""
        self._show(1)
        memory.poison(self.buffers[0])
        saved = self._saved_bytes() if self.workload.phase == "train" else None
        start = latency.clock()
        (seconds, raw), held = memory.measure(lambda *given: latency.once(self.task.call, given), self.buffers)
        reserved = memory.reserved_bytes(self.buffers[0])
        self._check_form(raw)
        if not {_storage(x) for x in outputs(raw)}.isdisjoint(_storage(x) for x in outputs(earlier)):
            raise Failed("wrong", "a call overwrites the output of the call before")
        self._check_inputs(1)
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

    def _check_inputs(self, index: int) -> None:
        if not all(torch.equal(b, t) for b, t in zip(self.buffers, self.sets[index], strict=True)):
            raise Failed("wrong", "a call changes its inputs")

    def _judge(self, raw: Any) -> Message:
        """Both errors of an output for what the buffers hold now. A wrong one keeps its errors on record."""
        return judge(self.task, self.plugin.family, self.buffers, raw, self.rows, self.workload.seed + self.draws)

    def block(self, calls: int, head: int, turn: int, check: bool) -> Message:
        """Times one block on the next set of values. With `check`, on fresh values, and its output is checked."""
        self.stage = "timed call"
        shown = turn % len(self.sets)
        if check:
            inputs.fill(self.sets[shown], self.workload, self.draws)
            self.rows = reference.sample_rows(self.workload.seq, self.workload.seed + self.draws)
            self.draws += 1
        self._show(shown)
        if check:
            memory.poison(self.buffers[0])
        timed, raw = self.timer.block(calls, head)
        self.calls += calls + head
        answer: Message = {"start": timed.start, "seconds": timed.seconds, "calls_s": timed.total_seconds}
        if timed.wall_s is not None:
            answer["wall_s"] = timed.wall_s
        if check:
            self._check_form(raw)
            self._check_inputs(shown)
            # A block repeats a short call on the same values: one that remembers its last answer would win.
            if calls + head > 1 and _storage(outputs(self.task.call(*self.buffers))[0]) == _storage(outputs(raw)[0]):
                raise Failed("wrong", "a call returns the output of the call before once more")
            checks = self._judge(raw)
            answer |= checks | {"calls_s": answer["calls_s"] + checks["calls_s"]}
        self._check_global_state()
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
        before, calls = self.gpu.energy_j(), max(1, ceil(max(energy_s, BLOCK_SECONDS) / self.call_s))
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

    def _check_global_state(self) -> None:
        now = _global_state()
        for name, before in self.global_state.items():
            if now.get(name) != before:
                # What the environment holds may be a secret.
                values = "" if name.startswith("os.environ") else f" was {before}, now {now[name]}"
                raise Failed("wrong", f"changes global state: {name}{values}")


def _global_state() -> dict[str, Any]:
    return {
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_default_dtype()": str(torch.get_default_dtype()),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.backends.cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "torch.initial_seed()": torch.initial_seed(),
        # Variables that are added, as torch.compile does, change nothing for others.
        **{f"os.environ[{name!r}]": value for name, value in os.environ.items()},
    }


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
