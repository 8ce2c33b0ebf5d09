"""Rows of a frame, and series of them that differ in length alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from attnbench.records.schema import COLUMNS, WORKLOAD, Row, of_kind
from attnbench.stats.powers import curve, first_length
from attnbench.theory import costs
from attnbench.workload import Workload

_SIZES = of_kind("size")
_NUMBERS = of_kind("size", "count", "number")
_SCORES = tuple(name for name in of_kind("number") if name in WORKLOAD)
R = TypeVar("R")


def as_rows(frame: pd.DataFrame) -> list[Row]:
    """The rows as dictionaries, with Python's own numbers. `DataFrame.to_dict` takes five times as long for few."""
    names = [str(name) for name in frame.columns]
    plain = ([x.item() if isinstance(x, np.generic) else x for x in row] for row in frame.to_numpy(dtype=object))
    return [dict(zip(names, row, strict=True)) for row in plain]


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a latency that counts."""
    return frame[(frame["status"] == "ok") & frame["latency_s"].notna()]


def workload_of(row: Mapping[Any, Any]) -> Workload:
    """The workload of a row; pandas' missing texts and its own integers become Python's."""
    texts = {name: row[name] if isinstance(row[name], str) else "" for name in WORKLOAD}
    scores = {name: row[name] if row[name] == row[name] else None for name in _SCORES}
    return Workload.from_dict(texts | {name: int(row[name]) for name in _SIZES} | scores | {"sinks": row["sinks"] == 1})


Place = tuple[str, str]
"""A run, and of its machines the one: what may be set beside each other."""


def place(row: Row) -> Place:
    return str(row["run"]), str(row["machine"])


def cells(frame: pd.DataFrame) -> dict[tuple[Place, Any, Workload], Row]:
    """The finished rows, `filled`, by where they were measured, plugin and workload."""
    return {(place(row), row["plugin"], workload_of(row)): row for row in as_rows(finished(frame))}


def by_index(frame: pd.DataFrame, told: Callable[[Row], R | None]) -> dict[object, R]:
    """What is told of each row, by its index, where it is not None."""
    values = ((index, told(row)) for index, row in zip(frame.index, as_rows(frame), strict=True))
    return {index: value for index, value in values if value is not None}


PROBLEM = tuple(name for name in WORKLOAD if name not in ("seq", "kv_seq", "batch"))
"""The columns that rows have in common which differ in length; a table of this module starts with them and `plugin`."""


def series(frame: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """What rows have in common that differ in length only, and those rows, sorted by their column `length` (tokens).

    Machines are kept apart. A panel's rows (`report.prepare`) keep their `length`, and may differ in run and batch.
    Without such a column runs and batches are kept apart, too, and the length is that of the keys, or of the queries
    where they alone vary.
    """
    frame = filled(frame)
    keys = ["plugin", *PROBLEM, "machine", *([] if "length" in frame else ["run", "batch"])]
    for _, rows in frame.groupby(keys, dropna=False, sort=False):
        if "length" not in rows:
            queries = rows["kv_seq"].nunique() == 1 < rows["seq"].nunique()
            rows = rows.assign(length=rows["seq"] if queries else rows["kv_seq"])
        rows = rows.sort_values("length", kind="stable")
        first = as_rows(rows.head(1))[0]
        yield {name: first[name] for name in ("plugin", *PROBLEM)}, rows


def operations(row: Row) -> float:
    """What the variant itself computes where it says so, else `costs.flops`."""
    own = row.get("variant_flops")
    return float(own) if own and own > 0 else float(costs.flops(workload_of(row)))


def shown_flops(workload: Workload) -> float:
    """Operations of QK^T and PV."""
    return sum(n for part, n in costs.flops_by_part(workload).items() if part.endswith("attention"))


def attention_flops(row: Row) -> float:
    """Operations of QK^T and PV, or of what the variant does in their place."""
    workload = workload_of(row)
    return operations(row) - costs.flops(workload) + shown_flops(workload)


def has_other_lengths(row: Row, rows: pd.DataFrame) -> bool:
    """Whether `first_at` can say what the row's problem is elsewhere: not of several batches, nor of ragged ones."""
    return rows["batch"].nunique() == 1 and not workload_of(row).lengths


def first_at(row: Row, test: Callable[[Workload], bool]) -> float:
    """The length from which on the row's workload passes a test: of seq and kv_seq, what is its `length` moves."""
    workload, moving = workload_of(row), [name for name in ("seq", "kv_seq") if row[name] == row["length"]]
    # Where only keys become more, each query needs one of its own if it is causal.
    shortest = int(row["seq"]) if row["length"] == row["kv_seq"] != row["seq"] else 1
    return first_length(lambda length: test(workload.replace(**dict.fromkeys(moving, length))), shortest)


def length_of(row: Row, workload: Workload) -> int:
    """The length of a workload that `first_at` made of the row."""
    return workload.kv_seq if row["kv_seq"] == row["length"] else workload.seq


def said_workspace(rows: Sequence[Row]) -> Callable[[Workload], float] | None:
    """What a plugin says of its workspace, at any length of a series; None where it said so of fewer than two."""
    own = curve({row["length"]: row["predicted_workspace_bytes"] for row in rows})
    return own and (lambda workload: own(length_of(rows[-1], workload)))


def filled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column of a record, numbers as numbers, whatever an older one lacks."""
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, "run", *COLUMNS])))
    frame = frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in _NUMBERS})
    frame = frame.assign(machine=frame["machine"].astype(object).fillna(""))
    return frame.assign(**{name: frame[name].fillna(0.0) for name in _SCORES}, sinks=frame["sinks"].eq(True))


def tidy(table: Sequence[Row], *columns: str) -> pd.DataFrame:
    return pd.DataFrame(table, columns=["plugin", *PROBLEM, *columns])
