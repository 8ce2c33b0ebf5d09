"""How time and memory grow with the length, and where attention outgrows the block, measured and predicted."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from attnbench.analysis import frames
from attnbench.analysis.frames import PROBLEM, as_rows, attention_flops, finished, operations, series, tidy, workload_of
from attnbench.analysis.memory import holders_of_scores, peak_of, workspace_of
from attnbench.analysis.shares import with_attention
from attnbench.records.schema import Row
from attnbench.stats.powers import crossing, fit_exponent
from attnbench.theory import costs
from attnbench.workload import Workload

_CLOSE = 0.1  # of an exponent to a whole number that names an order


def growth(frame: pd.DataFrame) -> pd.DataFrame:
    """The exponent p of l^p of latency, peak memory and workspace, measured and predicted over the same lengths.

    Latency is predicted to grow as operations do, peak memory as `peak` does. Both are fitted in the same way
    (`powers.fit_exponent`), so that what lower orders add at finite lengths is in both.

    Returns a row for each series and quantity that has three lengths: PROBLEM, plugin, quantity ("latency",
    "peak memory" or "workspace"), measured with its 95% interval low and high, predicted, shortest and longest length
    of the fit, and order: of the operations at the two longest lengths, "l^2", "l" or "constant", or "" between those.
    """
    table, holders = [], holders_of_scores(frame)
    for shared, rows in series(frame):
        done = as_rows(finished(rows))
        lengths = [row["length"] for row in done]
        columns: dict[str, tuple[str, Callable[[Row], float]]] = {
            "latency": ("latency_s", operations),
            "peak memory": ("peak_bytes", partial(peak_of, holders=holders)),
            "workspace": ("workspace_bytes", workspace_of),
        }
        for quantity, (column, theirs) in columns.items():
            values = [float(row[column]) for row in done]
            if fit := fit_exponent(lengths, values):
                usable = [theirs(row) if 0 < v < math.inf else math.nan for row, v in zip(done, values, strict=True)]
                predicted = fit_exponent(lengths, usable)
                found = {"quantity": quantity, "measured": fit.value, "low": fit.low, "high": fit.high}
                found |= {"predicted": predicted.value if predicted else math.nan, "order": order(as_rows(rows))}
                table.append(shared | found | {"shortest": fit.lengths[0], "longest": fit.lengths[-1]})
    return tidy(table, "quantity", "measured", "low", "high", "predicted", "shortest", "longest", "order")


def order(rows: Sequence[Row]) -> str:
    """How the operations grow between the two longest lengths: "l^2", "l", "constant", or "" where none is near."""
    counts = {float(row["length"]): operations(row) for row in rows}
    if len(counts) < 2:
        return ""
    (short, few), (long, many) = sorted(counts.items())[-2:]
    power = math.log(many / few) / math.log(long / short)
    names = {0: "constant", 1: "l", 2: "l^2"}
    return names.get(round(power), "") if abs(power - round(power)) <= _CLOSE else ""


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
        rows = as_rows(part)
        if shared["scope"] == "block" and shared["layers"] == 1 and frames.has_other_lengths(rows[0], part):
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
        predicted = _first(rows[-1], frames.shown_flops, costs.ffn_flops)
    else:
        ratios = [attention_flops(row) / costs.ffn_flops(workload_of(row)) for row in rows]
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
    own = frames.said_workspace(rows)
    found: list[Row] = []
    for what, than in rivals.items():
        found.append({"plugin": "", "what": what, "predicted": _first(last, costs.score_bytes, than)})
        if alone and own and last["phase"] == "forward" and holds_scores:
            theirs = _first(last, own, than)
            ratios = [row["attention_workspace_bytes"] / than(workload_of(row)) for row in alone]
            measured = crossing([row["length"] for row in alone], ratios)
            found.append({"what": what, "predicted": theirs, "measured": measured} | _measured_over(alone))
    return found


def _first(row: Row, one: Callable[[Workload], float], other: Callable[[Workload], float]) -> float:
    """The length from which on `one` is at least `other`."""
    return frames.first_at(row, lambda workload: one(workload) >= other(workload))


def _measured_over(rows: Sequence[Row]) -> Row:
    return {"shortest": float(rows[0]["length"]), "longest": float(rows[-1]["length"])}


def _over_ffn(row: Row, share: float) -> float:
    """Attention's share of a block's time over what of the rest is the FFN's, by operations."""
    share = share if share < 0.99 or math.isnan(share) else 0.99  # noise can make it more than all
    return share / ((1 - share) * costs.ffn_flops(workload_of(row)) / (operations(row) - attention_flops(row)))
