"""What a variant's error is on one sort of inputs, and what on another."""

from collections.abc import Sequence

import pandas as pd

from attnbench.analysis.compare import rounding_floor
from attnbench.workload import INPUTS

DRAWN = INPUTS[0]


def sorts(frame: pd.DataFrame) -> list[str]:
    """The sorts of inputs in a frame: drawn ones first, then the layers of models in the order they came."""
    found = list(dict.fromkeys(frame["inputs"]))
    return [name for name in INPUTS if name in found] + [name for name in found if name not in INPUTS]


def error_by_inputs(frame: pd.DataFrame) -> pd.DataFrame:
    """Each variant's approximation error on each sort of inputs, side by side.

    frame: rows of one problem with their `length`, which differ in variant, length and inputs.

    Returns a row for each variant and length that has at least two errors, the longest length first, and there those
    first that look better on the first sort than they are. It has `plugin`, `length`, `family`, an error for each of
    `sorts`, and `ratio`, the largest error on what is `compared` over that on the first. An error below that of
    rounding, which exact variants differ by, counts as that.
    """
    names = sorts(frame)
    known = frame[(frame["status"] == "ok") & frame["approximation_rel_l2"].notna()]
    if len(names) < 2 or known.empty:
        return pd.DataFrame(columns=["plugin", "length", "family", *names, "ratio"])
    wide = known.pivot_table("approximation_rel_l2", ["plugin", "length", "family"], "inputs", aggfunc="max")
    wide = wide.reindex(columns=names)
    wide = wide[wide.notna().sum(axis=1) >= 2]
    floor = rounding_floor(known)
    floored = wide.clip(lower=floor) if floor else wide
    ratio = floored[compared(names)].max(axis=1) / floored[names[0]]
    wide = wide.assign(ratio=ratio).reset_index()
    return wide.sort_values(["length", "ratio"], ascending=False, kind="stable", ignore_index=True)


def at_longest(found: pd.DataFrame) -> pd.DataFrame:
    """Of `error_by_inputs` the rows with a ratio at the longest length of those at which the most variants have one."""
    known: pd.DataFrame = found[found["ratio"].notna()]
    if known.empty:
        return known
    counts = known["length"].value_counts()
    longest: pd.DataFrame = known[known["length"] == max(counts[counts == counts.max()].index)]
    return longest


def compared(names: Sequence[str]) -> list[str]:
    """Of `sorts` those whose error is compared with that on the first."""
    return [name for name in names if name not in INPUTS] or list(names[1:])
