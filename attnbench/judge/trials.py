"""How a case is tried and judged, in this process and without a clock: `attempt` is the door.

A plugin that crashes or hangs ends the process: `workers` has others for that.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnbench.bias import BIASES
from attnbench.errors import Failed
from attnbench.judge import deviation, draws, form, reference
from attnbench.judge.cases import Case
from attnbench.judge.hints import hint
from attnbench.judge.values import judge
from attnbench.plugin import Definition, FeatureMap, Formula, Maps, Plugin, Recurrence, Softmax
from attnbench.task import inputs
from attnbench.task.call import NoGradient, Task, outputs
from attnbench.task.promise import promise, refusal
from attnbench.workload import DEVICES, DTYPES, PHASES, Workload

COARSE = 0.05  # relative L2 where rounding is blown up by large scores: finite, and about right
_OURS = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__), "<")
_GARBAGE = 100.0  # behind the end of an entry of a ragged batch, where nothing may be read
_BIASES = tuple(f"{name}-bias" for name in BIASES)
_HULL = 1.05  # an average lies among what it is taken of


@dataclass(frozen=True)
class Checked:
    """What became of a variant on a workload.

    status: "ok", "unsupported", "error" or "wrong". reason: in one line, "" where it is ok.
    implementation: what ran, as the variant says.
    measures: the errors as a record's columns, `implementation_max_abs` and so on; empty where no call came to an end.
    traceback: of what it raised.
    """

    status: str
    reason: str = ""
    implementation: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    traceback: str = ""

    @property
    def implementation_error(self) -> float | None:
        """Relative L2 against the function that the variant defines, in float64; None where it was not measured."""
        return self.measures.get("implementation_rel_l2")

    @property
    def approximation_error(self) -> float | None:
        """Relative L2 against exact softmax attention, in float64; None for a recurrence too, which has no softmax."""
        return self.measures.get("approximation_rel_l2")


def attempt(plugin: Plugin, case: Case) -> Checked:
    """What becomes of a variant on a case. What it raises is a status."""
    try:
        if case.trial != "said" and (reason := promise(plugin, case.workload).unsupported):
            return Checked("unsupported", reason)
        with torch.no_grad():
            return TRIALS[case.trial](plugin, case)
    except NoGradient:
        return Checked("unsupported", "its output carries no gradient: it has no backward pass")
    except Failed as ended:
        return Checked(ended.status, ended.reason)
    except Exception as problem:
        said = first_line(problem) + _where(problem)
        return Checked("error", said, traceback="".join(traceback.format_exception(problem)))


def first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}".partition("\n")[0]


def _where(problem: BaseException) -> str:
    """The line of the plugin's own code that it comes from, such as " (mine.py:31)"."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    return f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""


def _wrong_if(problem: str | None) -> None:
    if problem:
        raise Failed("wrong", problem)


def _call(plugin: Plugin, case: Case) -> Checked:
    return called(plugin, Task(plugin, case.workload), case.lay, case.values)


def called(plugin: Plugin, task: Task, lay: str = "contiguous", values: str = "") -> Checked:
    """Two calls on different values: right values, shapes and dtypes, inputs untouched, no shared memory.

    lay, values: see `draws`.
    """
    w, before = task.workload, form.global_state()
    like, laid = _laid(task, lay)
    said, measures, earlier = str(task.implementation), dict[str, float](), ()
    for number in (w.seed, w.seed + 1):
        _drawn(like, w, number, values)
        laid.fill(like)
        tensors = laid.views
        kept, around = [x.clone() for x in tensors], laid.surroundings()
        form.poison(tensors[0])
        raw = task.call(*tensors)
        outs: tuple[Any, ...] = outputs(raw)
        problem = form.misshapen(outs, task.shapes(), tensors)
        if not problem:
            seen = form.glimpse(outs, number)
            problem = form.overwritten(outs, earlier) or form.changed(tensors, kept) or form.disturbed(before)
        if not problem and laid.overrun(around):
            problem = "a call writes beside its inputs"
        problem = problem or _padding(w, outs)
        if problem:
            return Checked("wrong", problem, said, measures)
        found, problem = _judged(task, plugin.family, tensors, raw, number, values)
        measures = {name: max(value, measures.get(name, value)) for name, value in found.items()}
        if problem := form.unfinished(outs, seen) or problem:
            return Checked("wrong", problem, said, measures)
        earlier = outs
    return Checked("ok", "", said, measures)


def _padding(workload: Workload, outs: Sequence[Tensor]) -> str | None:
    """What is put out behind the end of a ragged batch's entries, where 0 should be: of the output, then gradients."""
    if not workload.lengths or workload.scope == "block":
        return None
    for b, entry in enumerate(workload.entries()):
        for i, out in enumerate(outs):
            end = entry.seq if i < 2 else entry.kv_seq  # of output and query; of key and value
            if bool(out[b, :, end:].count_nonzero()):
                what = "a gradient" if i else "the output"
                return f"{what} is not 0 behind the end of an entry of {entry.kv_seq} tokens"
    return None


