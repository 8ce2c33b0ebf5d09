"""What was measured beside what theory says of it: growth, workspace, crossings, longest lengths, saved activations.

Every function takes rows as `records.load` gives them, of one run or several, or those of a report's panel, and returns
a tidy table; nothing is drawn. What a plugin itself counts (`variant_flops`, `predicted_workspace_bytes`) stands for
theory where there is it, since the formulas of `attnbench.theory` are those of exact attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from attnbench import theory
from attnbench.analysis import WORKLOAD, Row, attention_share, finished, fit_exponent, records, workload_of
from attnbench.workload import Workload

PROBLEM = tuple(name for name in WORKLOAD if name not in ("seq", "kv_seq", "batch"))
"""The columns that rows have in common which differ in length; a table of this module starts with them and `plugin`."""

BEFORE, BEYOND, UNKNOWN = 0.0, math.inf, math.nan
"""A crossing before the shortest length measured, one beyond the longest, and one that measurements leave open."""

_LONGEST = 2**40  # tokens
_MOST = 2.0  # of a power of l: no more than all pairs are held
_CLOSE = 0.1  # of an exponent to a whole number that names an order
_NEEDED = ("latency_s", "peak_bytes", "workspace_bytes", "predicted_workspace_bytes", "variant_flops", "saved_bytes",
           "input_bytes", "output_bytes")  # fmt: skip


def growth(frame: pd.DataFrame) -> pd.DataFrame:
    """The exponent p of l^p of latency, peak memory and workspace, measured and predicted over the same lengths.

    Latency is predicted to grow as operations do, peak memory as `peak` does. Both are fitted in the same way
    (`analysis.fit_exponent`), so that what lower orders add at finite lengths is in both.

    Returns a row for each series and quantity that has three lengths: PROBLEM, plugin, quantity ("latency",
    "peak memory" or "workspace"), measured with its 95% interval low and high, predicted, shortest and longest length
    of the fit, and order: of the operations at the two longest lengths, "l^2", "l" or "constant", or "" between those.
    """
    table, holders = [], _holders(frame)
    for shared, rows in series(frame):
        done = records(finished(rows))
        lengths = [row["length"] for row in done]
        columns: dict[str, tuple[str, Callable[[Row], float]]] = {
            "latency": ("latency_s", operations),
            "peak memory": ("peak_bytes", partial(_peak_of, holders=holders)),
            "workspace": ("workspace_bytes", _workspace_of),
        }
        for quantity, (column, theirs) in columns.items():
            values = [float(row[column]) for row in done]
            fit = fit_exponent(lengths, values)
            if fit:
                usable = [v > 0 and math.isfinite(v) for v in values]
                same = [theirs(row) if use else math.nan for row, use in zip(done, usable, strict=True)]
                predicted = fit_exponent(lengths, same)
                table.append(
                    shared
                    | {"quantity": quantity, "measured": fit.value, "low": fit.low, "high": fit.high}
                    | {"predicted": predicted.value if predicted else math.nan}
                    | {"shortest": fit.lengths[0], "longest": fit.lengths[-1], "order": order(records(rows))}
                )
    return _tidy(table, "quantity", "measured", "low", "high", "predicted", "shortest", "longest", "order")


def workspace(frame: pd.DataFrame) -> pd.DataFrame:
    """Workspace as measured over what was predicted, for each series.

    Returns PROBLEM, plugin, cells (how many), ratio (the median), least and most, predicted_least and predicted_most
    (bytes). A block's prediction is `block_workspace`; there is none for a block that decodes, and none for training.
    """
    table = []
    for shared, rows in series(frame):
        pairs = [(float(row["workspace_bytes"]), _workspace_of(row)) for row in records(finished(rows))]
        known = [(ours, theirs) for ours, theirs in pairs if math.isfinite(ours) and theirs > 0]
        if known:
            ratios, theirs = [a / b for a, b in known], [b for _, b in known]
            table.append(
                shared
                | {"cells": len(known), "ratio": float(np.median(ratios)), "least": min(ratios), "most": max(ratios)}
                | {"predicted_least": min(theirs), "predicted_most": max(theirs)}
            )
    return _tidy(table, "cells", "ratio", "least", "most", "predicted_least", "predicted_most")


def shares(frame: pd.DataFrame) -> pd.DataFrame:
    """Attention's share of a block: of its operations (`theory.flops_by_part`), of its time and of its peak memory.

    Returns PROBLEM, plugin, length, predicted, measured with its interval low and high, and memory: fractions, for
    single blocks whose attention was measured alone (`analysis.attention_share`). memory is the workspace of attention
    alone over the block's peak.
    """
    table = []
    for shared, rows in series(with_attention(frame)):
        table += [
            shared
            | {"length": row["length"], "predicted": _attention(row) / operations(row)}
            | {"measured": row["share"], "low": row["share_low"], "high": row["share_high"]}
            | {"memory": row["attention_workspace_bytes"] / row["peak_bytes"]}
            for row in records(rows[rows["share"].notna()])
            if shared["layers"] == 1
        ]
    return _tidy(table, "length", "predicted", "measured", "low", "high", "memory")


def crossings(frame: pd.DataFrame) -> pd.DataFrame:
    """The lengths at which attention outgrows the rest of a block: in operations, in time and in memory.

    "attention over FFN": QK^T and PV against the FFN. Operations are those of theory, and their crossing is found by
    bisection; of a variant that counts its own it is the one between the lengths recorded. Of the time that attention
    leaves of the block, the FFN is taken to have as large a part as of those operations.

    "scores over ..." weights; weights, input and output; and what fused attention's training step keeps
    (`theory.saved_bytes`): one matrix (batch, heads, l, l) against these bytes, plugin is "" there. Of a variant that
    holds such matrices it is the workspace, as it says and as it was measured alone, in the forward pass.

    Returns PROBLEM, plugin, what, predicted, measured with its interval low and high, shortest and longest length
    measured. Lengths are in tokens, of single blocks; see BEFORE, BEYOND and UNKNOWN.
    """
    table: list[Row] = []
    holders = _holders(frame)
    for shared, part in series(with_attention(frame)):
        if shared["scope"] == "block" and shared["layers"] == 1 and part["batch"].nunique() == 1:
            rows = records(part)
            in_memory = _in_memory(rows, shared["plugin"] in holders) if shared["phase"] != "decode" else []
            found = [_in_time(rows), *in_memory]
            table += [shared | each for each in found if each]
    tidy = _tidy(table, "what", "predicted", "measured", "low", "high", "shortest", "longest")
    again = tidy["plugin"].eq("") & tidy.duplicated(["plugin", *PROBLEM, "what"])  # said for each plugin
    return tidy[~again].reset_index(drop=True)


def _in_time(rows: Sequence[Row]) -> Row:
    known = [row for row in rows if math.isfinite(row["share"])]
    if not known:
        return {}
    if all(operations(row) == theory.flops(workload_of(row)) for row in rows):
        predicted = _first(rows[-1], _shown, _ffn)
    else:
        ratios = [_attention(row) / _ffn(workload_of(row)) for row in rows]
        predicted = crossing([row["length"] for row in rows], ratios)
    ends = (("measured", "share"), ("low", "share_high"), ("high", "share_low"))  # a larger share crosses earlier
    lengths = [row["length"] for row in known]
    found = {end: crossing(lengths, [_over_ffn(row, row[name]) for row in known]) for end, name in ends}
    return {"what": "attention over FFN", "predicted": predicted} | found | _measured_over(known)


def _in_memory(rows: Sequence[Row], holds_scores: bool) -> list[Row]:
    last = rows[-1]
    rivals: dict[str, Callable[[Workload], float]] = {
        "scores over weights": lambda w: theory.parameters(w) * w.itemsize,
        "scores over weights, input and output": lambda w: theory.min_bytes(w.replace(phase="forward")),
        "scores over what a training step keeps": lambda w: theory.saved_bytes(w, scores=False),
    }
    alone = [row for row in rows if math.isfinite(row["attention_workspace_bytes"])]
    own = _curve({row["length"]: row["predicted_workspace_bytes"] for row in rows})
    found: list[Row] = []
    for what, than in rivals.items():
        found.append({"plugin": "", "what": what, "predicted": _first(last, _scores, than)})
        if alone and own and last["phase"] == "forward" and holds_scores:
            theirs = _first(last, lambda w: own(_length_of(last, w)), than)
            ratios = [row["attention_workspace_bytes"] / than(workload_of(row)) for row in alone]
            measured = crossing([row["length"] for row in alone], ratios)
            found.append({"what": what, "predicted": theirs, "measured": measured} | _measured_over(alone))
    return found


def _first(row: Row, one: Callable[[Workload], float], other: Callable[[Workload], float]) -> float:
    """The length from which on `one` is at least `other`."""
    return first_length(lambda l: one(at(row, l)) >= other(at(row, l)), _shortest(row))  # noqa: E741


def _measured_over(rows: Sequence[Row]) -> Row:
    return {"shortest": float(rows[0]["length"]), "longest": float(rows[-1]["length"])}


def longest(frame: pd.DataFrame, memories: Mapping[str, int]) -> pd.DataFrame:
    """The longest l whose peak memory fits, for each series and each of `memories`, bytes by name.

    predicted: the largest l at which `peak` fits; beyond the lengths recorded, what a plugin says of its workspace goes
    on as the power law through the two longest. measured: where peak_bytes reach the memory, interpolated in log-log.
    Beyond the longest (extrapolated is then true) inputs, outputs and weights are those of theory, whose share in the
    peak changes with l, and what was held beside them goes on with its fitted exponent; low and high from its interval.

    Returns PROBLEM, plugin, memory (its name), predicted, measured, low, high (tokens), extrapolated, shortest.
    """
    table, holders = [], _holders(frame)
    for shared, rows in series(frame):
        done = finished(rows)
        done = done[done["peak_bytes"] > 0]
        if rows["batch"].nunique() == 1 and len(done):
            for name, size in memories.items():
                found = {"memory": name, "predicted": _longest_predicted(records(rows), size, holders)}
                table.append(shared | found | _longest_measured(records(done), size))
    return _tidy(table, "memory", "predicted", "measured", "low", "high", "extrapolated", "shortest")


def _longest_predicted(rows: Sequence[Row], size: int, holders: set[str]) -> float:
    last = rows[-1]
    own = _curve({row["length"]: row["predicted_workspace_bytes"] for row in rows})
    if last["phase"] == "train":
        return _longest(last, lambda w: peak(w, 0.0, last["plugin"] in holders), size) if _is_exact(last) else UNKNOWN
    return _longest(last, lambda w: peak(w, own(_length_of(last, w))), size) if own else UNKNOWN


def _longest_measured(done: Sequence[Row], size: int) -> Row:
    lengths = [row["length"] for row in done]
    last = done[-1]
    found: Row = {"shortest": float(lengths[0]), "low": UNKNOWN, "high": UNKNOWN, "extrapolated": False}
    found["measured"] = crossing(lengths, [row["peak_bytes"] / size for row in done])
    if found["measured"] != BEYOND:
        return found
    beside = [row["peak_bytes"] - row["input_bytes"] - row["output_bytes"] for row in done]
    fit = fit_exponent(lengths, beside)
    powers = {"measured": fit.value, "low": fit.high, "high": fit.low} if fit else {}

    def held(workload: Workload, power: float) -> float:
        grown = (_length_of(last, workload) / lengths[-1]) ** min(max(power, 0.0), _MOST)
        return float(theory.min_bytes(workload) + beside[-1] * grown)

    ends = {end: _longest(last, partial(held, power=power), size) for end, power in powers.items()}
    return found | {"measured": UNKNOWN, "extrapolated": True} | ends


def _longest(row: Row, held: Callable[[Workload], float], size: int) -> float:
    return first_length(lambda l: held(at(row, l)) > size, _shortest(row)) - 1  # noqa: E741


def saved(frame: pd.DataFrame) -> pd.DataFrame:
    """Bytes that training keeps for the backward pass, against `theory.saved_bytes`; of blocks, by layers.

    Returns PROBLEM, plugin, run, batch, seq, kv_seq, measured, predicted and ratio; and inference as measured and
    inference_predicted: workspace_bytes of the forward pass alone with the same plugin and sizes, where the run has it,
    which does not grow with the layers. Predictions are for exact attention; for other families there are none.
    """
    frame, holders = _filled(frame), _holders(frame)
    done = records(finished(frame))
    forward = {(row["run"], row["plugin"], workload_of(row)): row for row in done if row["phase"] == "forward"}
    table = []
    for row in done:
        if row["phase"] == "train" and row["scope"] == "block" and row["saved_bytes"] > 0:
            workload = workload_of(row)
            predicted = float(theory.saved_bytes(workload, row["plugin"] in holders)) if _is_exact(row) else math.nan
            twin = forward.get((row["run"], row["plugin"], workload.replace(phase="forward")))
            table.append(
                {name: row[name] for name in (*PROBLEM, "plugin", "run", "batch", "seq", "kv_seq")}
                | {"measured": row["saved_bytes"], "predicted": predicted, "ratio": row["saved_bytes"] / predicted}
                | {"inference": twin["workspace_bytes"] if twin else math.nan}
                | {"inference_predicted": _workspace_of(twin) if twin else math.nan}
            )
    columns = ("run", "batch", "seq", "kv_seq", "measured", "predicted", "ratio", "inference", "inference_predicted")
    return _tidy(table, *columns).sort_values(["plugin", "batch", "seq", "kv_seq", "layers"], kind="stable")


def series(frame: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """What rows have in common that differ in length only, and those rows, sorted by their column `length` (tokens).

    A panel's rows (`report.panels`) keep their `length`, and may differ in run and batch. Without such a column runs
    and batches are kept apart, and the length is that of the keys, or of the queries where they alone vary.
    """
    frame = _filled(frame)
    keys = ["plugin", *PROBLEM, *([] if "length" in frame else ["run", "batch"])]
    for _, rows in frame.groupby(keys, dropna=False, sort=False):
        if "length" not in rows:
            queries = rows["kv_seq"].nunique() == 1 < rows["seq"].nunique()
            rows = rows.assign(length=rows["seq"] if queries else rows["kv_seq"])
        rows = rows.sort_values("length", kind="stable")
        first = records(rows.head(1))[0]
        yield {name: first[name] for name in ("plugin", *PROBLEM)}, rows


def with_attention(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, those of blocks with what their attention did when measured alone in the same run.

    share, share_low and share_high as in `analysis.attention_share`, and attention_workspace_bytes: the workspace of
    the attention that holds most.
    """
    frame = _filled(frame)
    if "share" not in frame:
        frame = frame.join(attention_share(frame))
    if "attention_workspace_bytes" in frame:
        return frame
    rows = records(finished(frame))
    alone = {(row["run"], row["plugin"], workload_of(row)): row["workspace_bytes"] for row in rows}
    found: dict[object, float] = {}
    for index, row in zip(finished(frame).index, rows, strict=True):
        parts = theory.attentions(workload_of(row)).values()
        held = [alone.get((row["run"], row["plugin"], part), math.nan) for part in parts]
        if row["scope"] == "block":
            found[index] = float(np.max(held))
    return frame.assign(attention_workspace_bytes=pd.Series(found, dtype=float))


