"""What a plugin is asked to do for a workload: one call on tensors, whatever the phase, and what is known beside it.

forward   call(query, key, value, *gates[, sinks]) -> out, or of a block call(x[, memory]) -> out
decode    the same, with the new tokens alone, after a past that a state holds
train     the same with the output's gradient behind -> out, and gradients of all inputs and of a block's parameters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnbench.errors import Failed
from attnbench.plugin import Attention, Call, Decoding, Definition, Plugin, built
from attnbench.task import inputs, ragged
from attnbench.task.transformer import Stack
from attnbench.theory import costs
from attnbench.workload import Workload


class NoGradient(Exception):
    """The output of a variant carries no gradient."""


@dataclass
class Tap:
    """One attention inside a task, as it was called: query, key, value and gates, and what came out.

    gradients: of the output and of each of `tensors`, in phase train.
    """

    layer: int
    name: str
    tensors: tuple[Tensor, ...]
    out: Tensor
    gradients: tuple[Tensor, ...] = ()


Built: TypeAlias = dict[str, Attention | Decoding]
"""What a plugin made for each attention problem of one layer, by name."""


def build(plugin: Plugin, workload: Workload) -> Built:
    """Lets the plugin build whatever the workload needs of it; compiling may take it seconds."""
    made: Built = {}
    for name, part in costs.attentions(workload).items():
        if part.decodes:
            made[name] = ragged.decoding(plugin, part) if part.lengths else plugin.decoding(part)
        else:
            made[name] = ragged.build(plugin, part) if part.lengths else built(plugin, part)
    return made


class Task:
    """One plugin's call for one workload.

    call: what is timed; see the module. plain: its forward pass. implementation, density, emulated: as the plugin says.
    parts: the attention problems of one layer. definitions, gates: for each of them.
    bytes: of all tensors that it is known to hold: parameters, past and state.
    past: for each layer and problem, key, value and gates of the tokens before; empty lists but for phase decode.

    made: what `build` gave; None builds it.
    """

    def __init__(self, plugin: Plugin, workload: Workload, made: Built | None = None) -> None:
        self._plugin, self.workload = plugin, workload
        w = workload
        self.parts = costs.attentions(w)
        self.gates = {name: plugin.gates(part) for name, part in self.parts.items()}
        self.definitions: dict[str, Definition] = {n: plugin.definition(p) for n, p in self.parts.items()}
        made = made or build(plugin, w)
        first = next(iter(made.values()))
        self.implementation = ", ".join(dict.fromkeys(str(each.implementation) for each in made.values()))
        self._density = first.density
        self.emulated = any(bool(plugin.emulated(entry)) for part in self.parts.values() for entry in part.entries())
        self._taps: list[Tap] | None = None
        self.past: list[dict[str, list[Tensor]]] = []
        self.cache_bytes = 0
        calls = [self._layer(layer, made) for layer in range(w.layers)]
        self.stack = Stack(w, calls, self.gates) if w.scope == "block" else None
        plain: Call = self.stack or calls[0]["self"]
        parameters = list(self.stack.parameters()) if self.stack else []
        self.parameter_bytes = sum(p.nbytes for p in parameters)
        past = sum(x.nbytes for layer in self.past for tensors in layer.values() for x in tensors)
        self.bytes = self.parameter_bytes + past + self.cache_bytes
        self.plain, self._parameters = plain, parameters
        self.call: Callable[..., Any] = partial(CALLS[w.phase], self) if w.phase in CALLS else plain

    @property
    def density(self) -> float | None:
        """Of the last call, where it hangs on values."""
        return self._density() if callable(self._density) else self._density

    def _layer(self, layer: int, parts: Mapping[str, Attention | Decoding]) -> dict[str, Call]:
        """The attention callables of one layer, each with its own past."""
        calls: dict[str, Call] = {}
        self.past.append({})
        for name, made in parts.items():
            call = made.call if isinstance(made, Attention) else self._decoder(layer, name, made)
            calls[name] = _Tapped(self, layer, name, call) if self.workload.scope == "block" else call
        return calls

    def _decoder(self, layer: int, name: str, made: Decoding) -> Call:
        part = self.parts[name]
        past = self.past[layer][name] = inputs.past(part, self.gates[name], layer)
        state = made.start(*past, capacity=part.kv_seq)
        self.cache_bytes += _bytes(state)
        return lambda *tensors: made.step(state, *tensors)[0]

    def train(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The output, and the gradients of all inputs and parameters; the output's gradient comes last."""
        *given, up = tensors
        leaves, out = self.forward(given)
        wanted = [*leaves, *self._parameters]
        return out.detach(), *torch.autograd.grad(out, wanted, up, allow_unused=True, materialize_grads=True)

    def forward(self, given: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The forward pass of a training step: its leaves, and the output with what the backward pass needs."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in given]
            out = self.plain(*leaves)
        if out.grad_fn is None:
            raise NoGradient
        return leaves, out

    def taps(self, tensors: Sequence[Tensor], raw: Any) -> list[Tap]:
        """Every attention problem of the call that got `tensors` and returned `raw`.

        Of a block or a stack those inside it, from one more call.
        """
        if self.workload.scope == "attention":
            return [self._tap(tuple(tensors), raw)]
        with self._tapping() as taps:
            if not self.workload.trains:
                self.call(*tensors)
            else:
                *given, up = tensors
                _, out = self.forward(given)
                if not all(tap.out.requires_grad for tap in taps):
                    raise NoGradient
                inner = [x for tap in taps for x in (tap.out, *tap.tensors)]
                found = iter(torch.autograd.grad(out, inner, up, allow_unused=True, materialize_grads=True))
                for tap in taps:
                    tap.gradients = tuple(next(found) for _ in (tap.out, *tap.tensors))
        return taps

    def _tap(self, given: tuple[Tensor, ...], raw: Any) -> Tap:
        if not self.workload.trains:
            return Tap(0, "self", given, raw)
        return Tap(0, "self", given[:-1], raw[0], (given[-1], *raw[1:]))

    def touch(self) -> None:
        """Reads all parameters once, as `Pools.touch`."""
        for parameter in self._parameters:
            parameter.amax()

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the output, and in phase train of the gradients of inputs and parameters."""
        w = self.workload
        out = (w.batch, w.seq, w.width) if w.scope == "block" else (w.batch, w.heads, w.seq, w.value_dim)
        if not w.trains:
            return [out]
        gates = self.gates["self"] if w.scope == "attention" else ()
        return [out, *inputs.shapes(w, gates)[:-1], *(tuple(x.shape) for x in self._parameters)]

    def definition(self, name: str, part: Workload) -> Definition:
        """The function computed in one of `problems`."""
        return self.definitions[name] if part == self.parts[name] else self._plugin.definition(part)

    def problems(self, tap: Tap) -> Iterator[tuple[Workload, Tap]]:
        """A tap as problems to compare with a reference: one, or one for each entry of a ragged batch.

        In phase decode keys, values and gates are those of past and new tokens together.
        """
        part, past = self.parts[tap.name], self.past[tap.layer].get(tap.name)
        for b, entry in enumerate(part.entries()):
            own = slice(b, b + 1) if part.lengths else slice(None)
            query, *tokens = (x[own] for x in tap.tensors)
            if past is not None:
                tokens = [torch.cat([old[own, :, : entry.past], new], 2) for old, new in zip(past, tokens, strict=True)]
            tokens = [x if x.ndim == 1 else x[:, :, : entry.kv_seq] for x in tokens]  # sinks are (heads,)
            shown = Tap(tap.layer, tap.name, (query[:, :, : entry.seq], *tokens), tap.out[own, :, : entry.seq])
            if tap.gradients:
                up, dq, *rest = (x[own] for x in tap.gradients)
                kept = (x[:, :, : entry.kv_seq] for x in rest)
                shown.gradients = (up[:, :, : entry.seq], dq[:, :, : entry.seq], *kept)
            yield entry, shown

    @contextmanager
    def _tapping(self) -> Iterator[list[Tap]]:
        self._taps = []
        try:
            yield self._taps
        finally:
            self._taps = None


class _Tapped:
    """An attention callable inside a block, which shows what it is given while somebody looks."""

    def __init__(self, task: Task, layer: int, name: str, call: Call) -> None:
        self.task, self.layer, self.name, self.call = task, layer, name, call

    def __call__(self, *tensors: Tensor) -> Tensor:
        if self.task._taps is None:
            return self.call(*tensors)
        before = [x.detach().clone() for x in tensors]
        out = self.call(*tensors)
        # What it left in its inputs would be taken for what it was given.
        if not all(torch.equal(x.detach().nan_to_num(), y.nan_to_num()) for x, y in zip(tensors, before, strict=True)):
            raise Failed("wrong", "a call changes its inputs")
        self.task._taps.append(Tap(self.layer, self.name, tensors, out))
        return out


CALLS: dict[str, Callable[..., Any]] = {"train": Task.train}
"""What a phase does on a task's tensors, where that is not one forward pass."""


def outputs(raw: Any) -> tuple[Any, ...]:
    """All that a call returned: the output, and in phase train the gradients behind it."""
    return raw if isinstance(raw, tuple) else (raw,)


def _bytes(state: Any) -> int:
    """Of all tensors in a state, each storage once."""
    tensors = (x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, Tensor))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