def _laid(task: Task, lay: str) -> tuple[list[Tensor], draws.Laid]:
    """Contiguous tensors to draw into, and those that a call gets."""
    like = inputs.empty(task.workload, task.gates["self"] if task.workload.scope == "attention" else ())
    return like, draws.lay(like, lay)


def _drawn(like: list[Tensor], workload: Workload, number: int, values: str) -> None:
    inputs.fill(like, workload, number)
    for b, entry in enumerate(workload.entries() if workload.lengths and workload.scope == "attention" else ()):
        ends = (entry.seq, *(entry.new for _ in like[1:]))
        for x, end in zip(like[:3], ends, strict=False):
            x[b, :, end:] = _GARBAGE
    if values:
        draws.VALUES[values].change(*like[:3])


def _judged(
    task: Task, family: str, tensors: Sequence[Tensor], raw: Any, number: int, values: str
) -> tuple[dict[str, float], str | None]:
    """Errors, and what is wrong: where scores are large gross errors only, in half precision what is no average."""
    w, definition, out = task.workload, task.definitions["self"], outputs(raw)[0]
    if not values or not (draws.VALUES[values].blown or isinstance(definition, Recurrence)):
        found = judge(task, family, tensors, raw, task.taps(tensors, raw), number)
        plain = definition == Softmax() and w.is_plain and not w.lengths and set(w.beyond) <= {"scale", *_BIASES}
        off = found.columns.get("implementation_rel_l2", 0.0)
        if plain and found.problem and (known := hint(w, tensors, out, family, off)):
            return found.columns, f"{found.problem}; it fits {known}"
        return found.columns, found.problem
    if not all(bool(x.isfinite().all()) for x in outputs(raw)):
        return {}, "output has NaN or infinite values"
    if w.trains:
        return {}, None  # gradients of such scores are rounding alone
    if w.dtype == "float32":
        query, key, value, *gates = tensors
        should = reference.expected(definition, w, query, key, value, torch.arange(w.seq), gates)
        off = deviation.compare(out, should).rel_l2
        most = float(should.abs().max())  # beyond float64, or products of denormal numbers, which are 0
        none = most != most or most < torch.finfo(torch.float32).tiny
        return {}, None if off <= COARSE or none else f"implementation error {off:.1e} (relative L2)"
    most = _HULL * float(tensors[2].double().abs().max())
    if isinstance(definition, Softmax) and definition.operands is None and float(out.double().abs().max()) > most:
        return {}, f"an average of values up to {most:.3g} is {float(out.double().abs().max()):.3g}"
    return {}, None


def _twice(plugin: Plugin, case: Case) -> Checked:
    """The same values, before and behind others, give the same bits."""
    task = Task(plugin, case.workload)
    like, laid = _laid(task, case.lay)
    outs = []
    for number in (0, 1, 0):
        _drawn(like, case.workload, number, case.values)
        laid.fill(like)
        outs.append(task.call(*laid.views).clone())
    off = deviation.compare(outs[2], outs[0].double()).rel_l2
    if torch.equal(outs[0], outs[2]):
        return Checked("ok", "", str(task.implementation))
    said = f"the same inputs give another output after a call on others: relative L2 {off:.1e}"
    return Checked("wrong", said, str(task.implementation))


def _no_batch(plugin: Plugin, case: Case) -> Checked:
    """A batch of 0, which no workload has: an empty output of the right shape, or an exception."""
    task = Task(plugin, case.workload)
    like, _ = _laid(task, case.lay)
    try:
        out = task.call(*(x[:0] for x in like))
    except Exception as refused:
        return Checked("ok", "", f"{task.implementation}; refuses: {first_line(refused)}")
    shape = (0, *task.shapes()[0][1:])
    found = getattr(out, "shape", None)
    if found is None or tuple(found) != shape:
        return Checked("wrong", f"of a batch of 0 the output has shape {found and tuple(found)}, not {shape}")
    return Checked("ok", "", str(task.implementation))


_STEPS = 6