def operations(row: Row) -> float:
    """What the variant itself computes where it says so, else `theory.flops`."""
    own = float(row["variant_flops"])
    return own if own > 0 else float(theory.flops(workload_of(row)))


def order(rows: Sequence[Row]) -> str:
    """How the operations grow between the two longest lengths: "l^2", "l", "constant", or "" where none is near."""
    counts = {float(row["length"]): operations(row) for row in rows}
    if len(counts) < 2:
        return ""
    (short, few), (long, many) = sorted(counts.items())[-2:]
    power = math.log(many / few) / math.log(long / short)
    names = {0: "constant", 1: "l", 2: "l^2"}
    return names.get(round(power), "") if abs(power - round(power)) <= _CLOSE else ""


def block_workspace(workload: Workload, attention: float) -> float:
    """Bytes that a block's forward pass (`attnbench.block`) holds at its peak beside inputs, parameters and output.

    Either while an attention runs (its workspace, query, key, value and output) or while ReLU does (d_ff twice), each
    with what its sub-layer got, and pre-norm with that normalised. A stack holds one block's input more, however many
    layers it has.

    attention: workspace bytes of the attention alone.
    """
    w = workload
    x = w.batch * w.seq * w.width * w.itemsize
    norm = x if w.norm == "pre" else 0
    stages: list[float] = [x + norm + 2 * theory.FFN_EXPANSION * x]
    for name, a in theory.attentions(w).items():
        rows, keys = a.batch * a.heads * a.seq, a.batch * a.kv_heads * a.kv_seq
        own = (rows + keys) * (a.head_dim + a.value_dim) * a.itemsize
        stages.append(attention + own + norm + (x if name == "cross" else 0))
    return float(np.max(stages)) + (x if w.layers > 1 else 0) - x  # NaN where attention is


