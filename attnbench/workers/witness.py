"""A second opinion from a process that no plugin enters: it draws the values itself and compares plain bytes.

Whatever a plugin has done to the process that it lives in, to torch's operators or to the judge there, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from attnbench.judge import deviation, reference, values
from attnbench.judge.deviation import Error
from attnbench.plugin import Call, Decoding, Plugin, Softmax
from attnbench.task.call import Tap, Task
from attnbench.task.inputs import pools as pools_of
from attnbench.task.transformer import Block
from attnbench.theory.costs import attentions
from attnbench.workers.about_witness import Given
from attnbench.workers.messages import Columns
from attnbench.workload import Workload


class Witness:
    """Exact softmax attention on the values of one workload at a time, as all its cells are asked about the same."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._key: tuple[Given, int] | None = None
        self._given: list[Tensor] = []
        self._exact: dict[int, tuple[Tensor, Tensor]] = {}
        """Of each attention problem, or of the block: the rows that are looked at, and what should be there."""

    def judge(self, workload: Workload, given: Given, rows: int, output: bytes) -> tuple[Error, Columns, str | None]:
        """How far an output is from exact attention, its gradients' errors, and what is wrong if it is said to be that.

        rows: from which those to look at are drawn. output: as `as_bytes` has it: (batch, heads, seq, value_dim), or of
        a block (batch, seq, width), and behind it the gradients of training, where they are to be judged.
        """
        if self._task is None or self._task.workload != workload:
            torch.set_num_threads(workload.threads)
            torch.set_grad_enabled(False)
            self._task, self._key = Task(_Nobody(), workload), None
        if self._key != (given, rows):
            self._given, self._exact, self._key = _drawn(workload, given), {}, (given, rows)
        out, *gradients = found = _tensors(output, self._task)
        errors, columns, problem = self._errors(self._task, rows, out, gradients)
        worst = max(errors, key=deviation.badness)
        if not all(bool(x.isfinite().all()) for x in found):  # all rows
            return worst, columns, "output has NaN or infinite values"
        allowed = deviation.tolerance(workload, "exact")
        wrong = (deviation.verdict(error, allowed) for error in errors)
        return worst, columns, next(filter(None, wrong), problem)

    def _errors(
        self, task: Task, rows: int, out: Tensor, gradients: Sequence[Tensor]
    ) -> tuple[list[Error], Columns, str | None]:
        """Of the output, one for each entry of a ragged batch; of its gradients; and what is wrong with those."""
        w = task.workload
        if w.scope == "block":
            at, exact = self._of_block(task, rows)
            return [deviation.compare(out.index_select(1, at), exact)], {}, None
        tensors, up = (self._given[:-1], self._given[-1:]) if w.trains else (self._given, [])
        tap = Tap(0, "self", tuple(tensors), out, (*up, *gradients) if gradients else ())
        errors, shown = [], list(task.problems(tap))
        for i, (part, each) in enumerate(shown):
            if i not in self._exact:
                query, key, value, *sinks = each.tensors
                at = reference.sample_rows(part.seq, rows)
                self._exact[i] = at, reference.exact(part, query, key, value, at, sinks)
            at, exact = self._exact[i]
            errors.append(deviation.compare(each.out.index_select(2, at), exact))
        if not gradients:
            return errors, {}, None
        told, problem = values.gradients(task, shown, deviation.gradient_tolerance(w, "exact"), rows)
        return errors, {**told}, problem

    def _of_block(self, task: Task, rows: int) -> tuple[Tensor, Tensor]:
        if not self._exact:
            w, block = task.workload, task.stack.blocks[0] if task.stack else None
            assert isinstance(block, Block)
            at = reference.sample_rows(w.seq, rows, every=reference.EVERY_IN_BLOCK)
            first, *more = self._given[:-1] if w.trains else self._given
            memory = more[0] if more else None
            exact = dict.fromkeys(attentions(w), Softmax())
            self._exact[0] = at, reference.expected_block(w, exact, block, first, memory, at, task.past[0])
        return self._exact[0]


class _Nobody(Plugin):
    """In the place of a variant: of a task it gives weights and past, and is not called."""

    def build(self, workload: Workload) -> Call:
        return _uncalled

    def decoding(self, workload: Workload) -> Decoding:
        return Decoding(lambda *past, capacity: None, _uncalled, "")

    def ragged(self, workload: Workload) -> bool:
        return True


def _uncalled(*tensors: Any) -> Any:
    raise AssertionError("whoever judges by plain bytes calls nothing")


def _drawn(workload: Workload, given: Given) -> list[Tensor]:
    """What the call was given."""
    pools, (drawn, *altered) = pools_of(workload), given.values
    pools.draw(drawn)
    for i, number in enumerate(altered):
        pools.alter(number, few=i > 0 or not given.thorough)
    return pools.views(1, given.places)[0]


def _tensors(output: bytes, task: Task) -> list[Tensor]:
    """What `as_bytes` was given, as far as it goes: the output, and what a training step puts out behind it."""
    flat = torch.frombuffer(bytearray(output), dtype=getattr(torch, task.workload.dtype))
    found: list[Tensor] = []
    for shape in task.shapes():
        if not len(flat):
            break
        found.append(flat[: prod(shape)].view(shape))
        flat = flat[prod(shape) :]
    return found


def as_bytes(*outputs: Tensor) -> bytes:
    """All values of tensors, as they lie in memory when they are contiguous."""
    return b"".join(x.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in outputs)