def _steps(plugin: Plugin, case: Case) -> Checked:
    """Step after step from one past, each with the state of the one before, and each twice: all are as defined."""
    last = case.workload
    lengths = [n for i in reversed(range(_STEPS)) if (n := last.kv_seq - i * last.seq) >= last.seq]
    each = [last.replace(kv_seq=n) for n in lengths]
    if reason := next((found for w in each if (found := refusal(plugin, w))), None):
        return Checked("unsupported", reason)
    made = [plugin.decoding(w) for w in each]
    whole = last.replace(phase="forward", seq=last.kv_seq)
    tensors = inputs.empty(whole, plugin.gates(last))
    inputs.fill(tensors, whole, 0)
    past, first = [x[:, :, : each[0].past].clone() for x in tensors[1:]], each[0].past
    kept, before = [x.clone() for x in past], form.global_state()
    state, columns = made[0].start(*past, capacity=last.kv_seq), dict[str, float]()
    allowed = deviation.tolerance(last, plugin.family, plugin.definition(last))
    for number, (w, decoding) in enumerate(zip(each, made, strict=True), 1):
        given = [x[:, :, w.past : w.kv_seq].clone() for x in tensors]
        should = _defined(plugin, w.replace(seq=w.kv_seq - first), tensors, w.seq)
        for again in ("", " once more from the same state"):
            values = [x.clone() for x in given]
            out, following = decoding.step(state, *given)
            shape = (w.batch, w.heads, w.seq, w.value_dim)
            problem = form.misshapen([out], [shape], given) or form.changed(given, values) or form.disturbed(before)
            if not problem:
                error = deviation.compare(out, should)
                for name, value in error.columns("implementation").items():
                    columns[name] = max(value, columns.get(name, value))
                problem = deviation.verdict(deviation.past_edges(error, plugin.definition(w)), allowed)
            if problem:
                said = f"step {number} of {len(each)}, {w.past} tokens before it{again}: {problem}"
                return Checked("wrong", said, decoding.implementation, columns)
        state = following
    problem = "a step changes the past that it was started with" if form.changed(past, kept) else None
    columns |= {"tolerance": allowed}
    return Checked("wrong" if problem else "ok", problem or "", made[0].implementation, columns)


def _defined(plugin: Plugin, since: Workload, tensors: Sequence[Tensor], count: int) -> Tensor:
    """The last `count` rows of all that are new since the state was made, of which a definition may tell the past."""
    query, *tokens = (x[:, :, : since.kv_seq] for x in tensors)
    key, value, *gates = tokens
    rows = torch.arange(since.seq - count, since.seq)
    return reference.expected(plugin.definition(since), since, query[:, :, since.past :], key, value, rows, gates)


def _compiled(plugin: Plugin, case: Case) -> Checked:
    """torch.compile of a block around it puts out what is right of the block."""
    task = Task(plugin, case.workload)
    tensors = inputs.empty(case.workload)
    inputs.fill(tensors, case.workload, 0)
    eager, raw = task.call(*tensors), torch.compile(task.call)(*tensors)
    _wrong_if(form.misshapen(outputs(raw), task.shapes(), tensors))
    error = deviation.compare(raw, eager.double())
    if problem := deviation.verdict(error, deviation.tolerance(case.workload, plugin.family)):
        return Checked("wrong", f"compiled it says something else than before: {problem}", str(task.implementation))
    found = judge(task, plugin.family, tensors, raw, [], 0)
    return Checked("wrong" if found.problem else "ok", found.problem or "", str(task.implementation), found.columns)


_HONOURED = ("scale", "window", "tree", "softcap", "sinks", *_BIASES)
_ASKED: tuple[dict[str, Any], ...] = (
    {}, {"mask": "causal"}, {"seq": 1}, {"kv_seq": 1000}, {"heads": 8}, {"head_dim": 20},
)  # fmt: skip


def _said(plugin: Plugin, case: Case) -> Checked:
    """What it says of itself, of many workloads, is of the right kind and the same each time."""
    _wrong_if(_known("phases", plugin.phases, PHASES) or _known("devices", plugin.devices, DEVICES))
    _wrong_if(_known("honours", plugin.honours, _HONOURED) if plugin.honours else None)
    _wrong_if(None if isinstance(plugin.study, bool) else f"study is {plugin.study!r}: True or False")
    like = case.workload
    for dtype in DTYPES:
        for changes in _ASKED:
            w = like.replace(dtype=dtype, **changes)
            said = plugin.supports(w)
            if said is not None and not (isinstance(said, str) and said):
                return Checked("wrong", f"supports says {said!r}: None where it can, else why not in a few words")
            _wrong_if(None if plugin.supports(w) == said else f"supports says {said!r} first, and then another thing")
            if said is None:
                _wrong_if(_figures(plugin, w))
    return Checked("ok")


def _known(what: str, said: Sequence[str], known: Any) -> str | None:
    if isinstance(said, str) or not said or not set(said) <= set(known):
        return f"{what} is {said!r}: a tuple of some of {', '.join(known)}"
    return None


def _figures(plugin: Plugin, workload: Workload) -> str | None:
    for name in ("workspace_bytes", "flops"):
        said = getattr(plugin, name)(workload)
        if said is not None and not (isinstance(said, int) and said >= 0):
            return f"{name} says {said!r}: a whole number, or None where it isn't known"
    defined = plugin.definition(workload)
    if not isinstance(defined, Definition):
        return f"definition says {defined!r}: a Softmax, Maps, a FeatureMap, a Recurrence or a Formula"
    if isinstance(defined, Maps | FeatureMap | Recurrence | Formula) and plugin.family == "exact":
        return f"it calls itself exact and defines a {type(defined).__name__}"
    return None


TRIALS: dict[str, Callable[[Plugin, Case], Checked]] = {
    "call": _call,
    "twice": _twice,
    "no-batch": _no_batch,
    "steps": _steps,
    "compiled": _compiled,
    "said": _said,
}
"""By the word for it in a case. What wants a device's memory measured is in `workers.trial`."""
