"""What of a variant's speedup is left in a block, and in a published model that attends by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from attnbench.analysis.frames import as_rows, finished
from attnbench.records.machines import identity
from attnbench.records.schema import Row

LEVELS = {"attention": "attention alone", "block": "in the block", "whole": "the whole model"}
# What a row of a model has in common with a run's.
_SHAPE = ("dtype", "mask", "heads", "kv_heads", "head_dim", "threads")
_OVER = "sdpa"  # what a model's speedups refer to
QUALITY = (
    "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_mean", "top1_agreement", "cosine",
    "rank_correlation",
)  # fmt: skip


def levels(frame: pd.DataFrame, runs: Sequence[Mapping[str, Any]], models: Sequence[Row]) -> pd.DataFrame:
    """A row for each variant that a model ran with at a length, if a run has it at the model's shape.

    frame, runs: rows of runs over `sdpa`, and what run.json says of each. models: rows of `attnbench model`, each with
    its machine; those of another machine than a run's are not set beside it.

    Columns: `model`, `plugin`, `variant`, `family`, `seq`; of each of `LEVELS` the speedup over exact attention, and
    with `_low` and `_high` its interval, NaN where it was not measured; and `QUALITY`.
    """
    machines = {str(run.get("name")): identity(dict(run.get("machine") or {})) for run in runs}
    measured: dict[tuple[Any, ...], Row] = {}
    # A block in a published model's style comes last, and so counts where there is a classic one too.
    for row in sorted(as_rows(finished(frame)), key=lambda row: bool(row["style"])):
        if _is_comparable(row):
            measured[
                (machines.get(row["run"]), row["plugin"], row["scope"], row["seq"], *(row[name] for name in _SHAPE))
            ] = row
    found = []
    for row in models:
        if row["status"] != "ok" or row["plugin"].partition(":")[0] == _OVER:
            continue
        where = (identity(dict(row["machine"])), row["plugin"])
        shape = (row["seq"], *(row[name] for name in _SHAPE))
        parts = {scope: measured.get((*where, scope, *shape)) for scope in ("attention", "block")}
        if any(parts.values()):
            found.append(_joined(row, parts))
    names = [f"{level}{end}" for level in LEVELS for end in ("", "_low", "_high")]
    table = pd.DataFrame(found, columns=["model", "plugin", "variant", "family", "seq", *names, *QUALITY])
    return table.astype(dict.fromkeys([*names, *QUALITY], float))


def _is_comparable(row: Row) -> bool:
    """Whether it is a forward pass as a model makes it, of one sequence over itself, and over the same baseline."""
    one = (
        row["batch"] == 1 and row["layers"] == 1 and row["seq"] == row["kv_seq"] and row["value_dim"] == row["head_dim"]
    )
    plain = not (row["softcap"] or row["softmax_scale"] or row["bias"]) and row["inputs"] == "normal"
    return bool(one and plain and row["phase"] == "forward" and str(row["baseline"]).partition(":")[0] == _OVER)


def _joined(row: Row, parts: Mapping[str, Row | None]) -> Row:
    found = {name: row[name] for name in ("model", "plugin", "variant", "family", "seq")}
    for end in ("", "_low", "_high"):
        found |= {f"{scope}{end}": part and part[f"speedup{end}"] for scope, part in parts.items()}
        found[f"whole{end}"] = row.get(f"prefill_speedup{end}")
    return found | {name: row.get(name) for name in QUALITY}
