"""The lengths at which attention outgrows the rest of the block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd

from attnbench.analysis.memory import holders_of_scores
from attnbench.analysis.rows import (
    PROBLEM,
    Row,
    at,
    has_other_lengths,
    length_of,
    operations,
    records,
    series,
    shortest_length,
    shown_flops,
    tidy,
    workload_of,
)
from attnbench.analysis.shares import attention_flops, with_attention
from attnbench.stats.powers import crossing, curve, first_length
from attnbench.theory import costs
from attnbench.theory.costs import ffn_flops, score_bytes
from attnbench.workload import Workload


def crossings(frame: pd.DataFrame) -> pd.DataFrame:
    """The lengths at which attention outgrows the rest of a block: in operations, in time and in memory.

    "attention over FFN": QK^T and PV against the FFN. Operations are those of theory, and their crossing is found by
    bisection; of a variant that counts its own it is the one between the lengths recorded. Of the time that attention
    leaves of the block, the FFN is taken to have as large a part as of those operations.

    "scores over ..." weights; weights, input and output; and what fused attention's training step keeps
    (`costs.saved_bytes`): one matrix (batch, heads, l, l) against these bytes, plugin is "" there. Of a variant that
    holds such matrices it is the workspace, as it says and as it was measured alone, in the forward pass.

    Returns PROBLEM, plugin, what, predicted, measured with its interval low and high, shortest and longest length
    measured. Lengths are in tokens, of single blocks; see BEFORE, BEYOND and UNKNOWN.
    """
    table: list[Row] = []
    holders = holders_of_scores(frame)
    for shared, part in series(with_attention(frame)):
        rows = records(part)
        if shared["scope"] == "block" and shared["layers"] == 1 and has_other_lengths(rows[0], part):
            in_memory = _in_memory(rows, shared["plugin"] in holders) if shared["phase"] != "decode" else []
            found = [_in_time(rows), *in_memory]
            table += [shared | each for each in found if each]
    told = tidy(table, "what", "predicted", "measured", "low", "high", "shortest", "longest")
    again = told["plugin"].eq("") & told.duplicated(["plugin", *PROBLEM, "what"])  # said for each plugin
    return told[~again].reset_index(drop=True)


def _in_time(rows: Sequence[Row]) -> Row:
    known = [row for row in rows if math.isfinite(row["share"])]
    if not known:
        return {}
    if all(operations(row) == costs.flops(workload_of(row)) for row in rows):
        predicted = _first(rows[-1], shown_flops, ffn_flops)
    else:
        ratios = [attention_flops(row) / ffn_flops(workload_of(row)) for row in rows]
        predicted = crossing([row["length"] for row in rows], ratios)
    ends = (("measured", "share"), ("low", "share_high"), ("high", "share_low"))  # a larger share crosses earlier
    lengths = [row["length"] for row in known]
    found = {end: crossing(lengths, [_over_ffn(row, row[name]) for row in known]) for end, name in ends}
    return {"what": "attention over FFN", "predicted": predicted} | found | _measured_over(known)


def _in_memory(rows: Sequence[Row], holds_scores: bool) -> list[Row]:
    last = rows[-1]
    rivals: dict[str, Callable[[Workload], float]] = {
        "scores over weights": lambda w: costs.parameters(w) * w.itemsize,
        "scores over weights, input and output": lambda w: costs.min_bytes(w.replace(phase="forward")),
        "scores over what a training step keeps": lambda w: costs.saved_bytes(w, scores=False),
    }
    alone = [row for row in rows if math.isfinite(row["attention_workspace_bytes"])]
    own = curve({row["length"]: row["predicted_workspace_bytes"] for row in rows})
    found: list[Row] = []
    for what, than in rivals.items():
        found.append({"plugin": "", "what": what, "predicted": _first(last, score_bytes, than)})
        if alone and own and last["phase"] == "forward" and holds_scores:
            theirs = _first(last, lambda w: own(length_of(last, w)), than)
            ratios = [row["attention_workspace_bytes"] / than(workload_of(row)) for row in alone]
            measured = crossing([row["length"] for row in alone], ratios)
            found.append({"what": what, "predicted": theirs, "measured": measured} | _measured_over(alone))
    return found


def _first(row: Row, one: Callable[[Workload], float], other: Callable[[Workload], float]) -> float:
    """The length from which on `one` is at least `other`."""
    return first_length(lambda l: one(at(row, l)) >= other(at(row, l)), shortest_length(row))  # noqa: E741


def _measured_over(rows: Sequence[Row]) -> Row:
    return {"shortest": float(rows[0]["length"]), "longest": float(rows[-1]["length"])}


def _over_ffn(row: Row, share: float) -> float:
    """Attention's share of a block's time over what of the rest is the FFN's, by operations."""
    share = share if share < 0.99 or math.isnan(share) else 0.99  # noise can make it more than all
    return share / ((1 - share) * ffn_flops(workload_of(row)) / (operations(row) - attention_flops(row)))
