"""A run in one file that many can share: run.json and the columns of all rows, without samples and tracebacks.

JSON, a column a line, so that a pull request can be read. A column in which all rows have one value is told once, one
that is empty not at all; a number has seven digits.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from attnbench.errors import AttnbenchError, refusals
from attnbench.records import flaws, run, strict
from attnbench.records.schema import COLUMNS, SCHEMA, SCHEMA_COLUMNS, STATUSES, Row

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


def of_rows(path: Path, meta: dict[str, Any], rows: Sequence[Row]) -> Shared:
    """Without what is not shared. Raises: AttnbenchError: there are no rows."""
    if not rows:
        raise AttnbenchError(f"{path} has no rows; make a run with: attnbench run")
    columns = {name: [_short(row.get(name)) for row in rows] for name in COLUMNS if name not in _LEFT_OUT}
    kept = {name: values for name, values in columns.items() if any(value not in (None, []) for value in values)}
    return Shared(path, meta, kept, len(rows))


def content(shared: Shared) -> bytes:
    """Of the file."""
    same = {name: values[0] for name, values in shared.columns.items() if all(v == values[0] for v in values)}
    told = {name: values for name, values in shared.columns.items() if name not in same}
    head = {"submission": LAYOUT, "schema": SCHEMA, "run": shared.meta, "rows": shared.length, "same": same}
    lines = [f"{json.dumps(name)}: {strict.dumps(value)}" for name, value in head.items()]
    body = ",\n".join(f" {json.dumps(name)}: {strict.dumps(values)}" for name, values in told.items())
    return ("{\n" + ",\n".join([*lines, f'"columns": {{\n{body}\n}}']) + "\n}\n").encode()


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def read(path: Path) -> Shared:
    """The run in a file, or in a run's folder.

    Raises:
        AttnbenchError: it is neither, is damaged, or a newer attnbench wrote it.
    """
    if path.is_dir():
        return of_rows(path, run.read_meta(path), run.rows(path))
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
