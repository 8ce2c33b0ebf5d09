"""Judges what a task's call returned against float64: the output, the attention inside a block, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from attnbench.judge import deviation, reference
from attnbench.judge.deviation import Error
from attnbench.judge.reference import EVERY_IN_BLOCK, EVERY_ROW, expected_block
from attnbench.plugin import Definition, Formula, Recurrence, Softmax
from attnbench.task.call import Tap, Task, outputs
from attnbench.task.transformer import Block
from attnbench.workload import Workload

_PAIRS = 1 << 25  # (query, key) pairs whose gradients are computed in float64 for one check: about a second
_GLANCE_ROWS = 4
# Times the tolerance: what a block quantizes its projections rounded first, to this side of an edge or that; and where
# it rounds softmax's weights as well, which then has steps of 4 bits.
_EDGES, _MORE_EDGES = 2, 3
_SAMPLED = 256  # the same where an error is only told, or was found before and is looked for again
_RECURRENT_PAIRS = 1 << 14  # what a token of a recurrence counts for, as states of all heads are carried one by one
Errors = dict[str, Error | None]


@dataclass(frozen=True)
class Judgement:
    """Errors as a record's columns, `tolerance` among them, and what is wrong; None where nothing is."""

    columns: dict[str, float]
    problem: str | None


def needs_taps(task: Task) -> bool:
    """Whether what a call returns can't be judged without the attentions inside it: see `judge`."""
    w = task.workload
    return w.scope == "attention" or w.trains or not _is_whole(task)


def _is_whole(task: Task) -> bool:
    w = task.workload
    inside = any(isinstance(d, Recurrence) or (isinstance(d, Softmax) and d.chosen) for d in task.definitions.values())
    return task.stack is not None and w.layers == 1 and not w.lengths and not inside


def judge(
    task: Task,
    family: str,
    tensors: Sequence[Tensor],
    raw: Any,
    taps: Sequence[Tap],
    draw: int,
    apart: bool = True,
    ends: bool = True,
    again: bool = False,
) -> Judgement:
    """Whether an output is that of the function that the variant defines, and how far that is from softmax attention.

    A stack of several blocks is judged by the attentions inside it alone: an end-to-end reference would compute every
    layer but the last at every position, in O(layers * seq^2) of float64. So is a block around a recurrence, which
    would be gone through token by token twice, and one around what chooses keys by their values: a choice is sharp, and
    what rounding does to a block's projections makes it another one.

    tensors: what the call that returned `raw` got. taps: the attentions inside it, as `Task.taps` tells them.
    draw: which rows are looked at, and which heads' gradients.
    apart: tell the approximation error, too, of fewer rows, and whether the attentions inside a whole block are right.
    ends: judge what a whole block puts out; else the attentions inside it alone, as somebody else judges that.
    again: all rows of a short problem were looked at before; some will do.
    """
    w = task.workload
    allowed = deviation.tolerance(w, family, *task.definitions.values())
    columns = {"tolerance": allowed}
    whole = _is_whole(task)
    found, problems = _end_to_end(task, tensors, outputs(raw)[0], draw, allowed, apart) if whole and ends else ({}, [])
    shown = [each for tap in taps for each in task.problems(tap)]
    every = _SAMPLED if whole or again else EVERY_ROW
    for part, tap in shown:
        errors, problem = _tap(task, part, tap, draw, allowed, apart and not whole, every)
        found = found if whole else _worse(found, errors)
        problems.append(problem)
    if family != "quantized" and any(map(deviation.rounds_weights, task.definitions.values())):
        problems.append(f"rounds softmax's weights, for which it is given room, and calls itself {family}")
    if family == "exact" and (off := found.get("approximation")) and not off.rel_l2 <= allowed:
        problems.append(f"calls itself exact, and is off softmax attention by {off.rel_l2:.1e} (relative L2)")
    for prefix, worst in found.items():
        columns |= worst.columns(prefix) if worst else {}
    if w.trains:
        told, problem = gradients(task, shown, deviation.gradient_tolerance(w, family), draw)
        columns |= told
        problems.append(problem)
    if not all(bool(x.isfinite().all()) for x in outputs(raw)):  # all rows, not the sampled ones alone
        problems.insert(0, "output has NaN or infinite values")
    return Judgement(columns, next((problem for problem in problems if problem), None))


def glance(task: Task, family: str, tensors: Sequence[Tensor], raw: Any, draw: int) -> str | None:
    """What is wrong with a few rows of one head of an output, at a small part of what the call took; or None.

    Nothing is looked at where that would take long: blocks, ragged batches, recurrences, a quantized past, and heads
    that are mixed. Nor is where there are sinks.
    """
    w, definition = task.workload, task.definitions["self"]
    operands = definition.operands if isinstance(definition, Softmax) else None
    mixed = isinstance(definition, Softmax) and definition.smooth
    left_out = w.scope == "block" or w.lengths or w.sinks or mixed
    if left_out or isinstance(definition, Recurrence | Formula) or (operands and w.decodes):
        return None
    drawn = Random(draw)
    b, h = drawn.randrange(w.batch), drawn.randrange(w.kv_heads)
    batch, head, heads = slice(b, b + 1), slice(h, h + 1), slice(h * w.group, (h + 1) * w.group)
    rows = torch.tensor(sorted(drawn.sample(range(w.seq), min(w.seq, _GLANCE_ROWS))), device=tensors[0].device)
    query, *tokens = tensors[:-1] if w.trains else tensors
    if operands:
        query, *tokens = operands(query, *tokens)
    tokens = [x[batch, head] for x in tokens]
    if past := task.past[0].get("self"):
        tokens = [torch.cat([old[batch, head], new], 2) for old, new in zip(past, tokens, strict=True)]
    key, value, *gates = tokens
    every = query[batch, heads]
    part = task.parts["self"]
    should = reference.expected_at(definition, part, every[:, :, rows], key, value, rows, gates, every, h)
    actual = outputs(raw)[0].detach()[batch, heads][:, :, rows]
    error = deviation.past_edges(deviation.compare(actual, should), definition)
    return deviation.verdict_of_rows(error, deviation.tolerance(w, family, definition))


