"""A run on disk: `run.json` says what was asked and where, `cells.jsonl` holds what came of it.

A line of cells.jsonl is one workload with the rows of all its variants and their samples; it is written and fsynced
whole, so that a run that was killed at any moment holds whole workloads and at most one torn last line. A workload that
is measured more closely has a further line: its rows stand for those before.
"""

import errno
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from attnbench.errors import AttnbenchError, refusals
from attnbench.records import flaws, machines, strict
from attnbench.records.schema import COLUMNS, NUMBERS, SCHEMA, TEXTS, Row, key, of_kind
from attnbench.workload import Workload

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """One run's folder, held by this process alone while it is open (a context manager)."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self._lock = FileLock(path / ".lock")

    @classmethod
    def create(cls, root: Path, name: str, meta: dict[str, Any]) -> Self:
        """Makes `<root>/<date>-<name>`, with -2, -3 ... behind it where that is taken.

        Raises:
            AttnbenchError: the folder can't be made.
        """
        return cls._begun(new_folder(root, name), meta)

    @classmethod
    def at(cls, path: Path, meta: dict[str, Any]) -> Self:
        """Makes this folder. Raises: AttnbenchError: it is there already, or can't be made."""
        if not _made(path, "out"):
            raise AttnbenchError(f"{path} is there already; choose another out")
        return cls._begun(path, meta)

    @classmethod
    def _begun(cls, path: Path, meta: dict[str, Any]) -> Self:
        run = cls(path, {"schema": SCHEMA, "name": path.name, **meta})
        run.save()
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises: AttnbenchError: there is no run, or a newer attnbench wrote it."""
        return cls(path, read_meta(path))

    def __enter__(self) -> Self:
        with refusals(f"write to {self.path}"):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise AttnbenchError(f"{self.path} is being written by another attnbench") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def cells(self) -> Path:
        return self.path / "cells.jsonl"

    def save(self) -> None:
        """Writes run.json in one step: the old one stays whole until the new one is."""
        path = self.path / "run.json"
        with refusals(f"write {path}"):
            replace_file(path, (strict.dumps(self.meta, indent=1) + "\n").encode())

    def append(self, rows: Sequence[Row]) -> None:
        """Adds one workload's rows.

        Raises:
            AttnbenchError: the disk is full or the file can't be written; what it held before is untouched.
        """
        line = _line(rows)
        before = self.cells.stat().st_size if self.cells.exists() else 0
        intact = f"what it holds is intact, go on with --resume {self.path}"
        with refusals(f"write {self.cells}", intact), self.cells.open("ab", buffering=0) as file:
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise

    def settle(self) -> list[Row]:
        """Leaves out, in one step, the rows that others stand for, and returns the rest."""
        rows = self.repair()
        lines = [_line(list(group)) for _, group in groupby(rows, key=lambda row: key(row)[1])]
        if rows and sum(map(len, lines)) < self.cells.stat().st_size:
            with suppress(OSError):  # a full disk: nothing is lost
                replace_file(self.cells, b"".join(lines))
        return rows

    def repair(self) -> list[Row]:
        """Cuts a torn last line off and returns the rows of all whole ones."""
        rows, whole = _read_lines(self.cells)
        if self.cells.exists() and whole < self.cells.stat().st_size:
            os.truncate(self.cells, whole)
        return rows


def new_folder(root: Path, name: str) -> Path:
    """Makes `<root>/<date>-<name>`, with -2, -3 ... behind it where that is taken.

    Raises:
        AttnbenchError: the folder can't be made.
    """
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or 'run'}"
    for count in range(1, 10_000):
        path = root / (stem if count == 1 else f"{stem}-{count}")
        if _made(path, "--out"):
            return path
    raise AttnbenchError(f"{root} holds too many runs called {stem}; choose another --name")


def _made(path: Path, option: str) -> bool:
    """False where the folder is there already. option: what names it."""
    with refusals(f"make {path}", f"choose another {option}"), suppress(FileExistsError):
        path.mkdir(parents=True)
        return True
    return False


def _line(rows: Sequence[Row]) -> bytes:
    return (strict.dumps({"schema": SCHEMA, "cells": list(rows)}) + "\n").encode()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: the old one stays whole until the new one is."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def read_meta(path: Path) -> dict[str, Any]:
    """The content of run.json. Raises: AttnbenchError: there is no run, or a newer attnbench wrote it."""
    try:
        meta = strict.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError:
        raise AttnbenchError(f"{path} is no run: it has no run.json") from None
    except UnicodeDecodeError:
        raise AttnbenchError(f"{path / 'run.json'} is no JSON") from None
    except ValueError as error:
        raise AttnbenchError(f"{path / 'run.json'} {error}") from None
    if not isinstance(meta, dict):
        raise AttnbenchError(f"{path / 'run.json'} holds no JSON object")
    try:
        _check_schema(meta, path / "run.json")
    except (KeyError, TypeError):
        raise AttnbenchError(f"{path / 'run.json'} is no run of attnbench: it has no schema") from None
    if wrong := flaws.of_run(meta):
        raise AttnbenchError(f"{path / 'run.json'} is damaged: {wrong}")
    return meta


def rows(path: Path) -> list[Row]:
    """All rows of a run, samples included; a torn last line is left out.

    Raises:
        AttnbenchError: there is no run, a line in the middle is broken, or a newer attnbench wrote it.
    """
    first = next(iter(machines.of_run(read_meta(path))))
    # A run from before it was a column is of one machine.
    return [{**row, "machine": row.get("machine") or first} for row in _read_lines(path / "cells.jsonl")[0]]


def labelled(paths: str | Path | Iterable[str | Path]) -> dict[str, Path]:
    """Runs' folders by the names that they go by, in the order given; one that is given twice is there once.

    A name is that of the folder, with as much of the path before it as tells it from the others: a date and a device
    are the same on many machines.
    """
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    folders: dict[str, Path] = {}
    for folder in given:
        folders.setdefault(os.path.realpath(folder), folder)
    named, every = {}, [Path(os.path.abspath(folder)).parts for folder in folders.values()]
    for folder, own in zip(folders.values(), every, strict=True):
        ends = (n for n in range(1, len(own) + 1) if sum(own[-n:] == other[-n:] for other in every) == 1)
        named[str(Path(*own[-next(ends) :]))] = folder
    return named


def read_metas(paths: str | Path | Iterable[str | Path]) -> list[dict[str, Any]]:
    """What run.json says of each run, under the name by which `load` calls it. Raises: see `read_meta`.

    A run of several machines is one for each of them, as nothing is compared across two: see `names_of`; `part_of` is
    the name of the whole.
    """
    found = []
    for name, folder in labelled(paths).items():
        parts = machines.apart(read_meta(folder))
        names = names_of(name, parts)
        found += [part | {"name": names[machine], "part_of": name} for machine, part in parts.items()]
    return found


def names_of(run: str, on: Iterable[str]) -> dict[str, str]:
    """What a run's rows go by, by the machine that they were measured on: that, too, where the run has several."""
    known = list(on)
    return {machine: run if len(known) == 1 else f"{run} on {machine}" for machine in known}


