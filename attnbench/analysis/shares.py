"""How much of a block's time its attention takes, measured and by Amdahl's law."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from attnbench.analysis.rows import Row, filled, finished, operations, records, series, shown_flops, tidy, workload_of
from attnbench.theory import costs
from attnbench.theory.costs import attentions


def attention_share(frame: pd.DataFrame) -> pd.DataFrame:
    """Attention's share of a block's time: latency of attention alone over that of the block around it.

    Both are of the same run, plugin and sizes; a decoder block's share is of its two attentions together (see
    `costs.attentions`). The projections W_Q, W_K, W_V and W_O count as the block's. The bounds take both intervals
    at their far ends, so they hold more than 95%.

    Returns (index of the block's row, columns share, share_low, share_high), a fraction each; blocks whose attention
    was not measured alone are left out.
    """
    rows = finished(frame)
    times = ["latency_s", "latency_low_s", "latency_high_s"]
    alone = {
        (row["run"], row["plugin"], workload_of(row)): np.array([row[name] for name in times], dtype=float)
        for row in records(rows[rows["scope"] == "attention"])
    }
    blocks = rows[rows["scope"] == "block"]
    shares: dict[object, list[float]] = {}
    for index, row in zip(blocks.index, records(blocks), strict=True):
        keys = [(row["run"], row["plugin"], part) for part in attentions(workload_of(row)).values()]
        if all(key in alone for key in keys):
            middle, low, high = np.sum([alone[key] for key in keys], axis=0)
            shares[index] = [middle / row["latency_s"], low / row["latency_high_s"], high / row["latency_low_s"]]
    return pd.DataFrame.from_dict(shares, orient="index", columns=["share", "share_low", "share_high"], dtype=float)


def amdahl(frame: pd.DataFrame) -> pd.Series:
    """The speedup that Amdahl's law gives a block: 1 / (1 - sum of f (1 - 1 / x)), by index of the block's row.

    f is the share of an attention (see `costs.attentions`) in the baseline's block, x what the variant speeds it up
    when measured alone. Amdahl 1967, "Validity of the single processor approach". Blocks of which a part was not
    measured are left out, and those where more is saved than the block took.
    """
    rows = finished(frame)
    cells = {(row["run"], row["plugin"], workload_of(row)): row for row in records(rows)}
    found: dict[object, float] = {}
    for index, row in zip(rows.index, records(rows), strict=True):
        workload, base = workload_of(row), (row["run"], row.get("baseline"))
        if row["scope"] != "block" or row["plugin"] == row.get("baseline") or (*base, workload) not in cells:
            continue
        parts = attentions(workload).values()
        pairs = [(cells.get((*base, part)), cells.get((row["run"], row["plugin"], part))) for part in parts]
        times = [(b["latency_s"], v["speedup"]) for b, v in pairs if b is not None and v is not None]
        if len(times) == len(pairs):
            saved = sum(seconds * (1 - 1 / speedup) for seconds, speedup in times)
            left = 1 - saved / cells[(*base, workload)]["latency_s"]
            if left > 0:  # on a noisy machine attention alone may take longer than the block around it did
                found[index] = 1 / left
    return pd.Series(found, name="amdahl", dtype=float)


def shares(frame: pd.DataFrame) -> pd.DataFrame:
    """Attention's share of a block: of its operations (`costs.flops_by_part`), of its time and of its peak memory.

    Returns PROBLEM, plugin, length, predicted, measured with its interval low and high, and memory: fractions, for
    single blocks whose attention was measured alone (`attention_share`). memory is the workspace of attention
    alone over the block's peak.
    """
    table = []
    for shared, rows in series(with_attention(frame)):
        table += [
            shared
            | {"length": row["length"], "predicted": attention_flops(row) / operations(row)}
            | {"measured": row["share"], "low": row["share_low"], "high": row["share_high"]}
            | {"memory": row["attention_workspace_bytes"] / row["peak_bytes"]}
            for row in records(rows[rows["share"].notna()])
            if shared["layers"] == 1
        ]
    return tidy(table, "length", "predicted", "measured", "low", "high", "memory")


def with_attention(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, those of blocks with what their attention did when measured alone in the same run.

    share, share_low and share_high as in `attention_share`, and attention_workspace_bytes: the workspace of
    the attention that holds most.
    """
    frame = filled(frame)
    if "share" not in frame:
        frame = frame.join(attention_share(frame))
    if "attention_workspace_bytes" in frame:
        return frame
    rows = records(finished(frame))
    alone = {(row["run"], row["plugin"], workload_of(row)): row["workspace_bytes"] for row in rows}
    found: dict[object, float] = {}
    for index, row in zip(finished(frame).index, rows, strict=True):
        parts = costs.attentions(workload_of(row)).values()
        held = [alone.get((row["run"], row["plugin"], part), math.nan) for part in parts]
        if row["scope"] == "block":
            found[index] = float(np.max(held))
    return frame.assign(attention_workspace_bytes=pd.Series(found, dtype=float))


def attention_flops(row: Row) -> float:
    """Operations of QK^T and PV, or of what the variant does in their place."""
    workload = workload_of(row)
    return operations(row) - costs.flops(workload) + shown_flops(workload)
