"""Runs on disk: what a row holds, how a run is written and read again."""

from attnbench.records.run import Run, load, newest, read_meta, rows
from attnbench.records.schema import COLUMNS, SAMPLE, SCHEMA, STATUSES, WELL, Row, key

__all__ = [
    "COLUMNS", "SAMPLE", "SCHEMA", "STATUSES", "WELL", "Row", "Run", "key", "load", "newest", "read_meta", "rows",
]  # fmt: skip
