"""`model.json`: what `attnbench model` found, in a folder of its own beside the runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnbench.errors import AttnbenchError, refusals
from attnbench.records import strict
from attnbench.records.schema import Row

FILE = "model.json"
_NEEDED = (
    "model", "plugin", "variant", "family", "seq", "dtype", "mask", "heads", "kv_heads", "head_dim", "threads",
    "status",
)  # fmt: skip


def is_one(folder: Path) -> bool:
    """Whether the folder holds what `attnbench model` wrote."""
    return (folder / FILE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The content of model.json. Raises: AttnbenchError: it can't be read, or is none."""
    path = folder / FILE
    with refusals(f"read {path}"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found: dict[str, Any] = strict.loads(text)
    except ValueError as error:
        raise AttnbenchError(f"{path} {error}") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not isinstance(found.get("machine"), dict):
        raise AttnbenchError(f"{path} is none of `attnbench model`: it has no rows, or no machine")
    for number, row in enumerate(rows, 1):
        missing = [name for name in _NEEDED if name not in row] if isinstance(row, dict) else list(_NEEDED)
        if missing:
            raise AttnbenchError(f"row {number} of {path} has no {missing[0]}")
    return found


def rows(folders: Iterable[Path]) -> list[Row]:
    """The rows of all, each with the `machine` that it was measured on."""
    return [row | {"machine": found["machine"]} for found in map(read, folders) for row in found["rows"]]
