"""A run in one file that many can share: run.json and the columns of all rows, without samples and tracebacks.

JSON, a column a line, so that a pull request can be read. A column in which all rows have one value is told once, one
that is empty not at all; a number has seven digits.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import msgspec

from attnbench.errors import AttnbenchError, refusals
from attnbench.records import flaws, machines, run, strict
from attnbench.records.schema import COLUMNS, SCHEMA, SCHEMA_COLUMNS, STATUSES, WORKLOAD, Column, Row

SUFFIX = ".attnbench.json"
LAYOUT = 1
_DIGITS = 7
_LEFT_OUT = ("traceback",)
_NEEDED = tuple(column.name for column in SCHEMA_COLUMNS if column.kind in ("name", "size"))
_LATER = ("layers",)  # what a run from before it was a column has none of
_KINDS: Mapping[str, Any] = {
    "name": list[str],
    "size": list[int],
    "text": list[str | None],
    "count": list[int | float | None],
    "number": list[int | float | None],
    "flag": list[bool | None],
    "kinds": list[list[str] | None],
}
_TYPES = {column.name: _KINDS[column.kind] for column in SCHEMA_COLUMNS}


def _field(column: Column) -> Any:
    kind, needed = get_args(_KINDS[column.kind])[0], column.name in _NEEDED and column.name not in _LATER
    return (column.name, kind) if needed else (column.name, kind | None, None)


_Cell = msgspec.defstruct("_Cell", [_field(column) for column in SCHEMA_COLUMNS], kw_only=True)


class _Line(msgspec.Struct):
    """Of cells.jsonl, without what is not shared: to build samples only to drop them takes most of the time."""

    schema: int
    cells: list[_Cell]  # type: ignore[valid-type]


_names = attrgetter("plugin", *WORKLOAD)
_lines = msgspec.json.Decoder(_Line).decode


@dataclass(frozen=True)
class Shared:
    """A run as it is shared. path: where it was read from. meta: of run.json. columns: of `length` rows each."""

    path: Path
    meta: dict[str, Any]
    columns: dict[str, list[Any]]
    length: int

    def column(self, name: str) -> list[Any]:
        """Of all rows, None where there is no value."""
        return self.columns.get(name) or [None] * self.length

    def rows(self) -> list[Row]:
        names = list(self.columns)
        return [dict(zip(names, values, strict=True)) for values in zip(*self.columns.values(), strict=True)]


def apart(shared: Shared) -> list[Shared]:
    """A run on several machines as one for each of them that has rows; another as it is."""
    metas = machines.apart(shared.meta)
    if len(metas) == 1:
        return [shared]
    found, where = [], shared.column("machine")
    for name, meta in metas.items():
        own = [i for i, machine in enumerate(where) if machine == name]
        columns = {column: [values[i] for i in own] for column, values in shared.columns.items()}
        found += [Shared(shared.path, meta, columns, len(own))] if own else []
    return found


def of_rows(path: Path, meta: dict[str, Any], rows: Sequence[Row]) -> Shared:
    """Without what is not shared. Raises: AttnbenchError: there are no rows."""
    return _of_columns(path, meta, {name: [row.get(name) for row in rows] for name in COLUMNS}, len(rows))


def _of_columns(path: Path, meta: dict[str, Any], columns: Mapping[str, list[Any]], length: int) -> Shared:
    if not length:
        raise AttnbenchError(f"{path} has no rows; make a run with: attnbench run")
    kept = {name: _short(values) for name, values in columns.items() if name not in _LEFT_OUT and _has_any(values)}
    return Shared(path, meta, kept, length)


def _has_any(values: Sequence[Any]) -> bool:
    return any(value is not None and value != [] for value in values)


def _short(values: Sequence[Any]) -> list[Any]:
    return [float(f"{value:.{_DIGITS}g}") if value.__class__ is float else value for value in values]


def _of_folder(path: Path) -> Shared:
    """Raises: AttnbenchError: see `records.run.rows`."""
    meta, file, found = run.read_meta(path), path / "cells.jsonl", dict[tuple[Any, ...], Any]()
    try:
        data = file.read_bytes()
        for line in map(_lines, data[: data.rfind(b"\n") + 1].splitlines()):
            found |= {_names(cell): cell for cell in line.cells}
            if line.schema > SCHEMA:
                raise ValueError
    except (OSError, ValueError, RecursionError):
        return of_rows(path, meta, run.rows(path))  # which says what is wrong
    columns = {name: [getattr(cell, name) for cell in found.values()] for name in COLUMNS}
    if not set(STATUSES).issuperset(columns["status"]):
        return of_rows(path, meta, run.rows(path))
    return _of_columns(path, meta, columns, len(found))


def content(shared: Shared) -> bytes:
    """Of the file."""
    same = {name: values[0] for name, values in shared.columns.items() if all(v == values[0] for v in values)}
    told = {name: values for name, values in shared.columns.items() if name not in same}
    head = {"submission": LAYOUT, "schema": SCHEMA, "run": shared.meta, "rows": shared.length, "same": same}
    lines = [f"{json.dumps(name)}: {strict.dumps(value)}" for name, value in head.items()]
    body = ",\n".join(f" {json.dumps(name)}: {strict.dumps(values)}" for name, values in told.items())
    return ("{\n" + ",\n".join([*lines, f'"columns": {{\n{body}\n}}']) + "\n}\n").encode()


def read(path: Path) -> Shared:
    """The run in a file, or in a run's folder.

    Raises:
        AttnbenchError: it is neither, is damaged, or a newer attnbench wrote it.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        raise AttnbenchError(f"{path} is not there; give a run's folder, or a file that attnbench submit wrote")
    with refusals(f"read {path}"):
        data = path.read_bytes()
    try:
        found = msgspec.json.decode(data)
    except msgspec.MsgspecError as error:
        raise AttnbenchError(f"{path} is no JSON: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise AttnbenchError(f"{path} is no JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("submission"), int):
        raise AttnbenchError(f"{path} is no submission; make one with: attnbench submit RUN")
    if found["submission"] > LAYOUT or not isinstance(found.get("schema"), int) or found["schema"] > SCHEMA:
        raise AttnbenchError(f"{path} is of a newer attnbench; install that to read it")
    if wrong := _flaw(found):
        raise AttnbenchError(f"{path} is damaged: {wrong}")
    length = found["rows"]
    columns = {name: [value] * length for name, value in found["same"].items()} | found["columns"]
    return Shared(path, found["run"], {name: columns[name] for name in COLUMNS if name in columns}, length)


