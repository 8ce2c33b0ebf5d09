"""What in a file of results is not of its kind: files are copied, edited and written by other tools."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import msgspec

from attnbench.errors import AttnbenchError
from attnbench.records.schema import SAMPLED, SCHEMA_COLUMNS, STATUSES, Meta, Row, key


class _Machine(TypedDict, total=False):
    """Of `device.describe`, what is compared, counted or spelled."""

    cpu: str | None
    gpu: str | None
    cores: float | None
    hardware_threads: float | None
    memory_bytes: float | None
    libraries: dict[str, Any]


class _Args(TypedDict, total=False):
    memory: float | None


class _Meta(TypedDict, total=False):
    """Of run.json, what is read here and there; `sweep.settings` reads all of args, `theory.roofline` ceilings."""

    name: str
    command: str | list[str]
    started: str | None
    finished: str | None
    standard: float | None
    args: _Args
    machine: _Machine
    machines: dict[str, _Machine]
    ceilings_of: dict[str, dict[str, Any] | None]
    distributions: dict[str, str]
    seconds: dict[str, float | None] | None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FITS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("text", _is_text),
    "size": ("whole number", lambda value: isinstance(value, int) and _is_number(value)),
    "text": ("text", _is_text),
    "count": ("finite number", _is_number),
    "number": ("finite number", _is_number),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "kinds": ("list of names", lambda value: isinstance(value, list) and all(map(_is_text, value))),
}
"""For each kind of column what its values are, and whether one is such a value."""


def _is_sample(value: Any) -> bool:
    return isinstance(value, list) and len(value) in SAMPLED and all(v is None or _is_number(v) for v in value)


def of_row(row: Row) -> str | None:
    """What in a row is not as it should be, and what to do, in words; None where all is, or may be missing.

    Raises:
        KeyError, TypeError, AttributeError: it is no row at all.
    """
    whose = f"of {row['plugin']}"
    for column in SCHEMA_COLUMNS:
        needed = column.kind in ("name", "size")
        value, (what, fits) = row.get(column.name), _FITS[column.kind]
        if column.name in row and not fits(value) and (needed or value is not None):
            remedy = "delete that line" if needed else "put null there"
            return f"{column.name} {whose} is {json.dumps(value)[:40]}, no {what}; {remedy}"
    samples = row.get("samples")
    if samples is not None and not (isinstance(samples, list) and all(map(_is_sample, samples))):
        *some, most = SAMPLED
        count = f"{', '.join(map(str, some))} or {most}"
        return f"samples {whose} holds what is no list of {count} finite numbers; put null there"
    if row["status"] not in STATUSES:
        return f"status {whose} is {json.dumps(row['status'])[:40]}, none that is known; delete that line"
    try:
        key(row)
    except AttnbenchError as error:
        return f"the row {whose} is of no workload, {error}; delete that line"
    return None


def of_run(meta: Meta) -> str | None:
    """Which value of a run.json is not what it should be, in words; None where all are, or are missing."""
    try:
        msgspec.convert(meta, _Meta)
    except msgspec.ValidationError as error:
        return str(error)
    return None