def load(paths: str | Path | Iterable[str | Path]) -> "pd.DataFrame":
    """The rows of one run or several as a tidy table: a row a cell, `COLUMNS` and the run's name.

    That is as `labelled` and `names_of` say.

    Raises:
        AttnbenchError: see `rows`.
    """
    found = []
    for name, folder in labelled(paths).items():
        names = names_of(name, machines.of_run(read_meta(folder)))
        found += [{**row, "run": names.get(row["machine"], name)} for row in rows(folder)]
    return as_frame(found)


def as_frame(rows: Iterable[Row]) -> "pd.DataFrame":
    """Rows as that table; those without a run's name have an empty one."""
    import pandas as pd

    table = [{"run": row.get("run", ""), **{c: row.get(c) for c in COLUMNS}} for row in rows]
    frame = pd.DataFrame(table, columns=["run", *COLUMNS])
    for column in NUMBERS:
        frame[column] = pd.to_numeric(frame[column]).astype(float)  # the same type whatever is missing
    frame["layers"] = frame["layers"].fillna(1).astype(int)  # a run from before there were stacks
    frame[["softmax_scale", "softcap"]] = frame[["softmax_scale", "softcap"]].fillna(0.0)  # or these
    for flag in of_kind("flag"):
        frame[flag] = frame[flag].map(bool).astype(bool)
    frame["warnings"] = frame["warnings"].map(lambda w: w if isinstance(w, list) else [])
    for column in TEXTS:
        frame[column] = frame[column].fillna("")
    return frame


def newest(root: Path) -> Path:
    """The run under `root` that was started last. Raises: AttnbenchError: there is none."""
    if not (runs := newest_first(root)):
        raise AttnbenchError(f"no run under {root}; make one with: attnbench run")
    return runs[0]


def newest_first(root: Path) -> list[Path]:
    """The runs under `root` that can be read, the one that was started last first."""
    runs = []
    for meta in root.glob("*/run.json"):
        try:
            runs.append((str(read_meta(meta.parent).get("started", "")), meta.parent))
        except AttnbenchError:
            continue  # a broken neighbour does not hide the good ones
    return [path for _, path in sorted(runs, reverse=True)]


def _read_lines(path: Path) -> tuple[list[Row], int]:
    """The rows, and how many bytes of the file are whole lines."""
    with refusals(f"read {path}"):
        data = path.read_bytes() if path.exists() else b""
    found: dict[tuple[str, Workload], Row] = {}
    whole = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            content = json.loads(line)
            _check_schema(content, path)
            for row in content["cells"]:
                if wrong := flaws.of_row(row):
                    raise AttnbenchError(f"line {number} of {path}: {wrong} to use the rest")
                found[key(row)] = dict(row)
        except AttnbenchError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise AttnbenchError(f"line {number} of {path} is broken; delete that line to use the rest") from None
    return list(found.values()), whole


def _check_schema(content: dict[str, Any], path: Path) -> None:
    schema = content["schema"]
    if schema > SCHEMA:
        raise AttnbenchError(f"{path} has schema {schema}; this attnbench reads up to {SCHEMA}: install a newer one")
