"""Rows of a frame, and series of them that differ in length alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import pandas as pd

from attnbench.theory import costs
from attnbench.workload import Workload

_NEEDED = ("latency_s", "peak_bytes", "workspace_bytes", "predicted_workspace_bytes", "variant_flops", "saved_bytes",
           "input_bytes", "output_bytes")  # fmt: skip
WORKLOAD = tuple(field.name for field in fields(Workload))
"""The columns that name a workload; with `plugin` they are a cell's key."""
Row: TypeAlias = dict[str, Any]
"""One row of a frame, by column."""


def records(frame: pd.DataFrame) -> list[Row]:
    """The rows as dictionaries, with Python's own numbers."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a latency that counts."""
    return frame[(frame["status"] == "ok") & frame["latency_s"].notna()]


def workload_of(row: Mapping[Any, Any]) -> Workload:
    """The workload of a row; pandas' missing texts and its own integers become Python's."""
    values = {field.name: row[field.name] for field in fields(Workload)}
    numbers = ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_dim", "value_dim", "layers", "seed", "threads")
    texts = {name: value if isinstance(value, str) else "" for name, value in values.items() if name not in numbers}
    return Workload.from_dict({**texts, **{name: int(values[name]) for name in numbers}})


PROBLEM = tuple(name for name in WORKLOAD if name not in ("seq", "kv_seq", "batch"))
"""The columns that rows have in common which differ in length; a table of this module starts with them and `plugin`."""


def series(frame: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """What rows have in common that differ in length only, and those rows, sorted by their column `length` (tokens).

    A panel's rows (`report.prepare`) keep their `length`, and may differ in run and batch. Without such a column runs
    and batches are kept apart, and the length is that of the keys, or of the queries where they alone vary.
    """
    frame = filled(frame)
    keys = ["plugin", *PROBLEM, *([] if "length" in frame else ["run", "batch"])]
    for _, rows in frame.groupby(keys, dropna=False, sort=False):
        if "length" not in rows:
            queries = rows["kv_seq"].nunique() == 1 < rows["seq"].nunique()
            rows = rows.assign(length=rows["seq"] if queries else rows["kv_seq"])
        rows = rows.sort_values("length", kind="stable")
        first = records(rows.head(1))[0]
        yield {name: first[name] for name in ("plugin", *PROBLEM)}, rows


def operations(row: Row) -> float:
    """What the variant itself computes where it says so, else `costs.flops`."""
    own = float(row["variant_flops"])
    return own if own > 0 else float(costs.flops(workload_of(row)))


def at(row: Row, length: int) -> Workload:
    """The row's workload at another length: whichever of seq and kv_seq is the row's `length` moves."""
    return workload_of(row).replace(**{name: length for name in ("seq", "kv_seq") if row[name] == row["length"]})


def has_other_lengths(row: Row, rows: pd.DataFrame) -> bool:
    """Whether `at` can say what the row's problem is at another length: not of several batches, nor of ragged ones."""
    return rows["batch"].nunique() == 1 and not workload_of(row).lengths


def shortest_length(row: Row) -> int:
    """The least length to look at: where only keys become more, each query needs one of its own if it is causal."""
    return int(row["seq"]) if row["length"] == row["kv_seq"] != row["seq"] else 1


def length_of(row: Row, workload: Workload) -> int:
    """The length of a workload that `at` made of the row."""
    return workload.kv_seq if row["kv_seq"] == row["length"] else workload.seq


def is_exact(row: Row) -> bool:
    return bool(row["family"] == "exact")


def filled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column that is read here, numbers as numbers, whatever an older record lacks."""
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *_NEEDED])))
    return frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in _NEEDED})


def tidy(table: Sequence[Row], *columns: str) -> pd.DataFrame:
    return pd.DataFrame(table, columns=["plugin", *PROBLEM, *columns])


def shown_flops(workload: Workload) -> float:
    return sum(n for part, n in costs.flops_by_part(workload).items() if part.endswith("attention"))
