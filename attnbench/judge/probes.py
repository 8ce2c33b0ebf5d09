"""Small problems that reveal what round lengths and tame values hide, tried once for each kind of workload.

Lengths with an odd tail and below any tile; scores that overflow where a row's maximum is not taken off; a key that
takes all the weight; keys that are all alike.
"""

from collections.abc import Callable, Iterator

import torch

from attnbench.judge import deviation, form, reference
from attnbench.judge.draws import VALUES
from attnbench.judge.trials import COARSE, first_line
from attnbench.plugin import Plugin
from attnbench.task import inputs
from attnbench.task.call import Task, outputs
from attnbench.task.promise import promise
from attnbench.workload import Workload

_LENGTHS = (1, 7, 33, 129, 200)
_VALUES = ("large", "dominant", "alike")  # of draws.VALUES


def problem(plugin: Plugin, like: Workload, go_on: Callable[[], bool] = lambda: True) -> str | None:
    """What is wrong with a variant on one of the small problems, or None.

    like: whose dtype, mask, head counts and head dims they have; of scope attention and phase forward.
    go_on: asked before each; a variant that compiles for each shape takes its time.
    """
    for workload, values in _problems(like):
        if not go_on():
            break
        if promise(plugin, workload).unsupported is None and (wrong := _tried(plugin, workload, values)):
            return f"at {workload.label()}{f' with {VALUES[values].what}' if values else ''}: {wrong}"
    return None


def _problems(like: Workload) -> Iterator[tuple[Workload, str]]:
    small = like.replace(batch=1, lengths="", inputs="normal")
    for n in _LENGTHS:
        yield small.replace(seq=n, kv_seq=n), ""
    yield small.replace(seq=33, kv_seq=65), ""
    for values in _VALUES:
        yield small.replace(seq=65, kv_seq=65), values


def _tried(plugin: Plugin, workload: Workload, values: str) -> str | None:
    try:
        return _wrong(Task(plugin, workload), workload, plugin.family, values)
    except Exception as failure:
        return first_line(failure)


def _wrong(task: Task, workload: Workload, family: str, values: str) -> str | None:
    tensors = inputs.empty(workload, task.gates["self"])
    inputs.fill(tensors, workload, 0)
    if values:
        VALUES[values].change(*tensors[:3])
    out = task.call(*tensors)
    if problem := form.misshapen(outputs(out), task.shapes(), tensors):
        return problem
    if not bool(out.isfinite().all()):
        return "output has NaN or infinite values"
    query, key, value, *gates = tensors
    rows = torch.arange(workload.seq)
    definition = task.definitions["self"]
    error = deviation.compare(out, reference.expected(definition, workload, query, key, value, rows, gates))
    if not values:
        return deviation.verdict(
            deviation.past_edges(error, definition), deviation.tolerance(workload, family, definition)
        )
    return None if error.rel_l2 <= COARSE else f"implementation error {error.rel_l2:.1e} (relative L2)"
