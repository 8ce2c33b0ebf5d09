"""How much of a block's time its attention takes, measured and by Amdahl's law."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from attnbench.analysis import frames
from attnbench.analysis.frames import as_rows, by_index, finished, series, workload_of
from attnbench.records.schema import Row
from attnbench.theory.costs import attentions

_TIMES = ("latency_s", "latency_low_s", "latency_high_s")


def attention_share(frame: pd.DataFrame) -> pd.DataFrame:
    """Attention's share of a block's time: latency of attention alone over that of the block around it.

    Both are of the same run, plugin and sizes; a decoder block's share is of its two attentions together (see
    `costs.attentions`). The projections W_Q, W_K, W_V and W_O count as the block's. The bounds take both intervals
    at their far ends, so they hold more than 95%.

    Returns (index of the block's row, columns share, share_low, share_high), a fraction each, and
    attention_workspace_bytes: of the attention that holds most. Blocks whose attention was not measured alone are left
    out.
    """
    frame = frames.filled(frame)
    alone = frames.cells(frame)

    def share(row: Row) -> Sequence[float] | None:
        keys = [(frames.place(row), row["plugin"], part) for part in attentions(workload_of(row)).values()]
        if row["scope"] != "block" or not all(key in alone for key in keys):
            return None
        middle, low, high = np.sum([[alone[key][name] for name in _TIMES] for key in keys], axis=0)
        held = np.max([alone[key]["workspace_bytes"] for key in keys])
        return middle / row["latency_s"], low / row["latency_high_s"], high / row["latency_low_s"], held

    columns = ["share", "share_low", "share_high", "attention_workspace_bytes"]
    found = by_index(finished(frame), share)
    return pd.DataFrame.from_dict(found, orient="index", columns=columns, dtype=float)


def with_attention(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, `filled`, with the columns of `attention_share`."""
    frame = frames.filled(frame)
    return frame if "share" in frame else frame.join(attention_share(frame))


def amdahl(frame: pd.DataFrame) -> pd.Series:
    """The speedup that Amdahl's law gives a block: 1 / (1 - sum of f (1 - 1 / x)), by index of the block's row.

    f is the share of an attention (see `costs.attentions`) in the baseline's block, x what the variant speeds it up
    when measured alone. Amdahl 1967, "Validity of the single processor approach". Blocks of which a part was not
    measured are left out, and those where more is saved than the block took.
    """
    frame = frames.filled(frame)
    known = frames.cells(frame)

    def survives(row: Row) -> float | None:
        workload, base = workload_of(row), (frames.place(row), row.get("baseline"))
        if row["scope"] != "block" or row["plugin"] == row.get("baseline") or (*base, workload) not in known:
            return None
        saved = 0.0
        for part in attentions(workload).values():
            theirs, ours = known.get((*base, part)), known.get((frames.place(row), row["plugin"], part))
            if theirs is None or ours is None:
                return None
            saved += theirs["latency_s"] * (1 - 1 / ours["speedup"])
        left = 1 - saved / known[(*base, workload)]["latency_s"]
        return 1 / left if left > 0 else None  # on a noisy machine attention alone may take longer than its block did

    return pd.Series(by_index(finished(frame), survives), name="amdahl", dtype=float)


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
            | {"length": row["length"], "predicted": frames.attention_flops(row) / frames.operations(row)}
            | {"measured": row["share"], "low": row["share_low"], "high": row["share_high"]}
            | {"memory": row["attention_workspace_bytes"] / row["peak_bytes"]}
            for row in as_rows(rows[rows["share"].notna()])
            if shared["layers"] == 1
        ]
    return frames.tidy(table, "length", "predicted", "measured", "low", "high", "memory")
