"""Rows of attention across processes, by problem: what `attnbench parallel` wrote, as figures and tables read it."""

from collections.abc import Iterable
from typing import Any

from attnbench.records.schema import Row
from attnbench.report import units

_PROBLEM = ("batch", "heads", "kv_heads", "head_dim", "value_dim", "seq", "dtype", "device", "mask", "phase", "threads")


def problems(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each problem together, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in _PROBLEM), []).append(row)
    return list(found.values())


def heading(row: Row) -> str:
    """What the rows of a problem share."""
    heads = str(row["heads"]) if row["heads"] == row["kv_heads"] else f"{row['heads']}/{row['kv_heads']}"
    dims = str(row["head_dim"]) if row["head_dim"] == row["value_dim"] else f"{row['head_dim']}/{row['value_dim']}"
    return (
        f"{row['batch']}x{heads}x{row['seq']}x{dims} {row['dtype']} {row['mask']} {row['phase']} on {row['device']}, "
        f"{units.count(row['threads'], 'thread')} a process"
    )


def lacking(rows: Iterable[Row]) -> list[str]:
    """Why there is no number, each reason once: "ulysses x 4: unsupported: 6 heads do not split evenly"."""
    return list(
        dict.fromkeys(
            f"{row['scheme']} x {row['world']}: {row['status']}: {row['reason']}"
            for row in rows
            if row["status"] != "ok"
        )
    )


def done(rows: Iterable[Row]) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in rows if row["status"] == "ok"]
