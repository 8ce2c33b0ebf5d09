"""Small problems that reveal what round lengths and tame values hide, tried once for each kind of workload.

Lengths with an odd tail and below any tile; scores that overflow where a row's maximum is not taken off; a key that
takes all the weight; keys that are all alike.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnbench.judge import deviation, form, reference
from attnbench.plugin import Plugin
from attnbench.task import inputs
from attnbench.task.call import Task, outputs
from attnbench.task.promise import promise
from attnbench.workload import Workload

_LENGTHS = (1, 7, 33, 129, 200)
_LARGE = 40.0  # times a query: scores of a hundred and more, beyond what float32's exponential holds
_COARSE = 0.05  # relative L2 where rounding is blown up by large scores: finite, and about right


def _large(query: Tensor, key: Tensor, value: Tensor) -> None:
    query.mul_(_LARGE)


def _dominant(query: Tensor, key: Tensor, value: Tensor) -> None:
    key[:, :, 0] = 3.0 * query.mean((1, 2)).sign()[:, None]


def _constant(query: Tensor, key: Tensor, value: Tensor) -> None:
    key.copy_(key[:, :, :1].expand_as(key))


VALUES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "large scores": _large,
    "a key that stands out": _dominant,
    "keys that are all alike": _constant,
}


def problem(plugin: Plugin, like: Workload, go_on: Callable[[], bool] = lambda: True) -> str | None:
    """What is wrong with a variant on one of the small problems, or None.

    like: whose dtype, mask, head counts and head dims they have; of scope attention and phase forward.
    go_on: asked before each; a variant that compiles for each shape takes its time.
    """
    for workload, what in _problems(like):
        if not go_on():
            break
        if promise(plugin, workload).unsupported is None and (wrong := _tried(plugin, workload, what)):
            return f"at {workload.label()}{f' with {what}' if what else ''}: {wrong}"
    return None


def _problems(like: Workload) -> Iterator[tuple[Workload, str]]:
    small = like.replace(batch=1, lengths="", inputs="normal")
    for n in _LENGTHS:
        yield small.replace(seq=n, kv_seq=n), ""
    yield small.replace(seq=33, kv_seq=65), ""
    for what in VALUES:
        yield small.replace(seq=65, kv_seq=65), what


def _tried(plugin: Plugin, workload: Workload, what: str) -> str | None:
    try:
        return _wrong(Task(plugin, workload), workload, plugin.family, what)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}".partition("\n")[0]


def _wrong(task: Task, workload: Workload, family: str, what: str) -> str | None:
    tensors = inputs.empty(workload, task.gates["self"])
    inputs.fill(tensors, workload, 0)
    if what:
        VALUES[what](*tensors[:3])
    out = task.call(*tensors)
    if problem := form.misshapen(outputs(out), task.shapes(), tensors):
        return problem
    if not bool(out.isfinite().all()):
        return "output has NaN or infinite values"
    query, key, value, *gates = tensors
    rows = torch.arange(workload.seq)
    error = deviation.compare(
        out, reference.expected(task.definitions["self"], workload, query, key, value, rows, gates)
    )
    if not what:
        return deviation.verdict(error, deviation.tolerance(workload, family))
    return None if error.rel_l2 <= _COARSE else f"implementation error {error.rel_l2:.1e} (relative L2)"