def peak(workload: Workload, attention: float, holds_scores: bool = False) -> float:
    """Predicted bytes at the peak of a call: `theory.min_bytes`, and what is held beside them.

    That is the workspace of attention alone (`attention`, bytes), and of a block's forward pass `block_workspace`. In
    training with exact attention it is at least what the forward pass leaves or, as that goes while the gradients come,
    all gradients, whichever is more; what the backward pass holds for a moment is left out.
    """
    if workload.phase == "train":
        gradients, out = theory.output_bytes(workload), theory.output_bytes(workload.replace(phase="forward"))
        left = out + theory.saved_bytes(workload, holds_scores)
        return theory.min_bytes(workload) - gradients + max(left, gradients)
    inside = workload.scope == "block" and workload.phase == "forward"
    return theory.min_bytes(workload) + (block_workspace(workload, attention) if inside else attention)


def at(row: Row, length: int) -> Workload:
    """The row's workload at another length: whichever of seq and kv_seq is the row's `length` moves."""
    return workload_of(row).replace(**{name: length for name in ("seq", "kv_seq") if row[name] == row["length"]})


def first_length(test: Callable[[int], bool], start: int = 1) -> float:
    """The least length from `start` up that passes a test which all longer ones pass too; BEYOND where none does."""
    low, high = start - 1, start
    while not test(high):
        low, high = high, 2 * high
        if high > _LONGEST:
            return BEYOND
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle, high)
    return float(high)