def _flaw(found: Mapping[str, Any]) -> str | None:
    """What of a file is not as it should be."""
    length, same, columns, meta = (found.get(name) for name in ("rows", "same", "columns", "run"))
    if not isinstance(length, int) or length < 1:
        return "it has no rows"
    if not (isinstance(same, dict) and isinstance(columns, dict) and isinstance(meta, dict)):
        return "it lacks same, columns or run"
    if wrong := flaws.of_run(meta):
        return f"of run: {wrong}"
    for name, values in ({name: [value] for name, value in same.items()} | columns).items():
        if name not in _TYPES:
            continue  # of a later release with the same schema
        try:
            msgspec.convert(values, _TYPES[name])
        except msgspec.ValidationError as error:
            return f"{name}: {error}"
        if name in columns and len(values) != length:
            return f"{name} has {len(values)} values for {length} rows"
        if any(isinstance(value, int) and abs(value) > sys.maxsize for value in values):
            return f"{name} has a number that is too large"
    if missing := [name for name in _NEEDED if name not in same and name not in columns and name not in _LATER]:
        return f"it has no {missing[0]}"
    if unknown := {*columns.get("status", ()), same.get("status", "ok")} - {*STATUSES}:
        return f"status {min(unknown)!r} is none that is known"
    return None


def found_in(paths: Iterable[Path]) -> list[Path]:
    """Files of submissions as they are given, and all of them and all runs' folders that folders hold, in order.

    Raises:
        AttnbenchError: a path is not there, or a folder holds neither.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise AttnbenchError(f"{path} is not there; give folders of runs or files that attnbench submit wrote")
        inside = [path]
        if path.is_dir() and not (path / "run.json").exists():
            inside = sorted([*path.rglob(f"*{SUFFIX}"), *(meta.parent for meta in path.rglob("run.json"))])
        if not inside:
            raise AttnbenchError(f"{path} holds no run and no *{SUFFIX}")
        found |= dict.fromkeys(inside)
    return list(found)
