"""What `attnbench calibrate` found of a machine, in the user's cache folder: its ceilings, and what auto takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from attnbench import home
from attnbench.errors import AttnbenchError
from attnbench.records import strict
from attnbench.records.machines import identity
from attnbench.theory.roofline import Ceilings
from attnbench.workload import DEVICES

LOSS = 1.05
"""How many times as fast as what auto takes another implementation has to be, at the least, to be worth a word."""


@dataclass(frozen=True)
class Checked:
    """What `impl=auto` takes of a variant on one workload, beside the fastest of the others that can.

    took: auto's. other: that one; "" where none has a number. times: how many times as fast as auto it is; low, high:
    its 95% interval, None where too little was measured for one. sure: that it is faster by more than `LOSS`.
    disturbed: most rounds of either had to wait for a core, which changes ratios too. why: there is no number.
    """

    variant: str
    dtype: str
    phase: str
    kv_seq: int
    took: str
    other: str = ""
    times: float | None = None
    low: float | None = None
    high: float | None = None
    sure: bool = False
    disturbed: bool = False
    why: str = ""

    @property
    def fastest(self) -> str:
        """Of the two, where that is certain; else ""."""
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            return ""
        return self.other if self.low > 1 else self.took

    @property
    def advice(self) -> str:
        """What to ask for instead, where auto is certainly slower by more than `LOSS`; else ""."""
        return f"{self.variant}:impl={self.other}" if self.sure and not self.disturbed else ""

    @property
    def where(self) -> str:
        """The workload, in a few words."""
        return f"{self.dtype}, {self.phase}, {self.kv_seq}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"where": self.where, "fastest": self.fastest, "advice": self.advice}


def stored_at(facts: Mapping[str, Any], device: str, threads: int) -> Path:
    """Where the ceilings of a machine are kept. facts: `device.describe`."""
    # A GPU's ceilings don't depend on the CPU's threads.
    key = json.dumps([*identity(dict(facts)), device, threads if DEVICES[device].host else None])
    return home.cache() / f"ceilings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def store(ceilings: Ceilings, facts: Mapping[str, Any]) -> Path:
    """Keeps them for later runs and returns where.

    Raises:
        AttnbenchError: the file can't be written.
    """
    return _keep(ceilings.as_dict(), facts, ceilings.device, ceilings.threads)


def store_checked(checked: Sequence[Checked], facts: Mapping[str, Any], device: str, threads: int) -> Path:
    """Keeps what was found of what auto takes, in the same file, and returns where.

    Raises:
        AttnbenchError: the file can't be written.
    """
    return _keep({"checked": [each.as_dict() for each in checked]}, facts, device, threads)


def stored(facts: Mapping[str, Any], device: str, threads: int) -> Ceilings | None:
    """The ceilings that were kept for a machine, device and number of threads; None if there are none, or broken."""
    return Ceilings.from_dict(_kept(stored_at(facts, device, threads)))


def checked(facts: Mapping[str, Any], device: str, threads: int) -> list[Checked]:
    """What was kept of what auto takes there; empty if nothing was, or it is broken."""
    try:
        return msgspec.convert(_kept(stored_at(facts, device, threads)).get("checked", []), list[Checked])
    except msgspec.ValidationError:
        return []


def _keep(part: Mapping[str, Any], facts: Mapping[str, Any], device: str, threads: int) -> Path:
    path = stored_at(facts, device, threads)
    content = _kept(path) | {"machine": identity(dict(facts)), **part}
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(strict.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise AttnbenchError(f"can't write {path}: {error.strerror}; set XDG_CACHE_HOME to a folder you own") from None
    return path


def _kept(path: Path) -> dict[str, Any]:
    try:
        found = strict.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