def crossing(lengths: Sequence[float], ratios: Sequence[float]) -> float:
    """The length from which on a ratio is at least 1, interpolated between measured lengths in log-log.

    lengths: ascending. BEFORE where it is nowhere less, BEYOND where it still is at the longest, UNKNOWN where a ratio
    that decides is missing.
    """
    x, r = np.asarray(lengths, dtype=float), np.asarray(ratios, dtype=float)
    below = np.flatnonzero(r < 1)
    last = int(below[-1]) if len(below) else -1
    if not np.isfinite(r[last + 1 :]).all():
        return UNKNOWN
    if last == len(x) - 1:
        return BEYOND
    if last < 0:
        return BEFORE
    (x0, x1), (r0, r1) = np.log(x[last : last + 2]), np.log(np.maximum(r[last : last + 2], 1e-9))
    return float(np.exp(x0 - r0 * (x1 - x0) / (r1 - r0)))


def _curve(values: Mapping[float, float]) -> Callable[[float], float] | None:
    """A value at any length: between the lengths known straight in log-log, beyond them as between the two nearest.

    None where fewer than two are known.
    """
    known = sorted((length, value) for length, value in values.items() if math.isfinite(value))
    if len(known) < 2:
        return None

    def at_length(length: float) -> float:
        i = min(max(1, sum(other < length for other, _ in known)), len(known) - 1)
        (short, few), (long, many) = known[i - 1 : i + 1]
        power = math.log(many / few) / math.log(long / short) if few > 0 and many > 0 else 0.0
        return float(many * (length / long) ** power)

    return at_length