def _worse(one: Errors, other: Errors) -> Errors:
    return {name: max(one.get(name), other[name], key=deviation.badness) for name in other}


def _end_to_end(
    task: Task, tensors: Sequence[Tensor], out: Tensor, draw: int, allowed: float, apart: bool
) -> tuple[Errors, list[str | None]]:
    """Of a single block's output."""
    w = task.workload
    assert task.stack is not None
    block = task.stack.blocks[0]
    assert isinstance(block, Block)
    has_memory = w.block == "decoder" and not w.decodes
    memory = tensors[1] if has_memory else None

    def error(definitions: Mapping[str, Definition], every: int) -> Error:
        rows = reference.sample_rows(w.seq, draw, every=every)
        should = expected_block(w, definitions, block, tensors[0], memory, rows, task.past[0])
        return deviation.compare(out.index_select(1, rows.to(out.device)), should)

    implementation = error(task.definitions, EVERY_IN_BLOCK if apart else _SAMPLED)
    found: Errors = {"implementation": implementation}
    if all(d == Softmax() for d in task.definitions.values()):
        found["approximation"] = implementation
    elif apart:
        found["approximation"] = error({name: Softmax() for name in task.definitions}, _SAMPLED)
    every = task.definitions.values()
    rounds = any(map(deviation.rounds_weights, every))
    edges = _MORE_EDGES if rounds else _EDGES if any(map(reference.is_of_all, every)) else 1
    return found, [deviation.verdict(implementation, edges * allowed)]


def _tap(
    task: Task, part: Workload, tap: Tap, draw: int, allowed: float, apart: bool, every: int
) -> tuple[Errors, str | None]:
    """Errors of one attention problem, and what is wrong with it. every: see `sample_rows`.

    The approximation error of a recurrence is None: there is no softmax that it approximates.
    """
    definition = task.definition(tap.name, part)
    query, key, value, *gates = (x.detach() for x in tap.tensors)

    def error(should: Callable[[Tensor], Tensor], every: int) -> Error:
        rows = reference.sample_rows(part.seq, draw, every=every)
        return deviation.compare(tap.out.detach().index_select(2, rows.to(tap.out.device)), should(rows))

    implementation = error(lambda rows: reference.expected(definition, part, query, key, value, rows, gates), every)
    found: Errors = {"implementation": implementation}
    if definition == Softmax():
        found["approximation"] = implementation
    elif isinstance(definition, Recurrence):
        found["approximation"] = None
    elif apart:
        found["approximation"] = error(lambda rows: reference.exact(part, query, key, value, rows, gates), _SAMPLED)
    return found, _located(task, tap, deviation.verdict(deviation.past_edges(implementation, definition), allowed))


def _located(task: Task, tap: Tap, problem: str | None) -> str | None:
    if problem is None or task.workload.scope == "attention":
        return problem
    layer = f" of layer {tap.layer + 1}" if task.workload.layers > 1 else ""
    return f"{tap.name}-attention{layer}: {problem}"


def gradients(
    task: Task, shown: Sequence[tuple[Workload, Tap]], allowed: float, draw: int
) -> tuple[dict[str, float], str | None]:
    """The worst relative L2 of each input's gradient, over the key/value heads looked at, and what is wrong.

    Every head costs O(seq * kv_seq) in float64: of long problems some are drawn, at least one.
    """
    columns: dict[str, float] = {}
    problem: str | None = None
    generator = torch.Generator().manual_seed(draw)
    for part, tap in shown:
        definition = task.definition(tap.name, part)
        each = part.kv_seq * part.group * (_RECURRENT_PAIRS if isinstance(definition, Recurrence) else part.seq)
        if isinstance(definition, Softmax) and definition.smooth:
            each *= part.kv_heads  # all are gone through for any
        heads = [(b, h) for b in range(part.batch) for h in range(part.kv_heads)]
        count = max(1, min(len(heads), _PAIRS // (each * len(shown))))
        names = ["query", "key", "value", *["gate"] * (len(tap.tensors) - 3)]
        up, *found = tap.gradients
        for i in torch.randperm(len(heads), generator=generator)[:count].tolist():
            b, h = heads[i]
            should = reference.gradients(definition, part, tap.tensors, up, b, h)
            for name, actual, wanted in zip(names, found, should, strict=True):
                of = slice(h * part.group, (h + 1) * part.group) if name == "query" else slice(h, h + 1)
                off = deviation.gradient_error(actual[b : b + 1, of], wanted, up[b : b + 1])
                columns[f"{name}_gradient_rel_l2"] = max(off, columns.get(f"{name}_gradient_rel_l2", 0.0))
                if not off <= allowed and problem is None:
                    said = f"gradient of {name} is off by {off:.1e} (relative L2), over the tolerance {allowed:.2g}"
                    problem = _located(task, tap, said)
    return columns, problem
