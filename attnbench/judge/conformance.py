"""Is this variant right? `check` runs it in this process on one workload, without timing it.

A run checks the same of what it times, in processes of its own: a plugin that crashes or hangs ends this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnbench import registry
from attnbench.judge import form
from attnbench.judge.values import judge
from attnbench.packages import only_whole
from attnbench.plugin import Plugin, of_function
from attnbench.task import inputs
from attnbench.task.call import NoGradient, Task, outputs
from attnbench.task.promise import promise
from attnbench.workload import Workload

Variant: TypeAlias = str | Plugin | type[Plugin] | Callable[..., Tensor]
"""A spec as `--plugins` takes it, a plugin or its class, or a function (query, key, value) -> out."""


@dataclass(frozen=True)
class Checked:
    """What became of a variant on a workload.

    status: "ok", "unsupported", "error" or "wrong". reason: in one line, "" where it is ok.
    implementation: what ran, as the variant says.
    measures: the errors as a record's columns, `implementation_max_abs` and so on; empty where no call came to an end.
    """

    status: str
    reason: str = ""
    implementation: str = ""
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def implementation_error(self) -> float | None:
        """Relative L2 against the function that the variant defines, in float64; None where it was not measured."""
        return self.measures.get("implementation_rel_l2")

    @property
    def approximation_error(self) -> float | None:
        """Relative L2 against exact softmax attention, in float64; None for a recurrence too, which has no softmax."""
        return self.measures.get("approximation_rel_l2")


def as_plugin(variant: Variant) -> Plugin:
    """Raises: AttnbenchError: a spec names no plugin, or several."""
    if isinstance(variant, str):
        return registry.create(variant)
    if isinstance(variant, Plugin):
        return variant
    return variant() if isinstance(variant, type) else of_function(variant)()


@only_whole()
def check(variant: Variant, workload: Workload, *, strided: bool = False) -> Checked:
    """Calls a variant twice on different values: right values, shapes and dtypes, inputs untouched, no shared memory.

    variant: a spec such as "int8:rows=32", a `Plugin` or its class, or any function f(query, key, value) -> out, which
        is held against exact softmax attention.
    workload: tensors are drawn for it as a run draws them; its threads are not set.
    strided: whether inputs lie as a block hands them on, views of (batch, length, heads, dim).

    Raises:
        AttnbenchError: a spec names no plugin, or several. What a variant raises is a status.
    """
    plugin = as_plugin(variant)
    try:
        if reason := promise(plugin, workload).unsupported:
            return Checked("unsupported", reason)
        with torch.no_grad():
            return _called(plugin, Task(plugin, workload), strided)
    except NoGradient:
        return Checked("unsupported", "its output carries no gradient: it has no backward pass")
    except Exception as problem:
        return Checked("error", f"{type(problem).__name__}: {problem}".partition("\n")[0])


def _called(plugin: Plugin, task: Task, strided: bool) -> Checked:
    w, before = task.workload, form.global_state()
    gates = task.gates["self"] if w.scope == "attention" else ()
    tensors = inputs.empty(w, gates, strided)
    said, measures, earlier = str(task.implementation), dict[str, float](), ()
    for number in (w.seed, w.seed + 1):
        inputs.fill(tensors, w, number)
        values = [x.clone() for x in tensors]
        form.poison(tensors[0])
        raw = task.call(*tensors)
        outs: tuple[Any, ...] = outputs(raw)
        if problem := form.misshapen(outs, task.shapes(), tensors):
            return Checked("wrong", problem, said, measures)
        seen = form.glimpse(outs, number)
        problem = form.overwritten(outs, earlier) or form.changed(tensors, values) or form.disturbed(before)
        if problem:
            return Checked("wrong", problem, said, measures)
        found = judge(task, plugin.family, tensors, raw, task.taps(tensors, raw), number)
        measures = {name: max(value, measures.get(name, value)) for name, value in found.columns.items()}
        if problem := form.unfinished(outs, seen) or found.problem:
            return Checked("wrong", problem, said, measures)
        earlier = outs
    return Checked("ok", "", said, measures)
