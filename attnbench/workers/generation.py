"""Two-phase inference: a prompt is taken in at once, then token after token comes out of a stack of blocks.

With a cache each layer keeps a state and a step computes the new token alone; without, every step computes all tokens
again. Both run the same weights on the same tokens, and must say the same.

    decoder-only   the prompt goes through the stack once (prefill); tokens are appended to it
    decoder        the prompt goes through a stack of encoder blocks; the decoder begins with one token of its own
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnbench.devices import device
from attnbench.plugin import Call, Decoding, Plugin, built
from attnbench.task import inputs
from attnbench.task.transformer import Block, MultiHead, Stack
from attnbench.theory import costs
from attnbench.workers.messages import Generated, printable
from attnbench.workload import Workload


@dataclass
class _Slot:
    """The attention of one layer: what runs in it changes from step to step, and so does its state."""

    call: Call | None = None
    decoding: Decoding | None = None
    state: Any = None
    seen: tuple[Tensor, ...] = field(default=())

    def __call__(self, *tensors: Tensor) -> Tensor:
        if self.decoding is not None:
            out, self.state = self.decoding.step(self.state, *tensors)
            return out
        assert self.call is not None
        self.seen = tensors
        return self.call(*tensors)


def generate(plugin: Plugin, workload: Workload, prompt: int, tokens: int, repeats: int) -> Generated:
    """Generates `tokens` tokens after a prompt, `repeats` times each way, the two ways in turn for each token.

    workload: a block of phase decode, whose lengths are not looked at. The tokens are drawn beforehand: nothing here
    has a vocabulary, and a token costs the same whatever it is.

    Returns:
        "prompt_s" and lists "with_s", "without_s" of median seconds for each token; "difference", the relative L2 norm
        of what both ways put out; "implementation".
    """
    torch.set_num_threads(workload.threads)
    torch.set_grad_enabled(False)
    run, on = _Run(plugin, workload, prompt, tokens), device.of(workload.device)
    for _ in range(2):  # the first one warms up
        run.prepare()
    with_s: list[list[float]] = [[] for _ in range(tokens)]
    without_s: list[list[float]] = [[] for _ in range(tokens)]
    prompts, off, norm = [], 0.0, 0.0
    for repeat in range(repeats):
        prompts.append(on.once(run.prepare, [])[0])
        for i in range(tokens):
            ways: list[tuple[list[float], Callable[[], Tensor]]] = [
                (with_s[i], lambda i=i: run.step(i)),  # type: ignore[misc]
                (without_s[i], lambda i=i: run.whole(i)),  # type: ignore[misc]
            ]
            outs = []
            for seconds, way in ways if (repeat + i) % 2 else ways[::-1]:
                took, out = on.once(way, [])
                seconds.append(took)
                outs.append(out.double())
            off, norm = off + float((outs[0] - outs[1]).square().sum()), norm + float(outs[0].square().sum())
    return Generated(
        prompt_s=statistics.median(prompts),
        with_s=[statistics.median(s) for s in with_s],
        without_s=[statistics.median(s) for s in without_s],
        difference=(off / norm) ** 0.5,
        implementation=printable(str(run.implementation)),
    )


class _Run:
    """Both ways, ready to be timed: `prepare` takes the prompt in, `step(i)` and `whole(i)` give the i-th new token."""

    def __init__(self, plugin: Plugin, workload: Workload, prompt: int, tokens: int) -> None:
        w = self.workload = workload
        self.prompt, self.crossed = prompt, w.block == "decoder"
        self.past = 0 if self.crossed else prompt  # tokens of the decoder's own before the first new one
        lengths = [self.past + i + 1 for i in range(tokens)]
        shape = w.replace(phase="forward", seq=prompt, kv_seq=prompt, mask="causal")
        self.parts = costs.attentions(self._whole(lengths[0]))
        gates = {name: plugin.gates(part) for name, part in self.parts.items()}
        self.slots = [{name: _Slot() for name in self.parts} for _ in range(w.layers)]
        self.stack = Stack(w, self.slots, gates)
        self.calls = [self._built(plugin, self._whole(n)) for n in lengths]
        self.decodings = [self._decodings(plugin, n) for n in lengths]
        self.implementation = next(iter(self.decodings[0].values())).implementation
        self.capacity = {"self": lengths[-1], "cross": prompt}
        x = w.replace(phase="forward", block="decoder-only", mask="causal", seq=lengths[-1], kv_seq=lengths[-1])
        (self.x,) = _filled(x)  # (batch, past + tokens, width)
        self.memory: Tensor | None = None
        if self.crossed:
            encoder = shape.replace(block="encoder", mask="full")
            calls = self._built(plugin, encoder)
            self.encoder = Stack(encoder, [calls] * w.layers, {"self": gates["self"]})
            (self.source,) = _filled(encoder)
        else:
            self.prefill = self._built(plugin, shape)

    def _whole(self, length: int) -> Workload:
        keys = self.prompt if self.crossed else length
        return self.workload.replace(phase="forward", seq=length, kv_seq=keys, mask="causal")

    def _built(self, plugin: Plugin, workload: Workload) -> dict[str, Call]:
        return {name: built(plugin, part).call for name, part in costs.attentions(workload).items()}

    def _decodings(self, plugin: Plugin, length: int) -> dict[str, Decoding]:
        keys = {"self": length, "cross": self.prompt}
        step = costs.attentions(self.workload.replace(seq=1, kv_seq=length))
        return {name: plugin.decoding(part.replace(kv_seq=keys[name])) for name, part in step.items()}

    def prepare(self) -> None:
        """The first phase: the encoder's output, or the prompt's keys and values in every layer."""
        if self.crossed:
            self.memory = self.encoder(self.source)  # (batch, prompt, width)
            empty = self.x[:, :0]
            for layer, block in zip(self.slots, self.stack.blocks, strict=True):
                assert isinstance(block, Block)
                assert block.cross_attention is not None
                for name, sublayer, source in (
                    ("self", block.self_attention, empty),
                    ("cross", block.cross_attention, self.memory),
                ):
                    assert isinstance(sublayer.layer, MultiHead)
                    self._start(layer[name], name, sublayer.layer.tokens(source))
            return
        self._set(self.prefill)
        self.stack(self.x[:, : self.past])
        for layer in self.slots:
            self._start(layer["self"], "self", layer["self"].seen[1:])

    def _start(self, slot: _Slot, name: str, tokens: Sequence[Tensor]) -> None:
        slot.state, slot.seen = self.decodings[0][name].start(*tokens, capacity=self.capacity[name]), ()

    def _set(self, calls: Mapping[str, Call]) -> None:
        for layer in self.slots:
            for name, slot in layer.items():
                slot.call, slot.decoding = calls[name], None

    def step(self, i: int) -> Tensor:
        """The i-th new token through states that hold all before it: (batch, 1, width)."""
        for layer in self.slots:
            for name, slot in layer.items():
                slot.decoding = self.decodings[i][name]
        at = self.past + i
        out: Tensor = self.stack(self.x[:, at : at + 1])
        return out

    def whole(self, i: int) -> Tensor:
        """The same token, by computing all tokens up to it: (batch, 1, width)."""
        self._set(self.calls[i])
        x = self.x[:, : self.past + i + 1]
        out: Tensor = self.stack(x, self.memory) if self.crossed else self.stack(x)
        return out[:, -1:]


def _filled(workload: Workload) -> list[Tensor]:
    tensors = inputs.empty(workload)
    inputs.fill(tensors, workload, 0)
    return tensors
