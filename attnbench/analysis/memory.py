"""Memory as measured beside what theory says of it: workspace, the longest length that fits, and what training keeps.

What a plugin itself counts (`variant_flops`, `predicted_workspace_bytes`) stands for theory where there is it, since
the formulas of `attnbench.theory.costs` are those of exact attention.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from attnbench.analysis import frames
from attnbench.analysis.frames import PROBLEM, as_rows, finished, first_at, length_of, series, tidy, workload_of
from attnbench.records.schema import Row
from attnbench.stats.powers import BEYOND, UNKNOWN, crossing, fit_exponent
from attnbench.theory import costs
from attnbench.workload import Workload

_MOST = 2.0  # of a power of l: no more than all pairs are held


def workspace(frame: pd.DataFrame) -> pd.DataFrame:
    """Workspace as measured over what was predicted, for each series.

    Returns PROBLEM, plugin, cells (how many), ratio (the median), least and most, predicted_least and predicted_most
    (bytes). A block's prediction is `block_workspace`; there is none for a block that decodes, and none for training.
    """
    table = []
    for shared, rows in series(frame):
        pairs = [(float(row["workspace_bytes"]), workspace_of(row)) for row in as_rows(finished(rows))]
        known = [(ours, theirs) for ours, theirs in pairs if math.isfinite(ours) and theirs > 0]
        if known:
            ratios, theirs = [a / b for a, b in known], [b for _, b in known]
            table.append(
                shared
                | {"cells": len(known), "ratio": float(np.median(ratios)), "least": min(ratios), "most": max(ratios)}
                | {"predicted_least": min(theirs), "predicted_most": max(theirs)}
            )
    return tidy(table, "cells", "ratio", "least", "most", "predicted_least", "predicted_most")


def longest(frame: pd.DataFrame, memories: Mapping[str, int]) -> pd.DataFrame:
    """The longest l whose peak memory fits, for each series and each of `memories`, bytes by name.

    Ragged batches are left out: nothing says how long their entries would be elsewhere.

    predicted: the largest l at which `peak` fits; beyond the lengths recorded, what a plugin says of its workspace goes
    on as the power law through the two longest. measured: where peak_bytes reach the memory, interpolated in log-log.
    Beyond the longest (extrapolated is then true) inputs, outputs and weights are those of theory, whose share in the
    peak changes with l, and what was held beside them goes on with its fitted exponent; low and high from its interval.

    Returns PROBLEM, plugin, memory (its name), predicted, measured, low, high (tokens), extrapolated, shortest.
    """
    table, holders = [], holders_of_scores(frame)
    for shared, rows in series(frame):
        done = finished(rows)
        every, fine = as_rows(rows), as_rows(done[done["peak_bytes"] > 0])
        if fine and frames.has_other_lengths(every[0], rows):
            for name, size in memories.items():
                found = {"memory": name, "predicted": _longest_predicted(every, size, holders)}
                table.append(shared | found | _longest_measured(fine, size))
    return tidy(table, "memory", "predicted", "measured", "low", "high", "extrapolated", "shortest")


def _longest_predicted(rows: Sequence[Row], size: int, holders: set[str]) -> float:
    last, own = rows[-1], frames.said_workspace(rows)
    if last["phase"] == "train" and last["family"] == "exact":
        return first_at(last, lambda w: costs.peak(w, 0.0, last["plugin"] in holders) > size) - 1
    if own is None or last["phase"] == "train":
        return UNKNOWN
    return first_at(last, lambda w: costs.peak(w, own(w)) > size) - 1


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

    def too_large(workload: Workload, power: float) -> bool:
        grown = (length_of(last, workload) / lengths[-1]) ** min(max(power, 0.0), _MOST)
        return bool(costs.min_bytes(workload) + beside[-1] * grown > size)

    ends = {end: first_at(last, partial(too_large, power=power)) - 1 for end, power in powers.items()}
    return found | {"measured": UNKNOWN, "extrapolated": True} | ends


def saved(frame: pd.DataFrame) -> pd.DataFrame:
    """Bytes that training keeps for the backward pass, against `costs.saved_bytes`; of blocks, by layers.

    Returns PROBLEM, plugin, run, batch, seq, kv_seq, measured, predicted and ratio; and inference as measured and
    inference_predicted: workspace_bytes of the forward pass alone with the same plugin and sizes, where the run has it,
    which does not grow with the layers. Predictions are for exact attention; for other families there are none.
    """
    holders, done = holders_of_scores(frame), frames.cells(frames.filled(frame))
    table = []
    for (run, plugin, workload), row in done.items():
        if workload.phase == "train" and workload.scope == "block" and row["saved_bytes"] > 0:
            exact = row["family"] == "exact"
            predicted = float(costs.saved_bytes(workload, plugin in holders)) if exact else math.nan
            twin = done.get((run, plugin, workload.replace(phase="forward")))
            table.append(
                {name: row[name] for name in (*PROBLEM, "plugin", "run", "batch", "seq", "kv_seq")}
                | {"measured": row["saved_bytes"], "predicted": predicted, "ratio": row["saved_bytes"] / predicted}
                | {"inference": twin["workspace_bytes"] if twin else math.nan}
                | {"inference_predicted": workspace_of(twin) if twin else math.nan}
            )
    columns = ("run", "batch", "seq", "kv_seq", "measured", "predicted", "ratio", "inference", "inference_predicted")
    return tidy(table, *columns).sort_values(["plugin", "batch", "seq", "kv_seq", "layers"], kind="stable")


def holders_of_scores(frame: pd.DataFrame) -> set[str]:
    """The plugins that by their own account hold all scores at once, at every length that is asked of them."""
    all_rows = as_rows(frames.filled(frame))
    others = {r["plugin"] for r in all_rows if not r["predicted_workspace_bytes"] >= costs.score_bytes(workload_of(r))}
    return {str(r["plugin"]) for r in all_rows} - others


def workspace_of(row: Row) -> float:
    own, workload = float(row["predicted_workspace_bytes"]), workload_of(row)
    if workload.scope == "attention" and workload.phase != "train":
        return own
    return costs.block_workspace(workload, own) if workload.phase == "forward" else math.nan


def peak_of(row: Row, holders: set[str]) -> float:
    workload = workload_of(row)
    if workload.phase == "train" and row["family"] != "exact":
        return math.nan
    return costs.peak(workload, float(row["predicted_workspace_bytes"]), row["plugin"] in holders)