def _over_ffn(row: Row, share: float) -> float:
    """Attention's share of a block's time over what of the rest is the FFN's, by operations."""
    share = share if share < 0.99 or math.isnan(share) else 0.99  # noise can make it more than all
    return share / ((1 - share) * _ffn(workload_of(row)) / (operations(row) - _attention(row)))


def _attention(row: Row) -> float:
    """Operations of QK^T and PV, or of what the variant does in their place."""
    workload = workload_of(row)
    return operations(row) - theory.flops(workload) + _shown(workload)


def _shown(workload: Workload) -> float:
    return sum(n for part, n in theory.flops_by_part(workload).items() if part.endswith("attention"))


def _shortest(row: Row) -> int:
    """The least length to look at: where only keys become more, each query needs one of its own if it is causal."""
    return int(row["seq"]) if row["length"] == row["kv_seq"] != row["seq"] else 1


def _length_of(row: Row, workload: Workload) -> int:
    """The length of a workload that `at` made of the row."""
    return workload.kv_seq if row["kv_seq"] == row["length"] else workload.seq


def _ffn(workload: Workload) -> float:
    return theory.flops_by_part(workload)["ffn"]


def _scores(workload: Workload) -> float:
    """Bytes of the largest matrix of scores, one value for each pair, head and batch entry."""
    return max(a.batch * a.heads * a.seq * a.kv_seq * a.itemsize for a in theory.attentions(workload).values())


def _holders(frame: pd.DataFrame) -> set[str]:
    """The plugins that by their own account hold all scores at once, at every length that is asked of them."""
    all_rows = records(_filled(frame))
    others = {r["plugin"] for r in all_rows if not r["predicted_workspace_bytes"] >= _scores(workload_of(r))}
    return {str(r["plugin"]) for r in all_rows} - others


def _workspace_of(row: Row) -> float:
    own, workload = float(row["predicted_workspace_bytes"]), workload_of(row)
    if workload.scope == "attention" and workload.phase != "train":
        return own
    return block_workspace(workload, own) if workload.phase == "forward" else math.nan


def _peak_of(row: Row, holders: set[str]) -> float:
    workload = workload_of(row)
    if workload.phase == "train" and not _is_exact(row):
        return math.nan
    return peak(workload, float(row["predicted_workspace_bytes"]), row["plugin"] in holders)


def _is_exact(row: Row) -> bool:
    return bool(row["family"] == "exact")


def _filled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column that is read here, numbers as numbers, whatever an older record lacks."""
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *_NEEDED])))
    return frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in _NEEDED})


def _tidy(table: Sequence[Row], *columns: str) -> pd.DataFrame:
    return pd.DataFrame(table, columns=["plugin", *PROBLEM, *columns])
