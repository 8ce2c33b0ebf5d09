"""Runs inside a worker process: makes one plugin ready for one workload, then times blocks of it on request.

Whatever a plugin does here (raise, hang, crash, print, exit) ends this process at worst, never the sweep.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnbench import reference, theory
from attnbench.bench import error, inputs, latency, machine, memory
from attnbench.bench.channel import Channel, Closed, Message, printable
from attnbench.block import Block, expected_block
from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Call, Plugin, Softmax
from attnbench.registry import canonical, instances, load
from attnbench.workload import Workload

_LONGEST_TEXT = 4000


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
                    case "prepare":
                        subject = Subject(Workload.from_dict(message.pop("workload")), **message)
                        answer = subject.prepare()
                    case "block":
                        assert subject is not None
                        answer = subject.block(**message)
                    case _:
                        assert subject is not None
                        answer = subject.leak()
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
    parts = list(theory.attentions(workload).values())
    for part in parts:
        if part.device not in plugin.devices:
            return {"unsupported": f"runs on {' and '.join(plugin.devices) or 'no device'} only"}
        if reason := plugin.supports(part):
            return {"unsupported": printable(str(reason))}
    workspaces = [plugin.workspace_bytes(part) for part in parts]
    own = [theory.flops(part) if (f := plugin.flops(part)) is None else f for part in parts]
    return {
        "workspace": None if None in workspaces else max(int(w) for w in workspaces if w is not None),
        "flops": int(theory.flops(workload) - sum(map(theory.flops, parts)) + sum(own)),
    }


class Subject:
    """One plugin made ready for one workload."""

    def __init__(self, workload: Workload, target: str, options: dict[str, Any], thorough: bool) -> None:
        self.workload, self.thorough = workload, thorough
        self.stage, self.calls, self.resident = "import", 0, 0
        memory.return_freed_pages()
        torch.set_num_threads(workload.threads)
        torch.manual_seed(workload.seed)
        torch.set_grad_enabled(False)  # for good: what a plugin does to it shows
        self.global_state = _global_state()
        self.plugin = load(target)(**options)
        # Two sets of values to rotate between, and the buffers that the calls see.
        self.sets = [inputs.empty(workload) for _ in range(2)]
        self.buffers = inputs.empty(workload)
        self.rows = reference.sample_rows(workload.seq, workload.seed)
        self.draws = len(self.sets)

    def prepare(self) -> Message:
        """Builds, makes the first calls, checks the output and measures memory."""
        self.stage = "build"
        call, attention = self._build()
        self.call = call
        for draw, tensors in enumerate(self.sets):
            inputs.fill(tensors, self.workload, draw)
        self.stage = "first call"
        self._show(0)
        memory.poison(self.buffers[0])
        first, out = latency.time_block(call, self.buffers, 1)
        self._check_form(out)
        self._check_global_state()
        facts: Message = {"setup_s": self.setup_s, "first_call_s": first.seconds, "calls_s": first.total_seconds}
        began = latency.clock()
        if self.thorough:
            self.stage = "memory and error"
            checked = self._measure_memory_and_error(out)
            facts["calls_s"] += checked.pop("calls_s")
            facts |= checked
        facts["checks_s"] = latency.clock() - began  # what a further process of the same cell is spared
        del out
        memory.keep_freed_pages()
        self.stage = "warm-up"
        steady, spent = latency.warm_up(call, self.buffers)
        facts["calls_s"] += spent
        facts["call_s"] = steady
        facts["implementation"] = printable(str(attention.implementation))
        facts["density"] = None if attention.density is None else float(attention.density)
        self._check_global_state()
        self.resident, self.calls = memory.resident_bytes(), 0
        return facts

    def _build(self) -> tuple[Callable[..., Tensor], Attention]:
        w = self.workload
        parts = theory.attentions(w)
        built: dict[str, Attention] = {}
        self.setup_s = 0.0
        for name, part in parts.items():
            start = latency.clock()
            made = self.plugin.build(part)
            self.setup_s += latency.clock() - start
            built[name] = made if isinstance(made, Attention) else Attention(made, type(self.plugin).__name__)
        self.definitions = {name: self.plugin.definition(part) for name, part in parts.items()}
        first = next(iter(built.values()))
        if w.scope != "block":
            return first.call, first
        self.taps: dict[str, tuple[Tensor, ...]] | None = None
        self.block_module = Block(w, {name: self._tapped(name, a.call) for name, a in built.items()})
        implementation = ", ".join(dict.fromkeys(a.implementation for a in built.values()))
        return self.block_module, Attention(first.call, implementation, first.density)

    def _tapped(self, name: str, call: Call) -> Call:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = call(query, key, value)
            if self.taps is not None:
                self.taps[name] = query, key, value, out
            return out

        return attend

    def _check_inside(self) -> Message:
        """Judges the attention inside the block by itself: the residual beside it would hide much of its error."""
        self.taps = {}
        spent, _ = latency.time_block(self.call, self.buffers, 1)
        taps, self.taps = self.taps, None
        facts: Message = {"calls_s": spent.total_seconds}
        for name, part in theory.attentions(self.workload).items():
            query, key, value, out = taps[name]
            should = reference.expected(self.definitions[name], part, query, key, value, self.rows)
            found = error.compare(out.index_select(2, self.rows.to(out.device)), should)
            if problem := error.verdict(found, error.tolerance(part, self.plugin.family)):
                facts |= {"failed": "wrong", "reason": f"{name}-attention: {problem}"}
        return facts

    def _show(self, index: int) -> None:
        for buffer, tensor in zip(self.buffers, self.sets[index], strict=True):
            buffer.copy_(tensor)

    def _output_shape(self) -> tuple[int, ...]:
        w = self.workload
        return (w.batch, w.seq, w.width) if w.scope == "block" else (w.batch, w.heads, w.seq, w.value_dim)

    def _check_form(self, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise Failed("wrong", f"returned a {type(out).__name__}, not a tensor")
        if tuple(out.shape) != self._output_shape():
            raise Failed("wrong", f"output has shape {tuple(out.shape)}, not {self._output_shape()}")
        if out.dtype != self.buffers[0].dtype:
            raise Failed("wrong", f"output is {out.dtype}, not {self.buffers[0].dtype}")
        if out.device.type != self.workload.device:
            raise Failed("wrong", f"output is on {out.device}, not on {self.workload.device}")
        if _storage(out) in {_storage(b) for b in self.buffers}:
            raise Failed("wrong", "output shares its memory with an input")

    def _measure_memory_and_error(self, earlier: Tensor) -> Message:
        """The second call, on other values in the same buffers, while the first one's output is still held."""
        self._show(1)
        memory.poison(self.buffers[0])
        start = latency.clock()
        out, held = memory.measure(self.call, self.buffers)
        spent = latency.clock() - start
        self._check_form(out)
        if _storage(out) == _storage(earlier):
            raise Failed("wrong", "a call overwrites the output of the call before")
        self._check_inputs(1)
        input_bytes = sum(b.nbytes for b in self.buffers)
        if self.workload.scope == "block":
            input_bytes += sum(p.nbytes for p in self.block_module.parameters())
        workspace = max(0, held - out.nbytes)
        checks = self._check_values(out)
        if self.workload.scope == "block":
            inside = self._check_inside()
            spent += inside.pop("calls_s")
            checks |= inside
        return {
            "calls_s": spent,
            "input_bytes": input_bytes,
            "output_bytes": out.nbytes,
            "workspace_bytes": workspace,
            "peak_bytes": input_bytes + out.nbytes + workspace,
            **checks,
        }

    def _check_inputs(self, index: int) -> None:
        if not all(torch.equal(b, t) for b, t in zip(self.buffers, self.sets[index], strict=True)):
            raise Failed("wrong", "a call changes its inputs")

    def _check_values(self, out: Tensor) -> Message:
        """Both errors of an output for what the buffers hold now. A wrong one keeps its errors on record."""
        w, axis = self.workload, 1 if self.workload.scope == "block" else 2
        actual = out.index_select(axis, self.rows.to(out.device))
        exact = self._expected({name: Softmax() for name in self.definitions})
        plain = all(d == Softmax() for d in self.definitions.values())
        defined = exact if plain else self._expected(self.definitions)
        implementation, approximation = error.compare(actual, defined), error.compare(actual, exact)
        allowed = error.tolerance(w, self.plugin.family)
        if not bool(out.isfinite().all()):  # all rows, not the sampled ones alone
            raise Failed("wrong", "output has NaN or infinite values")
        facts: Message = implementation.columns("implementation") | approximation.columns("approximation")
        facts["tolerance"] = allowed
        if problem := error.verdict(implementation, allowed):
            facts |= {"failed": "wrong", "reason": problem}
        return facts

    def _expected(self, definitions: Mapping[str, Any]) -> Tensor:
        if self.workload.scope == "block":
            x, memory_in = self.buffers[0], self.buffers[1] if len(self.buffers) > 1 else None
            return expected_block(self.workload, definitions, self.block_module, x, memory_in, self.rows)
        query, key, value = self.buffers
        return reference.expected(definitions["self"], self.workload, query, key, value, self.rows)

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
        timed, out = latency.time_block(self.call, self.buffers, calls, head)
        self.calls += calls + head
        answer: Message = {"start": timed.start, "seconds": timed.seconds, "calls_s": timed.total_seconds}
        if check:
            self._check_form(out)
            self._check_inputs(shown)
            # A block repeats a short call on the same values: one that remembers its last answer would win.
            if calls + head > 1 and _storage(self.call(*self.buffers)) == _storage(out):
                raise Failed("wrong", "a call returns the output of the call before once more")
            answer |= self._check_values(out)
        self._check_global_state()
        return answer

    def leak(self) -> Message:
        """Resident bytes gained a call since `prepare`."""
        return {"leak_bytes": (memory.resident_bytes() - self.resident) / max(1, self.calls)}

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
    return tensor.untyped_storage().data_ptr()
